"""The line of a period, the bar, and the time without data."""

import io
import time

import clu.values
import jax.numpy as jnp
import pytest
from absl import logging

from t5x.training import progress

METRICS = {
  'loss': clu.values.Scalar(812.0),
  'loss_per_nonpadding_target_token': clu.values.Scalar(2.34567),
  'accuracy': 0.5,
  'learning_rate': clu.values.Scalar(9.0),
  'learning_rate/current': clu.values.Scalar(3e-4),
  'timing/steps_per_second': clu.values.Scalar(2.0),
  'timing/seqs_per_second': 64.0,
  'timing/target_tokens_per_second': 65536.4,
  'timing/data_wait_share': 0.0312,
  'note': clu.values.Text('x'),
}


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def log(monkeypatch):
  lines = []
  monkeypatch.setattr(logging, 'info', lambda form, *args: lines.append(form % args))
  return lines


def test_the_line_of_a_period():
  assert progress.period_line(400, METRICS, total_steps=8000) == (
    'step 400 of 8,000 | loss 2.3457 | accuracy 0.5000 | tokens/s 65,536 | '
    '1:03:20 left | data wait 3%'
  )


def test_the_line_of_a_period_fits_a_terminal():
  metrics = {
    **METRICS,
    'timing/target_tokens_per_second': 123_456,
    'timing/steps_per_second': 2.0,
    'timing/data_wait_share': 1.0,
    'loss_per_nonpadding_target_token': 12.0,
    'infilled_accuracy': 0.5,
  }
  line = progress.period_line(100_000, metrics, total_steps=1_000_000)
  assert len('00:00:00 ' + line) <= 120


def test_what_is_not_there_is_left_out():
  assert progress.period_line(4, {'loss': 1.5}) == 'step 4 | loss 1.5000'
  text = {'accuracy': clu.values.Text('x')}
  assert progress.period_line(4, text, 4) == 'step 4 of 4'
  # Without a speed, or at the end, nothing is said of the time left.
  assert 'left' not in progress.period_line(8, METRICS, 8)
  assert 'left' not in progress.period_line(4, {'timing/steps_per_second': 0.0}, 8)
  # Models that count no tokens.
  steps = {'timing/steps_per_second': 2.0}
  assert progress.period_line(4, steps, 8) == 'step 4 of 8 | steps/s 2 | 0:00:02 left'


CHOSEN = {f'right at place {i}': f'accuracy_{i}' for i in range(5)} | {'absent': 'no'}
MANY = METRICS | {f'accuracy_{i}': clu.values.Scalar(i / 8) for i in range(5)}


def test_the_last_line_shows_all_in_lines_that_fit():
  assert progress.last_report(8000, MANY, CHOSEN).splitlines() == [
    'step 8,000 of 8,000 | loss 2.3457 | accuracy 0.5000 | right at place 0 0.0000 | '
    'right at place 1 0.1250',
    '         right at place 2 0.2500 | right at place 3 0.3750 | right at place 4 '
    '0.5000 | learning rate 0.0003 | steps/s 2',
    '         examples/s 64 | tokens/s 65,536 | data wait 3%',
  ]


def test_an_evaluation_shows_the_quality():
  text = progress.evaluation_report('denoising', 3, MANY, CHOSEN)
  assert text.startswith('denoising: step 3 | loss 2.3457 | accuracy 0.5000 | right')
  assert 'right at place 4 0.5000' in text and 'absent' not in text
  assert 'steps/s' not in text
  assert all(len(line) <= 120 for line in ('00:00:00 ' + text).splitlines())


def test_the_model_chooses_what_the_bar_and_the_last_line_show(log):
  stream = Terminal()
  shown = progress.Progress(total_steps=500, stream=stream, chosen=CHOSEN)
  shown.advance()
  shown.report(400, MANY)
  assert log == [progress.period_line(400, MANY, 500)]
  assert 'right at place 0 0.0000' in stream.getvalue()
  shown.report(500, MANY)
  assert log[1:] == [progress.last_report(500, MANY, CHOSEN)]
  shown.close()


