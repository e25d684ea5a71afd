"""Our gin files, tasks and model on google-research/t5x, compared with our runtime.

Both start from the same seeds. Each resumes what the other has written, so that every
comparison of numbers is one of checkpoints too.
"""

import json
import os
import pathlib
import shutil
import struct

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
STAND_INS = ROOT / 'runtime' / 'tests' / 'upstream_stand_ins'

pytestmark = [
  pytest.mark.upstream,
  pytest.mark.slow,
  pytest.mark.skipif(
    'UPSTREAM_T5X' not in os.environ, reason='UPSTREAM_T5X is not set'
  ),
]

THEIRS, OURS = 'theirs', 'ours'
PAIRS = [(THEIRS, OURS), (OURS, THEIRS)]
STEPS, MORE_STEPS = 8, 12
TASK = 'norwegian_denoising_mini'

# In files, because T5X's command line reaches macros only.
TRAIN = """
from __gin__ import dynamic_registration
import __main__ as train_script
from t5x import utils
include 'gin/bart_mini_no.gin'
include 'gin/models/tiny.gin'
BATCH_SIZE = 8
LOSS_NORMALIZING_FACTOR = 512
WARMUP_STEPS = 4
DROPOUT_RATE = 0.1
train_script.train:
  eval_period = 4
  eval_steps = 2
  stats_period = 2
utils.SaveCheckpointConfig.period = 4
"""
EVAL = """
from __gin__ import dynamic_registration
import seqio
from t5x import utils
include 'gin/eval.gin'
include 'gin/models/tiny.gin'
utils.DatasetConfig.batch_size = 8
utils.get_training_eval_datasets.eval_steps = 2
seqio.Evaluator.num_examples = 8
"""
INFER = """
from __gin__ import dynamic_registration
import __main__ as infer_script
from bart_t5x import model
from t5x import decoding
include 'gin/infer.gin'
include 'gin/models/tiny.gin'
infer_script.infer.mode = 'predict_with_aux'
model.BartModel.decode_fn = @decoding.beam_search
model.BartModel.predict_batch_with_aux.num_decodes = 4
"""
FINETUNE = """
from __gin__ import dynamic_registration
import __main__ as train_script
import word_task
from t5x import utils
include 'gin/finetune.gin'
include 'gin/models/tiny.gin'
MIXTURE_OR_TASK_NAME = 'words'
TASK_FEATURE_LENGTHS = {'inputs': 16, 'targets': 16}
BATCH_SIZE = 8
LOSS_NORMALIZING_FACTOR = 64
WARMUP_STEPS = 2
TRAIN_STEPS_RELATIVE = 4
EVAL_PERIOD = 4
COMPUTE_DTYPE = 'float32'
train/utils.DatasetConfig.seed = 0
train_script.train:
  eval_steps = 2
  stats_period = 1
"""
WORD_TASK = """
import os
from tasks.finetune import add_text_to_text_task

add_text_to_text_task(
  'words',
  lambda row: {'inputs': row['word'], 'targets': row['class']},
  files=dict.fromkeys(('train', 'validation'), os.environ['WORDS']),
  corpus_dir=os.path.join(os.environ['BART_T5X_DATA'], 'mini'),
  labels=('verb', 'substantiv'),
)
"""
SENTENCES = 'Sak 1: Fjordet og <mask> en by.\nSak <mask>: snøen er på byet.\n'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Where everything is written, with the gin files."""
  root = tmp_path_factory.mktemp('upstream')
  files = {'train': TRAIN, 'eval': EVAL, 'infer': INFER, 'finetune': FINETUNE}
  for name, text in files.items():
    (root / f'{name}.gin').write_text(text)
  (root / 'word_task.py').write_text(WORD_TASK)
  words = ['gå\tverb', 'snø\tsubstantiv', 'lese\tverb', 'fjord\tsubstantiv'] * 4
  (root / 'words.tsv').write_text('\n'.join(['word\tclass', *words]) + '\n')
  (root / 'sentences.txt').write_text(SENTENCES)
  return root


@pytest.fixture(scope='module')
def call(helpers, data_root, folder):
  """Runs `python -m t5x.SCRIPT` with a gin file of the folder and macros."""

  def start(whose, script, gin_file, **macros):
    path, python = [str(folder)], {}
    if whose == THEIRS:
      path = [os.environ['UPSTREAM_T5X'], str(STAND_INS), *path]
      python = {'python': os.environ['UPSTREAM_PYTHON']}
    outcome = helpers.Process(
      data_root,
      f't5x.{script}',
      *helpers.gin_flags([folder / f'{gin_file}.gin'], macros),
      PYTHONPATH=os.pathsep.join(path),
      WORDS=str(folder / 'words.tsv'),
      **python,
    ).end(timeout=900)
    assert outcome.code == 0, outcome.text

  return start


@pytest.fixture(scope='module')
def trained(call, folder):
  """The folder of a run from scratch, of each."""
  runs = {whose: folder / f'train_{whose}' for whose in (THEIRS, OURS)}
  for whose, run in runs.items():
    call(whose, 'train', 'train', MODEL_DIR=str(run), TRAIN_STEPS=STEPS)
  return runs


def scalars(run):
  """{(folder, tag, step): value} of all that does not depend on the clock."""
  from tensorboard.backend.event_processing import event_file_loader
  from tensorboard.util import tensor_util

  found = {}
  for file in run.rglob('events.out.tfevents.*'):
    for event in event_file_loader.EventFileLoader(str(file)).Load():
      for value in event.summary.value:
        array = tensor_util.make_ndarray(value.tensor)
        if array.dtype.kind == 'f' and not value.tag.startswith('timing/'):
          place = str(file.parent.relative_to(run))
          found[place, value.tag, event.step] = float(array)
  return found


def assert_same_numbers(theirs, ours, places, last_step, after=-1):
  """All that T5X reported after a step, ours reported too, bit for bit."""
  theirs, ours = (
    {key: value for key, value in scalars(run).items() if key[2] > after}
    for run in (theirs, ours)
  )
  assert {place for place, _, _ in theirs} == set(places)
  assert all((place, 'loss', last_step) in theirs for place in places[:2])
  assert {key: ours.get(key) for key in theirs} == theirs


def test_train(trained):
  places = ['train', f'training_eval/{TASK}']
  assert_same_numbers(trained[THEIRS], trained[OURS], places, STEPS)


@pytest.fixture(scope='module')
def resumed(call, trained, folder):
  """Each resumes the run of the other: {who began: folder}."""
  runs = {}
  for began, goes_on in PAIRS:
    runs[began] = shutil.copytree(trained[began], folder / f'resumed_by_{goes_on}')
    call(goes_on, 'train', 'train', MODEL_DIR=str(runs[began]), TRAIN_STEPS=MORE_STEPS)
  return runs


def test_each_resumes_the_run_of_the_other(resumed):
  places = ['train', f'training_eval/{TASK}']
  theirs, ours = resumed[OURS], resumed[THEIRS]
  assert_same_numbers(theirs, ours, places, MORE_STEPS, after=STEPS)


def outputs(call, trained, folder, script, **macros):
  """Folders of what each made of the checkpoint of the other."""
  for wrote, reads in PAIRS:
    macros['CHECKPOINT_PATH'] = str(trained[wrote] / f'checkpoint_{STEPS}')
    macros[f'{script.upper()}_OUTPUT_DIR'] = str(folder / f'{script}_by_{reads}')
    call(reads, script, script, **macros)
  return folder / f'{script}_by_{THEIRS}', folder / f'{script}_by_{OURS}'


def test_eval(call, trained, folder):
  theirs, ours = outputs(call, trained, folder, 'eval')
  numbers = scalars(theirs)
  assert (f'training_eval/{TASK}', 'loss', STEPS) in numbers
  assert {key: scalars(ours).get(key) for key in numbers} == numbers
  for name in (f'{TASK}-metrics', f'{TASK}-{STEPS:06}'):
    one, other = (
      (by / 'inference_eval' / f'{name}.jsonl').read_text() for by in (theirs, ours)
    )
    assert one and one == other


def test_infer(call, trained, folder):
  theirs, ours = outputs(
    call, trained, folder, 'infer', INPUT_FILE=str(folder / 'sentences.txt')
  )
  name = 'norwegian_fill_in_mini-predict_with_aux.jsonl-00000-of-00001'
  for by in (theirs, ours):
    assert (by / f'{name}.COMPLETED').exists()
  one, other = (
    [json.loads(line) for line in (by / name).read_text().splitlines()]
    for by in (theirs, ours)
  )
  assert len(one) == len(SENTENCES.splitlines())
  for row, want in zip(other, one, strict=True):
    got, expected = row.pop('aux'), want.pop('aux')
    assert row == want
    # Each has a beam search of its own, which adds in another order.
    np.testing.assert_allclose(got['scores'], expected['scores'], rtol=1e-5)


def test_finetune(call, trained, folder):
  runs = {}
  for wrote, trains in PAIRS:
    runs[trains] = folder / f'finetune_by_{trains}'
    call(
      trains,
      'train',
      'finetune',
      MODEL_DIR=str(runs[trains]),
      INITIAL_CHECKPOINT_PATH=str(trained[wrote] / f'checkpoint_{STEPS}'),
      # T5X would go on in the data of the checkpoint's run: see gin/finetune.gin.
      SAVE_DATASET=trains == OURS,
    )
  places = ['train', 'training_eval/words', 'inference_eval/words']
  assert_same_numbers(runs[THEIRS], runs[OURS], places, STEPS + 4)


def tensors(file):
  """{name: array} of a safetensors file, read by hand."""
  raw = file.read_bytes()
  (length,) = struct.unpack('<Q', raw[:8])
  header = json.loads(raw[8 : 8 + length])
  header.pop('__metadata__', None)
  body = raw[8 + length :]
  return {
    name: np.frombuffer(body[slice(*entry['data_offsets'])], np.float32)
    for name, entry in header.items()
  }


def test_export_of_what_t5x_trained(helpers, data_root, trained, folder):
  exported = []
  for whose, run in trained.items():
    exported.append(folder / f'export_{whose}')
    outcome = helpers.Process(
      data_root,
      'bart_t5x.hf.convert',
      'export',
      f'--checkpoint={run / f"checkpoint_{STEPS}"}',
      f'--output_dir={exported[-1]}',
    ).end()
    assert outcome.code == 0, outcome.text
  theirs, ours = (tensors(path / 'model.safetensors') for path in exported)
  assert theirs and theirs.keys() == ours.keys()
  for name, want in theirs.items():
    np.testing.assert_array_equal(ours[name], want, err_msg=name)
