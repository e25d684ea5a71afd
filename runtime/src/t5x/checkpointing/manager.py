"""Saves, keeps and restores a run's checkpoints with Orbax.

A checkpoint is written beside its final name and renamed when it is whole, in the
background; what is too old is renamed away before it is deleted. So a process
killed at any instant leaves only whole checkpoints under their names.
"""

import concurrent.futures
import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from t5x import checkpoint_importer, checkpoint_utils, checkpoints_utils, whole_files
from t5x.checkpointing import (
  dataset_position,
  old_layout,
  reading,
  retention,
  save_schedule,
  writing,
)
from t5x.checkpointing.lazy_arrays import LazyArray
from t5x.checkpointing.writing import CheckpointSaveError, mend

STATE_ITEM = reading.STATE_ITEM
DATASET_ITEM = 'dataset'
# Seconds after which a host gives up waiting for the others to finish a save.
_SAVE_TIMEOUT = 600
# How long, in seconds, a failed save must be gone before it counts as removed, and
# how long to try.
_QUIET_SECONDS = 0.5
_DISCARD_TIMEOUT = 10
# What a damaged checkpoint is renamed to, before its name.
_DAMAGED_PREFIX = 'damaged_'


def step_of(train_state: Any) -> int:
  """The step of a train state, as a Python int."""
  step = train_state.step
  step = step.get() if isinstance(step, LazyArray) else step
  return int(step.addressable_data(0) if isinstance(step, jax.Array) else step)


