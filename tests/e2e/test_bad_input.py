"""Wrong input: one clear message, a failure, and no incomplete output."""

import os
import shutil

import pytest

from bart_t5x import prepare

TRAIN_FILES = ('gin/bart_mini_no.gin', 'gin/models/tiny.gin')


# ---- prepare ----


def prepare_from(tmp_path, content, *more):
  texts = tmp_path / 'texts.txt'
  texts.write_bytes(content)
  return prepare.main([
      '--source=text', f'--input={texts}', f'--output_dir={tmp_path / "out"}',
      '--vocab_size=300', '--num_workers=1', *more,
  ])  # fmt: skip


@pytest.mark.parametrize(
  ('content', 'parts'),
  [
    (b'\n \n\t\n', ('holds 0 ', '--input')),
    (b'Ett eneste dokument om fjorden.\n', ('holds 1 ',)),
    (b'Hei.\nP\xe5 fjellet.\n', ('UTF-8', 'texts.txt', 'line 2')),
  ],
  ids=['blank', 'one document', 'invalid UTF-8'],
)
def test_unusable_text(tmp_path, capsys, helpers, content, parts):
  code = prepare_from(tmp_path, content)
  helpers.Outcome(code, capsys.readouterr().err).assert_one_error(*parts)
  assert sorted(os.listdir(tmp_path)) == ['texts.txt']


def test_prepare_into_a_file(tmp_path, capsys, helpers):
  (tmp_path / 'out').write_text('mine')
  code = prepare_from(tmp_path, b'Hei.\n')
  helpers.Outcome(code, capsys.readouterr().err).assert_one_error(str(tmp_path / 'out'))
  assert (tmp_path / 'out').read_text() == 'mine'


# ---- train ----


@pytest.fixture
def train(call_script, helpers, in_process_task, tmp_path):
  """Runs t5x.train with some bindings changed."""
  from t5x import train as script

  def call(**changes):
    changes = {'MIXTURE_OR_TASK_NAME': in_process_task, **changes}
    return call_script(
      script.train, TRAIN_FILES, helpers.tiny_training(tmp_path / 'run', **changes)
    )

  return call


def left_behind(folder):
  names = [name for _, _, files in os.walk(folder) for name in files]
  return [name for name in names if name != '.lock']


@pytest.mark.parametrize(
  ('missing', 'parts'),
  [
    ('', ('does not exist', 'python -m bart_t5x.prepare')),
    ('validation-*', ('validation-00000', '--overwrite')),
    ('tokenizer.json', ('tokenizer', 'python -m bart_t5x.prepare')),
  ],
)
def test_missing_files_of_a_corpus(train, data_root, tmp_path, missing, parts):
  import seqio

  from tasks import pretrain

  corpus = tmp_path / 'corpus'
  if missing:
    shutil.copytree(data_root / 'mini', corpus)
    for path in corpus.glob(missing):
      path.unlink()
  task = pretrain.add_denoising_task('e2e_no_corpus', str(corpus))
  try:
    outcome = train(MIXTURE_OR_TASK_NAME=task.name)
  finally:
    seqio.TaskRegistry.remove(task.name)
  outcome.assert_one_error(str(corpus), *parts)
  assert not left_behind(tmp_path / 'run')


