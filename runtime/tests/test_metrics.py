"""Metrics against values computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x import metrics, models


def test_sum():
  a = metrics.Sum.from_model_output(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
  assert a.merge(metrics.Sum.from_model_output(5.0)).compute() == 15.0


def test_average_per_step():
  a = metrics.AveragePerStep.from_model_output(jnp.array([2.0, 4.0]))
  b = metrics.AveragePerStep.from_model_output(3.0, steps=2)
  assert a.merge(b).compute() == 3.0
  # Microbatches merge as steps; the trainer then sets the number of steps.
  assert metrics.set_step_metrics_num_steps({'x': a.merge(b)}, 1)['x'].compute() == 9.0


def test_rates():
  a = metrics.TimeRate.from_model_output(numerator=6.0)
  b = metrics.TimeRate.from_model_output(numerator=2.0)
  with pytest.raises(ValueError, match='duration'):
    a.compute()
  two = metrics.StepsPerTime.from_model_output(2)
  tree = {'rate': a.merge(b), 'steps': two.merge(two).merge(two)}
  tree = metrics.set_time_metrics_duration(tree, 4.0)
  assert tree['rate'].compute() == 2.0 and tree['steps'].compute() == 1.5
  with pytest.raises(ValueError, match='merge before'):
    tree['rate'].merge(b)


# Two rows of four positions: two examples, and one example with padding.
TARGETS = np.array([[1, 2, 2, 1], [2, 1, 0, 0]])
MASK = (TARGETS != 0).astype(np.float32)
SEGMENTS = np.array([[1, 1, 2, 2], [1, 1, 0, 0]])
# Correct everywhere except at the first position of each row.
GUESSES = np.array([[0, 2, 2, 1], [1, 1, 0, 0]])
LOGITS = jax.nn.one_hot(GUESSES, 3) * 5.0


def base_metrics(**options):
  arguments = {
    'logits': LOGITS,
    'targets': TARGETS,
    'mask': MASK,
    'loss': jnp.array(12.0),
    'z_loss': jnp.array(2.0),
    'segment_ids': {'decoder': SEGMENTS, 'encoder': SEGMENTS[:, :3]},
  } | options
  found = metrics.set_time_metrics_duration(
    models.compute_base_metrics(**arguments), 2.0
  )
  return {name: float(metric.compute()) for name, metric in found.items()}


def test_all_metrics_of_a_step():
  devices = jax.device_count()
  expected = {
    'accuracy': 4 / 6,
    'loss': 12.0,
    'loss_per_nonpadding_target_token': 12 / 6,
    'loss_per_all_target_tokens': 12 / 8,
    'z_loss': 2.0,
    'z_loss_per_all_target_tokens': 2 / 8,
    'cross_ent_loss': 10.0,
    'cross_ent_loss_per_all_target_tokens': 10 / 8,
    'timing/seconds': 2.0,
    'timing/seqs': 2.0,
    'timing/steps_per_second': 1 / 2,
    'timing/seqs_per_second': 2 / 2,
    'timing/seqs_per_second_per_core': 2 / 2 / devices,
    'timing/target_tokens_per_second': 8 / 2,
    'timing/target_tokens_per_second_per_core': 8 / 2 / devices,
    'non_padding_fraction/loss_weights': 6 / 8,
    'non_padding_fraction/decoder': 6 / 8,
    'non_padding_fraction/encoder': 5 / 6,
    'non_padding_fraction/overall': 11 / 14,
    'effective_batch_size/decoder': 3.0,
    'effective_batch_size/encoder': 3.0,
  }
  assert base_metrics() == pytest.approx(expected, rel=1e-6)


def test_metrics_of_missing_arguments_are_left_out():
  found = base_metrics(mask=None, z_loss=None, segment_ids=None)
  assert found['accuracy'] == pytest.approx(6 / 8)
  assert found['loss_per_nonpadding_target_token'] == pytest.approx(12 / 8)
  assert not [name for name in found if 'z_loss' in name or 'cross_ent' in name]
  assert [name for name in found if 'non_padding' in name] == [
    'non_padding_fraction/loss_weights'
  ]
  # A feature that a task lacks is empty.
  found = base_metrics(segment_ids={'decoder': SEGMENTS, 'encoder': SEGMENTS[:, :0]})
  assert 'non_padding_fraction/encoder' not in found
  assert found['non_padding_fraction/overall'] == pytest.approx(6 / 8)


def test_metrics_merge_over_microbatches_under_jit():
  @jax.jit
  def halves(targets, mask):
    parts = [
      models.compute_base_metrics(
        logits=LOGITS[row], targets=targets[row], mask=mask[row], loss=jnp.array(6.0)
      )
      for row in (slice(0, 1), slice(1, 2))
    ]
    return {name: metric.merge(parts[1][name]) for name, metric in parts[0].items()}

  merged = metrics.set_step_metrics_num_steps(halves(TARGETS, MASK), 1)
  merged = metrics.set_time_metrics_duration(merged, 2.0)
  whole = base_metrics(z_loss=None, segment_ids=None)
  for name, metric in merged.items():
    assert float(metric.compute()) == pytest.approx(whole[name]), name


def test_packed_examples_are_runs_of_one_id():
  ids = np.array(
    [[1, 1, 3, 3, 0, 0], [2, 2, 2, 2, 2, 2], [2, 7, 7, 7, 7, 0], [0, 0, 0, 0, 0, 0]]
  )
  assert models.count_packed_examples(ids) == 5
  assert models.count_packed_examples(ids != 0) == 3
  # Leading padding, in a row whose first example lacks this feature.
  assert models.count_packed_examples(np.array([[0, 0, 2, 2]])) == 1
