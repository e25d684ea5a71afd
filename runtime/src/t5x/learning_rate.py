"""Learning rate schedules as products of named factors."""

import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LearningRateCallable = Callable[[Int[Array, ''] | int], Float[Array, '']]


def create_learning_rate_scheduler(
  factors: str = 'constant * linear_warmup * rsqrt_decay',
  base_learning_rate: float = 0.5,
  warmup_steps: int = 1000,
  decay_factor: float = 0.5,
  steps_per_decay: int = 20000,
  steps_per_cycle: int = 100000,
  step_offset: int = 0,
  min_learning_rate: float = 1e-8,
) -> LearningRateCallable:
  """Makes a schedule.

  With s = max(0, step - step_offset), w = warmup_steps, and the other parameters by
  name, the factors are

  - constant: base_learning_rate
  - linear_warmup: min(1, s / w)
  - linear_decay: base_learning_rate * min(s / w, 1 + decay_factor * (w - s)), which
    warms up, then falls by the share decay_factor of the peak a step. It holds the
    constant and the warm-up already.
  - rsqrt_decay: 1 / sqrt(max(s, w))
  - rsqrt_normalized_decay: sqrt(w / max(s, w)), 1 until w
  - decay_every: decay_factor ** floor(s / steps_per_decay)
  - cosine_decay: 1 until w, then (1 + cos(pi * ((s - w) / steps_per_cycle mod 1))) / 2

  Args:
    factors: names of factors, joined by '*'.
    base_learning_rate: see above.
    warmup_steps: see above, in steps.
    decay_factor: see above.
    steps_per_decay: see above, in steps.
    steps_per_cycle: see above, in steps.
    step_offset: the step at which the schedule starts.
    min_learning_rate: the least that is returned, whatever the factors say.

  Returns:
    A function of the step, which returns a float32 scalar.

  Raises:
    ValueError: a factor has no such name, or divides by a number of steps of 0.
  """

  known = _factors(
    base_learning_rate, warmup_steps, decay_factor, steps_per_decay, steps_per_cycle
  )
  chosen = _parse(factors, known)
  steps = (warmup_steps, steps_per_decay, steps_per_cycle)
  _check_divisors(chosen, dict(zip(_STEPS, steps, strict=True)))

  def learning_rate(step: Int[Array, ''] | int) -> Float[Array, '']:
    since = jnp.maximum(0, step - step_offset)
    product = jnp.float32(1.0)
    for name in chosen:
      product = product * known[name](since)
    return jnp.asarray(jnp.maximum(product, min_learning_rate), jnp.float32)

  return learning_rate


def _factors(
  base_learning_rate: float,
  warmup_steps: int,
  decay_factor: float,
  steps_per_decay: int,
  steps_per_cycle: int,
) -> dict[str, Callable[[Any], Any]]:
  """The factors by name, as functions of the step since the schedule's start."""

  def rise(step):
    return step / warmup_steps

  def fall(step):
    return jnp.minimum(rise(step), 1 + decay_factor * (warmup_steps - step))

  def after_warmup(step):
    return jnp.maximum(step, warmup_steps)

  def cosine(step):
    cycles = jnp.maximum(0.0, (step - warmup_steps) / steps_per_cycle)
    return jnp.maximum(0.0, 0.5 + 0.5 * jnp.cos(jnp.pi * (cycles % 1.0)))

  return {
    'constant': lambda step: base_learning_rate,
    'linear_warmup': lambda step: jnp.minimum(1.0, rise(step)),
    'linear_decay': lambda step: base_learning_rate * fall(step),
    'rsqrt_decay': lambda step: 1 / jnp.sqrt(after_warmup(step)),
    'rsqrt_normalized_decay': lambda s: jnp.sqrt(warmup_steps / after_warmup(s)),
    'decay_every': lambda step: decay_factor ** (step // steps_per_decay),
    'cosine_decay': cosine,
  }


def _parse(factors: str, known: Collection[str]) -> list[str]:
  chosen = [name.strip() for name in factors.split('*')]
  for name in chosen:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1)
      hint = f' Did you mean {near[0]!r}?' if near else ''
      raise ValueError(
        f'factors has no {name!r}; it joins by "*" any of {", ".join(known)}.{hint}'
      )
  return chosen


_STEPS = ('warmup_steps', 'steps_per_decay', 'steps_per_cycle')
_DIVISORS = {
  'rsqrt_decay': 'warmup_steps',  # At step 0.
  'rsqrt_normalized_decay': 'warmup_steps',
  'linear_warmup': 'warmup_steps',
  'linear_decay': 'warmup_steps',
  'decay_every': 'steps_per_decay',
  'cosine_decay': 'steps_per_cycle',
}


def _check_divisors(chosen: list[str], steps: Mapping[str, int]) -> None:
  for name in chosen:
    divisor = _DIVISORS.get(name)
    if divisor and steps[divisor] <= 0:
      raise ValueError(
        f'The factor {name!r} divides by {divisor}, which must be above 0. Got: '
        f'{steps[divisor]}.'
      )
