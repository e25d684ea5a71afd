"""Exported folders in transformers 4 (Flax) and 5 (PyTorch), as users load them."""

import json

import numpy as np
import pytest

from bart_t5x import tokenization, tokenizer_training
from bart_t5x.hf import tokenizers

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
