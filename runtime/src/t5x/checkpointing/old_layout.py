"""Reads T5X's layout from before Orbax, in which most published checkpoints are.

A folder `checkpoint_<step>` holds a file `checkpoint`: a msgpack map of `version` and
`optimizer`, the state dict. Its leaves are small arrays, stored right there, or
specifications of zarr arrays, one folder each (`target.encoder.layers_0...`), with
paths relative to the checkpoint, wherever it was first written.
"""

import asyncio
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
from etils import epath

from t5x import checkpoints_utils, state_utils
from t5x.checkpointing import reading
from t5x.checkpointing.lazy_arrays import LazyAwaitableArray
from t5x.checkpointing.reading import DamagedCheckpointError

INDEX_FILE = 'checkpoint'
# Version 2 kept bfloat16 as uint16; version 1 and plain Flax files (0) had other trees.
_OLDEST_VERSION = 2
_THREADS = 16


@dataclasses.dataclass(frozen=True)
class StoredArray:
  """An array in a checkpoint, not yet read.

  Attributes:
    name: where it is in the state dict, joined by '/'.
    shape: its shape.
    dtype: its dtype on disk.
    kvstore: TensorStore's specification of its folder, absolute.
  """

  name: str
  shape: tuple[int, ...]
  dtype: Any
  kvstore: Mapping[str, Any]

  @property
  def ndim(self) -> int:
    """The number of axes."""
    return len(self.shape)

  @functools.cached_property
  def _store(self):
    import tensorstore  # Here: half a second that no other reader needs to spend.

    try:
      store = tensorstore.open(
        {'driver': 'zarr', 'kvstore': dict(self.kvstore)}, open=True
      ).result()
    except ValueError as error:
      raise DamagedCheckpointError(
        f'{self.name!r} cannot be read: its folder {self.kvstore["path"]!r} is '
        f'missing or damaged. {error}'
      ) from error
    if tuple(store.shape) != self.shape:
      raise DamagedCheckpointError(
        f'{self.name!r} is of shape {self.shape} in the index and '
        f'{tuple(store.shape)} on disk: the checkpoint is damaged.'
      )
    return store

  def read(
    self, sharding: jax.sharding.Sharding | None = None, dtype: Any = None
  ) -> np.ndarray | jax.Array:
    """Reads the values, each device's part only.

    Args:
      sharding: where they go; None for a numpy array of all.
      dtype: what they are cast to; None leaves them.

    Raises:
      DamagedCheckpointError: the files are missing or damaged.
    """
    dtype = self.dtype if dtype is None else jnp.dtype(dtype)

    @functools.cache
    def part(bounds):
      index = tuple(slice(*b) for b in bounds)
      try:
        values = np.asarray(self._store[index].read().result())
      except ValueError as error:
        raise DamagedCheckpointError(
          f'{self.name!r} cannot be read: {error}'
        ) from error
      return values.astype(dtype, copy=False)

    def at(index):
      # Replicas ask for the same part; a slice cannot be a key.
      return part(tuple(s.indices(n)[:2] for s, n in zip(index, self.shape)))

    if sharding is None:
      return at((slice(None),) * self.ndim)
    return jax.make_array_from_callback(self.shape, sharding, at)


def _absolute(folder: str, spec: Mapping[str, Any]) -> dict[str, Any]:
  """Where an array's files are, given where its checkpoint now is."""
  relative = spec['kvstore'].get('path', spec.get('path'))  # Or as TensorStore 0.1.13.
  if relative is None:
    raise ValueError(f'A specification without a path: {dict(spec)}')
  if folder.startswith('gs://'):
    bucket, _, inner = folder.removeprefix('gs://').partition('/')
    path = os.path.join(inner, relative, '')
    return {'driver': 'gcs', 'bucket': bucket, 'path': path}
  return {'driver': 'file', 'path': os.path.join(os.path.abspath(folder), relative, '')}


