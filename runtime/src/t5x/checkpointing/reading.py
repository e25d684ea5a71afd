"""Reads the state in an Orbax checkpoint: renamed, cast, and laid on the mesh.

What is on disk is described first and read last, so that a checkpoint of another
model is told from a damaged one, and nothing is read that is not used.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from t5x import state_utils

STATE_ITEM = 'state'
# Names listed in a message before the rest is counted.
_SHOWN = 8


class DamagedCheckpointError(OSError):
  """A checkpoint is there but cannot be read."""


def is_cast(name: str, dtype: Any) -> bool:
  """Whether save and restore dtypes apply: to floating-point parameters.

  Args:
    name: '/'-joined name in the train state.
    dtype: the array's dtype.

  Returns:
    False for optimizer states, the step, and whole numbers.
  """
  return name.split('/')[0] == 'target' and jnp.issubdtype(dtype, jnp.floating)


@dataclasses.dataclass(frozen=True)
class SavedArray:
  """An array that a checkpoint holds, not yet read.

  Attributes:
    name: where it lies in the checkpoint.
    shape: its shape.
    dtype: its dtype on disk.
  """

  name: tuple[str, ...]
  shape: tuple[int, ...]
  dtype: Any


@dataclasses.dataclass(frozen=True)
class Destination:
  """Where restored arrays go.

  Attributes:
    state_dict: nested dict of arrays or their shapes: what is asked for.
    axes: the nested dict with a PartitionSpec, or None for replicated, a leaf.
    mesh: the devices.
    dtype: what parameters are cast to; None leaves them as saved.
  """

  state_dict: Mapping[str, Any]
  axes: Mapping[str, Any]
  mesh: jax.sharding.Mesh
  dtype: Any = None

  def arrays(self) -> dict[str, Any]:
    """'/'-joined name -> array or shape; without empty nodes and None."""
    flat = state_utils.flatten_state_dict(self.state_dict)
    return {name: leaf for name, leaf in flat.items() if leaf is not None}

  def sharding(self, name: str) -> NamedSharding:
    """Where the array of a name goes."""
    spec: Any = self.axes
    for key in name.split('/'):
      spec = spec.get(key) if isinstance(spec, Mapping) else None
    return NamedSharding(self.mesh, PartitionSpec() if spec is None else spec)

  def cast(self, name: str, dtype: Any) -> np.dtype:
    """The dtype to read an array as: only floating parameters are cast."""
    if self.dtype and is_cast(name, dtype):
      return np.dtype(self.dtype)
    return dtype

  def place(self, name: str, value: Any) -> jax.Array:
    """Lays a value on the mesh, cast."""
    sharding = self.sharding(name)
    if isinstance(value, jax.Array) and len(value.sharding.device_set) > 1:
      value = value.astype(self.cast(name, value.dtype))
      return jax.device_put(value, sharding)
    value = np.asarray(value)
    value = value.astype(self.cast(name, value.dtype))
    return jax.make_array_from_callback(value.shape, sharding, lambda i: value[i])


def saved_tree(folder: epath.Path) -> dict[str, Any]:
  """Describes the state in a checkpoint.

  Args:
    folder: the state's folder, `checkpoint_<step>/state`.

  Returns:
    Nested dict of `SavedArray`.

  Raises:
    DamagedCheckpointError: the description is missing or unreadable.
  """
  try:
    metadata = ocp.PyTreeCheckpointHandler(use_ocdbt=True).metadata(folder)
    tree = getattr(metadata, 'tree', metadata)
  except Exception as error:
    raise DamagedCheckpointError(f"'{folder}' is unreadable: {error}") from error

  def describe(node: Any, name: tuple[str, ...]) -> Any:
    if isinstance(node, Mapping):
      return {key: describe(child, (*name, str(key))) for key, child in node.items()}
    if node is None:
      return None
    return SavedArray(name, tuple(getattr(node, 'shape', ()) or ()), node.dtype)

  return describe(tree, ())


def _listed(names: Sequence[str]) -> str:
  more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
  return ', '.join(sorted(names)[:_SHOWN]) + more


def _check_shapes(where: str, available: Mapping[str, Any], wanted: Mapping[str, Any]):
  wrong = [
    f'{name} is {tuple(available[name].shape)}, the model has {tuple(leaf.shape)}'
    for name, leaf in wanted.items()
    if name in available
    and hasattr(available[name], 'shape')
    and tuple(available[name].shape) != tuple(leaf.shape)
  ]
  if wrong:
    raise ValueError(
      f"Checkpoint '{where}' is of another model: "
      + '; '.join(wrong[:_SHOWN])
      + (f' and {len(wrong) - _SHOWN} more' if len(wrong) > _SHOWN else '')
      + '. Configure the model as it was trained, or drop these with '
      'RestoreCheckpointConfig.assignment_map and fallback_to_scratch.'
    )


def choose(
  where: str,
  available: Mapping[str, Any],
  wanted: Mapping[str, Any],
  fallback: Mapping[str, Any] | None,
) -> dict[str, Any]:
  """Finds the source of every array that is wanted.

  Args:
    where: the checkpoint, for messages.
    available: name -> what the checkpoint has, after renaming.
    wanted: name -> array or shape in the train state.
    fallback: name -> value for what the checkpoint lacks.

  Returns:
    name -> entry of `available`, or else of `fallback`.

  Raises:
    ValueError: a shape differs, or an array is in neither.
  """
  _check_shapes(where, available, wanted)
  fallback = fallback or {}
  missing = [n for n in wanted if n not in available and n not in fallback]
  if missing:
    unasked = sorted(set(available) - set(wanted))
    raise ValueError(
      f"Checkpoint '{where}' lacks {len(missing)} of {len(wanted)} arrays: "
      f'{_listed(missing)}. It has {_listed(unasked) or "nothing"} that nobody asks '
      'for. Map the names with '
      'RestoreCheckpointConfig.assignment_map, or start these from scratch with '
      'fallback_to_scratch.'
    )
  return {
    name: available[name] if name in available else fallback[name] for name in wanted
  }


def _read_once(
  folder: epath.Path, sources: Mapping[str, SavedArray], destination: Destination
) -> dict[str, jax.Array]:
  """Reads arrays, each from an entry of its own."""
  item, restore_args = {}, {}
  for name, source in sources.items():
    *parents, last = source.name
    at_item, at_args = item, restore_args
    for key in parents:
      at_item, at_args = at_item.setdefault(key, {}), at_args.setdefault(key, {})
    at_item[last] = 0
    at_args[last] = ocp.ArrayRestoreArgs(
      sharding=destination.sharding(name), dtype=destination.cast(name, source.dtype)
    )
  tree = ocp.PyTreeCheckpointHandler(use_ocdbt=True).restore(
    folder,
    args=ocp.args.PyTreeRestore(
      item=item, restore_args=restore_args, partial_restore=True
    ),
  )
  read = {}
  for name, source in sources.items():
    value = tree
    for key in source.name:
      value = value[key]
    # Python scalars come back as such.
    read[name] = (
      value if isinstance(value, jax.Array) else destination.place(name, value)
    )
  return read


def read_arrays(
  folder: epath.Path, sources: Mapping[str, SavedArray], destination: Destination
) -> dict[str, jax.Array]:
  """Reads arrays from a checkpoint.

  Args:
    folder: the state's folder.
    sources: name in the train state -> entry; several names may share one.
    destination: where they go.

  Returns:
    name -> array, cast and sharded.

  Raises:
    DamagedCheckpointError: the files cannot be read.
  """
  read: dict[str, jax.Array] = {}
  waiting = dict(sources)
  while waiting:
    # Orbax reads an entry to one place; those that are wanted twice take turns.
    turn = {source.name: name for name, source in reversed(waiting.items())}
    batch = {name: waiting.pop(name) for name in turn.values()}
    try:
      read |= _read_once(folder, batch, destination)
    except MemoryError:
      raise
    except Exception as error:
      if 'RESOURCE_EXHAUSTED' in str(error) or isinstance(error, PermissionError):
        raise
      raise DamagedCheckpointError(f"'{folder}' is unreadable: {error}") from error
  return read


def assemble(destination: Destination, values: Mapping[str, Any]) -> dict[str, Any]:
  """Puts values into the nested dict of the train state, empty nodes included.

  Args:
    destination: the structure.
    values: '/'-joined name -> array, one for each that is wanted.

  Returns:
    The nested dict.
  """

  def build(node: Any, name: tuple[str, ...]) -> Any:
    if isinstance(node, Mapping):
      return {key: build(child, (*name, key)) for key, child in node.items()}
    return None if node is None else values['/'.join(name)]

  return build(destination.state_dict, ())


def read_state(
  folder: epath.Path,
  destination: Destination,
  transformations: Sequence[Any] = (),
  fallback_state: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Reads a train state.

  Args:
    folder: `checkpoint_<step>`.
    destination: what is wanted, and where it goes.
    transformations: functions of (saved nested dict, wanted nested dict) that
      give the saved one under the wanted names; applied in order.
    fallback_state: nested dict for what the checkpoint lacks.

  Returns:
    Nested dict of arrays.

  Raises:
    ValueError: the checkpoint is of another model.
    DamagedCheckpointError: it cannot be read.
  """
  state_folder = folder / STATE_ITEM
  tree: Any = saved_tree(state_folder)
  for transform in transformations:
    tree = transform(tree, destination.state_dict)
  available = {
    name: leaf
    for name, leaf in state_utils.flatten_state_dict(tree).items()
    if leaf is not None
  }
  fallback = None
  if fallback_state is not None:
    fallback = state_utils.flatten_state_dict(fallback_state)
  chosen = choose(str(folder), available, destination.arrays(), fallback)
  on_disk = {n: leaf for n, leaf in chosen.items() if isinstance(leaf, SavedArray)}
  values = read_arrays(state_folder, on_disk, destination)
  for name, leaf in chosen.items():
    if name not in on_disk:
      values[name] = destination.place(name, leaf)
  return assemble(destination, values)
