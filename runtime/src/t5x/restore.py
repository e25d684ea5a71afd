"""Train states from scratch or from checkpoints, on the mesh.

Also the names under which T5X's users know this: the configurations live in
`checkpointing.configs`, the list of variables in `model_info`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import flax.core
import jax
import numpy as np
from absl import logging
from etils import epath
from flax.core import scope as flax_scope
from jax.experimental import multihost_utils

from t5x import checkpoints, checkpoints_utils, state_utils, train_state
from t5x.checkpointing.configs import (
  AssignmentMap,
  CheckpointConfig,
  RestoreCheckpointConfig,
  SaveCheckpointConfig,
  get_fallback_state,
  get_first_valid_restore_config_and_paths,
)
from t5x.checkpointing.old_interface import LegacyCheckpointer, LegacyCheckpointManager
from t5x.model_info import log_model_info

__all__ = [
  'AssignmentMap',
  'CheckpointConfig',
  'InitFnCallable',
  'LegacyCheckpointManager',
  'LegacyCheckpointer',
  'RestoreCheckpointConfig',
  'SaveCheckpointConfig',
  'TrainStateInitializer',
  'create_checkpoint_manager_and_restore',
  'create_orbax_checkpoint_manager',
  'get_fallback_state',
  'get_first_valid_restore_config_and_paths',
  'log_model_info',
  'restore',
]


class InitFnCallable(Protocol):
  """Initialises a model's variables."""

  def __call__(
    self,
    rng: Any,
    input_shapes: Mapping[str, Any],
    input_types: Mapping[str, Any] | None,
  ) -> flax_scope.FrozenVariableDict: ...


def _is_tensorflow(path: str) -> bool:
  """Whether a path is the prefix of a TensorFlow checkpoint's files."""
  return epath.Path(path + '.index').exists()


def _restore_one(
  manager: Any,
  path: str,
  cfg: RestoreCheckpointConfig,
  fallback_state: Mapping[str, Any] | None,
) -> Any:
  """Restores a checkpoint of whatever kind."""
  if _is_tensorflow(path):
    if cfg.state_transformation_fns:
      raise ValueError(
        f"'{path}' is a checkpoint of TensorFlow: neither assignment_map nor "
        'state_transformation_fns apply to it. Convert it first, with '
        'Checkpointer.convert_from_tf_checkpoint.'
      )
    return manager.restore_from_tf_checkpoint(path, strict=cfg.strict)
  logging.info('Restoring %s.', path)
  return manager.restore(
    path=path,
    fallback_state=fallback_state,
    state_transformation_fns=cfg.state_transformation_fns,
  )


def restore(
  checkpoint_manager: Any,
  paths: Sequence[str] | None,
  restore_cfg: RestoreCheckpointConfig | None,
  fallback_state: Mapping[str, Any] | None = None,
) -> Any:
  """Restores checkpoints by a configuration.

  Args:
    checkpoint_manager: what reads.
    paths: the checkpoints.
    restore_cfg: names, dtypes and so on.
    fallback_state: state dict for what the checkpoints lack.

  Returns:
    The train state; a list of them for several paths; None if there is no
    configuration.
  """
  if restore_cfg is None or paths is None:
    return None
  states = [
    _restore_one(checkpoint_manager, path, restore_cfg, fallback_state)
    for path in paths
  ]
  return states[0] if len(states) == 1 else states


