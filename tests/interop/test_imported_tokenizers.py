"""Imported tokenizers give the ids that transformers gives from the same files."""

import io
import json

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from bart_t5x import tokenization
from bart_t5x.hf import tokenizers

WORDS = 'På fjellet bor ærlige bjørner Åja nr. og så 3,5 – blåbærsyltetøy'.split()
ODD = ['é', 'e\u0301', '€', '中', '😀', '\u00ad', 'ｆｕｌｌ', '½', '\t', '', '\u2581']


def texts(masks=True):
  random = np.random.default_rng(6)
  words = WORDS + ODD + ['<mask>'] * masks
  lines = [' '.join(random.choice(words, random.integers(1, 30))) for _ in range(1000)]
  return [*lines, '', ' ', 'bokmål ' * 2000, 'a' * 3000]


def check(ask_peer, framework, tokenizer_class, folder, vocab_size, masks=True):
  ours = tokenizers.read(folder)
  assert ours.vocab_size == vocab_size
  answer = ask_peer(
    framework,
    'tokenize',
    folder=str(folder),
    tokenizer=tokenizer_class,
    texts=json.dumps(texts(masks)),
  )
  for text, ids in zip(texts(masks), json.loads(str(answer['ids'])), strict=True):
    expected = tokenization.to_hf_ids([1, *ours.encode_template(text), 2]).tolist()
    assert ids == expected, text


def test_sentencepiece_with_a_dictionary(ask_peer, framework, tmp_path):
  """The files of BARTpho: a model, and a dict.txt with some of its pieces."""
  random = np.random.default_rng(4)
  lines = [' '.join(random.choice(WORDS + ODD[:4], 12)) for _ in range(500)]
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=model, model_type='unigram',
    vocab_size=80, hard_vocab_limit=False, minloglevel=2,
  )  # fmt: skip
  (tmp_path / 'sentencepiece.bpe.model').write_bytes(model.getvalue())
  proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
  symbols = [piece.piece for piece in proto.pieces][3:]
  symbols = random.permutation(symbols).tolist()[6:]
  (tmp_path / 'dict.txt').write_text(''.join(f'{s} 1\n' for s in symbols))
  check(ask_peer, framework, 'BartphoTokenizer', tmp_path, 4 + len(symbols) + 1)


def test_vocab_and_merges(ask_peer, framework, make_run, tmp_path):
  """The files of BART's slow tokenizer."""
  run = make_run(tmp_path / 'a')
  model = json.loads((run.corpus / 'tokenizer.json').read_text())['model']
  folder = tmp_path / 'model'
  folder.mkdir()
  (folder / 'vocab.json').write_text(json.dumps(model['vocab']))
  merges = [' '.join(pair) for pair in model['merges']]
  (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *merges, '']))
  # Without a tokenizer.json, the mask of transformers 5 leaves the space before it;
  # transformers 4 and every published tokenizer.json include it.
  check(ask_peer, framework, 'BartTokenizer', folder, 301, masks=framework == 'flax')
