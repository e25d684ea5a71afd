"""Learning-rate schedules that know where training ends."""

import re

import gin
import jax.numpy as jnp
import optax


@gin.configurable
def linear_warmup_linear_decay(
  peak: float, warmup_steps: int, total_steps: int, first_step: int = 0
) -> optax.Schedule:
  """A straight line up to the peak, then a straight line down to zero.

  T5X's own scheduler needs the slope of the decay as a number; this one takes
  the number of steps, so that one macro (TRAIN_STEPS) sets it. Bind the same
  schedule to the optimizer and to `Trainer.learning_rate_fn`: the first acts,
  the second is what is logged.

  Args:
    peak: the learning rate reached after `warmup_steps`.
    warmup_steps: length of the rise, in steps; 0 starts at the peak.
    total_steps: the step at which the rate is zero, counted from `first_step`.
    first_step: the step at which the schedule begins. 0 for the optimizer,
      whose own count starts at zero; the step of the restored checkpoint for
      `Trainer.learning_rate_fn`, whose steps are absolute.

  Returns:
    A function from a step to the learning rate.

  Raises:
    ValueError: if the warm-up does not fit into the total, or a number is a text.
  """
  given = {'peak': peak, 'warmup_steps': warmup_steps, 'total_steps': total_steps}
  for name, value in given.items():
    if isinstance(value, str):
      raise ValueError(
        f'linear_warmup_linear_decay.{name} must be a number, without quotes. '
        f'Got: {value!r}'
      )
  if not 0 <= warmup_steps < total_steps:
    raise ValueError(
      'linear_warmup_linear_decay needs 0 <= warmup_steps < total_steps. Got: '
      f'{warmup_steps} / {total_steps}. Set WARMUP_STEPS or TRAIN_STEPS '
      '(fine-tuning: TRAIN_STEPS_RELATIVE).'
    )
  decay = optax.linear_schedule(peak, 0.0, total_steps - warmup_steps)
  schedule = decay
  if warmup_steps:
    rise = optax.linear_schedule(0.0, peak, warmup_steps)
    schedule = optax.join_schedules([rise, decay], boundaries=[warmup_steps])
  return lambda step: schedule(step - first_step)


@gin.configurable
def linear_warmup(
  peak: float,
  warmup_steps: int,
  total_steps: int,
  first_step: int = 0,
  decay: str = 'linear',
) -> optax.Schedule:
  """A straight line up to the peak, and from there what `decay` says.

  Args:
    peak: the learning rate reached after `warmup_steps`.
    warmup_steps: length of the rise, in steps; 0 starts at the peak.
    total_steps: the last step, counted from `first_step`.
    first_step: see `linear_warmup_linear_decay`.
    decay: 'linear' down to zero at the last step, or 'constant': none.

  Returns:
    A function from a step to the learning rate.

  Raises:
    ValueError: there is no such decay, or the warm-up does not fit into the total.
  """
  if decay not in ('linear', 'constant'):
    raise ValueError(
      f"linear_warmup.decay must be 'linear' or 'constant'. Got: {decay!r}"
    )
  decayed = linear_warmup_linear_decay(peak, warmup_steps, total_steps, first_step)
  if decay == 'linear':
    return decayed
  return lambda step: decayed(jnp.minimum(step, first_step + warmup_steps))


@gin.configurable
def checkpoint_step(path: str | None) -> int:
  """The step that a checkpoint's name tells, for `first_step` of what is logged.

  Args:
    path: such as `runs/no/checkpoint_1500`; None or empty where training starts from
      random parameters.

  Returns:
    The step; 0 for no checkpoint.

  Raises:
    ValueError: the name has no step.
  """
  if not path:
    return 0
  match = re.search(r'checkpoint_(\d+)/*$', str(path))
  if match is None:
    raise ValueError(
      'INITIAL_CHECKPOINT_PATH must name one checkpoint, whose name ends in '
      f'checkpoint_<step>. Got: {path!r}'
    )
  return int(match.group(1))
