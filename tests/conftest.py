"""A corpus, runs of random models and a Hub, for the tests in this folder."""

import copy
import dataclasses
import pathlib
import shutil
import sys
import time
import types
from typing import Any

import numpy as np
import pytest

# Test files import helper modules such as `fake_hub` by name.
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import array_types  # noqa: E402 - found through the path above.

# Before anything imports them.
array_types.install(
  f'bart_t5x.{name}'
  for name in (
    'attention', 'dropout', 'flash', 'hf.mapping', 'loss', 'metrics', 'model',
    'network',
  )
)  # fmt: skip


@pytest.fixture(scope='session')
def corpus_dir(tmp_path_factory):
  """A corpus of 300 documents, 20 of them for validation, made by `prepare`."""
  from bart_t5x import prepare

  random = np.random.default_rng(7)
  words = 'fjord snø bokmål ærlig sjø på og huset barna Åse'.split()
  words += [f'ord{i}' for i in range(60)]

  def sentence():
    return ' '.join(random.choice(words, random.integers(2, 14))).capitalize() + '.'

  folder = tmp_path_factory.mktemp('corpus')
  texts = folder / 'texts.txt'
  with open(texts, 'w', encoding='utf-8') as f:
    for i in range(300):
      sentences = [sentence() for _ in range(random.integers(1, 25))]
      f.write(f'Dokument {i}. ' + '  '.join(sentences) + '\n')
  output = folder / 'prepared'
  code = prepare.main(
    [
      '--source=text',
      f'--input={texts}',
      f'--output_dir={output}',
      '--vocab_size=380',
      '--num_shards=4',
      '--min_validation_documents=20',
      '--num_workers=1',
    ]
  )
  assert code == 0
  return str(output)


@dataclasses.dataclass
class Run:
  """A run's folder, and what is in it."""

  model_dir: pathlib.Path
  checkpoint: pathlib.Path
  corpus: pathlib.Path
  config: Any
  params: dict

  def copy(self, folder):
    """Copies the run, so that a test may change it."""
    shutil.copytree(self.model_dir.parent, folder)
    return dataclasses.replace(
      self,
      model_dir=folder / 'run',
      checkpoint=folder / 'run/checkpoint_0',
      corpus=folder / 'corpus',
      params=copy.deepcopy(self.params),
    )

  def export(self, output_dir, *more):
    """The exit status of `bart_t5x.hf.convert export`."""
    from bart_t5x.hf import convert

    return convert.main([
        'export', f'--checkpoint={self.checkpoint}', f'--corpus_dir={self.corpus}',
        f'--output_dir={output_dir}', *more,
    ])  # fmt: skip


@pytest.fixture(scope='session')
def make_run():
  """Writes a run of a tiny random model: checkpoint, config.gin and corpus folder."""
  return _make_run


@pytest.fixture(scope='session')
def default_run(make_run, tmp_path_factory):
  """A run that tests only read or copy."""
  return make_run(tmp_path_factory.mktemp('default') / 'a')


def _make_run(folder, seed=0, tokenizer='bytelevel', **fields):
  import json

  from random_params import random_params

  from bart_t5x import checkpoints, network, tokenization, tokenizer_training

  text = 'På fjellet nr. {} bor det {} ærlige bjørner. Åja!'
  texts = [text.format(i, i * 7) for i in range(300)]
  corpus = folder / 'corpus'
  corpus.mkdir(parents=True)
  content = tokenizer_training.train(tokenizer, texts, len(texts), 301, 2)
  file_name = tokenization.read_tokenizer(tokenizer, content).file_name
  (corpus / file_name).write_bytes(content)
  split = {'documents': 1234, 'tokens': 56789, 'bytes': 345678}
  (corpus / 'corpus.json').write_text(
    json.dumps(
      {
        'source': 'test',
        'license': 'CC BY 4.0: "Bjørner", Ås',
        'splits': {'train': split, 'validation': {**split, 'documents': 7}},
      }
    )
  )
  fields = {
      'vocab_size': 301, 'emb_dim': 24, 'num_heads': 3, 'num_encoder_layers': 2,
      'num_decoder_layers': 3, 'mlp_dim': 40, 'max_positions': 40,
      'vocab_multiple_of': 16, **fields,
  }  # fmt: skip
  config = network.BartConfig(**fields)
  params = random_params(config, np.random.default_rng(seed))
  model_dir = folder / 'run'
  checkpoints.write_params(model_dir / 'checkpoint_0', params)
  lines = ["MIXTURE_OR_TASK_NAME = 'bjorner'", 'BATCH_SIZE = 8']
  lines += [f'network.BartConfig.{name} = {value!r}' for name, value in fields.items()]
  lines += ['noise.Recipe.infill_ratio = 0.3']
  (model_dir / 'config.gin').write_text('\n'.join(lines) + '\n')
  return Run(model_dir, model_dir / 'checkpoint_0', corpus, config, params)


@pytest.fixture
def server(monkeypatch, tmp_path):
  """A `fake_hub.FakeHub`, used by this process and its children."""
  import huggingface_hub.constants
  import huggingface_hub.utils
  from fake_hub import TOKEN, FakeHub

  fake = FakeHub()
  constants = huggingface_hub.constants
  for name, value in {
      'ENDPOINT': fake.url, 'HF_HUB_OFFLINE': False, 'HF_HUB_DISABLE_XET': True,
      'HF_HUB_CACHE': str(tmp_path / 'cache'),
      'HF_TOKEN_PATH': str(tmp_path / 'no_token'),
  }.items():  # fmt: skip
    monkeypatch.setattr(constants, name, value)
  monkeypatch.setattr(
      constants, 'HUGGINGFACE_CO_URL_TEMPLATE',
      fake.url + '/{repo_id}/resolve/{revision}/{filename}',
  )  # fmt: skip
  for name, value in {
      'HF_TOKEN': TOKEN, 'HF_ENDPOINT': fake.url, 'HF_HUB_OFFLINE': '0',
      'HF_HUB_DISABLE_XET': '1', 'HF_HOME': str(tmp_path / 'hf_home'),
  }.items():  # fmt: skip
    monkeypatch.setenv(name, value)
  # No waits between tries.
  impatient = types.SimpleNamespace(**{**vars(time), 'sleep': lambda seconds: None})
  monkeypatch.setattr('huggingface_hub.utils._http.time', impatient)
  huggingface_hub.utils.close_session()
  yield fake
  huggingface_hub.utils.close_session()
  fake.server.shutdown()
  fake.server.server_close()
