"""Each factor of the schedule against its formula."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x import learning_rate

STEPS = [0, 1, 50, 99, 100, 101, 150, 399, 400, 1000]
W, BASE, DECAY, EVERY, CYCLE = 100, 0.3, 0.01, 150, 300

FORMULAS = {
  'constant': lambda s: BASE,
  'linear_warmup': lambda s: min(1, s / W),
  'linear_decay': lambda s: BASE * min(s / W, 1 + DECAY * (W - s)),
  'rsqrt_decay': lambda s: 1 / math.sqrt(max(s, W)),
  'rsqrt_normalized_decay': lambda s: math.sqrt(W / max(s, W)),
  'decay_every': lambda s: DECAY ** (s // EVERY),
  'cosine_decay': lambda s: (
    0.5 * (1 + math.cos(math.pi * (max(0, (s - W) / CYCLE) % 1)))
  ),
}


def make(factors, **kwargs):
  return learning_rate.create_learning_rate_scheduler(
    factors,
    base_learning_rate=BASE,
    warmup_steps=W,
    decay_factor=DECAY,
    steps_per_decay=EVERY,
    steps_per_cycle=CYCLE,
    **kwargs,
  )


@pytest.mark.parametrize(
  'factors',
  [*FORMULAS, 'constant * linear_warmup * rsqrt_decay', 'constant*cosine_decay'],
)
@pytest.mark.parametrize('offset', [0, 40])
def test_formula(factors, offset):
  schedule = jax.jit(make(factors, step_offset=offset, min_learning_rate=1e-8))
  for step in STEPS:
    since = max(0, step - offset)
    want = math.prod(FORMULAS[name.strip()](since) for name in factors.split('*'))
    got = schedule(jnp.int32(step))
    assert got.dtype == jnp.float32 and got.shape == ()
    np.testing.assert_allclose(got, max(want, 1e-8), rtol=2e-5, atol=2e-8)


def test_least_rate():
  assert make('linear_warmup', min_learning_rate=0.5)(0) == 0.5
  # A linear decay that goes below zero stops at the least rate.
  np.testing.assert_allclose(make('linear_decay', min_learning_rate=1e-3)(500), 1e-3)


def test_defaults_of_t5():
  schedule = learning_rate.create_learning_rate_scheduler()
  np.testing.assert_allclose(schedule(500), 0.5 * 0.5 / math.sqrt(1000), rtol=1e-6)
  np.testing.assert_allclose(schedule(4000), 0.5 / math.sqrt(4000), rtol=1e-6)


def test_serves_as_an_optax_schedule():
  import optax

  rule = optax.sgd(make('constant * linear_warmup'))
  params = jnp.ones(())
  state = rule.init(params)
  for step in range(3):
    update, state = rule.update(jnp.ones(()), state, params)
    np.testing.assert_allclose(update, -max(BASE * step / W, 1e-8), rtol=1e-6)


def test_wrong_factor():
  with pytest.raises(ValueError, match="Did you mean 'linear_warmup'"):
    make('constant * linear_warmpu')


@pytest.mark.parametrize(
  'factor', ['linear_warmup', 'linear_decay', 'rsqrt_decay', 'rsqrt_normalized_decay']
)
def test_division_by_no_steps(factor):
  with pytest.raises(ValueError, match='warmup_steps'):
    learning_rate.create_learning_rate_scheduler(factor, warmup_steps=0)
