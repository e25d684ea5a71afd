"""Preprocessors: splitting documents, noise, and tokenization."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from bart_t5x import noise, preprocessors, vocabularies
from bart_t5x.features import BartFeatureConverter


def oracle_cuts(size, starts, room):
  """Whole sentences as long as they fit; one that is too long is cut when full."""
  cuts = [0]
  while cuts[-1] < size:
    fitting = [e for e in [*starts, size] if cuts[-1] < e <= cuts[-1] + room]
    cuts.append(max(fitting, default=cuts[-1] + room))
  return cuts


# size, sentence starts, room, cuts
CUTS_BY_HAND = [
  (10, [0, 4, 7], 10, [0, 10]),
  (10, [0, 4, 7], 9, [0, 7, 10]),
  (10, [0, 4, 7], 6, [0, 4, 10]),
  (10, [0, 4, 7], 4, [0, 4, 7, 10]),
  # The sentence from 4 to 10 is cut at 7, its rest is with the next one.
  (12, [0, 4, 10], 5, [0, 4, 9, 12]),
  (7, [0], 3, [0, 3, 6, 7]),
  (1, [0], 1, [0, 1]),
  (0, [], 5, [0]),
]


@pytest.mark.parametrize(('size', 'starts', 'room', 'want'), CUTS_BY_HAND)
def test_cuts_by_hand(size, starts, room, want):
  cuts = preprocessors.cut_points(
    tf.constant([0, size]), tf.constant(starts, tf.int32), room
  )
  assert cuts.numpy().tolist() == want == oracle_cuts(size, starts, room)


def documents(count=60, longest=90):
  random = np.random.default_rng(4)
  for i in range(count):
    size = (0, 1, 2, 0, 0, 3)[i] if i < 6 else int(random.integers(1, longest))
    cuts = random.integers(0, size, size // 6) if size else []
    yield {
      'tokens': random.integers(5, 300, size).astype(np.int32),
      'sentence_starts': np.unique([*([0] if size else []), *cuts]).astype(np.int32),
      'example_id': 2**40 + i,
      'seed': 7,
      'epoch': 3,
    }


def as_dataset(made, at_a_time=7):
  scalar, vector = tf.TensorSpec([], tf.int64), tf.TensorSpec([None], tf.int32)
  ds = tf.data.Dataset.from_generator(
    lambda: iter(made),
    output_signature={
      'tokens': vector,
      'sentence_starts': vector,
      'example_id': scalar,
      'seed': scalar,
      'epoch': scalar,
    },
  )
  return ds.ragged_batch(at_a_time)


@pytest.mark.parametrize('at_a_time', [1, 7, 100])
@pytest.mark.parametrize('length', [5, 12, 40, 100])
def test_pieces_are_the_document(length, at_a_time):
  made = list(documents())
  lengths = {'inputs': 9, 'targets': length}
  pieces = preprocessors.split_documents(as_dataset(made, at_a_time), lengths)
  pieces = iter(list(pieces.as_numpy_iterator()))
  for document in made:
    tokens, starts = document['tokens'], document['sentence_starts']
    cuts = oracle_cuts(len(tokens), starts, length - 2)
    for number, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)):
      piece = next(pieces)
      np.testing.assert_array_equal(piece['tokens'], tokens[a:b])
      # P11: sentences, and so the noise, start afresh with each piece.
      inside = {0, *(s - a for s in starts if a <= s < b)}
      assert piece['sentence_starts'].tolist() == sorted(inside)
      assert piece['piece'] == number
      assert piece['example_id'] == document['example_id']
      assert (piece['seed'], piece['epoch']) == (7, 3)
  assert next(pieces, None) is None


@pytest.fixture(scope='module')
def features(corpus_dir):
  vocabulary = vocabularies.load_vocabulary(corpus_dir)
  return {k: seqio.Feature(vocabulary) for k in ('inputs', 'targets')}


def denoised(features, made, lengths, recipe=None):
  pieces = preprocessors.split_documents(as_dataset(made), lengths)
  examples = preprocessors.denoise(pieces, lengths, features, recipe)
  return list(examples.as_numpy_iterator())


def test_denoise_applies_noise_to_each_piece(features):
  lengths = {'inputs': 64, 'targets': 64}
  recipe = noise.Recipe(random_ratio=0.2, whole_words=True)
  ids = noise.Ids.of(features['targets'].vocabulary)
  made = list(documents(30))
  pieces = preprocessors.split_documents(as_dataset(made), lengths)
  examples = denoised(features, made, lengths, recipe)
  for piece, example in zip(pieces, examples, strict=True):
    seed = preprocessors.piece_seed(piece)
    want = noise.corrupt(
      piece['tokens'], piece['sentence_starts'], seed, recipe, ids, 64
    )
    np.testing.assert_array_equal(example['inputs'], want.source)
    np.testing.assert_array_equal(example['targets'], want.target)
    np.testing.assert_array_equal(example['targets_noised'], want.codes)
    assert example['dropped'] == 0
    assert len(example['inputs']) <= 64 and len(example['targets']) <= 64


def own_tokens(count=300):
  """Documents without common tokens, so that the origin of each token is known."""
  random = np.random.default_rng(6)
  begin = 10
  for i in range(count):
    size = int(random.integers(1, 40))
    tokens = np.arange(begin, begin + size, dtype=np.int32)
    begin += size
    starts = np.unique([0, *random.integers(0, size, size // 6)]).astype(np.int32)
    yield {
      'tokens': tokens,
      'sentence_starts': starts,
      'example_id': i,
      'seed': 7,
      'epoch': 3,
    }


def test_p11_no_span_crosses_a_document_or_a_packing_segment(monkeypatch):
  """In packed rows each segment has the noise of its own document, and all of it."""
  made = list(own_tokens())
  ids = noise.Ids(
    bos=1,
    eos=2,
    mask=4,
    ordinary=np.arange(5, 10, dtype=np.int32),
    word_start=np.ones(0, bool),
  )
  monkeypatch.setattr(noise.Ids, 'of', lambda vocabulary: ids)
  feature = seqio.Feature(seqio.PassThroughVocabulary(20_000, eos_id=2))
  output_features = {'inputs': feature, 'targets': feature}
  lengths = {'inputs': 64, 'targets': 64}

  def examples(documents):
    pieces = preprocessors.split_documents(as_dataset(documents), lengths)
    return preprocessors.denoise(pieces, lengths, output_features, noise.Recipe())

  def key(targets):
    return int(targets[1])

  alone = {}
  for document in made[::100]:  # Each builds a graph.
    (example,) = examples([document]).as_numpy_iterator()
    alone[key(example['targets'])] = example['inputs'].tolist()
  rows = BartFeatureConverter(pack=True)(examples(made), lengths)
  own = {int(d['tokens'][0]): d['tokens'].tolist() for d in made}
  at_both_ends, found = 0, set()
  for row in rows.as_numpy_iterator():
    for segment in range(1, row['decoder_segment_ids'].max() + 1):
      source, targets, codes = (
        row[name][row[f'{name[:7]}_segment_ids'] == segment]
        for name in (
          'encoder_input_tokens',
          'decoder_target_tokens',
          'decoder_targets_noised',
        )
      )
      assert source[0] == targets[0] == 1 and source[-1] == targets[-1] == 2
      assert targets[1:-1].tolist() == own[key(targets)]
      # Of the document's own tokens all that are not covered, and no other's.
      copied = targets[1:-1][codes[1:-1] == noise.COPIED]
      assert sorted(source[source >= 10].tolist()) == copied.tolist()
      infilled = codes == noise.INFILLED
      assert infilled.sum() == int(np.ceil(0.3 * (len(targets) - 2) - 1e-9))
      at_both_ends += infilled[1] and infilled[-2]
      # The examples before and after it make no difference.
      assert source.tolist() == alone.get(key(targets), source.tolist())
      found.add(key(targets))
  assert len(found) == len(made)
  assert at_both_ends > 10


@pytest.mark.parametrize('field', ['seed', 'epoch', 'example_id'])
def test_p15_noise_depends_on_each(features, field):
  lengths = {'inputs': 100, 'targets': 100}
  made = list(documents(40))
  other = [{**d, field: d[field] + 1} for d in made]
  first, again, changed = (
    denoised(features, m, lengths, noise.Recipe()) for m in (made, made, other)
  )
  for a, b in zip(first, again, strict=True):
    np.testing.assert_array_equal(a['inputs'], b['inputs'])
  long = [i for i, e in enumerate(first) if len(e['targets']) > 20]
  same = [first[i]['inputs'].tolist() == changed[i]['inputs'].tolist() for i in long]
  assert len(long) > 20 and not any(same)
  for a, b in zip(first, changed, strict=True):
    np.testing.assert_array_equal(a['targets'], b['targets'])


def test_p15_each_piece_has_its_own_noise(features):
  tokens = np.tile(np.arange(10, 48, dtype=np.int32), 6)
  starts = np.arange(0, len(tokens), 38).astype(np.int32)
  document = {'tokens': tokens, 'sentence_starts': starts, 'example_id': 1}
  made = [{**document, 'seed': 2, 'epoch': 0}]
  examples = denoised(features, made, {'inputs': 44, 'targets': 40}, noise.Recipe())
  assert len(examples) == 6
  assert len({tuple(e['targets'].tolist()) for e in examples}) == 1
  assert len({tuple(e['inputs'].tolist()) for e in examples}) == 6


def test_piece_seeds_do_not_collide():
  grid = np.stack(np.meshgrid(*[np.arange(24)] * 3), -1).reshape(-1, 3)
  seeds = preprocessors.piece_seed(
    {
      'seed': tf.constant(grid[:, 0], tf.int64),
      'epoch': tf.constant(grid[:, 1], tf.int64),
      'piece': tf.constant(grid[:, 2], tf.int64),
      'example_id': tf.zeros(len(grid), tf.int64),
    }
  ).numpy()
  # The streams of one piece are the next few numbers.
  streams = seeds[1][:, np.newaxis] + np.arange(8)
  assert len(np.unique(streams)) == streams.size


def test_p18_noise_that_outgrows_the_encoder_raises(features):
  lengths = {'inputs': 100, 'targets': 128}
  with pytest.raises(ValueError, match='encoder takes 100'):
    denoised(features, [], lengths, noise.Recipe())
  growing = noise.Recipe(insert_ratio=0.5)
  with pytest.raises(ValueError, match='encoder takes 128'):
    denoised(features, [], {'inputs': 128, 'targets': 128}, growing)
  assert denoised(features, [], {'inputs': 192, 'targets': 128}, growing) == []


@pytest.mark.parametrize(
  'lengths', [None, {'targets': 9}, {'inputs': 9}, {'inputs': 9, 'targets': 2}]
)
def test_bad_lengths_raise(lengths):
  with pytest.raises(ValueError, match='TASK_FEATURE_LENGTHS'):
    preprocessors.split_documents(as_dataset([]), lengths)


def tokenized(features, texts, lengths=None):
  ds = tf.data.Dataset.from_tensor_slices(texts)
  return list(
    preprocessors.tokenize_for_bart(ds, features, lengths).as_numpy_iterator()
  )


def test_length_below_2_raises(features):
  texts = {'inputs': ['fjord'], 'targets': ['sjø']}
  (example,) = tokenized(features, texts, {'inputs': 2})
  assert example['inputs'].tolist() == [1, 2]
  with pytest.raises(ValueError, match='targets.* Got: 1'):
    tokenized(features, texts, {'targets': 1})


def test_other_features_pass(features):
  ds = tf.data.Dataset.from_tensors({'inputs': 'sjø', 'targets': [5, 6], 'label': 3})
  (example,) = preprocessors.tokenize_for_bart(ds, features).as_numpy_iterator()
  assert example['targets'].tolist() == [5, 6] and example['label'] == 3


def test_texts_are_tokenized_and_cut(features):
  vocabulary = features['inputs'].vocabulary
  texts = ['snø ' * i + 'sjø' for i in range(7)]
  examples = tokenized(features, {'inputs': texts, 'targets': texts}, {'inputs': 6})
  for text, example in zip(texts, examples, strict=True):
    ids = vocabulary.encode(text)
    assert example['inputs'].tolist() == [1, *ids[:4], 2]
    assert example['inputs_truncated'] == max(len(ids) - 4, 0)
    assert example['targets'].tolist() == [1, *ids, 2]
    assert example['targets_pretokenized'].decode() == text


def test_vocabulary_without_bos_raises():
  features = {'inputs': seqio.Feature(seqio.ByteVocabulary())}
  with pytest.raises(ValueError, match="<s> for feature 'inputs'"):
    tokenized(features, {'inputs': ['a']})
