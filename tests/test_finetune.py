"""Fine-tuning tasks on small files in the formats of the real ones."""

import json
import os
import pathlib
import runpy
import subprocess
import sys
import types

import gin
import jax
import numpy as np
import pytest
import seqio

from bart_t5x.features import BartFeatureConverter
from t5x import gin_utils, launch
from t5x import train as train_script
from tasks import finetune, readers

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


def examples(task, lengths=LENGTHS):
  dataset = task.get_dataset(lengths, 'train', shuffle=False)
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
  # As seqio evaluates: a model that answers right has full marks, another has not.
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
  headline = {'norec': 'macro_f1', 'norquad': 'em', 'nb_nn': 'chrf'}
  key = headline.get(task.name) or next(k for k in ('mcc', 'span_f1') if k in scores)
  assert scores[key] == pytest.approx(100)
  wrong = metric(targets=targets, predictions=['xyz'] * len(targets))
  assert wrong[key] < 5


@pytest.mark.parametrize('task', ['norquad'], indirect=True)
def test_every_right_answer_counts(task):
  first = examples(task)[0]
  target = task.postprocess_fn('cut off', example=first, is_target=True)
  assert target == ['17. mai 1814', '1814']


@pytest.mark.parametrize('task', ['norne_nb'], indirect=True)
def test_batches_as_the_model_takes_them(task):
  batches = seqio.get_dataset(
    task.name,
    LENGTHS,
    BartFeatureConverter(pack=False),
    dataset_split='train',
    shuffle=True,
    batch_size=2,
    num_epochs=None,
    seed=1,
    verbose=False,
  )
  batch = next(batches.as_numpy_iterator())
  assert batch['encoder_input_tokens'].shape == (2, 200)
  assert (batch['decoder_target_tokens'][:, 0] == 1).all()


@pytest.mark.parametrize('task', ['norec'], indirect=True)
def test_what_is_too_long_is_cut_and_counted(task):
  first = examples(task, {'inputs': 12, 'targets': 4})[0]
  assert first['inputs'].size == 12
  assert first['inputs_truncated'] > 0
  assert first['targets_pretokenized'] == b'positiv'


def test_importing_needs_neither_files_nor_libraries(tmp_path):
  code = (
    'import sys, seqio\n'
    'theirs = set(sys.modules)\n'  # seqio imports scikit-learn where it is
    'import tasks\n'
    'ours = set(sys.modules) - theirs\n'
    'modules = sorted(ours & {"sklearn", "datasets", "pyarrow"})\n'
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


# ---- Where data comes from ----


def test_gin_names_a_folder():
  gin.bind_parameter('tasks.readers.records.source', str(DATA / 'finetune'))
  records = readers.records('nb_nn', 'train', None, 'somewhere')
  assert next(records) == {'nb': 'Jeg heter Kari.', 'nn': 'Eg heiter Kari.'}


def test_gin_chooses_the_hub(monkeypatch):
  asked = []

  def load_dataset(path, config, split):
    asked.append((path, config, split))
    return [{'text': 'Barna leker.', 'label': 'correct'}]

  fake = types.SimpleNamespace(load_dataset=load_dataset)
  monkeypatch.setitem(sys.modules, 'datasets', fake)
  gin.bind_parameter('tasks.readers.records.source', 'hub')
  source = seqio.get_mixture_or_task('scala_nb').source
  (example,) = source.get_dataset('validation').as_numpy_iterator()
  assert example['targets'] == b'riktig'
  assert asked == [('EuroEval/scala-nb', None, 'val')]
  with pytest.raises(ValueError, match='on no Hub'):
    readers.records('nb_nn', 'train', None, 'https://www.nb.no')


def test_two_files_for_one_split_are_one_too_many(tmp_path):
  gin.bind_parameter('tasks.readers.records.source', str(tmp_path))
  (tmp_path / 'norec').mkdir()
  for name in ('train.jsonl', 'train.tsv'):
    (tmp_path / 'norec' / name).write_text('')
  with pytest.raises(ValueError, match='Keep one'):
    readers.records('norec', 'train', None, 'somewhere')


def test_parquet(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  from pyarrow import parquet

  rows = [{'text': 'God film.', 'rating': 5}]
  parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'train.parquet')
  assert list(readers.read_file(str(tmp_path / 'train.parquet'))) == rows


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.jsonl', '{"text": "x"}\nnei\n', 'line 2 is not JSON'),
    ('a.jsonl', '[1]\n', 'must be a JSON object'),
    ('a.tsv', 'a\tb\n1\n', 'line 2 has 1 columns, but the first line names 2'),
    ('a.tsv', '', 'must name the columns'),
    ('a.conllu', '1\tKari\n', 'has 2 columns; CoNLL-U has 10'),
    ('a.conllu', '1\tKari' + '\t_' * 8 + '\n', 'Take the files of NorNE'),
    ('a.json', '{}', 'not a SQuAD file'),
    ('a.csv', '', 'no known format'),
  ],
)
def test_damaged_files_are_named(name, content, message, tmp_path):
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=message):
    list(readers.read_file(str(tmp_path / name)))


# ---- Records ----


@pytest.mark.parametrize(
  ('to_text', 'record', 'message'),
  [
    (finetune.sentiment_to_text, {'text': 'x', 'label': 'bra'}, "label 'bra'"),
    (finetune.sentiment_to_text, {'text': 'x', 'rating': 7}, '1 to 6. Got: 7'),
    (finetune.acceptability_to_text, {'text': 'x', 'label': 1}, 'unknown label 1'),
    (finetune.entities_to_text, {'tokens': ['x'], 'labels': ['B-DYR']}, 'B-DYR'),
    (finetune.entities_to_text, {'tokens': ['x'], 'labels': []}, '1 tokens, but 0'),
  ],
)
def test_unknown_labels_stop(to_text, record, message):
  with pytest.raises(ValueError, match=message):
    to_text(record)


