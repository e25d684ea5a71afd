"""Initialises and restores train states on the mesh, and configures checkpoints."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.core
import jax
from absl import logging
from clu import parameter_overview
from etils import epath

from t5x import checkpoints, multihost, state_utils, train_state

_RESTORE_MODES = ('specific', 'latest', 'all')


# -- Configuration -------------------------------------------------------------


def _check_dtype(owner: str, dtype: str | None, known: Sequence[str]):
  if dtype is not None and dtype not in known:
    raise ValueError(f"{owner}.dtype must be None or one of {known}. Got: '{dtype}'.")


@dataclasses.dataclass
class SaveCheckpointConfig:
  """Configures when and how to save.

  Attributes:
    dtype: parameters are cast to it on disk: 'float32', 'bfloat16', or None for
      unchanged. Optimizer states are never cast.
    period: steps between checkpoints, counted from step 0; 0 or None for none.
    checkpoint_steps: further steps to save at.
    keep: how many of the newest checkpoints to keep (with a monitored metric, of the
      best); None keeps all.
    keep_dataset_checkpoints: how many of the newest keep the dataset state; None: all.
    save_dataset: whether to save the dataset state.
    checkpointer_cls: `SaveBestCheckpointer` keeps the best by a metric.
    state_transformation_fns: applied in order to the state dict before it is saved.
    checkpoint_manager_cls: builds the manager that saves.
  """

  dtype: str | None = 'float32'
  period: int | None = None
  checkpoint_steps: Sequence[int] | None = None
  keep: int | None = None
  keep_dataset_checkpoints: int | None = None
  save_dataset: bool = False
  checkpointer_cls: Callable[..., checkpoints.Checkpointer] = checkpoints.Checkpointer
  state_transformation_fns: Sequence[checkpoints.SaveStateTransformationFn] = (
    dataclasses.field(default_factory=list)
  )
  checkpoint_manager_cls: Callable[..., Any] = (
    checkpoints.OrbaxCheckpointManagerInterface
  )

  def __post_init__(self):
    _check_dtype('SaveCheckpointConfig', self.dtype, ('float32', 'bfloat16'))
    if self.keep is not None and self.keep < 1:
      raise ValueError(
        f'SaveCheckpointConfig.keep must be at least 1, or None. Got: {self.keep}.'
      )
    negative = [s for s in (self.period or 0, *(self.checkpoint_steps or ())) if s < 0]
    if negative:
      raise ValueError(
        'SaveCheckpointConfig.period and checkpoint_steps must not be negative. Got: '
        f'{negative}.'
      )
    if self.keep_dataset_checkpoints is not None and not self.save_dataset:
      raise ValueError(
        'SaveCheckpointConfig.keep_dataset_checkpoints is '
        f'{self.keep_dataset_checkpoints}, but save_dataset is False. Set save_dataset '
        'to True, or leave keep_dataset_checkpoints unset.'
      )


@dataclasses.dataclass(frozen=True)
class AssignmentMap:
  """Applies an assignment map as a `RestoreStateTransformationFn`."""

  rules: Sequence[tuple[str, str | None]]

  def __call__(
    self,
    state_dict: Mapping[str, Any],
    target_state_dict: Mapping[str, Any],
    *,
    is_resuming: bool = False,
  ) -> Mapping[str, Any]:
    return state_utils.apply_assignment_map(
      state_dict, target_state_dict, self.rules, is_resuming=is_resuming
    )


@dataclasses.dataclass
class RestoreCheckpointConfig:
  """Configures what to restore.

  Attributes:
    path: a checkpoint (mode 'specific') or a folder of them, or several of either.
    mode: 'specific' restores `path`, 'latest' the newest in the folder, 'all' each in
      turn.
    assignment_map: pairs (pattern, replacement) of regular expressions. A name of
      this model that matches the pattern is read from the replacement's name in the
      checkpoint, or not restored if the replacement is None.
    strict: if False, optimizer states that the checkpoint lacks are initialised.
    fallback_to_scratch: whether all arrays that the checkpoint lacks, or that the
      assignment map drops, are initialised.
    dtype: parameters are cast to it: 'float32', 'bfloat16', 'float16', or None for
      as saved.
    restore_dataset: whether to restore the dataset state.
    checkpointer_cls: ignored (T5X compatibility); see `checkpoint_manager_cls`.
    state_transformation_fns: applied in order to the saved state dict, after the
      assignment map.
    checkpoint_manager_cls: builds the manager that reads.
  """

  path: str | Sequence[str]
  mode: str = 'latest'
  assignment_map: Sequence[tuple[str, str | None]] | None = None
  strict: bool = True
  fallback_to_scratch: bool = False
  dtype: str | None = None
  restore_dataset: bool = False
  checkpointer_cls: Callable[..., checkpoints.Checkpointer] = checkpoints.Checkpointer
  state_transformation_fns: Sequence[checkpoints.RestoreStateTransformationFn] = ()
  checkpoint_manager_cls: Callable[..., Any] = (
    checkpoints.OrbaxCheckpointManagerInterface
  )

  def __post_init__(self):
    if self.mode not in _RESTORE_MODES:
      raise ValueError(
        f'RestoreCheckpointConfig.mode must be one of {_RESTORE_MODES}. Got: '
        f"'{self.mode}'."
      )
    _check_dtype(
      'RestoreCheckpointConfig', self.dtype, ('float32', 'bfloat16', 'float16')
    )
    # `dataclasses.replace` runs this again and must not add the map twice.
    others = [
      fn for fn in self.state_transformation_fns if not isinstance(fn, AssignmentMap)
    ]
    if self.assignment_map is not None:
      self.state_transformation_fns = (AssignmentMap(self.assignment_map), *others)


@dataclasses.dataclass
class CheckpointConfig:
  """Configures saving and restoring; None switches either off."""

  save: SaveCheckpointConfig | None = None
  restore: RestoreCheckpointConfig | None = None


def _checkpoints_in(folder: str) -> list[str]:
  """Paths of the checkpoints in a folder, oldest first."""
  steps = checkpoints.all_steps(folder)
  if not epath.Path(folder).is_dir() or (
    not steps and checkpoints.step_in_name(folder) is not None
  ):
    raise ValueError(
      "RestoreCheckpointConfig.mode 'latest' and 'all' take a folder of checkpoints. "
      f"Got: '{folder}'. For a single checkpoint, set mode = 'specific'."
    )
  return [checkpoints.get_checkpoint_dir(folder, step) for step in steps]


def get_first_valid_restore_config_and_paths(
  restore_cfgs: Sequence[RestoreCheckpointConfig],
) -> tuple[RestoreCheckpointConfig | None, Sequence[str]]:
  """Finds the first configuration with a checkpoint; mode 'specific' always has one.

  Returns:
    (the configuration, its checkpoints, oldest first), or (None, []).

  Raises:
    ValueError: a folder to search does not exist, or is itself a checkpoint.
  """
  for cfg in restore_cfgs:
    paths = [cfg.path] if isinstance(cfg.path, str) else list(cfg.path)
    if cfg.mode == 'specific':
      return cfg, paths
    for folder in paths:
      if found := _checkpoints_in(folder):
        return cfg, found if cfg.mode == 'all' else found[-1:]
      logging.info('No checkpoints in %s.', folder)
  return None, []


# -- Train states --------------------------------------------------------------


class TrainStateInitializer:
  """Initialises or restores train states on the mesh.

  Attributes:
    global_train_state_shape: the state with `jax.ShapeDtypeStruct` for arrays.
    train_state_axes: the state with PartitionSpecs (None: replicated).
  """

  def __init__(
    self,
    optimizer_def: Any,
    init_fn: Callable[..., Any],
    input_shapes: Mapping[str, Any],
    partitioner: Any,
    input_types: Mapping[str, Any] | None = None,
  ):
    """Derives the shapes and axes of the state without computing it.

    Args:
      optimizer_def: the optimizer; None for an inference state.
      init_fn: initialises the variables, like a model's `get_initial_variables`.
      input_shapes: feature -> shape of the global batch.
      partitioner: lays the state out on the mesh.
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
    """Initialises a state on the devices of its mesh."""
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

    Mode 'latest' reports a damaged checkpoint and restores the one before.

    Args:
      restore_cfgs: in order of precedence.
      ds_iter: iterator whose state is restored if the configuration says so.
      init_rng: random key for arrays that a checkpoint lacks.

    Yields:
      (state, path of its checkpoint).
    """
    cfg, paths = get_first_valid_restore_config_and_paths(restore_cfgs)
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
    """Restores the only checkpoint, or returns None if there is none.

    Raises:
      ValueError: there are several.
    """
    found = list(self.from_checkpoints(ckpt_cfgs, ds_iter=ds_iter, init_rng=init_rng))
    if len(found) > 1:
      raise ValueError(f'Expected one checkpoint. Got: {[path for _, path in found]}.')
    return found[0][0] if found else None

  def from_checkpoint_or_scratch(
    self,
    ckpt_cfgs: Sequence[RestoreCheckpointConfig],
    *,
    init_rng: Any,
    ds_iter: Any = None,
  ) -> train_state.TrainState:
    """Restores the only checkpoint, or initialises a state if there is none."""
    restored = self.from_checkpoint(ckpt_cfgs, ds_iter=ds_iter, init_rng=init_rng)
    return self.from_scratch(init_rng) if restored is None else restored


def _fallback(
  initializer: TrainStateInitializer,
  cfg: RestoreCheckpointConfig | None,
  init_rng: Any,
) -> Mapping[str, Any] | None:
  """State dict with the arrays that a checkpoint may lack, or None."""
  if cfg is None or cfg.strict and not cfg.fallback_to_scratch:
    return None
  if cfg.fallback_to_scratch:  # Any array may be missing.
    if not cfg.state_transformation_fns:
      raise ValueError(
        'RestoreCheckpointConfig.fallback_to_scratch is True without assignment_map or '
        'state_transformation_fns, so a misspelt name would silently start from '
        'scratch. Name the arrays that the checkpoint lacks, for instance with '
        "assignment_map = ((r'target/new_head/.*', None),)."
      )
    if init_rng is None:
      raise ValueError(
        'RestoreCheckpointConfig.fallback_to_scratch is True without a random key. In '
        'eval and infer, set fallback_init_rng.'
      )
    return initializer.from_scratch(init_rng).state_dict()
  # With strict = False, only optimizer states may be missing.
  shapes = initializer.global_train_state_shape.state_dict()
  if not state_utils.flatten_state_dict(shapes['state'].get('param_states') or {}):
    return None
  # An optimizer's initial state does not depend on the key.
  fresh = initializer.from_scratch(
    jax.random.PRNGKey(0) if init_rng is None else init_rng
  ).state_dict()
  return {'state': {'param_states': fresh['state']['param_states']}}


def _folder_of(checkpoint: str) -> epath.Path:
  return checkpoints.absolute(checkpoint).parent


def _restore_newest_readable(
  manager: Any,
  path: str,
  cfg: RestoreCheckpointConfig,
  fallback_state: Mapping[str, Any] | None,
) -> tuple[Any, str, list[int]]:
  """Restores a checkpoint or, in mode 'latest', the newest undamaged one up to it.

  Returns (the train state, its path, steps of damaged checkpoints).
  """
  candidates = [path]
  if cfg.mode == 'latest':
    folder, newest = _folder_of(path), checkpoints.step_in_name(path)
    steps = [step for step in checkpoints.all_steps(folder) if step <= newest]
    candidates = [checkpoints.get_checkpoint_dir(folder, s) for s in reversed(steps)]
  damaged, problem = [], None
  for candidate in candidates:
    logging.info('Restoring %s.', candidate)
    state = None
    try:
      state = manager.restore(
        path=candidate,
        fallback_state=fallback_state,
        state_transformation_fns=cfg.state_transformation_fns,
      )
    except checkpoints.DamagedCheckpointError as error:
      if cfg.mode != 'latest':
        raise
      problem = error
      logging.error("Checkpoint '%s' is damaged: %s", candidate, error)
    if multihost.everywhere(state is not None):
      if damaged:
        logging.error("Restored '%s' instead.", candidate)
      return state, candidate, damaged
    damaged.append(checkpoints.step_in_name(candidate))
  raise checkpoints.DamagedCheckpointError(
    f"All checkpoints in '{folder}' are damaged (steps {steps}). Restore the folder "
    'from a backup, or move the checkpoints away to start from scratch.'
  ) from problem


def _set_options(save_cfg: SaveCheckpointConfig, *names: str) -> dict[str, Any]:
  """The fields that are set: gin may bind the others to the manager's class."""
  options = {name: getattr(save_cfg, name) for name in names}
  return {name: value for name, value in options.items() if value is not None}


