"""Fine-tuning tasks on small files in the real formats, and their headline metrics."""

import json
import os
import pathlib
import subprocess
import sys

import gin
import numpy as np
import pytest
import seqio

from bart_t5x.features import BartFeatureConverter
from tasks import monitor, text_to_text

DATA = pathlib.Path(__file__).parent / 'data'
ROOT = DATA.parent.parent
LENGTHS = {'inputs': 200, 'targets': 64}

# Inputs and targets of each file in tests/data/finetune.
EXPECTED = {
  'norec': [
    ('stemning: En varm og morsom film om fjorden.', 'positiv'),
    ('stemning: Platen er kjedelig fra ende til annen.', 'negativ'),
    ('stemning: Boka er grei nok.', 'nøytral'),
  ],
  'scala_nb': [
    ('språk: Barna leker i snøen.', 'riktig'),
    ('språk: Barna i leker snøen.', 'feil'),
  ],
  'scala_nn': [
    ('språk: Eg ser "fjorden".', 'riktig'),
    ('språk: ser "fjorden".', 'feil'),
  ],
  'norne_nb': [
    ('navn: Kari Dahl bor i Oslo .', 'PER: Kari Dahl | LOC: Oslo'),
    ('navn: Det snør .', 'ingen'),
    ('navn: NRK Stortinget', 'ORG: NRK | ORG: Stortinget'),
  ],
  'norne_nn': [('navn: Eg las Fuglane', 'PROD: Fuglane')],
  'norquad': [
    (
      'spørsmål: Når ble Grunnloven vedtatt? '
      'tekst: Grunnloven ble vedtatt på Eidsvoll 17. mai 1814.',
      '17. mai 1814',
    ),
    (
      'spørsmål: Hvor ble den vedtatt? '
      'tekst: Grunnloven ble vedtatt på Eidsvoll 17. mai 1814.',
      'Eidsvoll',
    ),
  ],
  'no_sammendrag': [
    ('sammendrag: Det snør på fjellet. Veien er stengt.', 'Snø stenger veien.'),
    ('sammendrag: Laget vant igjen.', 'Ny seier.'),
  ],
  'nb_nn': [
    ('til nynorsk: Jeg heter Kari.', 'Eg heiter Kari.'),
    ('til nynorsk: Hva er dette?', 'Kva er dette?'),
  ],
}


@pytest.fixture(autouse=True)
def clean_gin():
  gin.clear_config()
  yield
  gin.clear_config()


@pytest.fixture
def task(request, corpus_dir, monkeypatch):
  """A registered task with the tests' vocabulary and data."""
  monkeypatch.setenv('BART_T5X_DATA', str(DATA))
  found = seqio.get_mixture_or_task(request.param)
  vocabulary = found.output_features['inputs'].vocabulary
  monkeypatch.setattr(vocabulary, 'path', corpus_dir)
  monkeypatch.setattr(vocabulary, '_content', None)
  return found


def examples(task, lengths=LENGTHS, split='train'):
  dataset = task.get_dataset(lengths, split, shuffle=False)
  return list(dataset.as_numpy_iterator())


@pytest.mark.parametrize('task', EXPECTED, indirect=True)
def test_file_to_ids_to_perfect_score(task):
  vocabulary = task.output_features['targets'].vocabulary
  found = examples(task)
  texts = []
  for example in found:
    for feature in ('inputs', 'targets'):
      assert example[feature][0] == vocabulary.bos_id
      assert example[feature][-1] == vocabulary.eos_id
      assert example[f'{feature}_truncated'] == 0
    texts.append(
      tuple(vocabulary.decode(example[f].tolist()) for f in ('inputs', 'targets'))
    )
  assert texts == EXPECTED[task.name]
  # As seqio evaluates: right answers score 100, wrong ones next to nothing.
  targets = [
    task.postprocess_fn(target, example=example, is_target=True)
    for (_, target), example in zip(texts, found, strict=True)
  ]
  answers = [
    task.postprocess_fn(target, example=e, is_target=False)
    for (_, target), e in zip(texts, found, strict=True)
  ]
  (metric,) = task.metric_fns
  scores = metric(targets=targets, predictions=answers)
  _, key = monitor.headline(task.name)
  assert scores[key] == pytest.approx(100)
  wrong = metric(targets=targets, predictions=['xyz'] * len(targets))
  assert wrong[key] < 5


