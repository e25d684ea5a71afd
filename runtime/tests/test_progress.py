"""The line of an interval, the bar, and metrics.jsonl."""

import io
import json

import clu.values
import numpy as np
import pytest
from absl import logging

from t5x import progress

METRICS = {
  'loss': clu.values.Scalar(812.0),
  'loss_per_nonpadding_target_token': clu.values.Scalar(2.34567),
  'accuracy': 0.5,
  'infilled_accuracy': np.float32(0.25),
  'timing/steps_per_second': clu.values.Scalar(2.0),
  'timing/target_tokens_per_second': 65536.4,
  'timing/data_wait_share': 0.0312,
  'note': clu.values.Text('x'),
}
CHOSEN = {'infilled': 'infilled_accuracy', 'absent': 'no'}


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def log(monkeypatch):
  lines = []
  monkeypatch.setattr(logging, 'info', lambda form, *args: lines.append(form % args))
  return lines


def test_the_line_of_an_interval():
  assert progress.interval_line(400, 8000, METRICS, {}) == (
    'step 400 of 8,000 | loss 2.3457 | accuracy 0.5000 | tokens/s 65,536 | '
    '1:03:20 left | data wait 3%'
  )


@pytest.mark.parametrize(
  'metrics, line',
  [
    ({'loss': 1.5}, 'loss 1.5000'),
    # A model that does not count tokens. Rates have three digits and no exponent.
    ({'timing/steps_per_second': 0.01234}, 'steps/s 0.0123 | 0:05:24 left'),
    ({'timing/steps_per_second': 2.0}, 'steps/s 2 | 0:00:02 left'),
    ({'timing/steps_per_second': 99.96}, 'steps/s 100 | 0:00:00 left'),
    ({'timing/steps_per_second': 5416.2}, 'steps/s 5,416 | 0:00:00 left'),
  ],
)
def test_missing_metrics_are_left_out(metrics, line):
  assert progress.interval_line(4, 8, metrics, {}) == f'step 4 of 8 | {line}'
  text = {'accuracy': clu.values.Text('x')}
  assert progress.interval_line(8, 8, text, {}) == 'step 8 of 8'


def test_no_bar_without_a_terminal(log):
  stream = io.StringIO()
  shown = progress.Progress(10, chosen=CHOSEN, stream=stream)
  shown.advance()
  shown.report(1, {'loss': 1.0, 'infilled_accuracy': 0.5})
  shown.report(10, {'loss': 1.0, 'infilled_accuracy': 0.5})
  shown.report_evaluation('task', 10, METRICS)
  shown.close()
  assert stream.getvalue() == ''
  assert log == [
    'step 1 of 10 | loss 1.0000',
    'step 10 of 10 | loss 1.0000 | infilled 0.5000',
    'task: step 10 | loss 2.3457 | accuracy 0.5000 | infilled 0.2500',
  ]


def test_bar_on_a_terminal(monkeypatch):
  stream = Terminal()
  monkeypatch.setattr(logging, 'info', lambda form, *args: stream.write(form % args))
  shown = progress.Progress(10, first_step=4, chosen=CHOSEN, stream=stream)
  assert stream.getvalue() == ''
  for _ in range(3):
    shown.advance()
  shown.report(7, METRICS)
  text = stream.getvalue()
  # The bar is cleared before a line is logged.
  before, _, after = text.partition('step 7 of 10 | loss 2.3457')
  assert before.rpartition('\r')[2] == '' and 'step' in before
  assert '7/10' in after and 'infilled 0.2500 | tokens/s 65,536' in after
  shown.close()


def test_only_the_first_process_shows_and_writes(monkeypatch, log, tmp_path):
  monkeypatch.setattr(progress.jax, 'process_index', lambda: 1)
  stream = Terminal()
  shown = progress.Progress(10, stream=stream)
  shown.advance()
  shown.report(1, METRICS)
  assert stream.getvalue() == '' and log == []
  metrics_log = progress.MetricsLog(str(tmp_path))
  metrics_log.add(1, 'train', {'loss': 1.0})
  assert list(tmp_path.iterdir()) == []
  assert metrics_log.at(1) == {'train/loss': 1.0}


def test_each_report_is_a_line(tmp_path):
  metrics_log = progress.MetricsLog(str(tmp_path))
  metrics_log.add(2, 'train', METRICS)
  metrics_log.add(2, 'training_eval/task', {'loss': np.float32(0.1)})
  assert metrics_log.at(2)['training_eval/task/loss'] == float(np.float32(0.1))
  assert metrics_log.at(2)['train/accuracy'] == 0.5
  metrics_log.add(4, 'train', {'loss': float('nan')})
  assert metrics_log.at(2) == {} and metrics_log.at(4).keys() == {'train/loss'}
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  first, second, third = map(json.loads, lines)
  assert first['step'] == 2 and first['source'] == 'train'
  assert first['values']['infilled_accuracy'] == 0.25 and 'note' not in first['values']
  assert second['source'] == 'training_eval/task'
  assert np.isnan(third['values']['loss'])


def test_resumed_run_recalls_its_reports_and_drops_later_ones(tmp_path):
  metrics_log = progress.MetricsLog(str(tmp_path))
  for step in (2, 4, 6):
    metrics_log.add(step, 'train', {'loss': step / 10})
    metrics_log.add(step, 'training_eval/task', {'loss': step * 1.0})
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text() + '[7]\n{"step": 7, "sou')

  resumed = progress.MetricsLog(str(tmp_path), 4)
  assert resumed.recall('train', 'loss') == [0.2, 0.4]
  assert resumed.recall('training_eval/task', 'loss') == [2.0, 4.0]
  assert resumed.recall('train', 'accuracy') == []
  assert len(path.read_text().splitlines()) == 4
  # The evaluation at step 4 will be repeated, but not the training before it.
  again = progress.MetricsLog(str(tmp_path), 4, evaluates_first=True)
  assert again.recall('train', 'loss') == [0.2, 0.4]
  assert again.recall('training_eval/task', 'loss') == [2.0]
