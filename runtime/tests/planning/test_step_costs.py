"""Accounts of whole steps, compiled for this machine's CPU devices."""

import jax
import jax.numpy as jnp
import pytest

from t5x.planning import abstract_steps, step_costs, topologies

CPUS = topologies.find('cpu:8')


class Jitted:
  """A function with the interface of a partitioned one."""

  def __init__(self, function):
    self.trace = jax.jit(function).trace


def step(function, *shapes, forward=None, passes=1):
  arguments = tuple(jax.ShapeDtypeStruct(shape, 'float32') for shape in shapes)
  return abstract_steps.AbstractStep(
    'train',
    Jitted(function),
    arguments,
    {},
    8,
    forward and (forward, arguments),
    passes,
    8,
  )


def test_recomputation_counts_and_is_not_useful():
  def forward(x, w):
    def layer(c, _):
      return jnp.tanh(c @ w), None

    return jax.lax.scan(jax.checkpoint(layer), x, None, length=4)[0].sum()

  made = step(
    jax.value_and_grad(forward, argnums=(0, 1)),
    (64, 64), (64, 64), forward=forward, passes=3,
  )  # fmt: skip
  costs = step_costs.measure(made, CPUS)
  product = 2 * 64**3
  assert costs.useful_flops * 8 == 3 * 4 * product
  # Four times forward, four recomputed, eight backward.
  assert costs.flops == 16 * product
  assert sorted(costs.loops.values()) == [4, 4]
  assert costs.roofline_s <= costs.estimate_s
  assert costs.memory.arguments == 2 * 64 * 64 * 4
  assert costs.cycles_s is None


def test_what_does_not_fit_says_by_how_much():
  def f(x):
    return jnp.sin(x[:, None] * x[None, :]) @ x

  chip = topologies.dataclasses.replace(CPUS.chip, hbm_bytes=2**20)
  small = topologies.dataclasses.replace(CPUS, chip=chip)
  with pytest.raises(step_costs.DoesNotFitError) as caught:
    step_costs.measure(step(f, (1024,)), small)
  assert caught.value.needed > 2**22
  largest = caught.value.held[0]
  assert (largest.shape, largest.bytes) == ((1024, 1024), 1024 * 1024 * 4 / 8)


@pytest.mark.parametrize(
  ('message', 'expected'),
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
      'temporaries (40.50G) exceeds available HBM (15.48G).',
      (40.5 * 2**30, 15.48 * 2**30),
    ),
    (
      'Ran out of memory in memory space hbm. Used 16.00G of 512.0M hbm. Exceeded hbm',
      (2**34, 2**29),
    ),
    ('RESOURCE_EXHAUSTED: no more', None),
  ],
)
def test_the_compilers_messages(message, expected):
  assert step_costs.read_refusal(message) == expected
