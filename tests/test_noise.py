"""Properties of the noise, over random texts, recipes and seeds."""

import collections
import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from bart_t5x import noise, spans

MASK = 4
VOCABULARY = 500
IDS = noise.Ids(
  bos=1,
  eos=2,
  mask=MASK,
  ordinary=np.arange(5, VOCABULARY, dtype=np.int32),
  word_start=np.arange(VOCABULARY) % 3 > 0,
)
# One graph a recipe: hypothesis would otherwise trace one an example.
PLAIN = noise.Recipe(permute_ratio=0.0)
STRONG = noise.Recipe(
  permute_ratio=0.8,
  infill_ratio=0.4,
  whole_words=True,
  mask_ratio=0.1,
  delete_ratio=0.1,
  insert_ratio=0.1,
  random_ratio=0.3,
  rotate_probability=0.5,
)
RECIPES = {
  'paper': noise.Recipe(),
  'plain': PLAIN,
  'fairseq': noise.Recipe(
    span_mean=3.5, whole_words=True, overlap=True, random_ratio=0.1
  ),
  'strong': STRONG,
  'deleting': noise.Recipe(replace_length=0),
  'a mask a token': noise.Recipe(replace_length=-1),
}


def compiled(recipe, encoder_length=None):
  vector = tf.TensorSpec([None], tf.int32)

  @tf.function(input_signature=[vector, vector, tf.TensorSpec([2], tf.int64)])
  def corrupt(tokens, starts, seed):
    return noise.corrupt(tokens, starts, seed, recipe, IDS, encoder_length)

  def call(text, seed):
    tokens, starts = text
    noised = corrupt(
      np.array(tokens, np.int32), np.array(starts, np.int32), np.array(seed, np.int64)
    )
    return noise.Noised(*(x.numpy() for x in noised))

  return call


CORRUPT = {name: compiled(recipe) for name, recipe in RECIPES.items()}


@st.composite
def drawn_texts(draw, most=150):
  size = draw(st.integers(0, most))
  tokens = draw(st.lists(st.integers(5, VOCABULARY - 1), min_size=size, max_size=size))
  cuts = draw(st.sets(st.integers(1, max(size - 1, 1)), max_size=12))
  return tokens, sorted({0, *(c for c in cuts if c < size)} if size else [])


