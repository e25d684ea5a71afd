"""Reads PyTorch's `.bin` and `.pt` files with no PyTorch and no code execution.

Such a file is a pickle, and a pickle can call any function it names. The reader
here knows a handful of names: what rebuilds a tensor, plain containers, and the
`argparse.Namespace` of fairseq checkpoints. Any other name stops the reading
(or, where a caller says so, becomes an inert `Opaque`). Both containers are
read: the zip archive of PyTorch 1.6 and later, and the older single stream.
"""

import argparse
import collections
import dataclasses
import pathlib
import pickle
import sys
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

_DTYPES = {
  'FloatStorage': np.dtype(np.float32),
  'DoubleStorage': np.dtype(np.float64),
  'HalfStorage': np.dtype(np.float16),
  'BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
  'LongStorage': np.dtype(np.int64),
  'IntStorage': np.dtype(np.int32),
  'ShortStorage': np.dtype(np.int16),
  'CharStorage': np.dtype(np.int8),
  'ByteStorage': np.dtype(np.uint8),
  'BoolStorage': np.dtype(np.bool_),
}

# The first objects of the older format: a magic number, the protocol version.
_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_OLD_PROTOCOL = 1001


class UnsafeFileError(ValueError):
  """The file names something that is no part of a saved state dict."""


class Opaque:
  """Stands for an object of a class that is not loaded: inert.

  Attributes:
    state: the object's attributes as the file has them, None where it has none.
  """

  state: Any = None

  def __init__(self, *args, **kwargs):
    del args, kwargs

  def __setstate__(self, state):
    self.state = state

  def __call__(self, *args, **kwargs):
    return self

  def append(self, item):
    del item

  def extend(self, items):
    del items

  def __setitem__(self, key, value):
    del key, value


@dataclasses.dataclass(frozen=True)
class _StorageType:
  """What `torch.FloatStorage` and its like become: a dtype."""

  dtype: np.dtype


class _Storage:
  """A flat buffer, filled when its bytes are known.

  In the older format the bytes come after the pickle that refers to them, so a
  tensor keeps its storage and is made into an array at the end.
  """

  def __init__(self, dtype: np.dtype, size: int):
    self.dtype = dtype
    self.size = size
    self.data: np.ndarray | None = None

  def fill(self, raw: bytes) -> None:
    if len(raw) != self.size * self.dtype.itemsize:
      raise ValueError(f'a storage of {self.size} {self.dtype} has {len(raw)} bytes')
    self.data = np.frombuffer(raw, self.dtype)


@dataclasses.dataclass(frozen=True)
class _Tensor:
  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  def to_array(self) -> np.ndarray:
    last = self.offset + sum(
      (n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)
    )
    if min((self.offset, *self.shape, *self.strides)) < 0 or (
      0 not in self.shape and last >= self.storage.size
    ):
      raise ValueError('a tensor reaches outside its storage')
    item = self.storage.dtype.itemsize
    view = np.lib.stride_tricks.as_strided(
      self.storage.data[self.offset :], self.shape, [s * item for s in self.strides]
    )
    return view.copy()


def _rebuild_tensor(storage, offset, shape, strides, *_unused) -> _Tensor:
  return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor, *_unused) -> _Tensor:
  return tensor


