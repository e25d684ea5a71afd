"""What happens at which step, against a step-by-step count."""

import itertools

import pytest

from t5x.training import run_schedule


def brute_force(schedule, first):
  """Every step after `first` at which something happens, by asking each one."""
  last = schedule.total_steps
  stops = [schedule.at(step) for step in range(first + 1, last + 1)]
  reports = {last, *range(0, last, schedule.stats_period or last)}
  return [s for s in stops if s.step in reports or s.save or s.evaluate or s.collect]


PERIODS = (None, 0, 1, 3, 4, 10, 50)


@pytest.mark.parametrize('stats, save', list(itertools.product(PERIODS, PERIODS)))
@pytest.mark.parametrize('evaluate, extra', [(None, ()), (5, (7, 8)), (4, (20, 99))])
def test_stops_are_exactly_the_steps_at_which_something_happens(
  stats, save, evaluate, extra
):
  schedule = run_schedule.RunSchedule(
    total_steps=21,
    stats_period=stats,
    checkpoint_period=save,
    checkpoint_steps=extra,
    eval_period=evaluate,
  )
  for first in (0, 1, 7, 20):
    assert list(schedule.stops_after(first)) == brute_force(schedule, first)


def test_numbers_of_steps_may_be_written_as_whole_floats():
  schedule = run_schedule.RunSchedule(
    total_steps=2e1, stats_period=6.0, checkpoint_steps=[7.0]
  )
  steps = [stop.step for stop in schedule.stops_after(0)]
  assert steps == [6, 7, 12, 18, 20]
  assert all(type(step) is int for step in steps)
  for wrong in (-1, 2.5):
    with pytest.raises(ValueError, match=f'eval_period must be a whole.*{wrong}'):
      run_schedule.RunSchedule(total_steps=5, eval_period=wrong)


def test_the_step_a_run_starts_at_may_be_one_to_save():
  def saves(step, **settings):
    return run_schedule.RunSchedule(total_steps=9, **settings).saves_before(step)

  assert saves(0, checkpoint_period=5) and saves(3, checkpoint_period=5)
  assert saves(0, checkpoint_steps=[0, 4])
  assert not saves(3, checkpoint_steps=[0, 4])
  assert not saves(0, checkpoint_period=0)


def test_periods_are_independent_and_absolute():
  schedule = run_schedule.RunSchedule(
    total_steps=20, stats_period=6, checkpoint_period=8, eval_period=9
  )
  stops = list(schedule.stops_after(0))
  assert [s.step for s in stops] == [6, 8, 9, 12, 16, 18, 20]
  assert [s.step for s in stops if s.save] == [8, 16, 20]
  assert [s.step for s in stops if s.evaluate] == [9, 18, 20]


def test_a_resumed_run_does_what_is_left_of_the_whole_one():
  schedule = run_schedule.RunSchedule(
    total_steps=40, stats_period=3, checkpoint_period=7, eval_period=10, gc_period=4
  )
  whole = list(schedule.stops_after(0))
  for first in range(1, 40):
    rest = [stop for stop in whole if stop.step > first]
    assert list(schedule.stops_after(first)) == rest


def test_without_periods_only_the_end_is_a_stop_and_nothing_is_saved():
  (only,) = run_schedule.RunSchedule(total_steps=5).stops_after(0)
  assert only == run_schedule.Stop(step=5, save=False, evaluate=False, collect=False)


def test_checkpoint_steps_alone_also_save_the_last_step():
  schedule = run_schedule.RunSchedule(total_steps=10, checkpoint_steps=(4,))
  assert [s.step for s in schedule.stops_after(0) if s.save] == [4, 10]


def test_a_finished_run_has_no_stop():
  schedule = run_schedule.RunSchedule(total_steps=10, stats_period=2)
  assert schedule.next_stop(10) is None
  assert list(schedule.stops_after(12)) == []


@pytest.mark.parametrize('period', [-1, 2.5])
def test_a_period_that_is_no_number_of_steps_is_named(period):
  with pytest.raises(ValueError, match=rf'eval_period.*whole number.*{period}'):
    run_schedule.RunSchedule(total_steps=10, eval_period=period)