class TrainStateInitializer:
  """Makes train states on the mesh, random or restored.

  Attributes:
    global_train_state_shape: the state with `jax.ShapeDtypeStruct` for arrays.
    train_state_axes: the state with PartitionSpecs (None: replicated).
  """

  def __init__(
    self,
    optimizer_def: Any,
    init_fn: InitFnCallable,
    input_shapes: Mapping[str, Any],
    partitioner: Any,
    input_types: Mapping[str, Any] | None = None,
  ):
    """Works out the shapes and axes of the state; nothing is computed yet.

    Args:
      optimizer_def: the optimizer; None for a state for inference only.
      init_fn: usually a model's `get_initial_variables`.
      input_shapes: feature -> shape of the global batch.
      partitioner: lays the state on the mesh.
      input_types: feature -> dtype; None for float32.
    """

    def initialize(rng):
      variables = flax.core.freeze(
        init_fn(rng=rng, input_shapes=input_shapes, input_types=input_types)
      )
      if optimizer_def is None:
        return train_state.InferenceState.create(variables)
      return train_state.FlaxOptimTrainState.create(optimizer_def, variables)

    self._initialize = initialize
    self._partitioner = partitioner
    self.global_train_state_shape = jax.eval_shape(initialize, jax.random.PRNGKey(0))
    self.train_state_axes = partitioner.get_mesh_axes(self.global_train_state_shape)

  def from_scratch(self, init_rng: Any) -> train_state.TrainState:
    """Initialises a state where it will live, without a detour over one device.

    Args:
      init_rng: random key.

    Returns:
      The state.
    """
    logging.info('Initialising parameters from scratch.')
    initialize = self._partitioner.partition(
      self._initialize,
      in_axis_resources=None,
      out_axis_resources=self.train_state_axes,
    )
    return initialize(init_rng)

  def from_checkpoints(
    self,
    restore_cfgs: Sequence[RestoreCheckpointConfig],
    ds_iter: Any = None,
    init_rng: Any = None,
  ) -> Iterable[tuple[train_state.TrainState, str]]:
    """Restores the checkpoints of the first configuration that has any.

    Args:
      restore_cfgs: in order of precedence.
      ds_iter: iterator to be moved to the saved position, where the configuration
        says so.
      init_rng: random key for what a checkpoint lacks.

    Yields:
      (state, path of its checkpoint); nothing where there is no checkpoint. In
      mode 'latest', a damaged checkpoint is reported and the one before is taken.
    """
    cfg, paths = get_first_valid_restore_config_and_paths(restore_cfgs)
    if cfg is None:
      return
    fallback = _fallback(self, cfg, init_rng)
    for path in paths:
      reader = create_orbax_checkpoint_manager(
        restore_cfg=cfg,
        train_state=self.global_train_state_shape,
        partitioner=self._partitioner,
        ds_iter=ds_iter,
        model_dir=os.fspath(_folder_of(path)),
      )
      state, taken, _ = _restore_newest_readable(reader, path, cfg, fallback)
      yield state, taken

  def from_checkpoint(
    self,
    ckpt_cfgs: Sequence[RestoreCheckpointConfig],
    *,
    ds_iter: Any = None,
    init_rng: Any = None,
  ) -> train_state.TrainState | None:
    """Restores one checkpoint, if there is one.

    Args:
      ckpt_cfgs: in order of precedence.
      ds_iter: see `from_checkpoints`.
      init_rng: see `from_checkpoints`.

    Returns:
      The state or None.

    Raises:
      ValueError: there are several.
    """
    found = list(self.from_checkpoints(ckpt_cfgs, ds_iter=ds_iter, init_rng=init_rng))
    if len(found) > 1:
      raise ValueError(
        f'{len(found)} checkpoints match where one is wanted: '
        f'{", ".join(path for _, path in found)}.'
      )
    return found[0][0] if found else None

  def from_checkpoint_or_scratch(
    self,
    ckpt_cfgs: Sequence[RestoreCheckpointConfig],
    *,
    init_rng: Any,
    ds_iter: Any = None,
  ) -> train_state.TrainState:
    """Restores one checkpoint, or initialises a state where there is none.

    Args:
      ckpt_cfgs: in order of precedence.
      init_rng: random key.
      ds_iter: see `from_checkpoints`.

    Returns:
      The state.
    """
    restored = self.from_checkpoint(ckpt_cfgs, ds_iter=ds_iter, init_rng=init_rng)
    return self.from_scratch(init_rng) if restored is None else restored


