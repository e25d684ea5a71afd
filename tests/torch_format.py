"""Writes files as `torch.save` does, without PyTorch.

`install` puts modules with PyTorch's names where the pickler looks them up; they do
nothing. A tensor is pickled as a call over a stored buffer.
"""

import collections
import io
import pickle
import sys
import types
import zipfile

import numpy as np

STORAGES = {
    'float32': 'FloatStorage', 'float16': 'HalfStorage',
    'bfloat16': 'BFloat16Storage', 'int64': 'LongStorage',
}  # fmt: skip


class Saved:
  """An array as PyTorch pickles a tensor: a call over a stored buffer."""

  def __init__(self, array, key, transposed=False):
    self.array = np.ascontiguousarray(array)
    self.key, self.transposed = key, transposed

  def __reduce__(self):
    strides = tuple(s // self.array.itemsize for s in self.array.strides)
    shape = self.array.shape
    if self.transposed:
      shape, strides = shape[::-1], strides[::-1]
    torch = sys.modules['torch']
    kind = getattr(torch, STORAGES[self.array.dtype.name])
    storage = Storage(kind, self.key, self.array.size)
    arguments = (storage, 0, shape, strides, False, collections.OrderedDict())
    return torch._utils._rebuild_tensor_v2, arguments


class Storage:
  def __init__(self, kind, key, size):
    self.id = ('storage', kind, key, 'cpu', size)


class Pickler(pickle.Pickler):
  def persistent_id(self, obj):
    return obj.id if isinstance(obj, Storage) else None


def install(monkeypatch):
  """Modules with PyTorch's names, until the test ends."""
  torch = add_module(monkeypatch, 'torch', STORAGES.values())
  torch._utils = add_module(monkeypatch, 'torch._utils', ['_rebuild_tensor_v2'])


def add_module(monkeypatch, module_name, classes):
  """A module of that name with empty classes, until the test ends."""
  module = types.ModuleType(module_name)
  for name in classes:
    made = types.new_class(name)
    made.__module__, made.__qualname__ = module_name, name
    setattr(module, name, made)
  monkeypatch.setitem(sys.modules, module_name, module)
  return module


def pickled(tree):
  buffer = io.BytesIO()
  Pickler(buffer, protocol=2).dump(tree)
  return buffer.getvalue()


def tree_of(state):
  """A state dict whose tensors are stored under the numbers 0, 1, …"""
  return collections.OrderedDict(
    (name, Saved(array, str(i))) for i, (name, array) in enumerate(state.items())
  )


def write_zip(path, state, tree=None, byteorder='little'):
  """The format since PyTorch 1.6; the tree is that of the state by default."""
  with zipfile.ZipFile(path, 'w') as archive:
    tree = tree_of(state) if tree is None else tree
    archive.writestr('archive/data.pkl', pickled(tree))
    archive.writestr('archive/byteorder', byteorder)
    for i, array in enumerate(state.values()):
      archive.writestr(f'archive/data/{i}', np.ascontiguousarray(array).tobytes())
  return path


def write_stream(path, state):
  """The format before PyTorch 1.6: five pickles, then the buffers."""
  with open(path, 'wb') as file:
    for header in (0x1950A86A20F9469CFC6C, 1001, {'little_endian': True}):
      pickle.dump(header, file, protocol=2)
    file.write(pickled(tree_of(state)))
    pickle.dump([str(i) for i in range(len(state))], file, protocol=2)
    for array in state.values():
      content = np.ascontiguousarray(array).tobytes()
      file.write(array.size.to_bytes(8, 'little') + content)
  return path
