"""Documents of a corpus: token ids, sentence starts, digests, records."""

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

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


@hypothesis.given(
  st.lists(st.integers(0, 2**31 - 1), max_size=300),
  st.lists(st.integers(0, 2**31 - 1), max_size=30),
  st.integers(0, 2**63 - 1),
)
@hypothesis.example([0], [0], 0)
@hypothesis.example([127, 128, 16_383, 16_384, 2**21], [0, 4], 2**63 - 1)
@hypothesis.example([], [], 1)
def test_records_are_those_of_tensorflow(ids, starts, example_id):
  ids, starts = np.array(ids, np.int32), np.array(starts, np.int32)
  example = tf.train.Example()
  feature = example.features.feature
  feature['tokens'].int64_list.value.extend(ids)
  feature['sentence_starts'].int64_list.value.extend(starts)
  feature['example_id'].int64_list.value.append(example_id)
  record = corpus_format.serialize(ids, starts, example_id)
  assert record == example.SerializeToString(deterministic=True)


def test_tfrecords_are_those_of_tensorflow(tmp_path):
  records = [b'', b'a', bytes(range(256)) * 300]
  with tf.io.TFRecordWriter(str(tmp_path / 'theirs')) as writer:
    for record in records:
      writer.write(record)
  ours = b''.join(map(corpus_format.tfrecord, records))
  assert ours == (tmp_path / 'theirs').read_bytes()
