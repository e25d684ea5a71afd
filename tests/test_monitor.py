"""The metric that is followed, and the best checkpoint by it."""

import json
import sys

import gin
import pytest
import seqio

from tasks import monitor, text_to_text


@pytest.fixture(autouse=True)
def clean_gin():
  gin.clear_config()
  yield
  gin.clear_config()


@pytest.mark.parametrize(
  ('task', 'metric', 'expected'),
  [
    ('norec', None, ('norec', 'macro_f1')),
    ('scala_nb_mini', None, ('scala_nb_mini', 'mcc')),
    ('norne_nn', 'span_recall', ('norne_nn', 'span_recall')),
    ('norne', None, ('norne_nb', 'span_f1')),
    ('sammendrag', None, ('no_sammendrag', 'rouge_lsum_max')),
  ],
)
def test_headlines(task, metric, expected):
  assert monitor.headline(task, metric) == expected


def test_the_name_in_tensorboard():
  gin.bind_parameter('tasks.monitor.headline.task', 'norquad')
  assert monitor.tensorboard_name() == 'inference_eval/norquad/eval/f1'


@pytest.mark.parametrize(
  ('task', 'module', 'package'),
  [
    ('norec', 'sklearn.metrics', 'scikit-learn'),
    ('norsumm_nb', 'rouge_score.rouge_scorer', 'rouge-score'),
    ('monitor_test_mixture', 'sklearn.metrics', 'scikit-learn'),
  ],
)
def test_a_metric_without_its_library_is_told_at_the_start(
  task, module, package, monkeypatch
):
  monkeypatch.setitem(sys.modules, module, None)
  gin.bind_parameter('tasks.monitor.headline.task', task)
  # The first of its tasks, which is the one to follow, needs no library.
  seqio.MixtureRegistry.add('monitor_test_mixture', [('norquad', 1), ('norec', 1)])
  try:
    with pytest.raises(ImportError, match=f'need {package}: pip install'):
      monitor.tensorboard_name()
    # Answers from a model that is there need no metrics.
    assert monitor.headline()
  finally:
    seqio.MixtureRegistry.remove('monitor_test_mixture')


def test_a_misspelt_task_is_answered_with_the_nearest():
  with pytest.raises(ValueError, match="'nornee_nb'. Nearest: norne_nb"):
    monitor.headline('nornee_nb')


def test_a_task_without_metrics_or_headline():
  with pytest.raises(ValueError, match='no split .validation. with metrics'):
    monitor.headline('norwegian_fill_in')
  with pytest.raises(ValueError, match='--gin.METRIC='):
    monitor.headline('norwegian_denoising')
  assert monitor.headline('norwegian_denoising', 'chrf')[1] == 'chrf'


def test_a_module_is_imported_first(tmp_path, monkeypatch):
  (tmp_path / 'monitor_test_module.py').write_text(
    'from tasks import text_to_text as t\n'
    't.add_text_to_text_task("monitor_test", None, files={"validation": "a.tsv"})\n'
  )
  monkeypatch.syspath_prepend(tmp_path)
  try:
    found = monitor.headline('monitor_test', module='monitor_test_module')
    assert found == ('monitor_test', 'chrf')
  finally:
    seqio.TaskRegistry.remove('monitor_test')


@pytest.fixture
def run_dir(tmp_path):
  """Four evaluations, of which the checkpoints of three steps are still there."""
  gin.bind_parameter('tasks.monitor.headline.task', 'norec')
  values = {10: 40.0, 20: 70.0, 30: 90.0, 40: 70.0}
  (tmp_path / 'inference_eval').mkdir()
  (tmp_path / 'inference_eval' / 'norec-metrics.jsonl').write_text(
    ''.join(json.dumps({'step': s, 'macro_f1': v}) + '\n' for s, v in values.items())
  )
  for step in (10, 20, 40):
    (tmp_path / f'checkpoint_{step}').mkdir()
  return tmp_path


def test_the_best_checkpoint_that_is_there(run_dir):
  assert monitor.best_checkpoint(str(run_dir)) == str(run_dir / 'checkpoint_20')
  (run_dir / 'checkpoint_30').mkdir()
  assert monitor.best_checkpoint(str(run_dir)) == str(run_dir / 'checkpoint_30')


def test_a_checkpoint_without_a_number_is_never_the_best(run_dir):
  metrics = run_dir / 'inference_eval' / 'norec-metrics.jsonl'
  rows = [json.loads(line) for line in metrics.read_text().splitlines()]
  rows[0]['macro_f1'] = float('nan')
  metrics.write_text('\n'.join(map(json.dumps, rows)))
  assert monitor.best_checkpoint(str(run_dir)) == str(run_dir / 'checkpoint_20')


def test_one_checkpoint_is_taken_as_it_is():
  assert monitor.best_checkpoint('runs/a/checkpoint_7/') == 'runs/a/checkpoint_7/'


def test_no_checkpoint_to_be_best(run_dir, tmp_path_factory):
  gin.bind_parameter('tasks.monitor.headline.metric', 'accuracy')
  with pytest.raises(FileNotFoundError, match="no checkpoint with a value of 'accur"):
    monitor.best_checkpoint(str(run_dir))
  empty = tmp_path_factory.mktemp('empty')
  with pytest.raises(FileNotFoundError, match='neither a checkpoint .* nor the folder'):
    monitor.best_checkpoint(str(empty))


def test_metrics_of_ones_own_need_a_headline():
  with pytest.raises(ValueError, match='as headline'):
    text_to_text.add_text_to_text_task(
      'no_headline', None, files={'train': 'a.tsv'}, metric_fns=[len]
    )
