"""Removes the checkpoints of a folder that its rules no longer keep."""

import dataclasses
import os

from t5x import checkpoint_utils, checkpoints_utils
from t5x.checkpointing import best_metrics, save_schedule


@dataclasses.dataclass(frozen=True)
class RetentionRules:
  """What is kept; pinned checkpoints and the newest always are.

  Attributes:
    keep: how many checkpoints, the newest or the best; None keeps all.
    force_keep_period: multiples of it are kept for good.
    keep_dataset_checkpoints: in how many of the newest the position in the data
      is kept; None keeps all.
    metric_name: rank by this metric, `<subfolder>/<TensorBoard tag>`; None ranks
      by age.
    metric_mode: whether 'max' or 'min' is best.
    keep_without_metrics: whether checkpoints without the metric are kept.
  """

  keep: int | None = None
  force_keep_period: int | None = None
  keep_dataset_checkpoints: int | None = None
  metric_name: str | None = None
  metric_mode: str = 'max'
  keep_without_metrics: bool = True

  def __post_init__(self):
    for name in ('force_keep_period', 'keep_dataset_checkpoints'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'{name} is {value}; it must be at least 1, or None.')
    if self.metric_mode not in ('max', 'min'):
      raise ValueError(
        f"metric_mode is '{self.metric_mode}'; it must be 'max' or 'min'."
      )


def _too_old(directory: str, rules: RetentionRules) -> list[int]:
  """Steps whose checkpoints are to be removed."""
  steps = checkpoints_utils.all_steps(directory)
  pinned = [
    step
    for step in steps
    if checkpoint_utils.is_pinned_checkpoint(
      checkpoints_utils.get_checkpoint_dir(directory, step)
    )
  ]
  if rules.metric_name is None:
    return save_schedule.steps_to_remove(
      steps,
      keep=rules.keep,
      force_keep_period=rules.force_keep_period,
      pinned=pinned,
    )
  metrics = best_metrics.populate_metrics_for_steps(directory, rules.metric_name, steps)
  return save_schedule.steps_to_remove_by_metric(
    steps,
    metrics,
    keep=rules.keep,
    mode=rules.metric_mode,
    keep_without_metrics=rules.keep_without_metrics,
    force_keep_period=rules.force_keep_period,
    pinned=pinned,
  )


def remove_old_checkpoints(directory: os.PathLike | str, rules: RetentionRules):
  """Applies the rules to a model's folder.

  Args:
    directory: the folder.
    rules: what is kept.

  Raises:
    OSError: something could not be removed.
  """
  directory = os.fspath(directory)
  for step in _too_old(directory, rules):
    checkpoint_utils.remove_checkpoint_dir(
      checkpoints_utils.get_checkpoint_dir(directory, step)
    )
  if rules.keep_dataset_checkpoints is None:
    return
  positions = checkpoints_utils.all_dataset_checkpoint_steps(directory)
  for step in positions[: -rules.keep_dataset_checkpoints]:
    checkpoint_utils.remove_dataset_checkpoint(
      checkpoints_utils.get_checkpoint_dir(directory, step),
      checkpoints_utils.DATASET_FILE_PREFIX,
    )
