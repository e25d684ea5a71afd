"""Checkpoints: T5X's names for what reads and writes them.

The work is done in the package `checkpointing`; here are the older interface,
`Checkpointer`, on top of the same layout, and the names that gin files and scripts look
for in this module.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import gin
import jax
import numpy as np

from t5x import checkpoints_utils
from t5x.checkpointing.best_metrics import populate_metrics_for_steps
from t5x.checkpointing.dataset_position import (
  DataPositionError,
  DatasetArgs,
  DatasetCheckpointHandler,
)
from t5x.checkpointing.lazy_arrays import (
  LazyArray,
  LazyAwaitableArray,
  LazyThreadPoolArray,
)
from t5x.checkpointing.manager import (
  CheckpointSaveError,
  OrbaxCheckpointManagerInterface,
)
from t5x.checkpointing.old_layout import find_checkpoint, load_t5x_checkpoint
from t5x.checkpointing.reading import DamagedCheckpointError
from t5x.checkpoints_utils import (
  all_dataset_checkpoint_steps,
  all_steps,
  get_checkpoint_dir,
  get_checkpoint_prefix,
  get_step_from_checkpoint_dir,
  latest_step,
)

__all__ = [
  'CheckpointManagerConstructor',
  'CheckpointSaveError',
  'Checkpointer',
  'CheckpointerConstructor',
  'DamagedCheckpointError',
  'DataPositionError',
  'DatasetArgs',
  'DatasetCheckpointHandler',
  'LazyArray',
  'LazyAwaitableArray',
  'LazyThreadPoolArray',
  'OrbaxCheckpointManagerInterface',
  'RestoreStateTransformationFn',
  'SaveBestCheckpointer',
  'SaveStateTransformationFn',
  'all_dataset_checkpoint_steps',
  'all_steps',
  'find_checkpoint',
  'get_checkpoint_dir',
  'get_checkpoint_prefix',
  'get_local_data',
  'get_step_from_checkpoint_dir',
  'latest_step',
  'load_t5x_checkpoint',
  'populate_metrics_for_steps',
]


class SaveStateTransformationFn(Protocol):
  """Changes a state before it is saved."""

  def __call__(self, state_dict: Any, parameter_infos: Any) -> tuple[Any, Any]: ...


class RestoreStateTransformationFn(Protocol):
  """Gives a saved state under the names of the present model."""

  def __call__(
    self, state_dict: Any, target_state_dict: Any, *, is_resuming: bool = False
  ) -> Any: ...


def get_local_data(x: Any) -> Any:
  """This host's part of a global array; anything else as it is."""
  if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
    return x.addressable_data(0)
  return x