_KNOWN: dict[tuple[str, str], Any] = {
  ('collections', 'OrderedDict'): collections.OrderedDict,
  ('argparse', 'Namespace'): argparse.Namespace,
  ('torch._utils', '_rebuild_tensor'): _rebuild_tensor,
  ('torch._utils', '_rebuild_tensor_v2'): _rebuild_tensor,
  ('torch._utils', '_rebuild_parameter'): _rebuild_parameter,
  **{('torch', name): _StorageType(dtype) for name, dtype in _DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
  """Finds only the names above; storages come from `load_storage`."""

  def __init__(
    self,
    file: BinaryIO,
    load_storage: Callable[..., _Storage],
    opaque_classes: bool,
  ):
    super().__init__(file, encoding='utf-8')
    self._load_storage = load_storage
    self._opaque_classes = opaque_classes

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) in _KNOWN:
      return _KNOWN[module, name]
    if self._opaque_classes:
      return Opaque
    raise UnsafeFileError(
      f'the file wants to load {module}.{name}, which is no part of a saved '
      'state dict; it may be malicious. Use model.safetensors instead.'
    )

  def persistent_load(self, saved_id: tuple) -> _Storage:
    if saved_id[0] != 'storage':
      raise UnsafeFileError(f'unknown kind of stored object: {saved_id[0]!r}')
    return self._load_storage(*saved_id[1:])


def _to_arrays(tree: Any) -> Any:
  """Replaces tensors by arrays, in dicts, lists and tuples."""
  if isinstance(tree, _Tensor):
    return tree.to_array()
  if isinstance(tree, dict):
    return {key: _to_arrays(value) for key, value in tree.items()}
  if isinstance(tree, list | tuple):
    return type(tree)(_to_arrays(value) for value in tree)
  return tree


def _load_zip(path: pathlib.Path, opaque_classes: bool) -> Any:
  with zipfile.ZipFile(path) as archive:
    pickles = [name for name in archive.namelist() if name.endswith('/data.pkl')]
    if len(pickles) != 1:
      raise ValueError('it is a zip archive but no PyTorch checkpoint')
    folder = pickles[0].removesuffix('data.pkl')
    if f'{folder}byteorder' in archive.namelist():
      order = archive.read(f'{folder}byteorder').decode()
      if order != sys.byteorder:
        raise ValueError(f'it holds {order}-endian numbers, which are not supported')
    storages: dict[str, _Storage] = {}

    def load_storage(kind, key, location, size):
      del location
      if key not in storages:
        storages[key] = _Storage(kind.dtype, size)
        storages[key].fill(archive.read(f'{folder}data/{key}'))
      return storages[key]

    with archive.open(pickles[0]) as file:
      return _to_arrays(_Unpickler(file, load_storage, opaque_classes).load())


def _load_stream(path: pathlib.Path, opaque_classes: bool) -> Any:
  storages: dict[str, _Storage] = {}

  def load_storage(kind, key, location, size, view=None):
    del location
    if view is not None:
      raise ValueError('it holds views of storages; save it again with PyTorch')
    return storages.setdefault(key, _Storage(kind.dtype, size))

  with path.open('rb') as file:

    def load():
      return _Unpickler(file, load_storage, opaque_classes).load()

    if (load(), load()) != (_OLD_MAGIC, _OLD_PROTOCOL):
      raise ValueError('it is no PyTorch checkpoint')
    if not load().get('little_endian', True):
      raise ValueError('it holds big-endian numbers, which are not supported')
    tree = load()
    for key in load():
      size = int.from_bytes(file.read(8), 'little')
      storage = storages[key]
      if size != storage.size:
        raise ValueError(f'storage {key} has {size}, not {storage.size} items')
      storage.fill(file.read(size * storage.dtype.itemsize))
  return _to_arrays(tree)


def load(path: str | pathlib.Path, opaque_classes: bool = False) -> Any:
  """Reads what `torch.save` wrote, tensors as NumPy arrays.

  Args:
    path: a `.bin` or `.pt` file.
    opaque_classes: objects of unknown classes become `Opaque` instead of an
      error; nothing of them is run. fairseq checkpoints need it for their
      configuration objects.

  Returns:
    The tree that was saved.

  Raises:
    UnsafeFileError: the file refers to a class or function not on the list.
    ValueError: the file is damaged, truncated, or of another kind.
  """
  path = pathlib.Path(path)
  reader = _load_zip if zipfile.is_zipfile(path) else _load_stream
  try:
    return reader(path, opaque_classes)
  except (FileNotFoundError, PermissionError, IsADirectoryError):
    raise  # these say what is wrong themselves
  except UnsafeFileError as e:
    raise UnsafeFileError(f'{path}: {e}') from e
  except Exception as e:  # a damaged pickle ends in whatever its opcodes hit on
    raise ValueError(
      f'{path} cannot be read as a PyTorch file: {e or type(e).__name__}. It is '
      'truncated, damaged, or of another kind. Download it again.'
    ) from e