@pytest.mark.parametrize('task', ['norquad'], indirect=True)
def test_seqio_scores_on_every_right_answer(task):
  """Questions have different numbers of answers; the second answer is as good."""
  evaluator = seqio.Evaluator(
    task.name,
    BartFeatureConverter(pack=False),
    eval_split='train',
    sequence_length=LENGTHS,
    seed=1,
  )
  encode = task.output_features['targets'].vocabulary.encode
  answers = [np.array([1, *encode(text), 2]) for text in ('1814', 'i Eidsvoll')]
  answers = [np.pad(ids, (0, 32 - len(ids))) for ids in answers]
  metrics, _ = evaluator.evaluate(
    compute_metrics=True, step=1, predict_fn=lambda dataset: list(enumerate(answers))
  )
  scores = metrics.result()[task.name]
  # Of the second, one word of two is right: precision 1 / 2, recall 1.
  assert scores == pytest.approx({'em': 50, 'f1': 100 * (1 + 2 / 3) / 2})


@pytest.mark.parametrize(
  ('task', 'first'),
  [
    ('norsumm_nb', 'Brua er stengt. \n\n Den males til mai.'),
    ('norsumm_nn', 'Brua er stengd. \n\n Ho blir måla til mai.'),
  ],
  indirect=['task'],
)
def test_norsumm_is_read_as_it_is_published(task, first):
  (example,) = examples(task, split='validation')
  assert example['targets_pretokenized'].decode() == first
  target = task.postprocess_fn('cut off', example=example, is_target=True)
  assert len(target) == {'norsumm_nb': 2, 'norsumm_nn': 1}[task.name]
  assert target[0] == first


@pytest.mark.parametrize('task', ['no_sammendrag'], indirect=True)
def test_mixture_trains_on_tasks_with_a_training_split(task, monkeypatch):
  mixture = seqio.get_mixture_or_task('sammendrag')
  for member in mixture.tasks:  # as with one corpus
    vocabulary = member.output_features['inputs'].vocabulary
    monkeypatch.setattr(
      vocabulary, 'path', task.output_features['inputs'].vocabulary.path
    )
    monkeypatch.setattr(vocabulary, '_content', None)
  dataset = mixture.get_dataset(LENGTHS, 'train', shuffle=False, num_epochs=1)
  decode = task.output_features['targets'].vocabulary.decode
  found = [decode(e['targets'].tolist()) for e in dataset.as_numpy_iterator()]
  assert found == ['Snø stenger veien.', 'Ny seier.']


def test_import_needs_neither_files_nor_libraries(tmp_path):
  code = (
    'import sys, seqio\n'
    'theirs = set(sys.modules)\n'  # seqio imports scikit-learn where it is
    'import tasks\n'
    'ours = set(sys.modules) - theirs\n'
    'modules = sorted(ours & {"sklearn", "datasets", "pyarrow", "rouge_score"})\n'
    'print("modules:", modules)\n'
    'try:\n'
    '  seqio.get_mixture_or_task("norne_nb").source.get_dataset("train")\n'
    'except FileNotFoundError as e:\n'
    '  print("message:", e)\n'
  )
  run = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=True,
    env={**os.environ, 'BART_T5X_DATA': str(tmp_path)},
    cwd=ROOT,
  )
  assert 'modules: []' in run.stdout.splitlines()
  assert f'message: no data at {tmp_path}/finetune/norne_nb/train.' in run.stdout
  assert 'Download it from https://github.com/ltgoslo/norne' in run.stdout
  assert "readers.records.source = 'hub'" in run.stdout


# ---- The headline metric and the best checkpoint ----