class Checkpointer:
  """Saves and restores the checkpoints of one folder, waiting for each write.

  T5X's interface from before Orbax. It writes Orbax's layout too.
  """

  def __init__(
    self,
    train_state: Any,
    partitioner: Any,
    checkpoints_dir: str,
    dataset_iterator: Any = None,
    *,
    keep: int | None = None,
    save_dtype: Any = np.float32,
    restore_dtype: Any = None,
    keep_dataset_checkpoints: int | None = None,
  ):
    """Prepares a folder; nothing is written until `save`.

    Args:
      train_state: state of arrays or of their shapes.
      partitioner: lays restored arrays on the mesh.
      checkpoints_dir: the folder.
      dataset_iterator: iterator whose position is saved and restored.
      keep: how many checkpoints to keep; None keeps all.
      save_dtype: what parameters are cast to on disk.
      restore_dtype: what restored parameters are cast to; None leaves them.
      keep_dataset_checkpoints: in how many the position in the data is kept.
    """
    self.checkpoints_dir = checkpoints_dir
    self.keep = keep
    self.restore_dtype = restore_dtype
    self.keep_dataset_checkpoints = keep_dataset_checkpoints
    self._arguments = dict(
      train_state=train_state,
      partitioner=partitioner,
      dataset_iterator=dataset_iterator,
      save_dtype=save_dtype,
    )

  def manager_options(self) -> dict[str, Any]:
    """Settings that an Orbax manager takes over from this class."""
    return {}

  def _manager(self) -> OrbaxCheckpointManagerInterface:
    return OrbaxCheckpointManagerInterface(
      self.checkpoints_dir,
      period=None,
      keep=self.keep,
      restore_dtype=self.restore_dtype,
      keep_dataset_checkpoints=self.keep_dataset_checkpoints,
      **self._arguments,
      **self.manager_options(),
    )

  def all_steps(self) -> Sequence[int]:
    """Steps of the checkpoints in the folder, ascending."""
    return checkpoints_utils.all_steps(self.checkpoints_dir)

  def all_dataset_checkpoint_steps(self) -> Sequence[int]:
    """Steps of those that hold a position in the data, ascending."""
    return checkpoints_utils.all_dataset_checkpoint_steps(self.checkpoints_dir)

  def latest_step(self) -> int | None:
    """The newest step, or None."""
    return checkpoints_utils.latest_step(self.checkpoints_dir)

  def save(
    self,
    train_state: Any,
    state_transformation_fns: Sequence[SaveStateTransformationFn] = (),
    *,
    concurrent_gb: int = 128,
  ):
    """Saves a checkpoint and waits until it is whole.

    Args:
      train_state: what to save.
      state_transformation_fns: applied to it in order.
      concurrent_gb: no longer needed: Orbax bounds what is in flight itself.

    Raises:
      CheckpointSaveError: it could not be written.
    """
    del concurrent_gb
    manager = self._manager()
    manager.save(train_state, state_transformation_fns)
    manager.close()

  def restore(
    self,
    step: int | None = None,
    path: str | None = None,
    state_transformation_fns: Sequence[RestoreStateTransformationFn] = (),
    fallback_state: Mapping[str, Any] | None = None,
    lazy_parameters: bool = False,
  ) -> Any:
    """Restores a train state; see `OrbaxCheckpointManagerInterface.restore`."""
    return self._manager().restore(
      step, path, fallback_state, state_transformation_fns, lazy_parameters
    )

  def restore_from_tf_checkpoint(
    self, path_or_dir: str, strict: bool = True, translator: Any = None
  ) -> Any:
    """See `OrbaxCheckpointManagerInterface.restore_from_tf_checkpoint`."""
    return self._manager().restore_from_tf_checkpoint(path_or_dir, strict, translator)

  def convert_from_tf_checkpoint(
    self,
    path_or_dir: str,
    *,
    state_transformation_fns: Sequence[SaveStateTransformationFn] = (),
    concurrent_gb: int = 16,
    translator: Any = None,
  ):
    """Saves a T5 of Mesh TensorFlow as a checkpoint in the folder.

    Args:
      path_or_dir: a folder or the prefix `.../model.ckpt-<step>`.
      state_transformation_fns: applied before saving.
      concurrent_gb: handed to `save`.
      translator: rules for the names; None for those of T5 and T5 1.1.
    """
    state = self.restore_from_tf_checkpoint(path_or_dir, translator=translator)
    self.save(state, state_transformation_fns, concurrent_gb=concurrent_gb)


