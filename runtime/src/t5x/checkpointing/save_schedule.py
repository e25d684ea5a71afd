"""At which steps to save, and which checkpoints to keep: pure functions.

Steps are counted from the run's first step, never from where it was resumed, so
that a resumed run saves at the steps at which an uninterrupted one does.
"""

import math
from collections.abc import Collection, Mapping, Sequence


def is_save_step(
  step: int, period: int | None = None, checkpoint_steps: Sequence[int] | None = None
) -> bool:
  """Whether a checkpoint is due at a step.

  Args:
    step: steps done since the run began.
    period: steps between checkpoints; None or 0 for none by period.
    checkpoint_steps: further steps to save at.

  Returns:
    True at multiples of `period` (0 included) and at `checkpoint_steps`.
  """
  by_period = bool(period) and step % period == 0
  return by_period or step in (checkpoint_steps or ())


def check_save_settings(
  period: int | None, keep: int | None, checkpoint_steps: Sequence[int] | None
):
  """Refuses settings that mean nothing.

  Args:
    period: steps between checkpoints.
    keep: how many to keep.
    checkpoint_steps: further steps.

  Raises:
    ValueError: a negative period or step, or keep below 1.
  """
  if period is not None and period < 0:
    raise ValueError(
      f'The checkpoint period is {period}; it must be a number of steps, or 0 or '
      'None for no periodic checkpoints.'
    )
  if keep is not None and keep < 1:
    raise ValueError(
      f'keep is {keep}: no checkpoint would be left to resume from. Set at least 1, '
      'or None to keep all.'
    )
  negative = [s for s in checkpoint_steps or () if s < 0]
  if negative:
    raise ValueError(f'checkpoint_steps has {negative}; steps count from 0.')


def _kept_for_good(
  steps: Collection[int], force_keep_period: int | None, pinned: Collection[int]
) -> set[int]:
  forced = {s for s in steps if force_keep_period and s % force_keep_period == 0}
  return forced | set(pinned)


def steps_to_remove(
  steps: Collection[int],
  *,
  keep: int | None,
  force_keep_period: int | None = None,
  pinned: Collection[int] = (),
) -> list[int]:
  """Which checkpoints are too old, if the newest are to be kept.

  Args:
    steps: steps of all checkpoints.
    keep: how many of the newest to keep; None for all.
    force_keep_period: multiples of it are kept for good.
    pinned: steps kept for good.

  Returns:
    Steps to remove, ascending.
  """
  if keep is None:
    return []
  kept = _kept_for_good(steps, force_keep_period, pinned)
  return [step for step in sorted(steps)[:-keep] if step not in kept]


def steps_to_remove_by_metric(
  steps: Collection[int],
  metrics: Mapping[int, float],
  *,
  keep: int | None,
  mode: str = 'max',
  keep_without_metrics: bool = True,
  force_keep_period: int | None = None,
  pinned: Collection[int] = (),
) -> list[int]:
  """Which checkpoints to give up, if the best are to be kept.

  The newest is always kept, beside the best, since training resumes from it.

  Args:
    steps: steps of all checkpoints.
    metrics: step -> metric, for the steps that have one.
    keep: how many of the best to keep; None for all.
    mode: 'max' if a higher metric is better, 'min' if a lower.
    keep_without_metrics: whether steps without a metric are kept; if not, they
      rank below all others, and the older the lower.
    force_keep_period: multiples of it are kept for good.
    pinned: steps kept for good.

  Returns:
    Steps to remove, ascending.
  """
  if keep is None or not steps:
    return []
  sign = 1.0 if mode == 'max' else -1.0

  def rank(step: int) -> tuple[float, int]:
    value = metrics.get(step, math.nan)
    return (-math.inf if math.isnan(value) else sign * value, step)

  kept = _kept_for_good(steps, force_keep_period, pinned)
  candidates = [
    step
    for step in sorted(steps)[:-1]
    if step not in kept and (step in metrics or not keep_without_metrics)
  ]
  best_last = sorted(candidates, key=rank)
  return sorted(best_last[: max(0, len(best_last) - keep)])


def find_first_checkpoint_step(
  checkpoint_steps_index: int,
  checkpoint_steps: Sequence[int],
  first_step: int,
  host_step: int,
) -> int:
  """Index of the first entry that is still to come.

  Kept for T5X's callers; `run_schedule` needs no index.

  Args:
    checkpoint_steps_index: where to begin to look.
    checkpoint_steps: steps to save at, ascending.
    first_step: the run's first step, which does not count.
    host_step: the present step.

  Returns:
    The index of the first entry not before `host_step`, or of the last entry.
  """
  last = len(checkpoint_steps) - 1
  for index in range(checkpoint_steps_index, last):
    if checkpoint_steps[index] >= host_step and checkpoint_steps[index] != first_step:
      return index
  return max(last, checkpoint_steps_index)


def find_next_checkpoint_step(
  checkpoint_steps_index: int,
  inner_num_steps: int,
  is_checkpoint_step: bool,
  host_step: int,
  checkpoint_steps: Sequence[int],
  epoch_end_step: int,
  checkpoint_period: int,
  first_step: int,
) -> tuple[int, bool]:
  """Shortens a stretch of training so that it ends at a step to save at.

  Kept for T5X's callers; `run_schedule` finds the next stop by itself.

  Args:
    checkpoint_steps_index: where to begin to look.
    inner_num_steps: steps to do next.
    is_checkpoint_step: whether a step to save at was found before.
    host_step: the present step.
    checkpoint_steps: steps to save at, ascending.
    epoch_end_step: the last step of the epoch.
    checkpoint_period: steps between periodic checkpoints, 0 or None for none.
    first_step: where the periods count from.

  Returns:
    (steps to do next, whether there is a step to save at after them).
  """
  for step in checkpoint_steps[checkpoint_steps_index:] if checkpoint_steps else ():
    if step > host_step + inner_num_steps:
      break
    periodic = bool(checkpoint_period) and (step - first_step) % checkpoint_period == 0
    if first_step < step <= epoch_end_step and step > host_step and not periodic:
      return step - host_step, True
  return inner_num_steps, is_checkpoint_step