@pytest.mark.parametrize(
  ('task', 'metric', 'expected'),
  [
    ('scala_nb_mini', None, ('scala_nb_mini', 'mcc')),
    ('norne_nn', 'span_recall', ('norne_nn', 'span_recall')),
    ('norne', None, ('norne_nb', 'span_f1')),
    ('sammendrag', None, ('no_sammendrag', 'rouge_lsum_max')),
  ],
)
def test_headline_of_tasks_and_mixtures(task, metric, expected):
  assert monitor.headline(task, metric) == expected


def test_tensorboard_name():
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
def test_missing_library_of_a_metric_is_reported_at_the_start(
  task, module, package, monkeypatch
):
  monkeypatch.setitem(sys.modules, module, None)
  gin.bind_parameter('tasks.monitor.headline.task', task)
  # The first of its tasks, which is monitored, needs no library.
  seqio.MixtureRegistry.add('monitor_test_mixture', [('norquad', 1), ('norec', 1)])
  try:
    with pytest.raises(ImportError, match=f'need {package}: pip install'):
      monitor.tensorboard_name()
    # Inference needs no metrics.
    assert monitor.headline()
  finally:
    seqio.MixtureRegistry.remove('monitor_test_mixture')


def test_a_task_without_metrics_or_headline():
  with pytest.raises(ValueError, match='no split .validation. with metrics'):
    monitor.headline('norwegian_fill_in')
  with pytest.raises(ValueError, match='--gin.METRIC='):
    monitor.headline('norwegian_denoising')
  assert monitor.headline('norwegian_denoising', 'chrf')[1] == 'chrf'


def test_module_is_imported_first(tmp_path, monkeypatch):
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
  """Four evaluations; three of the checkpoints still exist."""
  gin.bind_parameter('tasks.monitor.headline.task', 'norec')
  values = {10: 40.0, 20: 70.0, 30: 90.0, 40: 70.0}
  (tmp_path / 'inference_eval').mkdir()
  (tmp_path / 'inference_eval' / 'norec-metrics.jsonl').write_text(
    ''.join(json.dumps({'step': s, 'macro_f1': v}) + '\n' for s, v in values.items())
  )
  for step in (10, 20, 40):
    (tmp_path / f'checkpoint_{step}').mkdir()
  return tmp_path


def test_best_checkpoint_of_those_kept(run_dir):
  assert monitor.best_checkpoint(str(run_dir)) == str(run_dir / 'checkpoint_20')
  (run_dir / 'checkpoint_30').mkdir()
  assert monitor.best_checkpoint(str(run_dir)) == str(run_dir / 'checkpoint_30')


def test_nan_is_never_the_best(run_dir):
  metrics = run_dir / 'inference_eval' / 'norec-metrics.jsonl'
  rows = [json.loads(line) for line in metrics.read_text().splitlines()]
  rows[0]['macro_f1'] = float('nan')
  metrics.write_text('\n'.join(map(json.dumps, rows)))
  assert monitor.best_checkpoint(str(run_dir)) == str(run_dir / 'checkpoint_20')


def test_checkpoint_is_returned_as_it_is():
  assert monitor.best_checkpoint('runs/a/checkpoint_7/') == 'runs/a/checkpoint_7/'


def test_no_best_checkpoint(run_dir, tmp_path_factory):
  gin.bind_parameter('tasks.monitor.headline.metric', 'accuracy')
  with pytest.raises(FileNotFoundError, match="no checkpoint with a value of 'accur"):
    monitor.best_checkpoint(str(run_dir))
  empty = tmp_path_factory.mktemp('empty')
  with pytest.raises(FileNotFoundError, match='neither a checkpoint .* nor the folder'):
    monitor.best_checkpoint(str(empty))


def test_own_metrics_need_a_headline():
  with pytest.raises(ValueError, match='as headline'):
    text_to_text.add_text_to_text_task(
      'no_headline', None, files={'train': 'a.tsv'}, metric_fns=[len]
    )
