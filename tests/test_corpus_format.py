"""Documents of a corpus: token ids, sentence starts, digests, records."""

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
  texts = TEXTS[:20] + ['x', '  ', ' \n Først.\u00a0Så 日本.\tOg 😀!  Ferdig']
  for text, (ids, starts) in zip(texts, corpus_format.encode(tokenizer, texts)):
    assert ids.tolist() == tokenizer.encode(text)
    assert ids.dtype == starts.dtype == np.int32
    assert starts[0] == 0 and (np.diff(starts) > 0).all() and starts[-1] < ids.size
    pieces = [tokenizer.decode(p) for p in np.split(ids, starts[1:])]
    assert pieces == sentences.split_sentences(text)
  ((ids, starts),) = corpus_format.encode(tokenizer, [''])
  assert ids.size == starts.size == 0


class Coarse:
  """A tokenizer with tokens of four characters, which cross sentence ends."""

  byte_lengths = np.array([4])
  lossless = True

  def encode_batch(self, texts):
    return [[0] * (len(text) // 4) for text in texts]


def test_start_inside_a_token_moves_to_the_next_one():
  text = 'Han kom. Hun gikk. A'
  ((_, starts),) = corpus_format.encode(Coarse(), [text])
  assert sentences.sentence_starts(text) == [0, 8, 18]
  # 18 is inside the last token, so no token is left for it.
  assert starts.tolist() == [0, 2]


def test_lossy_tokenizer_is_an_error():
  with pytest.raises(ValueError, match='not lossless'):
    corpus_format.encode(Coarse(), ['Han kom.x'])


def test_digest_is_stable_and_fits_int64():
  assert corpus_format.digest('Ås'.encode()) == 4126507821509844243
  values = [corpus_format.digest(str(i).encode()) for i in range(2000)]
  assert all(0 <= v < 2**63 for v in values)
  # Uniform, because it determines the split.
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
