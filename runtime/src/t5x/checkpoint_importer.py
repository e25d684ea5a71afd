"""Arrays read on demand, and the checkpoint layout before Orbax.

Most published T5X checkpoints have this layout: a folder `checkpoint_<step>` with a
file `checkpoint`, a msgpack map of `version` and `optimizer`, the state dict. Its
leaves are small arrays, stored in place, or TensorStore specifications of zarr arrays,
one folder each (`target.encoder.layers_0...`), with paths relative to the checkpoint.
This module reads the layout and writes it; a complete checkpoint has its index.
"""

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import tensorstore
from etils import epath
from flax import traverse_util

from t5x import state_utils

INDEX_FILE = 'checkpoint'
# Version 2 kept bfloat16 as uint16; version 1 and plain Flax files (0) had other trees.
_OLDEST_VERSION = 2
_VERSION = 3
_THREADS = 16
_CHUNK_BYTES = 64 * 2**20  # Larger shards are written in several files.


class DamagedCheckpointError(OSError):
  """A checkpoint exists but cannot be read."""


class LazyArray:
  """Describes an array whose values are read on demand."""

  def __init__(self, shape: Sequence[int], dtype: Any, get_fn: Callable[[], Any]):
    self.shape = tuple(shape)
    self.dtype = jnp.dtype(dtype)
    self._get_fn = get_fn

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

  def astype(self, dtype: Any) -> 'LazyArray':
    """Returns the same array, cast when it is read."""
    return LazyArray(self.shape, dtype, self.get)

  def get(self) -> Any:
    """Reads the values."""
    return self._get_fn().astype(self.dtype, copy=False)

  def __repr__(self) -> str:
    return f'{type(self).__name__}({self.shape}, {self.dtype})'


class StoredArray(LazyArray):
  """A zarr array of a checkpoint."""

  def __init__(
    self, name: str, shape: Sequence[int], dtype: Any, kvstore: Mapping[str, Any]
  ):
    super().__init__(shape, dtype, self.read)
    self.name = name
    self._kvstore = kvstore  # TensorStore's specification of the folder

  @functools.cached_property
  def _store(self):
    spec = {'driver': 'zarr', 'kvstore': self._kvstore}
    try:
      store = tensorstore.open(spec, open=True).result()
    except ValueError as error:
      raise DamagedCheckpointError(
        f"'{self.name}' cannot be read from '{self._kvstore['path']}': {error}"
      ) from error
    if tuple(store.shape) != self.shape:
      raise DamagedCheckpointError(
        f"'{self.name}' has shape {self.shape} in the index and {tuple(store.shape)} "
        'on disk.'
      )
    return store

  def read(
    self, sharding: jax.sharding.Sharding | None = None, dtype: Any = None
  ) -> np.ndarray | jax.Array:
    """Reads the values as an array with `sharding`, or as a NumPy array.

    Each device reads only its own part.

    Raises:
      DamagedCheckpointError: the files are missing or damaged.
    """

    @functools.cache  # Replicas read the same part. Slices are not hashable.
    def part(bounds):
      try:
        values = self._store[tuple(slice(*b) for b in bounds)].read().result()
      except ValueError as error:
        raise DamagedCheckpointError(
          f"'{self.name}' cannot be read: {error}"
        ) from error
      return np.asarray(values).astype(dtype or self.dtype, copy=False)

    def at(index):
      return part(tuple(s.indices(n)[:2] for s, n in zip(index, self.shape)))

    if sharding is None:
      return at((slice(None),) * self.ndim)
    return jax.make_array_from_callback(self.shape, sharding, at)


def _kvstore(folder: str, path: str) -> dict[str, str]:
  if folder.startswith('gs://'):
    bucket, _, inner = folder.removeprefix('gs://').partition('/')
    path = os.path.join(inner, path, '')
    return {'driver': 'gcs', 'bucket': bucket, 'path': path}
  return {'driver': 'file', 'path': os.path.join(folder, path, '')}


def _stored(name: str, spec: Mapping[str, Any], folder: str) -> StoredArray:
  dtype = jnp.dtype(spec.get('dtype', spec['metadata'].get('dtype')))
  if spec['driver'] != 'zarr' or dtype == np.uint16:
    raise ValueError(
      f"'{name}' is stored as {dtype} by driver '{spec['driver']}'. Only zarr is "
      'supported, without bfloat16 kept as uint16. Save it again with a later T5X.'
    )
  # TensorStore 0.1.13 kept the path outside `kvstore`.
  path = spec['kvstore'].get('path', spec.get('path'))
  return StoredArray(name, spec['metadata']['shape'], dtype, _kvstore(folder, path))


