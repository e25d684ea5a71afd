"""Exported folders in transformers 4 (Flax) and 5 (PyTorch), as users load them."""

import functools
import json

import jax
import numpy as np
import pytest

from bart_t5x import (
  checkpoints,
  model,
  network,
  tokenization,
  tokenizer_training,
  vocabularies,
)
from bart_t5x.hf import configs, convert, tokenizers

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

  check_tokens(answer, texts, run.corpus / 'tokenizer.json')


@pytest.mark.parametrize('kind', ['unigram', 'bpe'])
def test_sentencepiece_has_the_same_ids(request, framework, tmp_path, kind):
  peer = request.getfixturevalue(f'{framework}_tokenizer_peer')
  texts = [f'På fjellet nr. {i} bor det {i * 7} bjørner.  Åja!' for i in range(300)]
  source = tmp_path / 'tokenizer.model'
  source.write_bytes(tokenizer_training.train(kind, texts, len(texts), 340, 2))
  folder = tmp_path / 'exported'
  folder.mkdir()
  tokenizers.write(source, folder, 64)
  texts = TEXTS + lines()
  given = {'folder': np.array(str(folder)), 'texts': np.array(json.dumps(texts))}
  check_tokens(peer(given), texts, source)


def check_tokens(answer, texts, tokenizer_file):
  """The peer's ids of texts, and its texts of them, against ours."""
  assert json.loads(str(answer['special'])) == [0, 1, 2, 3, 4]
  ours = tokenization.read_tokenizer(str(tokenizer_file))
  decoded = json.loads(str(answer['decoded']))
  for i, ids in enumerate(json.loads(str(answer['ids']))):
    expected = [1, *ours.encode_template(texts[i]), 2]
    assert ids == tokenization.to_hf_ids(expected).tolist(), texts[i]
    assert decoded[i] == ours.decode(expected)
    if '<mask>' not in texts[i]:
      assert decoded[i] == texts[i]


def loss_by(logits, targets):
  """Mean cross-entropy of targets that are no padding, by the peer's logits.

  Args:
    logits: [batch, length, vocabulary], columns in Hugging Face's order.
    targets: [batch, length], inside ids, 0 for padding.
  """
  logits = logits.astype(np.float64)
  log_sums = np.log(np.exp(logits).sum(axis=-1))
  columns = tokenization.to_hf_ids(targets)[..., None]
  chosen = np.take_along_axis(logits, columns, axis=-1)[..., 0]
  return (log_sums - chosen)[targets != 0].mean()


def our_loss(imported):
  """The first loss of a run that starts from an imported folder, and its targets."""
  config = configs.read_gin(imported / 'config.gin').bart_config()
  vocabulary = vocabularies.load_vocabulary(str(imported))
  bart = model.BartModel(
    network.Transformer(config), vocabulary, vocabulary, optimizer_def=None
  )
  inputs, decoder_inputs = batch()
  targets = np.zeros_like(decoder_inputs)
  for row, length in enumerate((9, 6, 4)):
    targets[row, :length] = [*decoder_inputs[row, 1:length], 2]
  total, metrics = jax.jit(lambda params, batch: bart.loss_fn(params, batch, None))(
    checkpoints.read_params(imported / 'checkpoint_0'),
    {
      'encoder_input_tokens': inputs,
      'decoder_input_tokens': decoder_inputs,
      'decoder_target_tokens': targets,
      'decoder_loss_weights': (targets != 0).astype(np.float32),
    },
  )
  loss = float(metrics['loss'].compute())
  # The sum is what is differentiated.
  assert float(total) == pytest.approx(loss * (targets != 0).sum(), rel=1e-6)
  return loss, targets


def test_an_imported_model_is_the_same_model(peer, framework, make_run, tmp_path):
  """Through this bridge and back, read by the peer: scanned and padded otherwise.

  Training from the imported checkpoint starts at the peer's loss.
  """
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
  loss, targets = our_loss(tmp_path / 'in')
  assert loss == pytest.approx(loss_by(answer['logits'], targets), abs=1e-5)
