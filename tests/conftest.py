"""Every test runs on the CPU, split into eight devices, and never on a network."""

import os

import numpy as np
import pytest

# Before JAX is imported: the flags are read once.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ['HF_HUB_OFFLINE'] = '1'


@pytest.fixture(scope='session')
def corpus_dir(tmp_path_factory):
  """A corpus of 300 documents, 20 of them for validation, made by `prepare`."""
  from bart_t5x import prepare

  random = np.random.default_rng(7)
  words = ['fjord', 'snø', 'bokmål', 'ærlig', 'sjø', 'på', 'og', 'huset', 'barna', 'Åse']
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
  code = prepare.main([
      '--source=text', f'--input={texts}', f'--output_dir={output}',
      '--vocab_size=380', '--num_shards=4', '--min_validation_documents=20',
      '--num_workers=1',
  ])
  assert code == 0
  return str(output)
