"""T5X's interface from before Orbax, over the same checkpoints: `use_orbax=False`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from t5x import checkpoints_utils
from t5x.checkpointing import configs


@dataclasses.dataclass(kw_only=True)
class LegacyCheckpointer:
  """A pair of `Checkpointer`s, one to save and one to restore.

  Attributes:
    save_checkpointer: None for one that only restores.
    restore_checkpointer: reads.
    strict: handed on for TensorFlow checkpoints.
  """

  save_checkpointer: Any = None
  restore_checkpointer: Any
  strict: bool | None = False

  def save(
    self,
    path: str,
    item: Any,
    force: bool = False,
    custom_metadata: dict[str, Any] | None = None,
    state_transformation_fns: Sequence[Callable] = (),
    *,
    concurrent_gb: int = 128,
  ):
    """Saves a train state into the save checkpointer's folder.

    Args:
      path: unused, as the checkpointer has its folder.
      item: the train state.
      force: unused; Orbax's signature.
      custom_metadata: unused; Orbax's signature.
      state_transformation_fns: applied before saving.
      concurrent_gb: handed on.

    Raises:
      ValueError: there is no save checkpointer.
    """
    del path, force, custom_metadata
    if self.save_checkpointer is None:
      raise ValueError('This LegacyCheckpointer has no save_checkpointer.')
    self.save_checkpointer.save(
      item, state_transformation_fns, concurrent_gb=concurrent_gb
    )

  def restore(
    self,
    path: str,
    item: Any = None,
    state_transformation_fns: Sequence[Callable] = (),
    fallback_state: Mapping[str, Any] | None = None,
    lazy_parameters: bool = False,
  ) -> Any:
    """Restores a train state; see `Checkpointer.restore`."""
    del item
    if epath.Path(path + '.index').exists():
      return self.restore_checkpointer.restore_from_tf_checkpoint(
        path, strict=self.strict
      )
    return self.restore_checkpointer.restore(
      path=path,
      state_transformation_fns=state_transformation_fns,
      fallback_state=fallback_state,
      lazy_parameters=lazy_parameters,
    )


class LegacyCheckpointManager:
  """Saves and restores by the `checkpointer_cls` of two configurations."""

  def __init__(
    self,
    *,
    save_cfg: configs.SaveCheckpointConfig | None,
    restore_cfg: configs.RestoreCheckpointConfig | None,
    train_state_shape: Any,
    partitioner: Any,
    ds_iter: Any = None,
    model_dir: str | None = None,
  ):
    """Builds the checkpointers.

    Args:
      save_cfg: how to save; None for a manager that only restores.
      restore_cfg: how to restore; None for one that only saves.
      train_state_shape: state of arrays or of their shapes.
      partitioner: lays restored arrays on the mesh.
      ds_iter: the training iterator.
      model_dir: the folder.

    Raises:
      ValueError: the position in the data is to be saved, and there is no iterator.
    """
    if save_cfg is not None and save_cfg.save_dataset and ds_iter is None:
      raise ValueError('save_dataset is True, but there is no training iterator.')
    common = dict(
      train_state=train_state_shape,
      partitioner=partitioner,
      checkpoints_dir=model_dir,
    )
    save_checkpointer = save_cfg and save_cfg.checkpointer_cls(
      **common,
      keep=save_cfg.keep,
      keep_dataset_checkpoints=save_cfg.keep_dataset_checkpoints,
      save_dtype=save_cfg.dtype,
      dataset_iterator=ds_iter if save_cfg.save_dataset else None,
    )
    restore_checkpointer = restore_cfg and restore_cfg.checkpointer_cls(
      dataset_iterator=ds_iter if restore_cfg.restore_dataset else None,
      restore_dtype=restore_cfg.dtype,
      **common,
    )
    self._model_dir = model_dir
    self._checkpointer = LegacyCheckpointer(
      save_checkpointer=save_checkpointer,
      restore_checkpointer=restore_checkpointer,
      strict=restore_cfg.strict if restore_cfg else False,
    )

  def all_steps(self) -> Sequence[int]:
    """Steps of the checkpoints in the folder, ascending."""
    return checkpoints_utils.all_steps(self._model_dir)

  def latest_step(self) -> int | None:
    """The newest step, or None."""
    return checkpoints_utils.latest_step(self._model_dir)

  def wait_until_finished(self):
    """Nothing to wait for: `save` returns when the checkpoint is whole."""

  def close(self):
    """Nothing to close."""

  def save(
    self,
    train_state: Any,
    state_transformation_fns: Sequence[Callable] = (),
    metrics: Mapping[str, float] | None = None,
  ):
    """Saves a train state, waiting until it is whole.

    Args:
      train_state: what to save.
      state_transformation_fns: applied before saving.
      metrics: unused.
    """
    del metrics
    self._checkpointer.save(
      '', train_state, state_transformation_fns=state_transformation_fns
    )

  def restore(
    self,
    paths: Sequence[str],
    restore_cfg: configs.RestoreCheckpointConfig | None = None,
    fallback_state: Mapping[str, Any] | None = None,
  ) -> Any:
    """Restores checkpoints.

    Args:
      paths: the checkpoints.
      restore_cfg: for its transformations.
      fallback_state: state dict for what a checkpoint lacks.

    Returns:
      The train state; a list for several paths; None without a configuration.
    """
    if restore_cfg is None or paths is None:
      return None
    states = [
      self._checkpointer.restore(
        path,
        state_transformation_fns=restore_cfg.state_transformation_fns,
        fallback_state=fallback_state,
      )
      for path in paths
    ]
    return states[0] if len(states) == 1 else states
