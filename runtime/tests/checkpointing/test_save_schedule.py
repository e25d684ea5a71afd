"""When to save and what to keep, by hand-worked cases."""

import itertools
import math

import pytest

from t5x.checkpointing import save_schedule


@pytest.mark.parametrize(
  'period, steps, expected',
  [
    (None, None, []),
    (0, None, []),
    (0, [3], [3]),
    (4, None, [0, 4, 8]),
    (4, [0, 5, 8, 50], [0, 4, 5, 8]),
    (1, [], list(range(10))),
  ],
)
def test_save_steps(period, steps, expected):
  due = [s for s in range(10) if save_schedule.is_save_step(s, period, steps)]
  assert due == expected


def test_settings():
  save_schedule.check_save_settings(None, None, None)
  save_schedule.check_save_settings(0, 1, [0])
  for settings in ((-1, None, None), (1, 0, None), (1, None, [-1])):
    with pytest.raises(ValueError):
      save_schedule.check_save_settings(*settings)


def test_the_newest_are_kept():
  old = save_schedule.steps_to_remove
  assert old([5, 0, 10, 15], keep=2) == [0, 5]
  assert old([0, 5], keep=2) == []
  assert old([0, 5, 10], keep=None) == []
  assert old(range(8), keep=2, force_keep_period=4) == [1, 2, 3, 5]
  assert old(range(5), keep=1, pinned=[1, 3]) == [0, 2]


def test_the_best_are_kept():
  def old(metrics, **rules):
    return save_schedule.steps_to_remove_by_metric(range(5), metrics, **rules)

  metrics = {0: 3.0, 1: 1.0, 2: 2.0, 3: 0.0, 4: -9.0}
  assert old(metrics, keep=2) == [1, 3]
  assert old(metrics, keep=2, mode='min') == [0, 2]
  assert old(metrics, keep=None) == []
  assert old(metrics, keep=4) == []
  assert old(metrics, keep=1, pinned=[3]) == [1, 2]
  assert old(metrics, keep=1, force_keep_period=3) == [1]
  some = {1: 1.0, 2: 2.0}
  assert old(some, keep=1) == [1]
  assert old(some, keep=1, keep_without_metrics=False) == [0, 1, 3]
  # Too few have a metric: the newest without one fill up.
  assert old(some, keep=3, keep_without_metrics=False) == [0]
  assert old({}, keep=2, keep_without_metrics=False) == [0, 1]
  assert save_schedule.steps_to_remove_by_metric([], {}, keep=1) == []


def test_nan_is_never_best():
  metrics = {0: math.nan, 1: 1.0, 2: 5.0, 3: 0.0}
  for mode in ('max', 'min'):
    old = save_schedule.steps_to_remove_by_metric(range(4), metrics, keep=1, mode=mode)
    assert 0 in old


def test_kept_ones_are_the_best_by_exhaustion():
  for values in itertools.permutations(range(4)):
    metrics = dict(enumerate([float(v) for v in values]))
    old = save_schedule.steps_to_remove_by_metric(range(5), metrics, keep=2)
    kept = set(range(4)) - set(old)
    assert {metrics[s] for s in kept} == {2.0, 3.0}


def test_t5x_helpers():
  first = save_schedule.find_first_checkpoint_step
  steps = [2, 5, 9]
  assert first(0, steps, first_step=0, host_step=0) == 0
  assert first(0, steps, first_step=2, host_step=2) == 1
  assert first(0, steps, first_step=0, host_step=6) == 2
  assert first(0, steps, first_step=0, host_step=50) == 2
  assert first(0, [], first_step=0, host_step=0) == 0

  def following(host_step, inner, steps=steps, period=10, first_step=0):
    return save_schedule.find_next_checkpoint_step(
      0, inner, False, host_step, steps, 100, period, first_step
    )

  assert following(0, 4) == (2, True)
  assert following(2, 4) == (3, True)
  assert following(3, 1) == (1, False)
  assert following(9, 5) == (5, False)
  assert following(0, 10, steps=[10]) == (10, False)  # Saved by period anyway.
  assert following(0, 10, steps=[10], period=0) == (10, True)
  assert following(0, 10, steps=[]) == (10, False)