@pytest.mark.parametrize(
  'rate, shown',
  [
    (0.01234, '0.0123'),
    (1.5, '1.5'),
    (99.94, '99.9'),
    (99.96, '100'),
    (123.4, '123'),
    (54160.2, '54,160'),
  ],
)
def test_rates_have_three_figures_and_no_exponent(rate, shown):
  names = ('timing/steps_per_second', 'timing/seqs_per_second')
  line = progress.last_report(1, dict.fromkeys(names, rate))
  assert line == f'step 1 of 1 | steps/s {shown} | examples/s {shown}'


def test_no_bar_without_a_terminal(log):
  stream = io.StringIO()
  shown = progress.Progress(total_steps=10, stream=stream)
  shown.advance()
  shown.report(1, {'loss': 1.0})
  shown.close()
  assert stream.getvalue() == ''
  assert log == ['step 1 of 10 | loss 1.0000']


def test_no_bar_without_a_total(log):
  stream = Terminal()
  shown = progress.Progress(stream=stream)
  shown.advance()
  shown.report(1, {'loss': 1.0})
  assert stream.getvalue() == ''
  assert log == ['step 1 | loss 1.0000']


def test_a_bar_on_a_terminal(log):
  stream = Terminal()
  shown = progress.Progress(total_steps=10, first_step=4, stream=stream)
  assert stream.getvalue() == ''
  shown.advance()
  shown.advance(2)
  shown.report(7, METRICS)
  assert '7/10' in stream.getvalue()
  assert 'loss 2.3457 | accuracy 0.5000' in stream.getvalue()
  assert len(log) == 1 and log[0].startswith('step 7 of 10 | loss 2.3457')
  shown.close()
  length = len(stream.getvalue())
  shown.advance()
  assert len(stream.getvalue()) == length


def test_other_lines_go_above_the_bar(monkeypatch):
  """The bar's text is wiped first: the line does not begin behind it."""
  stream = Terminal()
  monkeypatch.setattr(logging, 'info', lambda form, *args: stream.write(form % args))
  shown = progress.Progress(total_steps=10, stream=stream)
  shown.advance()
  shown.log('evaluated')
  before, _, _ = stream.getvalue().partition('evaluated')
  assert before.rpartition('\r')[2] == '' and 'step' in before
  shown.close()


def test_only_the_first_process_shows_anything(monkeypatch, log):
  monkeypatch.setattr(progress.jax, 'process_index', lambda: 1)
  stream = Terminal()
  shown = progress.Progress(total_steps=10, stream=stream)
  shown.advance()
  shown.report(1, METRICS)
  assert stream.getvalue() == '' and log == []


def test_time_without_data():
  ended = []
  follower = progress.StepFollower(lambda: ended.append(1))
  for seconds in (0.1, 0.2, 0.0):
    asked = time.perf_counter()
    time.sleep(seconds)
    follower.launched(jnp.zeros(2), asked, time.perf_counter())
  idle = follower.take_idle_seconds().result()
  assert 0.3 <= idle < 1.0
  assert len(ended) == 3
  assert follower.take_idle_seconds().result() == 0.0
  follower.close()


def test_data_that_comes_while_devices_compute_costs_nothing():
  follower = progress.StepFollower(lambda: None)
  now = time.perf_counter()
  follower.launched(jnp.zeros(2), now, now)
  follower.take_idle_seconds().result()
  # Asked before the step before ended: from then on nothing was waited for.
  follower.launched(jnp.zeros(2), now - 5, now)
  assert follower.take_idle_seconds().result() == 0.0
  follower.close()


def test_a_check_that_fails_is_raised_two_steps_later():
  def fail():
    raise FloatingPointError('bad')

  follower = progress.StepFollower(lambda: None)
  now = time.perf_counter()
  follower.launched(jnp.zeros(2), now, now, fail)
  follower.launched(jnp.zeros(2), now, now)
  with pytest.raises(FloatingPointError, match='bad'):
    follower.launched(jnp.zeros(2), now, now)
  follower.launched(jnp.zeros(2), now, now, fail)
  # Of the three then under way the first was waited for.
  pending = follower.take_pending()
  assert [future.exception() is None for future in pending] == [True, False]
  assert follower.take_pending() == []
  follower.close()