@gin.configurable(module='t5x.checkpoints')
class SaveBestCheckpointer(Checkpointer):
  """Keeps the checkpoints that are best by a metric, and the newest.

  Bind it to `SaveCheckpointConfig.checkpointer_cls`. The metric is read from the
  run's TensorBoard files, so it may be written after the checkpoint.
  """

  def __init__(
    self,
    train_state: Any,
    partitioner: Any,
    checkpoints_dir: str,
    dataset_iterator: Any = None,
    *,
    keep: int | None = None,
    save_dtype: Any = np.float32,
    restore_dtype: Any = None,
    metric_name_to_monitor: str = 'train/accuracy',
    metric_mode: str = 'max',
    keep_checkpoints_without_metrics: bool = True,
    force_keep_period: int | None = None,
    keep_dataset_checkpoints: int | None = None,
  ):
    """Prepares a folder; see `Checkpointer` for the arguments not listed.

    Args:
      train_state: state of arrays or of their shapes.
      partitioner: lays restored arrays on the mesh.
      checkpoints_dir: the folder.
      dataset_iterator: iterator whose position is saved and restored.
      keep: how many of the best to keep, beside the newest; None keeps all.
      save_dtype: what parameters are cast to on disk.
      restore_dtype: what restored parameters are cast to.
      metric_name_to_monitor: `<subfolder>/<TensorBoard tag>`.
      metric_mode: whether 'max' or 'min' is best.
      keep_checkpoints_without_metrics: whether those without a metric are kept.
      force_keep_period: checkpoints at its multiples are never removed.
      keep_dataset_checkpoints: in how many the position in the data is kept.

    Raises:
      ValueError: metric_mode is neither.
    """
    if metric_mode not in ('max', 'min'):
      raise ValueError(f"metric_mode is '{metric_mode}'; it must be 'max' or 'min'.")
    super().__init__(
      train_state,
      partitioner,
      checkpoints_dir,
      dataset_iterator,
      save_dtype=save_dtype,
      restore_dtype=restore_dtype,
      keep=keep,
      keep_dataset_checkpoints=keep_dataset_checkpoints,
    )
    self._ranking = dict(
      metric_name_to_monitor=metric_name_to_monitor,
      metric_mode=metric_mode,
      keep_checkpoints_without_metrics=keep_checkpoints_without_metrics,
      force_keep_period=force_keep_period,
    )

  def manager_options(self) -> dict[str, Any]:
    """How to rank, for an Orbax manager."""
    return dict(self._ranking)


class CheckpointerConstructor(Protocol):
  """What builds a `Checkpointer`."""

  def __call__(
    self,
    train_state: Any,
    partitioner: Any,
    checkpoints_dir: str,
    dataset_iterator: Any = None,
    *,
    keep: int | None = None,
    save_dtype: Any = np.float32,
    restore_dtype: Any = None,
    keep_dataset_checkpoints: int | None = None,
  ) -> Checkpointer: ...


@gin.configurable(module='t5x.checkpoints')
class CheckpointManagerConstructor(Protocol):
  """What builds a checkpoint manager."""

  def __call__(
    self,
    directory: str,
    train_state: Any,
    partitioner: Any,
    dataset_iterator: Any = None,
    save_dtype: Any = None,
    restore_dtype: Any = None,
    keep: int | None = None,
    period: int | None = None,
    force_keep_period: int | None = None,
    checkpoint_steps: Sequence[int] | None = None,
  ) -> OrbaxCheckpointManagerInterface: ...


def manager_options_of(
  checkpointer_cls: Callable[..., Any], **arguments: Any
) -> dict[str, Any]:
  """What a configured checkpointer class asks of an Orbax manager.

  The class is called rather than looked at: gin and `functools.partial` wrap it,
  and only the instance knows what was bound.

  Args:
    checkpointer_cls: of a `SaveCheckpointConfig`.
    **arguments: train_state, partitioner, checkpoints_dir.

  Returns:
    Keyword arguments of `OrbaxCheckpointManagerInterface`.

  Raises:
    ValueError: it builds something that is no `Checkpointer`.
  """
  built = checkpointer_cls(**arguments)
  if not isinstance(built, Checkpointer):
    raise ValueError(
      f'checkpointer_cls builds a {type(built).__name__}, which is no '
      't5x.checkpoints.Checkpointer: its settings would be lost. Bind '
      'SaveCheckpointConfig.checkpoint_manager_cls instead.'
    )
  options = built.manager_options()
  for name in ('keep', 'keep_dataset_checkpoints'):
    if getattr(built, name) is not None:
      options[name] = getattr(built, name)
  return options
