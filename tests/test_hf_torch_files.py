"""PyTorch's files read without PyTorch: what they hold, and that nothing is run."""

import argparse
import collections
import io
import pickle
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

from bart_t5x.hf import torch_files

STATE = {
  'weight': np.arange(6, dtype=np.float32).reshape(2, 3),
  'half': np.array([1.5, -2], np.float16),
  'brain': np.array([[0.5], [3]], ml_dtypes.bfloat16),
  'count': np.array(7, np.int64),
}
STORAGES = {
    'float32': 'FloatStorage', 'float16': 'HalfStorage',
    'bfloat16': 'BFloat16Storage', 'int64': 'LongStorage',
}  # fmt: skip


class Saved:
  """An array as PyTorch pickles a tensor: a call over a stored buffer."""

  def __init__(self, array, key, transposed=False):
    self.array, self.key, self.transposed = array, key, transposed

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


@pytest.fixture(autouse=True)
def torch_names(monkeypatch):
  """Modules with PyTorch's names, for the pickler to look up; they do nothing."""

  def named(module, name):
    made = types.new_class(name)
    made.__module__, made.__qualname__ = module.__name__, name
    setattr(module, name, made)

  torch, utils = types.ModuleType('torch'), types.ModuleType('torch._utils')
  for name in STORAGES.values():
    named(torch, name)
  named(utils, '_rebuild_tensor_v2')
  torch._utils = utils
  monkeypatch.setitem(sys.modules, 'torch', torch)
  monkeypatch.setitem(sys.modules, 'torch._utils', utils)


def pickled(tree):
  buffer = io.BytesIO()
  Pickler(buffer, protocol=2).dump(tree)
  return buffer.getvalue()


def tree_of(state):
  return collections.OrderedDict(
    (name, Saved(array, str(i))) for i, (name, array) in enumerate(state.items())
  )


def write_zip(path, state=STATE, tree=None, byteorder='little'):
  with zipfile.ZipFile(path, 'w') as archive:
    tree = tree_of(state) if tree is None else tree
    archive.writestr('archive/data.pkl', pickled(tree))
    archive.writestr('archive/byteorder', byteorder)
    for i, array in enumerate(state.values()):
      archive.writestr(f'archive/data/{i}', array.tobytes())
  return path


def write_stream(path, state=STATE):
  """The format before PyTorch 1.6: five pickles, then the buffers."""
  with open(path, 'wb') as file:
    for header in (0x1950A86A20F9469CFC6C, 1001, {'little_endian': True}):
      pickle.dump(header, file, protocol=2)
    file.write(pickled(tree_of(state)))
    pickle.dump([str(i) for i in range(len(state))], file, protocol=2)
    for array in state.values():
      file.write(array.size.to_bytes(8, 'little') + array.tobytes())
  return path


WRITERS = {'zip': write_zip, 'stream': write_stream}


@pytest.fixture(params=WRITERS)
def file(request, tmp_path):
  return WRITERS[request.param](tmp_path / 'pytorch_model.bin')


def test_both_formats_give_the_arrays(file):
  loaded = torch_files.load(file)
  assert list(loaded) == list(STATE)
  for name, array in STATE.items():
    assert loaded[name].dtype == array.dtype
    np.testing.assert_array_equal(loaded[name], array)


def test_strides_are_followed(tmp_path):
  state = {'w': STATE['weight']}
  tree = {'w': Saved(STATE['weight'], '0', transposed=True)}
  loaded = torch_files.load(write_zip(tmp_path / 'f.bin', state, tree))
  np.testing.assert_array_equal(loaded['w'], STATE['weight'].T)


def test_tied_tensors_share_a_storage(tmp_path):
  state = {'w': STATE['weight']}
  tree = {name: Saved(STATE['weight'], '0') for name in ('shared', 'lm_head')}
  loaded = torch_files.load(write_zip(tmp_path / 'f.bin', state, tree))
  np.testing.assert_array_equal(loaded['shared'], loaded['lm_head'])


class Malicious:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (self.path, 'w')


@pytest.mark.parametrize('opaque', [False, True])
def test_nothing_in_a_file_is_run(tmp_path, opaque):
  trace = tmp_path / 'trace'
  tree = {'w': Malicious(str(trace))}
  path = write_zip(tmp_path / 'f.bin', {}, tree)
  if opaque:
    assert isinstance(torch_files.load(path, opaque)['w'], torch_files.Opaque)
  else:
    with pytest.raises(torch_files.UnsafeFileError, match=r'io\.open.*safetensors'):
      torch_files.load(path)
  assert not trace.exists()


def test_a_bare_pickle_is_no_checkpoint_and_is_not_run(tmp_path):
  path, trace = tmp_path / 'f.bin', tmp_path / 'trace'
  path.write_bytes(pickle.dumps(Malicious(str(trace)), protocol=2))
  with pytest.raises(torch_files.UnsafeFileError):
    torch_files.load(path)
  path.write_bytes(pickle.dumps({'w': 1}, protocol=2) * 2)
  with pytest.raises(ValueError, match='no PyTorch checkpoint'):
    torch_files.load(path)
  assert not trace.exists()


def test_namespaces_are_read_as_fairseq_writes_them(tmp_path):
  path = write_zip(tmp_path / 'f.pt', {}, {'args': argparse.Namespace(arch='bart')})
  assert torch_files.load(path)['args'].arch == 'bart'


def test_every_cut_is_an_error_that_names_the_file(file):
  whole = file.read_bytes()
  for length in range(0, len(whole) - 1, 7):
    file.write_bytes(whole[:length])
    with pytest.raises(ValueError, match=r'pytorch_model\.bin'):
      torch_files.load(file)


def test_changed_bytes_never_end_in_another_error(file):
  """Damage is a ValueError, or is not noticeable (a changed number or name)."""
  whole = bytearray(file.read_bytes())
  random = np.random.default_rng(0)
  for _ in range(400):
    damaged = whole.copy()
    damaged[random.integers(len(whole))] = random.integers(256)
    file.write_bytes(damaged)
    try:
      torch_files.load(file)
    except ValueError as e:
      assert 'pytorch_model.bin' in str(e)


@pytest.mark.parametrize('change', [{'size': 5}, {'size': 9}])
def test_a_storage_of_another_size(tmp_path, change):
  array = np.zeros(6, np.float32)
  tree = {'w': Saved(np.zeros(change['size'], np.float32), '0')}
  path = write_zip(tmp_path / 'f.bin', {'w': array}, tree)
  with pytest.raises(ValueError, match='has 24 bytes.*truncated, damaged'):
    torch_files.load(path)


def test_a_tensor_outside_its_storage(tmp_path):
  class Outside(Saved):
    def __reduce__(self):
      function, (storage, _, shape, strides, *rest) = super().__reduce__()
      return function, (storage, 3, shape, strides, *rest)

  tree = {'w': Outside(STATE['weight'], '0')}
  path = write_zip(tmp_path / 'f.bin', {'w': STATE['weight']}, tree)
  with pytest.raises(ValueError, match='outside its storage'):
    torch_files.load(path)


def test_other_kinds_of_file(tmp_path):
  path = tmp_path / 'f.bin'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('readme.txt', 'no checkpoint')
  with pytest.raises(ValueError, match='zip archive but no PyTorch checkpoint'):
    torch_files.load(path)
  with pytest.raises(ValueError, match='big-endian numbers, which are not'):
    torch_files.load(write_zip(path, byteorder='big'))
  path.write_text('<html>Not found</html>')
  with pytest.raises(ValueError, match=r'f\.bin cannot be read'):
    torch_files.load(path)