seeds = st.tuples(st.integers(0, 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
names = st.sampled_from(sorted(RECIPES))


def long_text(size=1022, sentence=25):
  """All tokens different, so that positions can be read off."""
  return list(range(1000, 1000 + size)), list(range(0, size, sentence))


@settings(max_examples=150, deadline=None)
@given(drawn_texts(), seeds, names)
def test_p01_the_target_is_the_clean_text(text, seed, name):
  noised = CORRUPT[name](text, seed)
  assert noised.target.tolist() == [1, *text[0], 2]


@settings(max_examples=150, deadline=None)
@given(drawn_texts(), seeds, names)
def test_p04_start_and_end_are_never_touched(text, seed, name):
  source = CORRUPT[name](text, seed).source
  assert source[0] == 1 and source[-1] == 2
  inner = source[1:-1]
  assert not np.isin(inner, [0, 1, 2, 3]).any()


def is_subsequence(shorter, longer):
  longer = iter(longer)
  return all(element in longer for element in shorter)


@settings(max_examples=150, deadline=None)
@given(drawn_texts(), seeds)
def test_p05_what_is_no_mask_is_a_subsequence(text, seed):
  source = CORRUPT['plain'](text, seed).source
  assert is_subsequence(source[source != MASK], [1, *text[0], 2])


@settings(max_examples=150, deadline=None)
@given(drawn_texts(), seeds, names)
def test_codes_tell_what_can_be_copied(text, seed, name):
  noised = CORRUPT[name](text, seed)
  assert noised.codes.shape == noised.target.shape
  assert noised.codes[0] == noise.COPIED and noised.codes[-1] == noise.END
  copied = np.flatnonzero(noised.codes[1:-1] == noise.COPIED) + 1
  refs = noised.references
  assert sorted(refs[refs > 0].tolist()) == copied.tolist()
  np.testing.assert_array_equal(
    noised.source[1:-1][refs > 0], noised.target[refs[refs > 0]]
  )
  np.testing.assert_array_equal(noised.source[1:-1][refs < 0], -refs[refs < 0])


@settings(max_examples=200, deadline=None)
@given(drawn_texts(), seeds)
def test_p06_the_budget_is_exact_in_each_example(text, seed):
  noised = CORRUPT['paper'](text, seed)
  infilled = (noised.codes == noise.INFILLED).sum()
  assert infilled == math.ceil(0.3 * len(text[0]) - 1e-9)


def test_p07_a_mask_for_each_span_and_each_insertion():
  corrupt = compiled(noise.Recipe(random_ratio=0.4))
  for draw in range(100):
    noised = corrupt(long_text(200), (draw, 3))
    seed = tf.constant([draw, 3 + noise._INFILL], tf.int64)
    # 54 lengths and 54 places are drawn for a budget of 60.
    edges = spans.span_edges(spans.uniform_draws(108, seed)[:54], tf.constant(60), 3.0)
    new = noised.source[1:-1][noised.references < 0]
    assert len(new) == len(edges) - 1
    assert (noised.references > 0).sum() == 140


def test_p12_permutation_keeps_sentences_whole():
  corrupt = compiled(noise.Recipe(infill_ratio=0))
  random = np.random.default_rng(2)
  for draw in range(200):
    size = int(random.integers(1, 200))
    starts = np.unique([0, *random.integers(0, size, 8)]).tolist()
    noised = corrupt((list(range(1000, 1000 + size)), starts), (draw, 7))
    inner = (noised.source[1:-1] - 1000).tolist()
    assert sorted(inner) == list(range(size))
    sentences = [list(range(a, b)) for a, b in itertools.pairwise([*starts, size])]
    while inner:
      (sentence,) = [s for s in sentences if s[0] == inner[0]]
      assert inner[: len(sentence)] == sentence
      inner = inner[len(sentence) :]
    assert (noised.codes == noise.INFILLED).sum() == 0


@pytest.mark.parametrize('last', [True, False])
def test_p12_all_orders_occur_equally_often(last):
  corrupt = compiled(noise.Recipe(infill_ratio=0, permute_last=last))
  orders = collections.Counter()
  for draw in range(2400):
    source = corrupt(([10, 11, 20, 30, 31, 40], [0, 2, 3, 5]), (draw, 7)).source
    orders[tuple(t // 10 for t in source if t >= 10 and t != 11 and t != 31)] += 1
  if not last:
    assert {order[-1] for order in orders} == {4}
  assert len(orders) == (24 if last else 6)
  assert scipy.stats.chisquare(list(orders.values())).pvalue > 1e-3


def test_p12_one_sentence_stays():
  corrupt = compiled(noise.Recipe(infill_ratio=0))
  for draw in range(20):
    assert corrupt(([7, 8, 9], [0]), (draw, 1)).source.tolist() == [1, 7, 8, 9, 2]


def test_p12_a_share_of_the_sentences_moves():
  corrupt = compiled(noise.Recipe(permute_ratio=0.3, infill_ratio=0))
  moved = []
  for draw in range(300):
    source = corrupt((list(range(10, 20)), list(range(10))), (draw, 7)).source[1:-1]
    moved.append((source != np.arange(10, 20)).sum())
  assert max(moved) == 3  # of ten sentences
  # A permutation of three has one fixed point on average.
  assert abs(np.mean(moved) - 2) < 0.25


def test_p14_random_tokens_are_ordinary():
  ordinary = np.array([7, 8, 9, 300], np.int32)
  ids = dataclasses.replace(IDS, ordinary=ordinary)
  recipe = noise.Recipe(random_ratio=1.0, insert_ratio=0.2)
  seen = collections.Counter()
  for draw in range(40):
    seed = tf.constant([draw, 1], tf.int64)
    noised = noise.corrupt(tf.range(100, 200), tf.constant([0]), seed, recipe, ids)
    refs = noised.references.numpy()
    seen.update((-refs[refs < 0]).tolist())
  assert set(seen) == set(ordinary.tolist())
  assert scipy.stats.chisquare(list(seen.values())).pvalue > 1e-3


@pytest.mark.parametrize(
  'recipe',
  [
    noise.Recipe(random_ratio=0.1),
    noise.Recipe(random_ratio=0.1, span_mean=1.0),  # a third are insertions
    noise.Recipe(random_ratio=0.1, infill_ratio=0, insert_ratio=0.3),
    noise.Recipe(random_ratio=0.1, overlap=True),
  ],
)
def test_p14_the_rate_holds_for_insertions_too(recipe):
  corrupt = compiled(recipe)
  random = new = 0
  for draw in range(300):
    refs = corrupt(([9] * 300, [0]), (draw, 5)).references
    new += (refs < 0).sum()
    random += ((refs < 0) & (refs != -MASK)).sum()
  assert abs(random / new - 0.1) < 4 * math.sqrt(0.09 / new)


def test_p15_equal_seeds_equal_noise_and_others_differ():
  corrupt = CORRUPT['paper']
  text = ([5 + i % 400 for i in range(200)], [0, 50, 100])
  sources = {
    tuple(corrupt(text, seed).source.tolist())
    for seed in [(1, 1), (1, 2), (2, 1), (1, 1), (2**62, -5)]
  }
  assert len(sources) == 4


@pytest.mark.parametrize('room', [3, 10, 60, 84, 200])
def test_p18_the_source_never_outgrows_its_length(room):
  corrupt = compiled(noise.Recipe(insert_ratio=0.3), room)
  free = compiled(noise.Recipe(insert_ratio=0.3))
  for draw in range(50):
    noised = corrupt(long_text(90), (draw, 1))
    whole = free(long_text(90), (draw, 1))
    assert len(noised.source) == min(room, len(whole.source))
    assert noised.source[-1] == 2 and noised.source[0] == 1
    assert noised.dropped == len(whole.source) - len(noised.source)
    # What was cut off cannot be copied.
    copied = (noised.codes == noise.COPIED).sum() - 1
    assert copied == (noised.references > 0).sum()


@pytest.mark.parametrize('length', [64, 256, 1024])
@pytest.mark.parametrize('name', ['paper', 'fairseq', 'a mask a token', 'deleting'])
def test_p18_the_longest_source_is_known_beforehand(name, length):
  recipe = RECIPES[name]
  longest = noise.longest_source(recipe, length)
  text = [5] * (length - 2), list(range(0, length - 2, 20))
  ones = dataclasses.replace(IDS, word_start=np.ones(VOCABULARY, bool))

  def source_length(draw):
    noised = noise.corrupt(*map(tf.constant, text), tf.stack([draw, 9]), recipe, ones)
    return tf.size(noised.source)

  dataset = tf.data.Dataset.range(2000).map(source_length)
  lengths = next(iter(dataset.batch(2000))).numpy()
  assert (lengths > longest).mean() <= 2e-3
  assert longest - lengths.max() < 0.02 * length + 3


@pytest.mark.parametrize('name', RECIPES)
def test_p21_empty_and_tiny_texts(name):
  corrupt = CORRUPT[name]
  assert corrupt(([], []), (1, 2)).target.tolist() == [1, 2]
  for size in (1, 2, 3):
    for draw in range(50):
      noised = corrupt((list(range(9, 9 + size)), [0]), (draw, 2))
      assert noised.target.tolist() == [1, *range(9, 9 + size), 2]


@pytest.mark.parametrize(
  'field',
  [
    'permute_ratio',
    'infill_ratio',
    'mask_ratio',
    'delete_ratio',
    'insert_ratio',
    'random_ratio',
    'rotate_probability',
  ],
)
def test_p21_ratios_of_nothing_and_of_everything(field):
  none = {'permute_ratio': 0.0, 'infill_ratio': 0.0}
  text = list(range(10, 60)), [0, 20, 40]
  clean = compiled(noise.Recipe(**{**none, field: 0.0}))(text, (1, 2))
  assert clean.source.tolist() == clean.target.tolist()
  noised = compiled(noise.Recipe(**{**none, field: 1.0}))(text, (1, 2))
  inner = noised.source[1:-1].tolist()
  if field == 'mask_ratio':
    assert inner == [MASK] * 50
  elif field == 'delete_ratio':
    assert inner == []
  elif field == 'insert_ratio':
    assert inner.count(MASK) == 50 and is_subsequence(text[0], inner)
  elif field == 'infill_ratio':
    assert set(inner) == {MASK} and (noised.codes[1:-1] == noise.INFILLED).all()
  else:
    assert sorted(inner) == text[0]


def test_rotation_begins_anywhere():
  corrupt = compiled(
    noise.Recipe(permute_ratio=0, infill_ratio=0, rotate_probability=1.0)
  )
  text = list(range(10, 20)), [0]
  begins = collections.Counter()
  for draw in range(1000):
    inner = corrupt(text, (draw, 4)).source[1:-1].tolist()
    begin = inner[0] - 10
    assert inner == text[0][begin:] + text[0][:begin]
    begins[begin] += 1
  assert len(begins) == 10
  assert scipy.stats.chisquare(list(begins.values())).pvalue > 1e-3


@pytest.mark.parametrize('field', ['mask_ratio', 'delete_ratio', 'insert_ratio'])
def test_p06_token_noise_is_exact(field):
  recipe = noise.Recipe(permute_ratio=0, infill_ratio=0, **{field: 0.15})
  corrupt = compiled(recipe)
  for size in range(1, 120):
    noised = corrupt((list(range(10, 10 + size)), [0]), (size, 4))
    count = math.ceil(0.15 * size - 1e-9)
    masks = (noised.source == MASK).sum()
    kept = (noised.references > 0).sum()
    assert (masks, kept) == {
      'mask_ratio': (count, size - count),
      'delete_ratio': (0, size - count),
      'insert_ratio': (count, size),
    }[field]


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'span_mean': 0.9}, 'span_mean must be at least 1'),
    ({'infill_ratio': 1.1}, 'infill_ratio is a share between 0 and 1'),
    ({'rotate_probability': -0.1}, 'rotate_probability is a share'),
    ({'replace_length': 2}, 'replace_length is 1'),
    ({'merge_adjacent': True}, 'merge_adjacent needs overlap'),
  ],
)
def test_p21_recipes_that_cannot_be(fields, message):
  with pytest.raises(ValueError, match=message):
    noise.Recipe(**fields)