def _fallback(
  initializer: TrainStateInitializer,
  cfg: RestoreCheckpointConfig | None,
  init_rng: Any,
) -> Mapping[str, Any] | None:
  """What to take where a checkpoint lacks something; None for nothing.

  1. `fallback_to_scratch`: anything.
  2. `strict` is False: the optimizer's states, if there is an optimizer.
  """

  def initial(rng):
    return initializer.from_scratch(rng).state_dict()

  if cfg is None or cfg.strict or cfg.fallback_to_scratch:
    return get_fallback_state(cfg, initial, init_rng)
  shapes = initializer.global_train_state_shape.state_dict()
  if not state_utils.flatten_state_dict(shapes['state'].get('param_states') or {}):
    return None
  # An optimizer's first state does not depend on the key.
  fresh = initial(jax.random.PRNGKey(0) if init_rng is None else init_rng)
  return {'state': {'param_states': fresh['state']['param_states']}}


def _folder_of(checkpoint: str) -> epath.Path:
  """The folder that a checkpoint lies in."""
  return checkpoints_utils.absolute(checkpoint).parent


def _all_hosts(succeeded: bool) -> bool:
  if jax.process_count() == 1:
    return succeeded
  return bool(multihost_utils.process_allgather(np.asarray(succeeded)).all())


def _restore_newest_readable(
  manager: Any,
  path: str,
  cfg: RestoreCheckpointConfig,
  fallback_state: Mapping[str, Any] | None,
) -> tuple[Any, str, list[int]]:
  """Restores a checkpoint, or in mode 'latest' one before it if it is damaged.

  Returns:
    (the train state, the path it came from, steps of damaged checkpoints).

  Raises:
    DamagedCheckpointError: none can be read.
  """
  if cfg.mode != 'latest' or _is_tensorflow(path):
    return _restore_one(manager, path, cfg, fallback_state), path, []
  folder, newest = checkpoints_utils.get_step_from_checkpoint_dir(path)
  damaged, problem = [], None
  steps = [step for step in checkpoints_utils.all_steps(folder) if step <= newest]
  for step in reversed(steps):
    taken = os.fspath(checkpoints_utils.get_checkpoint_dir(folder, step))
    state = None
    try:
      state = _restore_one(manager, taken, cfg, fallback_state)
    except checkpoints.DamagedCheckpointError as error:
      problem = error
      logging.error("Checkpoint '%s' is damaged: %s", taken, error)
    if _all_hosts(state is not None):
      if damaged:
        logging.error("Took '%s' instead.", taken)
      return state, taken, damaged
    damaged.append(step)
  raise checkpoints.DamagedCheckpointError(
    f"No checkpoint in '{folder}' can be read (steps {steps}). Restore the folder "
    'from a copy, or move these checkpoints away to begin anew.'
  ) from problem


def create_orbax_checkpoint_manager(
  *,
  save_cfg: SaveCheckpointConfig | None = None,
  restore_cfg: RestoreCheckpointConfig | None = None,
  train_state: Any,
  partitioner: Any,
  ds_iter: Any = None,
  model_dir: str | None = None,
) -> Any:
  """Builds the manager that configurations describe.

  Args:
    save_cfg: how to save; None for a manager that only reads.
    restore_cfg: how to restore.
    train_state: state of arrays or of their shapes.
    partitioner: lays restored arrays on the mesh.
    ds_iter: training iterator; used if a configuration wants its position.
    model_dir: the folder.

  Returns:
    The manager.

  Raises:
    ValueError: the configurations disagree about the class of the manager.
  """
  cfgs = [cfg for cfg in (save_cfg, restore_cfg) if cfg is not None]
  if not cfgs:
    raise ValueError('A checkpoint manager needs a save or a restore configuration.')
  cls = cfgs[0].checkpoint_manager_cls
  if cls is not cfgs[-1].checkpoint_manager_cls:
    raise ValueError(
      'SaveCheckpointConfig and RestoreCheckpointConfig have different '
      f'checkpoint_manager_cls: {cls}, {cfgs[-1].checkpoint_manager_cls}.'
    )
  with_position = bool(
    (save_cfg and save_cfg.save_dataset)
    or (restore_cfg and restore_cfg.restore_dataset)
  )
  options = dict(period=None)
  if save_cfg is not None:
    options = checkpoints.manager_options_of(
      save_cfg.checkpointer_cls,
      train_state=train_state,
      partitioner=partitioner,
      checkpoints_dir=model_dir,
    )
    options |= dict(period=save_cfg.period, save_dtype=save_cfg.dtype)
    # What is unset may be bound to the manager's class itself.
    for name in ('keep', 'checkpoint_steps', 'keep_dataset_checkpoints'):
      if getattr(save_cfg, name) is not None:
        options[name] = getattr(save_cfg, name)
  if restore_cfg is not None:
    options['restore_dtype'] = restore_cfg.dtype
  return cls(
    directory=model_dir,
    train_state=train_state,
    partitioner=partitioner,
    dataset_iterator=ds_iter if with_position else None,
    **options,
  )


