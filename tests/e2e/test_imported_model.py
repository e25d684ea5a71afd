"""A model of Hugging Face is imported; training, answering and tuning start from it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bart_t5x import network
from bart_t5x.hf import configs, mapping, weights

pytestmark = pytest.mark.slow

TASK = 'norwegian_denoising_mini'
FINETUNING = """
from tasks.finetune import add_text_to_text_task

add_text_to_text_task(
  'imported_finetuning',
  lambda row: {'inputs': row['inputs'], 'targets': row['targets']},
  files={'train': 'TRAIN', 'validation': 'TRAIN'},
  corpus_dir='CORPUS',
)
"""


@pytest.fixture(scope='module')
def imported(helpers, data_root, tmp_path_factory):
  """The folder that the import command made of a model of another shape."""
  folder = tmp_path_factory.mktemp('imported')
  source = folder / 'hf'
  source.mkdir()
  config = network.BartConfig(
      vocab_size=512, emb_dim=24, num_heads=3, num_encoder_layers=1,
      num_decoder_layers=2, mlp_dim=40, max_positions=64,
  )  # fmt: skip
  tokens = jnp.ones((1, 2), jnp.int32)
  variables = jax.jit(
    network.Transformer(config).init, static_argnames='enable_dropout'
  )(jax.random.key(3), tokens, tokens, tokens, enable_dropout=False)
  # A model that has learned: far from an untrained one's uniform guesses.
  params = jax.tree.map(lambda leaf: 3 * np.asarray(leaf), variables['params'])
  tensors = mapping.to_hf(params, config, 'torch')
  weights.write_safetensors(source / weights.SAFETENSORS, tensors)
  hf_config = configs.to_hf(config, 'float32') | {'forced_bos_token_id': 0}
  configs.write_json(source / 'config.json', hf_config)
  shutil.copy(data_root / 'mini' / 'tokenizer.json', source)
  call(
      helpers, data_root, 'bart_t5x.hf.convert', 'import',
      f'--model={source}', f'--output_dir={folder / "in"}',
  )  # fmt: skip
  return folder / 'in'


def call(helpers, data_root, module, *args):
  outcome = helpers.Process(data_root, module, *args).end()
  assert outcome.code == 0, outcome.text
  assert 'Traceback' not in outcome.text
  return outcome.text


def flags(helpers, run_file, imported, *more_files, **bindings):
  files = (run_file, str(imported / 'config.gin'), *more_files)
  settings = {
    'TASK_FEATURE_LENGTHS': {'inputs': 64, 'targets': 64},
    'COMPUTE_DTYPE': 'float32',
    **bindings,
  }
  return helpers.gin_flags(files, settings)


def test_training_starts_from_it(imported, helpers, data_root, tmp_path):
  tiny = helpers.tiny_training(tmp_path / 'run', TRAIN_STEPS=20, WARMUP_STEPS=5)
  tiny |= {'train.eval_period': 20, 'utils.SaveCheckpointConfig.period': 20}
  text = call(
    helpers,
    data_root,
    't5x.train',
    *flags(
      helpers,
      'gin/bart_mini_no.gin',
      imported,
      'gin/from_checkpoint.gin',
      INITIAL_CHECKPOINT_PATH=str(imported / 'checkpoint_0'),
      **tiny,
    ),
  )
  assert 'Finished at step 20' in text
  loss = helpers.scalars(tmp_path / 'run/training_eval' / TASK)
  # The weights are those that were imported: worse than an untrained model's guess.
  assert loss[0] > np.log(512) + 0.3
  assert loss[20] < loss[0]


def test_infer(imported, helpers, data_root, tmp_path):
  assert 'forced_first_id = 1' in (imported / 'config.gin').read_text()
  sentences = tmp_path / 'sentences.txt'
  sentences.write_text('Sak 7: <mask> på fjordveien.\nÅse <mask>.\n', encoding='utf-8')
  call(
    helpers,
    data_root,
    't5x.infer',
    *flags(
      helpers,
      'gin/infer.gin',
      imported,
      CHECKPOINT_PATH=str(imported / 'checkpoint_0'),
      INFER_OUTPUT_DIR=str(tmp_path / 'out'),
      INPUT_FILE=str(sentences),
    ),
  )
  name = 'norwegian_fill_in_mini-predict.jsonl-00000-of-00001'
  lines = (tmp_path / 'out' / name).read_text(encoding='utf-8').splitlines()
  assert len(lines) == 2
  assert all(isinstance(json.loads(line)['prediction'], str) for line in lines)


def test_finetune(imported, helpers, data_root, tmp_path, monkeypatch):
  """With a task of one's own over the imported tokenizer."""
  rows = [{'inputs': f'Sak {i}', 'targets': 'fjord' * (i % 2 + 1)} for i in range(32)]
  train = tmp_path / 'train.jsonl'
  train.write_text('\n'.join(json.dumps(row) for row in rows) + '\n')
  module = FINETUNING.replace('TRAIN', str(train)).replace('CORPUS', str(imported))
  (tmp_path / 'imported_task.py').write_text(module)
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.setenv('PYTHONPATH', str(tmp_path), prepend=':')
  text = call(
    helpers,
    data_root,
    't5x.train',
    *flags(
      helpers,
      'gin/finetune.gin',
      imported,
      MIXTURE_OR_TASK_MODULE='imported_task',
      MIXTURE_OR_TASK_NAME='imported_finetuning',
      INITIAL_CHECKPOINT_PATH=str(imported / 'checkpoint_0'),
      MODEL_DIR=str(tmp_path / 'run'),
      TRAIN_STEPS_RELATIVE=10,
      EVAL_PERIOD=10,
      NUM_BEAMS=1,
      BATCH_SIZE=8,
      WARMUP_STEPS=2,
      LEARNING_RATE=1e-3,
    ),
  )
  assert 'Finished at step 10' in text
  assert (tmp_path / 'run/checkpoint_10').exists()