@pytest.mark.parametrize(
  ('changes', 'parts'),
  [
    (
      {'network.BartConfig.vocab_size': 500},
      ('vocabulary has 512 ids', 'vocab_size is 500', '--vocab_size=500'),
    ),
    ({'BATCH_SIZE': 12}, ('multiple', 'a batch of 12 over 8 data partitions')),
    ({'TRAIN_STPES': 5}, ("'TRAIN_STEPS'",)),
    ({'network.BartConfig.emb_dm': 5}, ("'emb_dim'",)),
    ({'network.BartConfg.emb_dim': 5}, ("'BartConfig'",)),
    ({'MIXTURE_OR_TASK_NAME': 'e2e_denoisng'}, ('Nearest: e2e_denoising',)),
    ({'network.BartConfig.num_heads': 5}, ('must divide emb_dim', '5 / 32')),
    (
      {'network.BartConfig.max_positions': 32},
      ('max_positions', '32', '64'),
    ),
    (
      {'TASK_FEATURE_LENGTHS': {'inputs': 16, 'targets': 64}},
      ("TASK_FEATURE_LENGTHS['inputs']",),
    ),
    ({'WARMUP_STEPS': 240}, ('warmup_steps < total_steps', '240 / 240')),
    ({'LEARNING_RATE': -1.0}, ('negative', '-1.0')),
    ({'RANDOM_SEED': 'x'}, ('RANDOM_SEED', "'x'")),
    ({'TRAIN_STEPS': None}, ('TRAIN_STEPS', 'None')),
    ({'TRAIN_STEPS': 400.5}, ('TRAIN_STEPS', '400.5')),
    ({'TASK_FEATURE_LENGTHS': 64}, ('TASK_FEATURE_LENGTHS', 'Mapping[str, int]', '64')),
    ({'TASK_FEATURE_LENGTHS': {'inputs': '64', 'targets': 64}}, ("'64'",)),
    ({'BATCH_SIZE': 10**10}, ('batch_size', '10000000000')),
    ({'MODEL_DIR': ''}, ('model_dir', "''")),
    ({'MODEL_DIR': None}, ('MODEL_DIR', 'None')),
  ],
  ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_invalid_settings(train, tmp_path, changes, parts):
  train(**changes).assert_one_error(*parts)
  assert not left_behind(tmp_path / 'run')


def test_a_file_in_place_of_the_run_folder(train, tmp_path):
  # Not a folder without permission: tests may run as root.
  path = tmp_path / 'file'
  path.write_text('mine')
  outcome = train(MODEL_DIR=str(path / 'run'))
  outcome.assert_one_error(f'model_dir {path / "run"} cannot be written to')
  train(MODEL_DIR=str(path)).assert_one_error(f'model_dir {path} cannot be written to')
  assert path.read_text() == 'mine'


# ---- eval and infer ----

CHECKPOINT = 'checkpoint_7'


def reading(task, tmp_path, **more):
  """Returns bindings of eval and infer, with a checkpoint that does not exist."""
  return {
    'MIXTURE_OR_TASK_NAME': task,
    'TASK_FEATURE_LENGTHS': {'inputs': 64, 'targets': 64},
    'CHECKPOINT_PATH': str(tmp_path / CHECKPOINT),
    'utils.DatasetConfig.batch_size': 8,
    **more,
  }


def test_evaluating_a_missing_checkpoint(call_script, in_process_task, tmp_path):
  from t5x import eval as script

  bindings = reading(in_process_task, tmp_path, EVAL_OUTPUT_DIR=str(tmp_path / 'eval'))
  outcome = call_script(
    script.evaluate, ('gin/eval.gin', 'gin/models/tiny.gin'), bindings
  )
  outcome.assert_one_error(str(tmp_path), CHECKPOINT)
  assert not (tmp_path / 'eval' / 'inference_eval').exists()


@pytest.fixture
def fill_in(data_root):
  import seqio

  from tasks import fill_in as module

  yield module.add_fill_in_task('e2e_fill_in', str(data_root / 'mini')).name
  seqio.TaskRegistry.remove('e2e_fill_in')


@pytest.mark.parametrize(
  ('given', 'parts'),
  [
    (None, ('INPUT_FILE', '--gin.INPUT_FILE=')),
    ('', ('no input file is set', '--gin.INPUT_FILE=')),
    ('missing.txt', ('missing.txt', 'does not exist')),
    ('sentences.txt', (CHECKPOINT,)),
  ],
)
def test_missing_input_of_infer(call_script, fill_in, tmp_path, given, parts):
  from t5x import infer as script

  (tmp_path / 'sentences.txt').write_text('Oslo er <mask>.\n')
  bindings = reading(fill_in, tmp_path, INFER_OUTPUT_DIR=str(tmp_path / 'infer'))
  if given is not None:
    bindings['INPUT_FILE'] = str(tmp_path / given) if given else ''
  files = ('gin/infer.gin', 'gin/models/tiny.gin')
  outcome = call_script(script.infer, files, bindings)
  outcome.assert_one_error(*parts)
  assert not list(tmp_path.rglob('*.jsonl*'))