def _stored(name: str, spec: Mapping[str, Any], folder: str) -> StoredArray:
  if spec['driver'] != 'zarr':
    raise ValueError(
      f'{name!r} is stored by the driver {spec["driver"]!r}; only zarr is read.'
    )
  dtype = jnp.dtype(spec.get('dtype', spec['metadata'].get('dtype')))
  if dtype == np.uint16:
    raise ValueError(
      f'{name!r} is stored as uint16, as version 2 did with bfloat16. Save it anew '
      'with a T5X of 2021-06-10 or later.'
    )
  shape = tuple(spec['metadata']['shape'])
  return StoredArray(name, shape, dtype, _absolute(folder, spec))


def is_previous_layout(folder: epath.PathLike) -> bool:
  """Whether a folder is a checkpoint of this layout: it has a msgpack index."""
  index = epath.Path(folder) / INDEX_FILE
  if not index.exists() or index.is_dir():
    return False
  with index.open('rb') as file:
    try:
      return 'version' in _keys_of_map(file)
    except (msgpack.exceptions.UnpackException, ValueError):
      return False


def _keys_of_map(file: Any) -> list[Any]:
  unpacker = msgpack.Unpacker(file, max_buffer_size=0, raw=False, strict_map_key=False)
  keys = []
  for _ in range(unpacker.read_map_header()):
    keys.append(unpacker.unpack())
    unpacker.skip()
  return keys


def saved_tree(index: epath.PathLike) -> dict[str, Any]:
  """Reads an index.

  Args:
    index: the file `checkpoint`, or the folder that it is in.

  Returns:
    The state dict (`state`, `target`, ...). Leaves are `StoredArray`, numpy arrays for
    what stands in the index, or None.

  Raises:
    ValueError: it is not there, or of a version that is not read.
    DamagedCheckpointError: it is no index.
  """
  path = epath.Path(index)
  if path.is_dir():
    path = path / INDEX_FILE
  if not path.exists():
    raise ValueError(f'{os.fspath(path)!r} is not there, so this is no T5X checkpoint.')
  try:
    contents = flax.serialization.msgpack_restore(path.read_bytes())
    version = contents.get('version', 0)
  except (msgpack.exceptions.UnpackException, ValueError, AttributeError) as error:
    raise DamagedCheckpointError(
      f'{os.fspath(path)!r} is no index of a T5X checkpoint, or damaged: {error}'
    ) from error
  if version < _OLDEST_VERSION or 'optimizer' not in contents:
    raise ValueError(
      f'{os.fspath(path)!r} is of version {version}; versions from {_OLDEST_VERSION} '
      'on are read.'
    )
  folder = os.fspath(path.parent)
  flat = state_utils.flatten_state_dict(contents['optimizer'], keep_empty_nodes=True)
  leaves = {
    name: _stored(name, leaf, folder) if isinstance(leaf, Mapping) else leaf
    for name, leaf in flat.items()
  }
  return flax.traverse_util.unflatten_dict(leaves, sep='/')


def read_all(
  leaves: Mapping[str, Any], read: Callable[[str, StoredArray], Any]
) -> dict[str, Any]:
  """Reads many arrays, some at a time.

  Args:
    leaves: name -> leaf of `saved_tree`.
    read: makes an array of a `StoredArray`; the name comes first.

  Returns:
    name -> what `read` returned, or the leaf itself if it was read already.
  """
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    pending = {
      name: pool.submit(read, name, leaf) if isinstance(leaf, StoredArray) else leaf
      for name, leaf in leaves.items()
    }
    return {
      name: leaf.result() if isinstance(leaf, futures.Future) else leaf
      for name, leaf in pending.items()
    }


