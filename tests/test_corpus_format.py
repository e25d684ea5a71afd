"""Documents of a corpus: token ids, sentence starts, ids, records."""

import dataclasses

import noise_cases
import numpy as np
import pytest
import tensorflow as tf

from bart_t5x import corpus_format, sentences, tokenization, tokenizer_training

TEXTS = [
  f'Dokument {i}. Det er kl. 10 på Ås.  To mellomrom! «Ja», sa {i} dyr.\n\nSlutt …'
  for i in range(200)
]
SIZES = {'bytelevel': 380, 'unigram': 330, 'bpe': 330}


@pytest.fixture(scope='module', params=tokenizer_training.KINDS)
def tokenizer(request):
  size = SIZES[request.param]
  content = tokenizer_training.train(request.param, TEXTS, len(TEXTS), size, 2)
  return tokenization.read_tokenizer('t', content)


def test_sentences_begin_at_their_tokens(tokenizer):
  texts = TEXTS[:20] + ['Én setning', 'x', ' \n Først. Så 日本. Og så 😀!  Ferdig']
  for text, (ids, starts) in zip(texts, corpus_format.encode(tokenizer, texts)):
    assert ids.tolist() == tokenizer.encode(text)
    assert ids.dtype == starts.dtype == np.int32
    assert starts[0] == 0 and (np.diff(starts) > 0).all() and starts[-1] < ids.size
    pieces = [tokenizer.decode(p) for p in np.split(ids, starts[1:])]
    assert pieces == sentences.split_sentences(text)


@pytest.mark.parametrize('mode', noise_cases.MODES)
def test_p13_targets_decode_to_the_text(tokenizer, mode):
  """White space of every kind included, whatever the noise did to the source."""
  random = np.random.default_rng(13)
  parts = ['Det', 'er', 'kl. 10', 'på Ås.', 'Ja!', '«Nei»', '…', 'sa', '日本', '😀']
  spaces = [' ', ' ', ' ', '  ', '\n', '\n\n', '\t', '\u00a0', '']
  texts = [
    ''.join(random.choice(parts) + random.choice(spaces) for _ in range(size))
    for size in random.integers(0, 30, noise_cases.MODES[mode])
  ]
  encoded = corpus_format.encode(tokenizer, texts)
  cases = [(*pair, np.array([i, 1])) for i, pair in enumerate(encoded)]
  ids = dataclasses.replace(noise_cases.IDS, word_start=np.ones(380, bool))
  recipe = noise_cases.RECIPES['strong']
  changed = 0
  for text, result in zip(
    texts, noise_cases.corrupted(recipe, cases, mode, ids=ids), strict=True
  ):
    assert tokenizer.decode(result.target[1:-1]) == text
    changed += result.source.tolist() != result.target.tolist()
  assert changed > 0.9 * len(texts)


def test_empty_document(tokenizer):
  ((ids, starts),) = corpus_format.encode(tokenizer, [''])
  assert ids.size == starts.size == 0


def test_white_space_alone_is_one_sentence(tokenizer):
  ((ids, starts),) = corpus_format.encode(tokenizer, ['  '])
  assert tokenizer.decode(ids) == '  ' and starts.tolist() == [0]


class Coarse:
  """A tokenizer whose tokens reach over sentence ends: four characters each."""

  byte_lengths = np.array([4])
  lossless = True

  def encode_batch(self, texts):
    return [[0] * (len(text) // 4) for text in texts]


def test_start_inside_a_token_moves_to_the_next_one():
  #       0123|4567|8901|2345|
  text = 'Han k' + 'om. Hun gikk. Å'.ljust(15, 'x')
  text = text.replace('Å', 'A')
  ((_, starts),) = corpus_format.encode(Coarse(), [text])
  begins = sentences.sentence_starts(text)
  assert begins == [0, 8, 18] and len(text) == 20
  # 18 lies inside the last token, behind which there is none.
  assert starts.tolist() == [0, 2]


def test_tokenizer_that_loses_text_is_an_error():
  with pytest.raises(ValueError, match='does not keep the text'):
    corpus_format.encode(Coarse(), ['Han kom.x'])


def test_digest_is_stable_and_fits_int64():
  assert corpus_format.digest('Ås'.encode()) == 4126507821509844243
  values = [corpus_format.digest(str(i).encode()) for i in range(2000)]
  assert all(0 <= v < 2**63 for v in values)
  # Spread evenly, for it decides on the split.
  assert abs(np.mean(values) / 2**63 - 0.5) < 0.03


def test_records_are_examples_with_sorted_names():
  ids, starts = np.array([5, 300, 70_000], np.int32), np.array([0, 2], np.int32)
  record = corpus_format.serialize(ids, starts, 2**63 - 1)
  feature = tf.train.Example.FromString(record).features.feature
  assert {name: list(f.int64_list.value) for name, f in feature.items()} == {
    'tokens': [5, 300, 70_000],
    'sentence_starts': [0, 2],
    'example_id': [2**63 - 1],
  }
  places = [record.index(name) for name in (b'example_id', b'sentence_st', b'tokens')]
  assert places == sorted(places)
