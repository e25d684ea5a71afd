"""Exported folders in transformers 4 (Flax) and 5 (PyTorch), as users load them."""

import functools
import json

import jax
import numpy as np
import pytest

from bart_t5x import network, tokenization
from bart_t5x.hf import convert

FRAMEWORKS = [
  pytest.param('flax', marks=pytest.mark.flax_peer),
  pytest.param('torch', marks=pytest.mark.torch_peer),
]
TOLERANCE = {'flax': 1e-5, 'torch': 2e-5}

TEXTS = [
  'Ærlig talt, «bjørnen» på Ås er 3,5 m.',
  'På fjellet <mask> bor <mask><mask> bjørner.',
  '<mask>',
  ' <mask>  innledende og  doble mellomrom ',
  '',
  ' ',
  '\n\t\r\n',
  '日本語 😀👩‍👩‍👧 e\u0301 \u00a0\u2028 \u202e \ufeff \x00\x7f',
  'bokmål ' * 3000,
  'a' * 5000,
]


def lines():
  """Norwegian-like lines, with masks and odd characters strewn in."""
  random = np.random.default_rng(5)
  words = "På fjellet bor ærlige bjørner Åja nr. og «så» 3,5 – it's blåbærsyltetøy"
  words = [*words.split(), '<mask>', 'é', 'e\u0301', '€', '中', '😀', '\u00ad', '']
  return [' '.join(random.choice(words, random.integers(1, 30))) for _ in range(10_000)]


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
  return request.param


@pytest.fixture
def peer(request, framework):
  return request.getfixturevalue(f'{framework}_folder_peer')


def exported(run, tmp_path):
  folder = tmp_path / 'norbart'
  assert convert.main([
      'export', f'--checkpoint={run.checkpoint}', f'--corpus_dir={run.corpus}',
      f'--output_dir={folder}',
  ]) == 0  # fmt: skip
  return folder


def batch():
  """Three rows with padding, in inside ids; targets begin as T5X's do, with 0."""
  random = np.random.default_rng(1)
  inputs = np.zeros((3, 12), np.int64)
  for row, length in enumerate((12, 7, 4)):
    inputs[row, :length] = [1, *random.integers(4, 301, length - 2), 2]
  targets = random.integers(4, 301, (3, 9))
  targets[:, 0], targets[:, 1] = 0, 1
  return inputs, targets


def ask(peer, framework, folder, texts):
  inputs, targets = batch()
  return peer(
    {
      'folder': np.array(str(folder)),
      'framework': np.array(framework),
      'input_ids': tokenization.to_hf_ids(inputs),
      'attention_mask': (inputs != 0).astype(np.int64),
      'decoder_input_ids': tokenization.to_hf_ids(np.where(targets, targets, 2)),
      'texts': np.array(json.dumps(texts)),
    }
  )


def logits_of(run):
  inputs, targets = batch()
  logits = jax.jit(
    functools.partial(network.Transformer(run.config).apply, enable_dropout=False)
  )({'params': run.params}, inputs, targets, targets)
  order = tokenization.to_hf_ids(np.arange(301))
  return np.asarray(logits)[..., order]


def test_logits_and_tokens(peer, framework, make_run, tmp_path):
  run = make_run(tmp_path / 'a')
  folder = exported(run, tmp_path)
  texts = TEXTS + lines()
  answer = ask(peer, framework, folder, texts)
  assert json.loads(str(answer['problems'])) == []
  np.testing.assert_allclose(
    logits_of(run), answer['logits'], rtol=0, atol=TOLERANCE[framework]
  )
  assert answer['logits'].std() > 0.3

  assert json.loads(str(answer['special'])) == [0, 1, 2, 3, 4]
  ours = tokenization.read_tokenizer(str(run.corpus / 'tokenizer.json'))
  decoded = json.loads(str(answer['decoded']))
  for i, ids in enumerate(json.loads(str(answer['ids']))):
    expected = [1, *ours.encode_template(texts[i]), 2]
    assert ids == tokenization.to_hf_ids(expected).tolist(), texts[i]
    assert decoded[i] == ours.decode(expected)
    if '<mask>' not in texts[i]:
      assert decoded[i] == texts[i]


def test_an_imported_model_is_the_same_model(peer, framework, make_run, tmp_path):
  """Through this bridge and back, read by the peer: scanned and padded otherwise."""
  run = make_run(
    tmp_path / 'a', seed=3, scan_layers=True, num_heads=2, vocab_multiple_of=1
  )
  folder = exported(run, tmp_path)
  (folder / 'model.safetensors').unlink()
  assert convert.main([
      'import', f'--model={folder}', f'--output_dir={tmp_path}/in'
  ]) == 0  # fmt: skip
  run.checkpoint, run.corpus = tmp_path / 'in/checkpoint_0', tmp_path / 'in'
  (tmp_path / 'again').mkdir()
  answer = ask(peer, framework, exported(run, tmp_path / 'again'), [])
  np.testing.assert_allclose(
    logits_of(run), answer['logits'], rtol=0, atol=TOLERANCE[framework]
  )