def saved_tree(folder: epath.Path) -> dict[str, Any]:
  """Reads a checkpoint's index: a state dict of `StoredArray`, NumPy array or None.

  Raises:
    ValueError: its version is not supported.
    DamagedCheckpointError: it is not an index.
  """
  path = folder / INDEX_FILE
  try:
    contents = flax.serialization.msgpack_restore(path.read_bytes())
    version = contents.get('version', 0)
  except (msgpack.exceptions.UnpackException, ValueError, AttributeError) as error:
    raise DamagedCheckpointError(
      f"'{path}' is not the index of a T5X checkpoint, or damaged: {error}"
    ) from error
  if version < _OLDEST_VERSION or 'optimizer' not in contents:
    raise ValueError(
      f"'{path}' has version {version}; versions from {_OLDEST_VERSION} are supported."
    )
  flat = state_utils.flatten_state_dict(contents['optimizer'], keep_empty_nodes=True)
  leaves = {
    name: _stored(name, leaf, os.fspath(folder)) if isinstance(leaf, Mapping) else leaf
    for name, leaf in flat.items()
  }
  return traverse_util.unflatten_dict(leaves, sep='/')


def read_all(
  leaves: Mapping[str, Any], read: Callable[[str, StoredArray], Any]
) -> dict[str, Any]:
  """Replaces each `StoredArray` by read(name, array), in parallel."""
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    pending = {
      name: pool.submit(read, name, leaf)
      for name, leaf in leaves.items()
      if isinstance(leaf, StoredArray)
    }
    return {**leaves, **{name: future.result() for name, future in pending.items()}}


# -- Writing -------------------------------------------------------------------


def _write_array(folder: str, name: str, value: Any, dtype: np.dtype) -> dict[str, Any]:
  """Writes this host's shards of an array; returns its specification."""
  shards = [(..., value)] if jax.process_index() == 0 else []
  chunks = list(value.shape)
  if isinstance(value, jax.Array):
    shards = [(s.index, s.data) for s in value.addressable_shards if s.replica_id == 0]
    chunks = list(value.sharding.shard_shape(value.shape))
  while math.prod(chunks) * dtype.itemsize > _CHUNK_BYTES:
    # By the least divisor of all axes: two hosts must not write to the same chunk.
    divisor, axis = min(
      (next(d for d in range(2, size + 1) if not size % d), axis)
      for axis, size in enumerate(chunks)
      if size > 1
    )
    chunks[axis] //= divisor
  path = name.replace('/', '.')
  spec = {
    'driver': 'zarr',
    'dtype': dtype.name,
    'metadata': {
      'shape': list(value.shape),
      'chunks': [max(1, size) for size in chunks],
      'compressor': {'id': 'gzip', 'level': 1},
    },
  }
  store = tensorstore.open(
    {**spec, 'kvstore': _kvstore(folder, path)}, create=True, open=True
  ).result()
  for index, data in shards:
    store[index].write(np.asarray(data).astype(dtype, copy=False)).result()
  # Relative, so that the checkpoint can be moved, also between disks and buckets.
  return {**spec, 'kvstore': {'driver': 'file', 'path': f'{path}/'}}


def write_arrays(
  folder: epath.Path, state_dict: Mapping[str, Any], dtypes: Mapping[str, np.dtype]
) -> dict[str, Any]:
  """Writes this host's parts of all arrays, in parallel.

  Args:
    folder: the checkpoint, an existing folder.
    state_dict: nested; scalars and None stay for the index.
    dtypes: '/'-joined name of each array -> dtype on disk.

  Returns:
    The tree for `write_index`.
  """
  leaves = state_utils.flatten_state_dict(state_dict, keep_empty_nodes=True)
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    for name, value in leaves.items():
      if name in dtypes and not np.ndim(value):
        leaves[name] = np.asarray(value).astype(dtypes[name])
      elif name in dtypes:
        leaves[name] = pool.submit(
          _write_array, os.fspath(folder), name, value, dtypes[name]
        )
  written = {
    name: leaf.result() if isinstance(leaf, futures.Future) else leaf
    for name, leaf in leaves.items()
  }
  return traverse_util.unflatten_dict(written, sep='/')


def write_index(folder: epath.Path, tree: Mapping[str, Any]) -> None:
  """Writes the index of a checkpoint whose arrays all hosts have written."""
  contents = {'version': _VERSION, 'optimizer': tree}
  (folder / INDEX_FILE).write_bytes(flax.serialization.msgpack_serialize(contents))
