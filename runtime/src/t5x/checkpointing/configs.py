"""What to save and what to restore: the configurations, and the paths they mean."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from t5x import checkpoints, checkpoints_utils, state_utils
from t5x.checkpointing import save_schedule

_RESTORE_MODES = ('specific', 'latest', 'all')


def _check_dtype(owner: str, dtype: str | None, known: Sequence[str]):
  if dtype is not None and dtype not in known:
    raise ValueError(f"{owner}.dtype is '{dtype}'; it must be None or one of {known}.")


@dataclasses.dataclass
class SaveCheckpointConfig:
  """When and how to save.

  Attributes:
    dtype: what parameters are cast to on disk: 'float32', 'bfloat16', or None for
      as they are. Optimizer states are never cast.
    period: steps between checkpoints, counted from step 0; 0 or None for none.
    checkpoint_steps: further steps to save at.
    keep: how many checkpoints to keep; None keeps all.
    keep_dataset_checkpoints: in how many of the newest the position in the data is
      kept; None keeps it in all.
    save_dataset: whether to save the position in the data.
    checkpointer_cls: `SaveBestCheckpointer` keeps the best by a metric.
    state_transformation_fns: applied to the state, in order, before it is saved.
    checkpoint_manager_cls: what writes.
  """

  dtype: str | None = 'float32'
  period: int | None = None
  checkpoint_steps: Sequence[int] | None = None
  keep: int | None = None
  keep_dataset_checkpoints: int | None = None
  save_dataset: bool = False
  checkpointer_cls: checkpoints.CheckpointerConstructor = checkpoints.Checkpointer
  state_transformation_fns: Sequence[checkpoints.SaveStateTransformationFn] = (
    dataclasses.field(default_factory=list)
  )
  checkpoint_manager_cls: checkpoints.CheckpointManagerConstructor = (
    checkpoints.OrbaxCheckpointManagerInterface
  )

  def __post_init__(self):
    _check_dtype('SaveCheckpointConfig', self.dtype, ('float32', 'bfloat16'))
    save_schedule.check_save_settings(self.period, self.keep, self.checkpoint_steps)
    if self.keep_dataset_checkpoints is not None and not self.save_dataset:
      raise ValueError(
        'SaveCheckpointConfig.keep_dataset_checkpoints is '
        f'{self.keep_dataset_checkpoints}, but save_dataset is False: there is no '
        'position in the data to keep. Set save_dataset to True, or leave it unset.'
      )


@dataclasses.dataclass(frozen=True)
class AssignmentMap:
  """An assignment map as a transformation of restored states.

  Attributes:
    rules: pairs of a pattern for this model's names and a replacement that names
      the checkpoint's, or None.
  """

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
  """What to restore.

  Attributes:
    path: a checkpoint (mode 'specific') or a folder of them; or several.
    mode: 'specific' takes `path`, 'latest' the newest in the folder, 'all' one
      after the other.
    assignment_map: pairs (pattern, replacement) of regular expressions. A name of
      this model that matches the pattern is read from the checkpoint's name that
      the replacement gives; None drops it.
    strict: whether every optimizer state must be in the checkpoint. If not, those
      it lacks are initialised.
    fallback_to_scratch: whether what the checkpoint lacks (after the assignment
      map) is initialised.
    dtype: what parameters are cast to: 'float32', 'bfloat16', 'float16', or None
      for as saved.
    restore_dataset: whether to restore the position in the data.
    checkpointer_cls: used where `use_orbax` is False.
    state_transformation_fns: applied to the saved state, in order. The assignment
      map comes first and is put there.
    checkpoint_manager_cls: what reads.
  """

  path: str | Sequence[str]
  mode: str = 'latest'
  assignment_map: Sequence[tuple[str, str | None]] | None = None
  strict: bool = True
  fallback_to_scratch: bool = False
  dtype: str | None = None
  restore_dataset: bool = False
  checkpointer_cls: checkpoints.CheckpointerConstructor = checkpoints.Checkpointer
  state_transformation_fns: Sequence[checkpoints.RestoreStateTransformationFn] = ()
  checkpoint_manager_cls: checkpoints.CheckpointManagerConstructor = (
    checkpoints.OrbaxCheckpointManagerInterface
  )

  def __post_init__(self):
    if self.mode not in _RESTORE_MODES:
      raise ValueError(
        f"RestoreCheckpointConfig.mode is '{self.mode}'; it must be one of "
        f'{_RESTORE_MODES}.'
      )
    _check_dtype(
      'RestoreCheckpointConfig', self.dtype, ('float32', 'bfloat16', 'float16')
    )
    # `dataclasses.replace` comes through here again: the map must not double.
    others = [
      fn for fn in self.state_transformation_fns if not isinstance(fn, AssignmentMap)
    ]
    if self.assignment_map is not None:
      self.state_transformation_fns = (AssignmentMap(self.assignment_map), *others)


@dataclasses.dataclass
class CheckpointConfig:
  """Saving and restoring; None for neither.

  Attributes:
    save: when and how to save.
    restore: what to begin from.
  """

  save: SaveCheckpointConfig | None = None
  restore: RestoreCheckpointConfig | None = None


def _tensorflow_checkpoints(folder: epath.Path) -> list[str]:
  """Prefixes that TensorFlow's list of checkpoints in a folder names, oldest first."""
  listing = folder / 'checkpoint'
  if not listing.is_file():
    return []
  names = re.findall(
    r'^all_model_checkpoint_paths: "(.*)"$', listing.read_text(), re.MULTILINE
  )
  return [os.path.join(folder, name) for name in names]


