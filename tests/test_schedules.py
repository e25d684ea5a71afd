"""Schedules at steps computed by hand."""

import numpy as np
import pytest

from bart_t5x import schedules


@pytest.mark.parametrize(
  ('step', 'rate'),
  [(0, 0.0), (5, 0.5), (10, 1.0), (55, 0.5), (100, 0.0), (500, 0.0)],
)
def test_rises_to_the_peak_and_falls_to_zero(step, rate):
  schedule = schedules.linear_warmup_linear_decay(
    peak=1.0, warmup_steps=10, total_steps=100
  )
  np.testing.assert_allclose(schedule(step), rate, atol=1e-7)


def test_without_warmup_it_starts_at_the_peak():
  schedule = schedules.linear_warmup_linear_decay(
    peak=2.0, warmup_steps=0, total_steps=4
  )
  np.testing.assert_allclose([schedule(s) for s in range(5)], [2, 1.5, 1, 0.5, 0])


@pytest.mark.parametrize('warmup_steps', [100, -1])
def test_warmup_that_does_not_fit_is_rejected(warmup_steps):
  with pytest.raises(ValueError, match=f'Got: {warmup_steps} / 100'):
    schedules.linear_warmup_linear_decay(1.0, warmup_steps, 100)


def test_number_in_quotes_is_rejected():
  with pytest.raises(ValueError, match="without quotes. Got: '10'"):
    schedules.linear_warmup_linear_decay(1.0, '10', 100)


def test_step_of_a_checkpoint_by_its_name():
  assert schedules.checkpoint_step('runs/no/checkpoint_1500') == 1500
  assert schedules.checkpoint_step('gs://b/checkpoint_7/') == 7
  assert schedules.checkpoint_step([]) == schedules.checkpoint_step(None) == 0
  with pytest.raises(ValueError, match='runs/no'):
    schedules.checkpoint_step('runs/no')


@pytest.mark.parametrize(
  ('decay', 'rates'),
  [('linear', [0, 0.5, 1, 0.5, 0]), ('constant', [0, 0.5, 1, 1, 1])],
)
def test_decay_after_the_rise(decay, rates):
  schedule = schedules.linear_warmup(1.0, 10, 100, first_step=40, decay=decay)
  steps = [40, 45, 50, 95, 140]
  np.testing.assert_allclose([schedule(s) for s in steps], rates, atol=1e-7)


def test_unknown_decay_is_rejected():
  with pytest.raises(ValueError, match="'linear' or 'constant'. Got: 'cosine'"):
    schedules.linear_warmup(1.0, 10, 100, decay='cosine')
