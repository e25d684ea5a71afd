"""Metrics: what they sum, and what they refuse to guess."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x import metrics


def test_sum():
  a = metrics.Sum.from_model_output(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
  b = metrics.Sum.from_model_output(5.0)
  assert a.merge(b).compute() == 15.0


def test_average_per_step():
  a = metrics.AveragePerStep.from_model_output(jnp.array([2.0, 4.0]))
  b = metrics.AveragePerStep.from_model_output(3.0, steps=2)
  assert a.merge(b).compute() == 3.0
  # Microbatches merge as steps; the trainer then says how many steps they were.
  assert metrics.set_step_metrics_num_steps({'x': a.merge(b)}, 1)['x'].compute() == 9.0
  with pytest.raises(ValueError, match='total'):
    metrics.AveragePerStep().compute()
  with pytest.raises(TypeError, match='StepsPerTime'):
    a.merge(metrics.StepsPerTime.from_model_output())


def test_rates():
  a = metrics.TimeRate.from_model_output(numerator=6.0)
  b = metrics.TimeRate.from_model_output(numerator=2.0)
  with pytest.raises(ValueError, match='duration'):
    a.compute()
  tree = {'rate': a.merge(b), 'steps': metrics.StepsPerTime.from_model_output(steps=8)}
  tree = metrics.set_time_metrics_duration(tree, 4.0)
  assert tree['rate'].compute() == 2.0 and tree['steps'].compute() == 2.0
  with pytest.raises(ValueError, match='merge before'):
    tree['rate'].merge(b)
  assert metrics.Time(duration=3.0).compute() == 3.0


def test_steps():
  assert metrics.Step(steps=None).replace_steps(4).compute() == 4
  with pytest.raises(ValueError, match='replace_steps'):
    metrics.Step(steps=None).compute()
  two = metrics.StepsPerTime.from_model_output(2)
  assert two.merge(two).steps == 4


def test_kinds():
  rate, total = metrics.TimeRate(), metrics.Sum(total=1.0)
  assert metrics.is_metric_obj(total) and not metrics.is_metric_obj(1.0)
  assert metrics.is_time_metric(rate) and not metrics.is_time_metric(total)
  assert metrics.create_metrics_dict({'a': 2.0})['a'].compute() == 2.0


def test_zeros_of_an_abstract_metric():
  def make(x):
    return {
      'sum': metrics.Sum.from_model_output(x),
      'mean': metrics.AveragePerStep.from_model_output(x),
    }

  abstract = jax.eval_shape(make, jnp.ones(3))
  zero = {k: metrics.shape_obj_to_defined_obj(v) for k, v in abstract.items()}
  np.testing.assert_array_equal(zero['sum'].total, jnp.float32(0))
  merged = {k: zero[k].merge(v) for k, v in make(jnp.ones(3)).items()}
  assert merged['sum'].compute() == 3.0


def test_merging_inside_a_scan():
  def body(carry, x):
    return carry.merge(metrics.Sum.from_model_output(x)), None

  start = metrics.Sum.from_model_output(jnp.zeros(2))
  total, _ = jax.lax.scan(body, start, jnp.arange(8.0).reshape(4, 2))
  assert total.compute() == 28.0
