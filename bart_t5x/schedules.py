"""Learning-rate schedules."""

import re

import gin
import jax.numpy as jnp
import optax


@gin.configurable
def linear_warmup_linear_decay(
  peak: float, warmup_steps: int, total_steps: int, first_step: int = 0
) -> optax.Schedule:
  """Rises linearly to the peak, then falls linearly to zero.

  Bind the same schedule to the optimizer, where it acts, and to
  `Trainer.learning_rate_fn`, where it is logged.

  Args:
    peak: the learning rate after `warmup_steps`.
    warmup_steps: 0 starts at the peak.
    total_steps: the step at which the rate is zero, counted from `first_step`.
    first_step: 0 for the optimizer, which counts from zero; the restored checkpoint's
      step for `Trainer.learning_rate_fn`.

  Raises:
    ValueError: not 0 <= warmup_steps < total_steps, or a number is a string.
  """
  given = {'peak': peak, 'warmup_steps': warmup_steps, 'total_steps': total_steps}
  for name, value in given.items():
    if isinstance(value, str):
      raise ValueError(
        f'linear_warmup_linear_decay.{name} must be a number, without quotes. '
        f'Got: {value!r}'
      )
  if peak < 0:
    raise ValueError(
      f'linear_warmup_linear_decay.peak must not be negative. Got: {peak}'
    )
  if not 0 <= warmup_steps < total_steps:
    raise ValueError(
      'linear_warmup_linear_decay needs 0 <= warmup_steps < total_steps. Got: '
      f'{warmup_steps} / {total_steps}. Set WARMUP_STEPS or TRAIN_STEPS '
      '(fine-tuning: TRAIN_STEPS_RELATIVE).'
    )
  schedule = optax.linear_schedule(peak, 0.0, total_steps - warmup_steps)
  if warmup_steps:
    rise = optax.linear_schedule(0.0, peak, warmup_steps)
    schedule = optax.join_schedules([rise, schedule], boundaries=[warmup_steps])
  return lambda step: schedule(step - first_step)


@gin.configurable
def linear_warmup(
  peak: float,
  warmup_steps: int,
  total_steps: int,
  first_step: int = 0,
  decay: str = 'linear',
) -> optax.Schedule:
  """Is `linear_warmup_linear_decay`, or stays at the peak if `decay` is 'constant'."""
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
  """Returns the step in a checkpoint's name, for `first_step`; 0 for no checkpoint."""
  if not path:
    return 0
  match = re.search(r'checkpoint_(\d+)/*$', str(path))
  if match is None:
    raise ValueError(
      f'INITIAL_CHECKPOINT_PATH must end in checkpoint_<step>. Got: {path!r}'
    )
  return int(match.group(1))
