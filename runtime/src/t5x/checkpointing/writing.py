"""What goes into a checkpoint: arrays as Orbax takes them, cast, and room for them."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from t5x.checkpointing import reading
from t5x.checkpointing.lazy_arrays import LazyArray

# Seconds to wait for the writes of a save that has failed.
_WRITE_TIMEOUT = 60


class CheckpointSaveError(OSError):
  """A checkpoint could not be written. Nothing half-written is left."""


@dataclasses.dataclass
class ParameterInfo:
  """What a save-time transformation is told of an array.

  Attributes:
    name: '/'-joined name in the train state.
    mesh_axes: its PartitionSpec; None if replicated.
  """

  name: str
  mesh_axes: Any


def map_named(
  function: Callable[[str, Any], Any], tree: Any, name: tuple[str, ...] = ()
) -> Any:
  """Maps function('/'-joined name, leaf) over nested dicts; None stays.

  Args:
    function: called for every leaf.
    tree: nested dicts.
    name: keys above the tree, in front of the leaves' names.

  Returns:
    The nested dicts of what `function` returned.
  """
  if isinstance(tree, Mapping):
    return {k: map_named(function, child, (*name, k)) for k, child in tree.items()}
  return None if tree is None else function('/'.join(name), tree)


class BackgroundWrites:
  """What a handler still writes of a save, while another may have failed."""

  def __init__(self, handler: ocp.AsyncCheckpointHandler):
    """Takes note of each save of the handler from now on.

    Args:
      handler: of an item; its `async_save` is wrapped. On the instance, as Orbax finds
        handlers by their class and writes its name into the checkpoint.
    """
    self._pending: Sequence[Any] = ()
    begin = handler.async_save

    async def async_save(*args: Any, **kwargs: Any) -> Sequence[Any]:
      self._pending = await begin(*args, **kwargs) or ()
      return self._pending

    handler.async_save = async_save

  def wait(self) -> None:
    """Waits until all writes of the last save have ended, well or badly."""
    for write in self._pending:
      with contextlib.suppress(Exception):
        write.result(timeout=_WRITE_TIMEOUT)


def mend(error: BaseException) -> str:
  """What to do about a failed write, as a sentence without its full stop."""
  text = str(error).lower()
  if any(sign in text for sign in ('no space', 'quota', 'too large', 'enough space')):
    return 'Free some space, or lower SaveCheckpointConfig.keep'
  if any(sign in text for sign in ('permission', 'read-only', 'not a directory')):
    return 'Make the folder writable, or choose another MODEL_DIR'
  return 'Mend the cause'


def savable(leaf: Any) -> Any:
  """An array as Orbax takes it: read, and where there are many hosts not of one."""
  if isinstance(leaf, LazyArray):
    return leaf.get()
  if jax.process_count() > 1 and isinstance(leaf, jax.Array):
    return np.asarray(leaf) if leaf.is_fully_addressable else leaf
  return leaf


def dtype_on_disk(name: str, leaf: Any, save_dtype: Any) -> np.dtype:
  """The dtype an array is saved in.

  Args:
    name: '/'-joined name in the train state.
    leaf: an array, its shape, or a number.
    save_dtype: what parameters are cast to; None leaves them.
  """
  dtype = leaf.dtype if hasattr(leaf, 'dtype') else np.result_type(leaf)
  if save_dtype and reading.is_cast(name, dtype):
    return np.dtype(save_dtype)
  return np.dtype(dtype)


def check_space(directory: epath.Path, state_dict: Mapping[str, Any], save_dtype: Any):
  """Refuses to begin a save that the disk cannot hold; all hosts call it.

  Args:
    directory: where the checkpoint goes.
    state_dict: nested dict of what is to be saved.
    save_dtype: what parameters are cast to; None leaves them.

  Raises:
    CheckpointSaveError: there is too little space.
  """
  short = ''
  if jax.process_index() == 0 and '://' not in os.fspath(directory):
    sizes = []
    map_named(
      lambda name, x: sizes.append(
        np.size(x) * dtype_on_disk(name, x, save_dtype).itemsize
      ),
      state_dict,
    )
    free = shutil.disk_usage(directory).free
    if free < sum(sizes):
      short = f'{sum(sizes) / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free'
  refuse = bool(short)
  if jax.process_count() > 1:
    refuse = bool(multihost_utils.broadcast_one_to_all(np.int32(refuse)))
  if refuse:
    raise CheckpointSaveError(
      f"There is not enough space for a checkpoint in '{directory}': "
      f'{short or "see the first process"}. {mend(OSError("no space"))}.'
    )


def parameter_infos(train_state: Any, partitioner: Any) -> dict[str, Any]:
  """What save-time transformations are told of a state.

  Args:
    train_state: the state.
    partitioner: has `mesh` and `get_mesh_axes`.

  Returns:
    Nested dict of `ParameterInfo`.
  """
  axes = reading.Destination(
    {}, partitioner.get_mesh_axes(train_state).state_dict(), partitioner.mesh
  )
  return map_named(
    lambda name, _: ParameterInfo(name, axes.sharding(name).spec),
    train_state.state_dict(),
  )