@gin.configurable(module='t5x.checkpoints')
class OrbaxCheckpointManagerInterface:
  """The checkpoints of one model folder.

  Args:
    directory: the model's folder, or a checkpoint in it.
    train_state: state of arrays or of their shapes, for names and axes.
    partitioner: has `mesh`, `get_mesh_axes`, `get_data_layout`.
    dataset_iterator: training iterator whose position is saved and restored.
    save_dtype: what parameters are cast to on disk; None leaves them.
    restore_dtype: what restored parameters are cast to; None leaves them.
    keep: how many checkpoints to keep; None keeps all.
    period: steps between saves, for `should_save`; 0 or None for none.
    checkpoint_steps: further steps to save at.
    keep_dataset_checkpoints: newest checkpoints that keep the data's position.
    force_keep_period: checkpoints at its multiples are never removed.
    metric_name_to_monitor: keep the best by this metric instead of the newest;
      `<subfolder of directory>/<TensorBoard tag>`.
    metric_mode: whether 'max' or 'min' is best.
    keep_checkpoints_without_metrics: whether those without a metric are kept.
  """

  def __init__(
    self,
    directory: str,
    train_state: Any,
    partitioner: Any,
    dataset_iterator: Any = None,
    save_dtype: Any = None,
    restore_dtype: Any = None,
    keep: int | None = None,
    period: int | None = 1,
    checkpoint_steps: Sequence[int] | None = None,
    keep_dataset_checkpoints: int | None = None,
    force_keep_period: int | None = None,
    metric_name_to_monitor: str | None = None,
    metric_mode: str = 'max',
    keep_checkpoints_without_metrics: bool = True,
  ):
    """Prepares a model folder; the arguments are explained at the class.

    Raises:
      ValueError: settings that mean nothing.
      CheckpointSaveError: checkpoints are to be saved and the folder cannot be
        written to.
    """
    save_schedule.check_save_settings(period, keep, checkpoint_steps)
    self._retention = retention.RetentionRules(
      keep,
      force_keep_period,
      keep_dataset_checkpoints,
      metric_name_to_monitor,
      metric_mode,
      keep_checkpoints_without_metrics,
    )
    directory = os.fspath(directory)
    if checkpoint_utils.whole_checkpoint(directory):
      directory, _ = checkpoints_utils.get_step_from_checkpoint_dir(directory)
    self._directory = checkpoints_utils.absolute(directory)
    self._train_state = train_state
    self._partitioner = partitioner
    self._dataset_iterator = dataset_iterator
    self._save_dtype = np.dtype(save_dtype) if save_dtype else None
    self._restore_dtype = np.dtype(restore_dtype) if restore_dtype else None
    self._period = period
    self._checkpoint_steps = tuple(checkpoint_steps or ())
    layout = partitioner.get_data_layout()
    self._dataset_handler = dataset_position.DatasetCheckpointHandler(
      f'{checkpoints_utils.DATASET_FILE_PREFIX}-'
      f'{layout.shard_id:03}-of-{layout.num_shards:03}',
      layout.is_first_host_in_replica_set,
    )
    self._checkpointer: ocp.AsyncCheckpointer | None = None
    self._finisher: concurrent.futures.ThreadPoolExecutor | None = None
    self._saving: tuple[int, concurrent.futures.Future] | None = None
    if period or checkpoint_steps:
      self._open_for_saving()

  @property
  def directory(self) -> epath.Path:
    """The model's folder."""
    return self._directory

  def _folder(self, step: int) -> epath.Path:
    return epath.Path(checkpoints_utils.get_checkpoint_dir(self._directory, step))

  def all_steps(self) -> Sequence[int]:
    """Steps of whole checkpoints and of the one being written, ascending."""
    steps = set(checkpoints_utils.all_steps(self._directory))
    if self._saving is not None and not self._saving[1].done():
      steps.add(self._saving[0])
    return sorted(steps)

  def latest_step(self) -> int | None:
    """The newest step, or None."""
    return max(self.all_steps(), default=None)

  def should_save(self, step: int) -> bool:
    """Whether a checkpoint is due; depends on the step alone."""
    return save_schedule.is_save_step(step, self._period, self._checkpoint_steps)

  # -- Saving ------------------------------------------------------------------

  def _open_for_saving(self):
    """Makes sure of a writable folder, without the traces of interrupted saves."""
    if self._checkpointer is not None:
      return
    if jax.process_index() == 0:
      try:
        whole_files.make_writable(self._directory)
        for leftover in checkpoint_utils.leftovers(self._directory):
          logging.warning('Removing what an interrupted run left: %s', leftover)
          leftover.rmtree()
      except OSError as error:
        raise CheckpointSaveError(
          f"Checkpoints cannot be written to '{self._directory}': {error}. "
          f'{mend(error)}.'
        ) from error
    state_handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True)
    self._writes = writing.BackgroundWrites(state_handler)
    self._checkpointer = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(
        **{STATE_ITEM: state_handler, DATASET_ITEM: self._dataset_handler}
      ),
      timeout_secs=_SAVE_TIMEOUT,
    )
    self._finisher = concurrent.futures.ThreadPoolExecutor(1, 't5x_checkpoint')

  def save(
    self,
    train_state: Any,
    state_transformation_fns: Sequence[Any] = (),
    force: bool = True,
    metrics: Mapping[str, float] | None = None,
  ) -> bool:
    """Begins to write a checkpoint; the rest happens in the background.

    The state may be changed or donated as soon as this returns. All hosts call it.

    Args:
      train_state: what to save.
      state_transformation_fns: functions of (state dict, dict of `ParameterInfo`)
        that give both anew; applied in order.
      force: save even if `should_save` says no.
      metrics: metrics of this state, by the names of `metric_name_to_monitor`.

    Returns:
      Whether a checkpoint is written: not where one of this step exists.

    Raises:
      CheckpointSaveError: this save or the one before failed.
      DataPositionError: the position in the data cannot be saved.
    """
    del metrics
    step = step_of(train_state)
    if not force and not self.should_save(step):
      return False
    self._open_for_saving()
    self.wait_until_finished()
    folder = self._folder(step)
    if step in self.all_steps():
      logging.info('%s exists and is not written again.', folder)
      return False
    state_dict = writing.map_named(
      lambda _, x: writing.savable(x), train_state.state_dict()
    )
    infos = writing.parameter_infos(train_state, self._partitioner)
    for transform in state_transformation_fns:
      state_dict, infos = transform(state_dict, infos)
    writing.check_space(self._directory, state_dict, self._save_dtype)
    save_args = writing.map_named(
      lambda name, x: ocp.SaveArgs(
        dtype=writing.dtype_on_disk(name, x, self._save_dtype)
      ),
      state_dict,
    )
    items = {STATE_ITEM: ocp.args.PyTreeSave(state_dict, save_args=save_args)}
    if self._dataset_iterator is not None:
      items[DATASET_ITEM] = dataset_position.DatasetArgs(self._dataset_iterator)
    try:
      # Whatever has this name is not whole, or all_steps would have listed it.
      self._checkpointer.save(folder, args=ocp.args.Composite(**items), force=True)
    except dataset_position.DataPositionError:
      self._discard(folder)
      raise
    except Exception as error:
      raise self._failure(folder, error) from error
    self._saving = (step, self._finisher.submit(self._finish, folder))
    return True

  def _discard(self, folder: epath.Path):
    """Removes what a failed save has written, when nothing more is written to it."""
    self._writes.wait()
    with contextlib.suppress(Exception):
      # Now for the checkpoint's metadata: the failure came before this wait.
      self._checkpointer.wait_until_finished()
    if jax.process_index() != 0:
      return
    # TensorStore does not tell when the writes beside a failed one have ended, and
    # makes their folders anew: look until none comes back.
    begun = seen = time.monotonic()
    while (now := time.monotonic()) - seen < _QUIET_SECONDS:
      for leftover in checkpoint_utils.leftovers(self._directory):
        if folder.name + '.' in leftover.name:
          seen = now
          try:
            leftover.rmtree()
          except OSError:  # Not empty any more, or gone already.
            if now - begun > _DISCARD_TIMEOUT:
              raise
      if now - begun > 2 * _DISCARD_TIMEOUT:
        raise OSError('something writes to it still')
      time.sleep(0.05)

  def _failure(self, folder: epath.Path, error: Exception) -> CheckpointSaveError:
    try:
      self._discard(folder)
    except OSError as second:
      logging.warning('What was written of %s could not be removed: %s', folder, second)
    return CheckpointSaveError(
      f"Checkpoint '{folder}' could not be written: {error}. {mend(error)}; the "
      'checkpoints before it are whole.'
    )

  def _finish(self, folder: epath.Path):
    """Waits for the files, then removes what is too old. Runs in the background."""
    try:
      self._checkpointer.wait_until_finished()
    except Exception as error:
      raise self._failure(folder, error) from error
    if jax.process_index() == 0:
      try:
        retention.remove_old_checkpoints(self._directory, self._retention)
      except OSError as error:
        # The new checkpoint is whole; the next save tries again.
        logging.warning('Old checkpoints could not be removed: %s', error)

  def wait_until_finished(self):
    """Waits for the checkpoint being written.

    Raises:
      CheckpointSaveError: it could not be written.
    """
    if self._saving is not None:
      _, future = self._saving
      self._saving = None
      future.result()

  def close(self):
    """Waits for the checkpoint being written and ends the background work.

    Raises:
      CheckpointSaveError: it could not be written.
    """
    try:
      self.wait_until_finished()
    finally:
      if self._checkpointer is not None:
        self._checkpointer.close()
        self._finisher.shutdown()
        self._checkpointer = self._finisher = None

  # -- Restoring ---------------------------------------------------------------

  def set_aside(self, step: int) -> epath.Path:
    """Renames a damaged checkpoint, so that its step can be saved again.

    Args:
      step: its step.

    Returns:
      Its new path.
    """
    folder = self._folder(step)
    target = folder.parent / (_DAMAGED_PREFIX + folder.name)
    if jax.process_index() == 0:
      if target.exists():
        target.rmtree()
      folder.rename(target)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f't5x_set_aside_{step}')
    return target

  def _folder_to_restore(self, step: int | None, path: str | None) -> epath.Path:
    if step is not None and path is not None:
      raise ValueError(f'Give a step or a path to restore, not both ({step}, {path}).')
    if path is not None:
      folder = checkpoints_utils.absolute(path)
      if folder.name == old_layout.INDEX_FILE and folder.is_file():
        folder = folder.parent
    else:
      step = checkpoints_utils.latest_step(self._directory) if step is None else step
      folder = self._folder(step) if step is not None else self._directory
    if step is None and path is None or not folder.exists():
      found = checkpoints_utils.all_steps(
        folder.parent if path is not None else self._directory
      )
      raise FileNotFoundError(
        f"There is no checkpoint '{folder}'; "
        + (f'there are those of steps {list(found)}.' if found else 'there is none.')
      )
    return folder

  def restore(
    self,
    step: int | None = None,
    path: str | None = None,
    fallback_state: Mapping[str, Any] | None = None,
    state_transformation_fns: Sequence[Any] = (),
    lazy_parameters: bool | None = False,
  ) -> Any:
    """Restores a train state, and the iterator's position if there is an iterator.

    Args:
      step: which checkpoint of this folder; the newest if neither is given.
      path: a checkpoint anywhere, instead.
      fallback_state: state dict for arrays that the checkpoint lacks.
      state_transformation_fns: functions of (saved state dict, state dict of this
        model) that give the saved one under this model's names.
      lazy_parameters: refused: arrays are read when they are restored.

    Returns:
      The train state, sharded over the partitioner's mesh.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: it is of another model, or its position of another pipeline.
      DamagedCheckpointError: it cannot be read.
    """
    if lazy_parameters:
      raise ValueError('lazy_parameters=True, but Orbax reads arrays at once.')
    folder = self._folder_to_restore(step, path)
    if (folder / STATE_ITEM).is_dir():
      reader, position = reading, folder / DATASET_ITEM
    elif (folder / old_layout.INDEX_FILE).exists():
      reader, position = old_layout, folder
    else:
      if steps := list(checkpoints_utils.all_steps(folder)):
        raise ValueError(
          f"'{folder}' is the folder of a run, with checkpoints of the steps {steps}. "
          f'Name one of them: {folder}/checkpoint_{steps[-1]}.'
        )
      raise reading.DamagedCheckpointError(
        f"'{folder}' has neither a folder '{STATE_ITEM}' nor a file "
        f"'{old_layout.INDEX_FILE}': it is no checkpoint of T5X, or damaged."
      )
    state_dict = reader.read_state(
      folder, self._destination(), state_transformation_fns, fallback_state
    )
    if self._dataset_iterator is not None:
      self._restore_position(position)
    return self._train_state.restore_state(state_dict)

  def _destination(self) -> reading.Destination:
    return reading.Destination(
      self._train_state.state_dict(),
      self._partitioner.get_mesh_axes(self._train_state).state_dict(),
      self._partitioner.mesh,
      self._restore_dtype,
    )

  def _restore_position(self, folder: epath.Path):
    try:
      self._dataset_handler.restore(
        folder, dataset_position.DatasetArgs(self._dataset_iterator)
      )
    except dataset_position.DataPositionError:
      raise
    except Exception as error:
      raise reading.DamagedCheckpointError(
        f"'{folder}' is unreadable: {error}"
      ) from error

  def restore_from_tf_checkpoint(
    self, path_or_dir: str, strict: bool = True, translator: Any = None
  ) -> Any:
    """Restores a T5 that was trained with Mesh TensorFlow.

    Args:
      path_or_dir: a folder or the prefix `.../model.ckpt-<step>`.
      strict: whether a variable that this model has not is an error.
      translator: rules for the names; None for those of T5 and T5 1.1.

    Returns:
      The train state, sharded over the partitioner's mesh.

    Raises:
      ValueError: it is of another model.
    """
    destination = self._destination()
    tree = checkpoint_importer.restore_from_t5_checkpoint(
      destination.state_dict, path_or_dir, strict=strict, translator=translator
    )
    return self._train_state.restore_state(writing.map_named(destination.place, tree))
