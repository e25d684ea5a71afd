"""Recipes, random texts, and how to run the noise, for its tests."""

import numpy as np
import tensorflow as tf

from bart_t5x import noise, spans
from bart_t5x.tensors import do_not_convert

MASK = 4
VOCABULARY = 500
IDS = noise.Ids(
  bos=1,
  eos=2,
  mask=MASK,
  ordinary=np.arange(5, VOCABULARY, dtype=np.int32),
  word_start=np.arange(VOCABULARY) % 3 > 0,
)
COUNT = 1000  # random texts of a test

NONE = {'permute_ratio': 0.0, 'infill_ratio': 0.0}
RECIPES = {
  'paper': noise.Recipe(),
  'plain': noise.Recipe(permute_ratio=0.0),
  'default': noise.Recipe(whole_words=True, random_ratio=0.1),
  'fairseq': noise.Recipe(
    span_mean=3.5, whole_words=True, overlap=True, random_ratio=0.1
  ),
  'hf_compat': noise.Recipe(
    permute_last=False, insertions=False, overlap=True, merge_adjacent=True
  ),
  'strong': noise.Recipe(
    permute_ratio=0.8,
    infill_ratio=0.4,
    whole_words=True,
    mask_ratio=0.1,
    delete_ratio=0.1,
    insert_ratio=0.1,
    random_ratio=0.3,
    rotate_probability=0.5,
  ),
  'deleting': noise.Recipe(replace_length=0),
  'a mask a token': noise.Recipe(replace_length=-1),
}


def random_cases(count, seed=5, longest=150, vocabulary=VOCABULARY):
  """(tokens, sentence starts, seed): all small sizes, then random ones."""
  random = np.random.default_rng(seed)
  for i in range(count):
    size = i if i < 12 else int(random.integers(1, longest))
    tokens = random.integers(5, vocabulary, size).astype(np.int32)
    cuts = random.integers(0, size, size // 8) if size else []
    starts = np.unique([*([0] if size else []), *cuts]).astype(np.int32)
    yield tokens, starts, random.integers(-(2**63), 2**63 - 1, 2)


def repeated(tokens, starts, count, stream=7):
  """One text under many seeds."""
  tokens, starts = np.array(tokens, np.int32), np.array(starts, np.int32)
  return [(tokens, starts, np.array([i, stream])) for i in range(count)]


def as_dataset(cases):
  """The cases as a dataset of the noise's three arguments."""
  *rows, seeds = zip(*cases, strict=True)
  rows = [
    tf.RaggedTensor.from_row_lengths(
      np.concatenate(row).astype(np.int32), [len(values) for values in row]
    )
    for row in rows
  ]
  dataset = tf.data.Dataset.from_tensor_slices((*rows, np.array(seeds, np.int64)))

  @do_not_convert
  def as_tensors(tokens, starts, seed):
    return tokens[:], starts[:], seed

  return dataset.map(as_tensors)


def each(function, cases, eager=False):
  """function(tokens, starts, seed) of each case, as NumPy; eagerly it is slow."""
  if not eager:
    function = do_not_convert(function)
    dataset = as_dataset(cases).map(function, num_parallel_calls=tf.data.AUTOTUNE)
    return list(dataset.as_numpy_iterator())
  found = []
  for tokens, starts, seed in cases:
    result = function(
      tf.constant(tokens, tf.int32),
      tf.constant(starts, tf.int32),
      tf.constant(seed, tf.int64),
    )
    found.append(tf.nest.map_structure(lambda x: x.numpy(), result))
  return found


def corrupted(recipe, cases, encoder_length=None, ids=IDS, eager=False):
  """`noise.corrupt` of each case."""

  def corrupt(tokens, starts, seed):
    return noise.corrupt(tokens, starts, seed, recipe, ids, encoder_length)

  return each(corrupt, cases, eager)


def words(tokens, starts):
  """The positions of a text's tokens, a list for each word."""
  found = []
  for i, token in enumerate(tokens):
    if IDS.word_start[token] or i in starts:
      found.append([])
    found[-1].append(i)
  return found


def span_lengths(tokens, starts, seed, recipe, ids=IDS, in_tokens=False):
  """The lengths that `noise.corrupt` draws for the same arguments; 0: an insertion."""
  units = tf.size(tokens)
  refs = tf.range(1, units + 1)
  words = noise._word_starts(tokens, starts, refs, ids, recipe)
  if words is not None:
    units = tf.where(in_tokens, units, tf.size(words))
  edges, _ = spans.draw_spans(
    units,
    noise._stream(seed, noise._INFILL),
    recipe.infill_ratio,
    recipe.span_mean,
    recipe.insertions,
  )
  return edges[1:] - edges[:-1]
