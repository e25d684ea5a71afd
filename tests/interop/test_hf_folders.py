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
  """Norwegian-like lines, with masks and odd characters."""
  random = np.random.default_rng(5)
  words = "På fjellet bor ærlige bjørner Åja nr. og «så» 3,5 – it's blåbærsyltetøy"
  words = [*words.split(), '<mask>', 'é', 'e\u0301', '€', '中', '😀', '\u00ad', '']
  return [' '.join(random.choice(words, random.integers(1, 30))) for _ in range(10_000)]


def batch():
  """Three rows with padding, in this project's ids; targets begin with 0."""
  random = np.random.default_rng(1)
  inputs = np.zeros((3, 12), np.int64)
  for row, length in enumerate((12, 7, 4)):
    inputs[row, :length] = [1, *random.integers(4, 301, length - 2), 2]
  targets = random.integers(4, 301, (3, 9))
  targets[:, 0], targets[:, 1] = 0, 1
  return inputs, targets


def ask(run_peer, framework, folder, texts):
  inputs, targets = batch()
  return run_peer(
    framework,
    'hf_folder_peer.py',
    {
      'folder': np.array(str(folder)),
      'framework': np.array(framework),
      'input_ids': tokenization.to_hf_ids(inputs),
      'attention_mask': (inputs != 0).astype(np.int64),
      'decoder_input_ids': tokenization.to_hf_ids(np.where(targets, targets, 2)),
      'texts': np.array(json.dumps(texts)),
    },
  )


def logits_of(run):
  inputs, targets = batch()
  logits = jax.jit(
    functools.partial(network.Transformer(run.config).apply, enable_dropout=False)
  )({'params': run.params}, inputs, targets, targets)
  order = tokenization.to_hf_ids(np.arange(301))
  return np.asarray(logits)[..., order]


def test_logits_and_tokens(run_peer, framework, make_run, tmp_path):
  run = make_run(tmp_path / 'a')
  assert run.export(tmp_path / 'out') == 0
  texts = TEXTS + lines()
  answer = ask(run_peer, framework, tmp_path / 'out', texts)
  assert json.loads(str(answer['problems'])) == []
  np.testing.assert_allclose(
    logits_of(run), answer['logits'], rtol=0, atol=TOLERANCE[framework]
  )
  assert answer['logits'].std() > 0.3

  check_tokens(answer, texts, run.corpus / 'tokenizer.json')


@pytest.mark.parametrize('kind', ['unigram', 'bpe'])
def test_sentencepiece_has_the_same_ids(run_peer, framework, tmp_path, kind):
  texts = [f'På fjellet nr. {i} bor det {i * 7} bjørner.  Åja!' for i in range(300)]
  source = tmp_path / 'tokenizer.model'
  source.write_bytes(tokenizer_training.train(kind, texts, len(texts), 340, 2))
  folder = tmp_path / 'exported'
  folder.mkdir()
  tokenizers.write(source, folder, 64)
  texts = TEXTS + lines()
  given = {'folder': np.array(str(folder)), 'texts': np.array(json.dumps(texts))}
  check_tokens(run_peer(framework, 'tokenizer_peer.py', given), texts, source)


def check_tokens(answer, texts, tokenizer_file):
  """Compares the peer's ids of texts and the decoded texts with ours."""
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
  """Mean cross-entropy of the peer's logits for targets that are not padding."""
  logits = logits.astype(np.float64)
  log_sums = np.log(np.exp(logits).sum(axis=-1))
  columns = tokenization.to_hf_ids(targets)[..., None]
  chosen = np.take_along_axis(logits, columns, axis=-1)[..., 0]
  return (log_sums - chosen)[targets != 0].mean()


def our_loss(imported):
  """Returns the first loss of training from an imported folder, and the targets."""
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
  assert float(total) == pytest.approx(loss * (targets != 0).sum(), rel=1e-6)
  return loss, targets


def test_reexported_model(run_peer, framework, make_run, tmp_path):
  """Logits after export, import and export; training starts at the peer's loss."""
  run = make_run(
    tmp_path / 'a', seed=3, scan_layers=True, num_heads=2, vocab_multiple_of=1
  )
  folder = tmp_path / 'out'
  assert run.export(folder) == 0
  (folder / 'model.safetensors').unlink()
  assert convert.main([
      'import', f'--model={folder}', f'--output_dir={tmp_path}/in'
  ]) == 0  # fmt: skip
  run.checkpoint, run.corpus = tmp_path / 'in/checkpoint_0', tmp_path / 'in'
  assert run.export(tmp_path / 'again') == 0
  answer = ask(run_peer, framework, tmp_path / 'again', [])
  np.testing.assert_allclose(
    logits_of(run), answer['logits'], rtol=0, atol=TOLERANCE[framework]
  )
  loss, targets = our_loss(tmp_path / 'in')
  assert loss == pytest.approx(loss_by(answer['logits'], targets), abs=1e-5)
