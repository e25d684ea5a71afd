"""The commands of the README, from text to a trained and exported BART."""

import json
import signal
import struct

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.slow

STEPS, PERIOD = 240, 60
TASK = 'norwegian_denoising_mini'


@pytest.fixture(scope='module')
def train(helpers, data_root):
  """Starts `python -m t5x.train` on a tiny model in a folder."""

  def start(model_dir):
    flags = helpers.gin_flags(helpers.TRAIN_FILES, helpers.tiny_training(model_dir))
    return helpers.Process(data_root, 't5x.train', *flags)

  return start


@pytest.fixture(scope='module')
def whole(train, tmp_path_factory):
  """The folder of an uninterrupted run."""
  folder = tmp_path_factory.mktemp('whole') / 'run'
  outcome = train(folder).end()
  assert outcome.code == 0, outcome.text
  assert f'Finished at step {STEPS}' in outcome.text
  return folder


@pytest.fixture(scope='module')
def held_out(helpers):
  """{step: value} of a run's metric on validation documents."""
  return lambda run, tag='loss': helpers.scalars(run / 'training_eval' / TASK, tag)


def call(helpers, data_root, module, *args):
  outcome = helpers.Process(data_root, module, *args).end()
  assert outcome.code == 0, outcome.text
  assert 'Traceback' not in outcome.text
  return outcome.text


# ---- prepare and train ----


def test_prepare(data_root, helpers):
  corpus = json.loads((data_root / 'mini' / 'corpus.json').read_text())
  documents = len(set(helpers.made_up_norwegian()))
  splits = corpus['splits']
  assert splits['validation']['documents'] == 40
  assert splits['train']['documents'] == documents - 40
  assert corpus['vocab_size'] == 512
  assert 0 < corpus['baselines']['unigram_loss'] < np.log(512)


def test_train_writes_its_files_and_learns(whole, held_out, helpers):
  names = {path.name for path in whole.iterdir()}
  assert names >= {'config.gin', 'model-info.txt', 'train', 'training_eval'}
  # keep = 2 in the run's file.
  assert {n for n in names if n.startswith('checkpoint_')} == {
    'checkpoint_180',
    'checkpoint_240',
  }
  loss = held_out(whole)
  assert list(loss) == [0, 60, 120, 180, 240]
  assert abs(loss[0] - np.log(512)) < 0.2
  assert loss[240] < loss[120] < loss[0] - 0.5
  for tag in ('accuracy', 'infilled_accuracy', 'copied_accuracy', 'hf_compat_loss'):
    values = held_out(whole, tag)
    assert np.isfinite(list(values.values())).all()
  training = helpers.scalars(whole / 'train')
  assert list(training) == list(range(20, STEPS + 1, 20))
  rates = helpers.scalars(whole / 'train', 'learning_rate/current')
  assert max(rates.values()) <= 3e-3 and rates[STEPS] < rates[40]
  assert f'TRAIN_STEPS = {STEPS}' in (whole / 'config.gin').read_text()


# ---- Interruptions ----


def test_killed_run_is_bit_for_bit_equal(train, whole, held_out, helpers, tmp_path):
  run = tmp_path / 'run'
  saved = run / f'checkpoint_{PERIOD}'
  helpers.interrupt(train, run, signal.SIGKILL, lambda _: saved.exists())
  assert held_out(run)[STEPS] == held_out(whole)[STEPS]
  name = f'checkpoint_{STEPS}'
  ours, theirs = (helpers.saved_state(folder / name) for folder in (run, whole))
  assert set(theirs) == {'state', 'target'}
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# ---- eval, infer, export ----


def test_eval(whole, held_out, helpers, data_root, tmp_path):
  flags = helpers.gin_flags(
    ('gin/eval.gin', 'gin/models/tiny.gin'),
    {
      'CHECKPOINT_PATH': str(whole / f'checkpoint_{STEPS}'),
      'EVAL_OUTPUT_DIR': str(tmp_path),
      'TASK_FEATURE_LENGTHS': {'inputs': 64, 'targets': 64},
      'COMPUTE_DTYPE': 'float32',
      # As in training.
      'utils.DatasetConfig.batch_size': 8,
      'utils.get_training_eval_datasets.eval_steps': 4,
      'seqio.Evaluator.num_examples': 8,
    },
  )
  call(helpers, data_root, 't5x.eval', *flags)
  found = held_out(tmp_path)
  assert list(found) == [STEPS]
  np.testing.assert_allclose(found[STEPS], held_out(whole)[STEPS], rtol=1e-6)
  lines = (tmp_path / 'inference_eval' / f'{TASK}-metrics.jsonl').read_text()
  metrics = json.loads(lines.splitlines()[-1])
  assert metrics['step'] == STEPS
  assert any('chrf' in name for name in metrics), metrics


def test_infer(whole, helpers, data_root, tmp_path):
  sentences = ['Sak 7: <mask> på fjordveien.', 'Åse <mask> i boka.', 'Og <mask>.']
  path = tmp_path / 'sentences.txt'
  path.write_text('\n'.join(sentences) + '\n', encoding='utf-8')
  flags = helpers.gin_flags(
    ('gin/infer.gin', 'gin/models/tiny.gin'),
    {
      'CHECKPOINT_PATH': str(whole / f'checkpoint_{STEPS}'),
      'INFER_OUTPUT_DIR': str(tmp_path / 'out'),
      'INPUT_FILE': str(path),
      'TASK_FEATURE_LENGTHS': {'inputs': 64, 'targets': 64},
      'COMPUTE_DTYPE': 'float32',
    },
  )
  call(helpers, data_root, 't5x.infer', *flags)
  name = 'norwegian_fill_in_mini-predict.jsonl-00000-of-00001'
  lines = (tmp_path / 'out' / name).read_text(encoding='utf-8').splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row['inputs']['inputs_pretokenized'] for row in rows] == sentences
  for row in rows:
    assert isinstance(row['prediction'], str)
    assert '<s>' not in row['prediction']


def safetensors_header(path):
  with open(path, 'rb') as f:
    (size,) = struct.unpack('<Q', f.read(8))
    return json.loads(f.read(size))


def test_export(whole, helpers, data_root, tmp_path):
  out = tmp_path / 'exported'
  call(
      helpers, data_root, 'bart_t5x.hf.convert', 'export',
      f'--checkpoint={whole / f"checkpoint_{STEPS}"}', f'--output_dir={out}',
  )  # fmt: skip
  assert {path.name for path in out.iterdir()} >= {
    'config.json',
    'generation_config.json',
    'model.safetensors',
    'flax_model.msgpack',
    'tokenizer.json',
    'tokenizer_config.json',
    'README.md',
  }
  config = json.loads((out / 'config.json').read_text())
  assert (config['model_type'], config['d_model']) == ('bart', 32)
  assert config['vocab_size'] == 512
  header = safetensors_header(out / 'model.safetensors')
  # Names of transformers' BartForConditionalGeneration.
  assert header['model.shared.weight']['shape'] == [512, 32]
  assert header['final_logits_bias']['shape'] == [1, 512]
  assert 'CC0-1.0' in (out / 'README.md').read_text(encoding='utf-8')