def test_entities_side_by_side_and_without_a_beginning():
  record = {
    'tokens': ['Oslo', 'Bergen', 'Kari', 'Dahl'],
    'labels': ['B-GPE_LOC', 'B-LOC', 'I-PER', 'I-PER'],
  }
  targets = finetune.entities_to_text(record)['targets']
  assert targets == 'LOC: Oslo | LOC: Bergen | PER: Kari Dahl'


# ---- A user's task ----


def test_the_readme_task(tmp_path, corpus_dir, monkeypatch):
  source = DATA / 'readme_task.py'
  assert len(source.read_text().splitlines()) <= 15
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data' / 'mini').symlink_to(corpus_dir)
  (tmp_path / 'ord').mkdir()
  (tmp_path / 'ord/train.tsv').write_text('ord\tklasse\nsnø\tsubstantiv\ngå\tverb\n')
  (tmp_path / 'ord/validation.tsv').write_text('ord\tklasse\nrød\tfarge\n')
  monkeypatch.chdir(tmp_path)
  runpy.run_path(str(source))
  task = seqio.get_mixture_or_task('ordklasser')
  try:
    found = [
      (e['inputs_pretokenized'], e['targets_pretokenized']) for e in examples(task)
    ]
    assert found[0] == ('ordklasse: snø'.encode(), b'substantiv')
    assert len(found) == 2
    (metric,) = task.metric_fns
    assert metric(['verb'], ['verb'])['accuracy'] == 100
    with pytest.raises(ValueError, match="ordklasser/validation: record 1 .*'farge'"):
      task.get_dataset(LENGTHS, 'validation')
  finally:
    seqio.TaskRegistry.remove('ordklasser')


def test_data_comes_from_one_place():
  with pytest.raises(ValueError, match='either files or read'):
    finetune.add_text_to_text_task('no_data', finetune.translation_to_text)


# ---- Learning ----

WORDS = {
  'substantiv': ['snø', 'fjord', 'hus', 'barn', 'sjø', 'bok'],
  'verb': ['gå', 'lese', 'snø inn', 'bo', 'ta'],
  'adjektiv': ['rød', 'ærlig', 'stor', 'kald', 'lang'],
}


@pytest.fixture
def words(tmp_path, corpus_dir):
  """A task of 16 examples, the same for training and validation."""
  rows = [f'{word}\t{name}' for name, found in WORDS.items() for word in found]
  (tmp_path / 'words.tsv').write_text('\n'.join(['word\tclass', *rows]) + '\n')
  files = dict.fromkeys(('train', 'validation'), str(tmp_path / 'words.tsv'))
  yield finetune.add_text_to_text_task(
    'finetune_test_words',
    lambda row: {'inputs': row['word'], 'targets': row['class']},
    files=files,
    corpus_dir=corpus_dir,
    labels=tuple(WORDS),
  )
  seqio.TaskRegistry.remove('finetune_test_words')


def train(monkeypatch, task, model_dir, steps, checkpoint):
  """Runs gin/finetune.gin with a tiny model; the step and state it ends with."""
  function = train_script.train
  monkeypatch.setattr(sys.modules['__main__'], 'train', function, raising=False)
  gin.clear_config()
  gin.configurable(function, module='__main__')
  vocab_size = task.output_features['targets'].vocabulary.vocab_size
  gin_utils.parse_gin_flags(
    [str(ROOT), *launch.GIN_SEARCH_PATHS],
    ['gin/finetune.gin', 'gin/models/tiny.gin'],
    [
      f'MIXTURE_OR_TASK_NAME = {task.name!r}',
      f'INITIAL_CHECKPOINT_PATH = {checkpoint!r}',
      f'MODEL_DIR = {str(model_dir)!r}',
      f'network.BartConfig.vocab_size = {vocab_size}',
      f'TRAIN_STEPS_RELATIVE = {steps}',
      "TASK_FEATURE_LENGTHS = {'inputs': 16, 'targets': 16}",
      "COMPUTE_DTYPE = 'float32'",
      'DROPOUT_RATE = 0.0',
      'BATCH_SIZE = 16',
      'EVAL_STEPS = 1',
      'EVAL_PERIOD = 1000',
      'LEARNING_RATE = 5e-3',
      'WARMUP_STEPS = 2',
    ],
  )
  return gin.get_configurable(function)()


@pytest.mark.slow
def test_a_tiny_model_over_fits_from_a_checkpoint(words, tmp_path, monkeypatch):
  step, _ = train(monkeypatch, words, tmp_path / 'first', 3, [])
  assert step == 3
  checkpoint = str(tmp_path / 'first' / 'checkpoint_3')
  step, state = train(monkeypatch, words, tmp_path / 'second', 150, checkpoint)
  assert step == 153
  # The optimizer began anew, though the checkpoint has its states.
  counts = {
    int(np.asarray(leaf))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.param_states)
    if 'count' in jax.tree_util.keystr(path)
  }
  assert counts == {150}
  # By beam search, on the last step.
  (found,) = (tmp_path / 'second').glob(f'inference_eval/*{words.name}-metrics.jsonl')
  last = json.loads(found.read_text().splitlines()[-1])
  assert last['step'] == 153
  assert last['accuracy'] >= 95