def create_orbax_checkpoint_manager(
  *,
  save_cfg: SaveCheckpointConfig | None = None,
  restore_cfg: RestoreCheckpointConfig | None = None,
  train_state: Any,
  partitioner: Any,
  ds_iter: Any = None,
  model_dir: str | None = None,
) -> Any:
  """Builds the checkpoint manager of `model_dir` from its configurations.

  Without `save_cfg`, the manager only reads. `train_state` has arrays or their shapes.
  The state of `ds_iter` is saved or restored if a configuration says so.
  """
  options: dict[str, Any] = dict(period=None)
  with_dataset = bool(restore_cfg and restore_cfg.restore_dataset)
  if save_cfg is not None:
    # Built, not inspected, because gin and `functools.partial` may wrap the class.
    options = save_cfg.checkpointer_cls(train_state, partitioner, model_dir).retention
    options |= dict(period=save_cfg.period, save_dtype=save_cfg.dtype)
    options |= _set_options(
      save_cfg, 'keep', 'checkpoint_steps', 'keep_dataset_checkpoints'
    )
    with_dataset |= save_cfg.save_dataset
  if restore_cfg is not None:
    options['restore_dtype'] = restore_cfg.dtype
  return (save_cfg or restore_cfg).checkpoint_manager_cls(
    directory=model_dir,
    train_state=train_state,
    partitioner=partitioner,
    dataset_iterator=ds_iter if with_dataset else None,
    **options,
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
  use_orbax: bool = True,
) -> tuple[Any, Any]:
  """Restores a checkpoint and builds the manager that saves further ones.

  Mode 'latest' reports a damaged checkpoint and restores the one before. If the run
  saves into the same folder, the damaged checkpoint is renamed.

  Args:
    train_state_initializer: describes the state.
    partitioner: lays restored arrays out on the mesh.
    restore_checkpoint_cfg: how to restore.
    restore_path: the checkpoint; None restores nothing.
    fallback_init_rng: random key for arrays that the checkpoint lacks.
    save_checkpoint_cfg: how to save; None for a manager that only reads.
    model_dir: the run's folder; None for that of the checkpoint.
    ds_iter: the training iterator.
    use_orbax: False saves with `save_checkpoint_cfg.checkpointer_cls`, in the layout
      before Orbax. Both layouts are read in any case.

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
  if damaged and _folder_of(restore_path) == checkpoints.absolute(model_dir):
    for step in damaged:
      reader.set_aside(step)
  if not use_orbax:
    save_cfg = save_checkpoint_cfg
    return state, save_cfg.checkpointer_cls(
      common['train_state'],
      partitioner,
      model_dir,
      ds_iter if save_cfg.save_dataset else None,
      save_dtype=save_cfg.dtype,
      **_set_options(save_cfg, 'keep', 'keep_dataset_checkpoints'),
    )
  return state, create_orbax_checkpoint_manager(save_cfg=save_checkpoint_cfg, **common)


# -- model-info.txt ------------------------------------------------------------


def log_model_info(log_file: str | None, full_train_state: Any, partitioner: Any):
  """Logs the number of parameters and writes a table of all variables to `log_file`.

  The table has names, shapes, sizes and partition specs. `full_train_state` has arrays
  or their shapes. With `log_file` None, no table is written.
  """
  if not multihost.is_host_0():
    return
  states = full_train_state.state_dict()
  specs = partitioner.get_mesh_axes(full_train_state).state_dict()
  tables = []
  for part in ('target', 'state'):
    part_specs = state_utils.flatten_state_dict(specs[part])
    leaves = {
      name: jax.ShapeDtypeStruct(
        x.shape,
        x.dtype,
        sharding=jax.sharding.NamedSharding(
          partitioner.mesh, part_specs.get(name) or jax.sharding.PartitionSpec()
        ),
      )
      for name, x in state_utils.flatten_state_dict(states[part]).items()
      if x is not None
    }
    if part == 'target':
      for name, x in leaves.items():
        logging.debug('Variable %s: %s, %s.', name, x.shape, x.sharding.spec)
      total = sum(math.prod(x.shape) for x in leaves.values())
      logging.info('The model has %s parameters.', f'{total:,}')
    tables.append(
      parameter_overview.get_parameter_overview(leaves, include_stats='sharding')
    )
  if log_file is not None:
    epath.Path(log_file).write_text('\n\n'.join(tables) + '\n')
