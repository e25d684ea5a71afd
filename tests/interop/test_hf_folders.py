"""Exported folders in transformers 4 (Flax) and 5 (PyTorch), as users load them."""

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


def test_logits_and_tokens(ask_peer, framework, make_run, make_case, tmp_path):
  run = make_run(tmp_path / 'a')
  folder = tmp_path / 'out'
  assert run.export(folder) == 0
  case = make_case(run=run)
  answer = ask_peer(framework, 'logits', folder=str(folder), **case.batch())
  np.testing.assert_allclose(
    case.logits(), answer['logits'], rtol=0, atol=TOLERANCE[framework]
  )
  check_tokens(ask_peer, framework, folder, run.corpus / 'tokenizer.json')


@pytest.mark.parametrize('kind', ['unigram', 'bpe'])
def test_sentencepiece_has_the_same_ids(ask_peer, framework, tmp_path, kind):
  texts = [f'På fjellet nr. {i} bor det {i * 7} bjørner.  Åja!' for i in range(300)]
  source = tmp_path / 'tokenizer.model'
  source.write_bytes(tokenizer_training.train(kind, texts, len(texts), 340, 2))
  folder = tmp_path / 'exported'
  folder.mkdir()
  tokenizers.write(source, folder, 64)
  check_tokens(ask_peer, framework, folder, source)


def check_tokens(ask_peer, framework, folder, tokenizer_file):
  """Compares the peer's ids of texts and the decoded texts with ours."""
  texts = TEXTS + lines()
  answer = ask_peer(framework, 'tokenize', folder=str(folder), texts=json.dumps(texts))
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


def our_loss(imported, case):
  """Returns the first loss of training from an imported folder, and the targets."""
  config = configs.read_gin(imported / 'config.gin').bart_config()
  vocabulary = vocabularies.load_vocabulary(str(imported))
  bart = model.BartModel(
    network.Transformer(config), vocabulary, vocabulary, optimizer_def=None
  )
  targets = np.zeros_like(case.decoder_inputs)
  for row, length in enumerate((9, 6, 4)):
    targets[row, :length] = [*case.decoder_inputs[row, 1:length], 2]
  total, metrics = jax.jit(lambda params, batch: bart.loss_fn(params, batch, None))(
    checkpoints.read_params(imported / 'checkpoint_0'),
    {
      'encoder_input_tokens': case.inputs,
      'decoder_input_tokens': case.decoder_inputs,
      'decoder_target_tokens': targets,
      'decoder_loss_weights': (targets != 0).astype(np.float32),
    },
  )
  loss = float(metrics['loss'].compute())
  assert float(total) == pytest.approx(loss * (targets != 0).sum(), rel=1e-6)
  return loss, targets


def test_reexported_model(ask_peer, framework, make_run, make_case, tmp_path):
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
  again = tmp_path / 'again'
  assert run.export(again) == 0
  case = make_case(run=run)
  answer = ask_peer(framework, 'logits', folder=str(again), **case.batch())
  np.testing.assert_allclose(
    case.logits(), answer['logits'], rtol=0, atol=TOLERANCE[framework]
  )
  loss, targets = our_loss(tmp_path / 'in', case)
  assert loss == pytest.approx(loss_by(answer['logits'], targets), abs=1e-5)


@pytest.mark.torch_peer
def test_fill_mask_pipeline(ask_peer, make_run, make_case, tmp_path):
  run = make_run(tmp_path / 'a')
  folder = tmp_path / 'out'
  assert run.export(folder) == 0
  text = 'På <mask> bor bjørner.'
  answer = ask_peer('torch', 'fill_mask', folder=str(folder), text=text)
  ids = tokenization.read_tokenizer(str(run.corpus / 'tokenizer.json'))
  source = [1, *ids.encode_template(text), 2]
  # It reads the logits at the mask's place, decoding from the source shifted.
  case = make_case(run=run)
  case.inputs, case.decoder_inputs = np.array([source]), np.array([[0, *source[:-1]]])
  place = source.index(ids.mask_id)
  assert answer['token'] == case.logits()[0, place].argmax()