def read_state(
  folder: epath.PathLike,
  destination: reading.Destination,
  transformations: Sequence[Callable[..., Any]] = (),
  fallback_state: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """As `reading.read_state`, for this layout.

  Args:
    folder: `checkpoint_<step>`.
    destination: what is wanted, and where it goes.
    transformations: functions of (saved state dict, wanted state dict) that give the
      saved one under the wanted names; applied in order.
    fallback_state: state dict for what the checkpoint lacks.

  Returns:
    Nested dict of arrays, cast and laid on the mesh.

  Raises:
    ValueError: the checkpoint is of another model.
    DamagedCheckpointError: it cannot be read.
  """
  tree: Any = saved_tree(folder)
  for transform in transformations:
    tree = transform(tree, destination.state_dict)
  available = state_utils.flatten_state_dict(tree)
  available = {name: leaf for name, leaf in available.items() if leaf is not None}
  if fallback_state is not None:
    fallback_state = state_utils.flatten_state_dict(fallback_state)
  wanted = destination.arrays()
  chosen = reading.choose(os.fspath(folder), available, wanted, fallback_state)

  def read(name, leaf):
    return leaf.read(destination.sharding(name), destination.cast(name, leaf.dtype))

  values = {
    name: value
    if isinstance(chosen[name], StoredArray)
    else destination.place(name, value)
    for name, value in read_all(chosen, read).items()
  }
  return reading.assemble(destination, values)


def find_checkpoint(path: epath.PathLike, step: int | None = None) -> epath.PathLike:
  """Finds the index of a checkpoint.

  Args:
    path: a model's folder, a checkpoint's folder, or an index.
    step: which checkpoint of a model's folder; None for the newest.

  Returns:
    The path of the index.

  Raises:
    ValueError: there is none.
  """
  found = epath.Path(path)
  if found.is_dir():
    if step is None:
      step = checkpoints_utils.latest_step(path)
    if step is not None:
      found = epath.Path(checkpoints_utils.get_checkpoint_dir(path, step))
    found = found / INDEX_FILE
  if not found.exists() or found.is_dir():
    raise ValueError(
      f'{os.fspath(path)!r} has no index {os.fspath(found)!r}: it is no checkpoint '
      'of T5X before Orbax. Newer ones are read by OrbaxCheckpointManagerInterface.'
    )
  return os.fspath(found)


def load_t5x_checkpoint(
  path: str,
  step: int | None = None,
  state_transformation_fns: Sequence[Callable[..., Any]] = (),
  remap: bool = True,
  restore_dtype: Any = None,
  lazy_parameters: bool = False,
) -> dict[str, Any]:
  """Reads a checkpoint of the previous layout, whatever model it is of.

  Args:
    path: a model's folder, a checkpoint's folder, or an index.
    step: which checkpoint of a model's folder; None for the newest.
    state_transformation_fns: functions of (saved state dict, {}), in order, before
      anything is read.
    remap: whether to apply them.
    restore_dtype: what parameters (`target`) are cast to; None leaves them.
    lazy_parameters: whether to return `LazyAwaitableArray`s instead of values.

  Returns:
    The state dict of numpy arrays.

  Raises:
    ValueError: there is no such checkpoint.
    DamagedCheckpointError: it is damaged.
  """
  tree = saved_tree(find_checkpoint(path, step))
  for transform in state_transformation_fns if remap else ():
    tree = transform(tree, {})
  flat = state_utils.flatten_state_dict(tree, keep_empty_nodes=True)

  def dtype_of(name):
    return restore_dtype if name.split('/')[0] == 'target' else None

  if lazy_parameters:
    values = {
      name: _lazy(leaf, dtype_of(name)) if hasattr(leaf, 'shape') else leaf
      for name, leaf in flat.items()
    }
  else:
    values = read_all(flat, lambda name, leaf: leaf.read(dtype=dtype_of(name)))
    values = {
      name: leaf.astype(dtype_of(name) or leaf.dtype)
      if hasattr(leaf, 'astype')
      else leaf
      for name, leaf in values.items()
    }
  return flax.traverse_util.unflatten_dict(values, sep='/')


def _lazy(leaf: StoredArray | np.ndarray, dtype: Any) -> LazyAwaitableArray:
  async def get():
    if isinstance(leaf, StoredArray):
      return await asyncio.to_thread(leaf.read)
    return leaf

  return LazyAwaitableArray.from_array(leaf, get, dtype)