def _saving_manager(
  save_cfg: SaveCheckpointConfig,
  restore_cfg: RestoreCheckpointConfig | None,
  use_orbax: bool,
  **common: Any,
) -> Any:
  """What saves: an Orbax manager, or the interface from before."""
  if use_orbax:
    return create_orbax_checkpoint_manager(save_cfg=save_cfg, **common)
  shapes = common.pop('train_state')
  return LegacyCheckpointManager(
    save_cfg=save_cfg, restore_cfg=restore_cfg, train_state_shape=shapes, **common
  )


def create_checkpoint_manager_and_restore(
  train_state_initializer: TrainStateInitializer,
  partitioner: Any,
  restore_checkpoint_cfg: RestoreCheckpointConfig | None,
  restore_path: str | None,
  fallback_init_rng: Any,
  save_checkpoint_cfg: SaveCheckpointConfig | None = None,
  model_dir: str | None = None,
  ds_iter: Any = None,
  use_orbax: bool = False,
) -> tuple[Any, Any]:
  """Restores a checkpoint, if one is given, and builds the manager for more.

  In mode 'latest', a damaged checkpoint is reported and the one before is taken;
  where the run saves into that folder, the damaged one is renamed.

  Args:
    train_state_initializer: knows the state's shapes.
    partitioner: lays restored arrays on the mesh.
    restore_checkpoint_cfg: how to restore.
    restore_path: the checkpoint; None restores nothing.
    fallback_init_rng: random key for what the checkpoint lacks.
    save_checkpoint_cfg: how to save; None for a manager that only reads.
    model_dir: the run's folder; by default that of the configuration.
    ds_iter: the training iterator.
    use_orbax: False writes before it returns, as T5X did before Orbax.

  Returns:
    (the train state or None, the manager).
  """
  if model_dir is None:
    path = _folder_of(restore_path) if restore_path else restore_checkpoint_cfg.path
    model_dir = os.fspath(path)
  common = dict(
    train_state=train_state_initializer.global_train_state_shape,
    partitioner=partitioner,
    ds_iter=ds_iter,
    model_dir=model_dir,
  )
  state, damaged, reader = None, [], None
  if restore_checkpoint_cfg is not None:
    reader = create_orbax_checkpoint_manager(
      restore_cfg=restore_checkpoint_cfg, **common
    )
  if restore_path:
    fallback = _fallback(
      train_state_initializer, restore_checkpoint_cfg, fallback_init_rng
    )
    state, _, damaged = _restore_newest_readable(
      reader, restore_path, restore_checkpoint_cfg, fallback
    )
  if save_checkpoint_cfg is None:
    return state, reader
  manager = _saving_manager(
    save_checkpoint_cfg, restore_checkpoint_cfg, use_orbax, **common
  )
  if damaged and _folder_of(restore_path) == checkpoints_utils.absolute(model_dir):
    for step in damaged:
      logging.error('Renamed the damaged checkpoint to %s.', reader.set_aside(step))
  return state, manager