def _checkpoints_in(folder: str) -> list[str]:
  """Paths of the checkpoints in a folder, oldest first.

  Raises:
    ValueError: it is no folder of checkpoints.
  """
  path = epath.Path(folder)
  if not path.is_dir():
    raise ValueError(
      f"'{folder}' is no folder; modes 'latest' and 'all' of RestoreCheckpointConfig "
      'look for checkpoints in a folder.'
    )
  steps = checkpoints_utils.all_steps(folder)
  if not steps and checkpoints_utils.is_checkpoint_name(path.name):
    raise ValueError(
      f"'{folder}' is a checkpoint; modes 'latest' and 'all' of "
      "RestoreCheckpointConfig take the folder around it. Set mode = 'specific'."
    )
  return _tensorflow_checkpoints(path) or [
    os.fspath(checkpoints_utils.get_checkpoint_dir(folder, step)) for step in steps
  ]


def get_first_valid_restore_config_and_paths(
  restore_cfgs: Sequence[RestoreCheckpointConfig],
) -> tuple[RestoreCheckpointConfig | None, Sequence[str]]:
  """Finds the first configuration that has something to restore.

  Args:
    restore_cfgs: in order of precedence. One of mode 'specific' always counts.

  Returns:
    (the configuration, the checkpoints it means, oldest first), or (None, []).

  Raises:
    ValueError: a folder to look in does not exist, or is a checkpoint itself.
  """
  for cfg in restore_cfgs:
    paths = [cfg.path] if isinstance(cfg.path, str) else list(cfg.path)
    if cfg.mode == 'specific':
      return cfg, paths
    for folder in paths:
      found = _checkpoints_in(folder)
      if found:
        return cfg, found if cfg.mode == 'all' else found[-1:]
      logging.info('No checkpoints in %s.', folder)
  return None, []


def get_fallback_state(
  restore_cfg: RestoreCheckpointConfig | None,
  init_fn: Callable[[Any], Mapping[str, Any]],
  init_rng: Any,
) -> Mapping[str, Any] | None:
  """Initialises a state to take from what a checkpoint lacks.

  Args:
    restore_cfg: says whether to.
    init_fn: random key -> state dict.
    init_rng: the key.

  Returns:
    The state dict, or None where nothing falls back.

  Raises:
    ValueError: `fallback_to_scratch` without a transformation that would tell the
      names apart, or without a key.
  """
  if restore_cfg is None or not restore_cfg.fallback_to_scratch:
    return None
  if not restore_cfg.state_transformation_fns:
    raise ValueError(
      'RestoreCheckpointConfig.fallback_to_scratch is True without assignment_map or '
      'state_transformation_fns: a misspelt name would start from scratch unnoticed. '
      'Say with one of them what the checkpoint lacks, for instance '
      "assignment_map = ((r'target/new_head/.*', None),)."
    )
  if init_rng is None:
    raise ValueError(
      'RestoreCheckpointConfig.fallback_to_scratch is True, and no random key was '
      'given to initialise from. In eval and infer, set fallback_init_rng.'
    )
  return init_fn(init_rng)
