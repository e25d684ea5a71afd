"""BART's noise: what becomes of one clean piece of text (arXiv 1910.13461, 2.2).

Everything here is TensorFlow on one 1-D example and has no state: equal arguments give
equal results, in eager mode and inside `tf.data`.

A text on its way through the noise is a vector of *references*, int32 [m]. A positive
number is a position in the clean text (`<s>` is position 0, the text's own tokens are
1 … n); a negative number is minus the id of a token that the noise put there, `<mask>`
or a random one. Each transformation maps references to references. So none needs to
know the tokens, and at the end it is known of every source token where it came from,
and of every target token whether it can still be copied. `<s>` and `</s>` are not among
the references: nothing can touch them.

Text infilling is in `spans`, the other transformations are here. Each draws from its
own seed, two int64.
"""

import dataclasses
import math
from typing import NamedTuple

import gin
import numpy as np
import tensorflow as tf

from bart_t5x import spans, tensors
from bart_t5x.spans import ceil_share, uniform_draws
from bart_t5x.tensors import do_not_convert, sums_at

# Codes of the feature `targets_noised`. Not 0, which is padding.
COPIED = 1
INFILLED = 2
END = 3

# One stream of random numbers for each transformation.
_PERMUTE, _INFILL, _RANDOM, _MASK, _DELETE, _INSERT, _ROTATE = range(7)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Recipe:
  """Which noise, and how much. gin binds each field (gin/denoising.gin).

  The transformations come in this order: permutation, infilling, masks, deletion,
  insertion, random tokens, rotation. The defaults are the paper's choice for large
  models: all sentences permuted, 30 % of the tokens infilled, spans of mean 3.

  Attributes:
    permute_ratio: share of the sentences that change places among themselves.
    permute_last: whether the last sentence is one of them.
    infill_ratio: share of the units that spans cover, rounded up, in each example.
    span_mean: mean of the Poisson distribution of span lengths, in units, at least 1.
    insertions: whether a span of length 0 inserts a mask. Otherwise it does nothing.
    replace_length: what a span becomes: 1 one mask, 0 nothing, -1 one mask a token.
      An insertion is one mask in any case.
    whole_words: whether a unit is a word, not a token. Where a few very long words make
      up a text, spans that pass them by can leave a source longer than the encoder;
      such a text gets spans of tokens instead (see `corrupt`).
    overlap: whether spans may overlap, as in fairseq. They then cover less than
      `infill_ratio`, and a span that begins inside another leaves no mask.
    merge_adjacent: whether spans that touch leave one mask together. Only with
      `overlap` and `replace_length` 1.
    mask_ratio: share of the tokens that become masks, one by one.
    delete_ratio: share of the tokens that are deleted.
    insert_ratio: masks inserted at random places, as a share of the tokens.
    random_ratio: chance of each mask to become a random ordinary token instead.
    rotate_probability: chance of an example to begin at a random token.
  """

  permute_ratio: float = 1.0
  permute_last: bool = True
  infill_ratio: float = 0.3
  span_mean: float = 3.0
  insertions: bool = True
  replace_length: int = 1
  whole_words: bool = False
  overlap: bool = False
  merge_adjacent: bool = False
  mask_ratio: float = 0.0
  delete_ratio: float = 0.0
  insert_ratio: float = 0.0
  random_ratio: float = 0.0
  rotate_probability: float = 0.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name.endswith(('_ratio', '_probability')) and not 0 <= value <= 1:
        raise ValueError(
          f'noise.Recipe.{field.name} is a share between 0 and 1. Got: {value}'
        )
    if self.span_mean < 1:
      raise ValueError(
        'noise.Recipe.span_mean must be at least 1: below, most spans are insertions '
        f'and the source grows without bound. Got: {self.span_mean}'
      )
    if self.replace_length not in (-1, 0, 1):
      raise ValueError(
        'noise.Recipe.replace_length is 1 (one mask a span), 0 (none) or -1 (one a '
        f'token). Got: {self.replace_length}'
      )
    if self.merge_adjacent and not (self.overlap and self.replace_length == 1):
      raise ValueError(
        'noise.Recipe.merge_adjacent needs overlap = True and replace_length = 1. Got: '
        f'{self}'
      )


class Noised(NamedTuple):
  """What `corrupt` returns, for a clean text of n tokens.

  Attributes:
    source: int32 [m], `<s>` … `</s>` with the noise in it.
    target: int32 [n + 2], `<s>`, the clean text, `</s>`.
    codes: int32 [n + 2], whether a target token is in the source: `COPIED` or
      `INFILLED`, and `END` for the `</s>`.
    references: int32 [m - 2], of the source's interior.
    dropped: int32 scalar, interior elements of the source that found no room.
    in_tokens: bool scalar, whether spans are of tokens although the recipe says words,
      for those left a source that was too long.
  """

  source: tf.Tensor
  target: tf.Tensor
  codes: tf.Tensor
  references: tf.Tensor
  dropped: tf.Tensor
  in_tokens: tf.Tensor


@dataclasses.dataclass(frozen=True)
class Ids:
  """What the noise needs to know of a vocabulary.

  Attributes:
    bos, eos, mask: ids of `<s>`, `</s>` and `<mask>`.
    ordinary: int32 [v], the ids that may stand in for a mask.
    word_start: bool [vocabulary], whether a token begins a word.
  """

  bos: int
  eos: int
  mask: int
  ordinary: np.ndarray
  word_start: np.ndarray

  @classmethod
  def of(cls, vocabulary) -> 'Ids':
    """Of a `BartVocabulary`."""
    ordinary = np.setdiff1d(
      np.arange(vocabulary.vocab_size, dtype=np.int32),
      np.asarray(vocabulary.special_ids, dtype=np.int32),
    )
    return cls(
      bos=vocabulary.bos_id,
      eos=vocabulary.eos_id,
      mask=vocabulary.mask_id,
      ordinary=ordinary,
      word_start=np.asarray(vocabulary.word_start_table, dtype=bool),
    )


def corrupt(
  tokens: tf.Tensor,
  sentence_starts: tf.Tensor,
  seed: tf.Tensor,
  recipe: Recipe,
  ids: Ids,
  encoder_length: int | None = None,
) -> Noised:
  """Applies a recipe to one piece of text.

  Args:
    tokens: int32 [n], ordinary ids, without `<s>` and `</s>`.
    sentence_starts: int32 [s], where sentences begin: strictly increasing, the first
      is 0 (none if n is 0).
    seed: int64 [2].
    recipe: what to do.
    ids: of the vocabulary.
    encoder_length: the most tokens that the source may have; None for any number. Of
      a recipe with `whole_words`, a text whose source would be longer gets its noise
      with tokens for units, from the same seed: `longest_source` bounds that. What
      still has no room is left out before the `</s>` and counted in `dropped`.

  Returns:
    The source, the target, and how they hang together.
  """
  refs = _noised(tokens, sentence_starts, seed, recipe, ids)
  in_tokens = tf.constant(False)
  dropped = tf.zeros([], tf.int32)
  if encoder_length is not None:
    room = encoder_length - 2
    if recipe.whole_words and recipe.infill_ratio:
      in_tokens = tf.size(refs) > room
      by_tokens = dataclasses.replace(recipe, whole_words=False)
      refs = tensors.replace_if(
        in_tokens,
        refs,
        lambda *piece: _noised(*piece, by_tokens, ids),
        (tokens, sentence_starts, seed),
      )
    dropped = tf.maximum(tf.size(refs) - room, 0)
    refs = refs[:room]
  return _assemble(tokens, refs, ids, dropped, in_tokens)


def _noised(
  tokens: tf.Tensor,
  sentence_starts: tf.Tensor,
  seed: tf.Tensor,
  recipe: Recipe,
  ids: Ids,
) -> tf.Tensor:
  """References behind all of a recipe's transformations, int32 [m], however many."""
  refs = permuted(tf.size(tokens), sentence_starts, seed, recipe)
  if recipe.infill_ratio:
    starts = _word_starts(tokens, sentence_starts, refs, ids, recipe)
    refs = spans.infill(
      refs,
      starts,
      _stream(seed, _INFILL),
      ids.mask,
      ratio=recipe.infill_ratio,
      mean=recipe.span_mean,
      insertions=recipe.insertions,
      replace_length=recipe.replace_length,
      overlap=recipe.overlap,
      merge_adjacent=recipe.merge_adjacent,
    )
  if recipe.mask_ratio:
    refs = mask_tokens(refs, _stream(seed, _MASK), recipe.mask_ratio, ids.mask)
  if recipe.delete_ratio:
    refs = delete_tokens(refs, _stream(seed, _DELETE), recipe.delete_ratio)
  if recipe.insert_ratio:
    refs = insert_masks(refs, _stream(seed, _INSERT), recipe.insert_ratio, ids.mask)
  if recipe.random_ratio:
    refs = randomize_masks(
      refs, _stream(seed, _RANDOM), recipe.random_ratio, ids.mask, ids.ordinary
    )
  if recipe.rotate_probability:
    refs = rotate(refs, _stream(seed, _ROTATE), recipe.rotate_probability)
  return refs


def permuted(
  size: tf.Tensor, sentence_starts: tf.Tensor, seed: tf.Tensor, recipe: Recipe
) -> tf.Tensor:
  """The references of `size` tokens behind the first step, int32 [size]."""
  if not recipe.permute_ratio:
    return tf.range(1, size + 1)
  order = permute_sentences(
    size,
    sentence_starts,
    _stream(seed, _PERMUTE),
    recipe.permute_ratio,
    recipe.permute_last,
  )
  return order + 1


def span_lengths(
  tokens: tf.Tensor,
  sentence_starts: tf.Tensor,
  seed: tf.Tensor,
  recipe: Recipe,
  ids: Ids,
  in_tokens: tf.Tensor | bool = False,
) -> tf.Tensor:
  """The lengths that `corrupt` draws for the same arguments, for statistics.

  Args:
    tokens, sentence_starts, seed, recipe, ids: as for `corrupt`.
    in_tokens: what it said, see `Noised`.

  Returns:
    int32 [k], in units: words with `whole_words` and not `in_tokens`, else tokens; 0 is
    an insertion. Empty without infilling.
  """
  if not recipe.infill_ratio:
    return tf.zeros([0], tf.int32)
  units = tf.size(tokens)
  starts = _word_starts(tokens, sentence_starts, tf.range(1, units + 1), ids, recipe)
  if starts is not None:
    units = tf.where(in_tokens, units, tf.size(starts))
  edges, _ = spans.draw_spans(
    units,
    _stream(seed, _INFILL),
    recipe.infill_ratio,
    recipe.span_mean,
    recipe.insertions,
  )
  return edges[1:] - edges[:-1]


def _assemble(
  tokens: tf.Tensor,
  refs: tf.Tensor,
  ids: Ids,
  dropped: tf.Tensor,
  in_tokens: tf.Tensor,
) -> Noised:
  target = tf.concat([[ids.bos], tokens, [ids.eos]], 0)
  # A new token's reference is no position: it stands for any, here that of `<s>`.
  clean = tf.gather(target, tf.maximum(refs, 0))
  source = tf.concat([[ids.bos], tf.where(refs > 0, clean, -refs), [ids.eos]], 0)
  # Each position is in the source once or not at all. Those of new tokens, which are
  # negative, do not count.
  copies = sums_at(refs - 1, tf.ones_like(refs), tf.size(tokens))
  codes = INFILLED - copies  # COPIED where there is one
  codes = tf.concat([[COPIED], codes, [END]], 0)
  return Noised(source, target, codes, refs, dropped, in_tokens)


# Sentence permutation.


def permute_sentences(
  size: tf.Tensor,
  sentence_starts: tf.Tensor,
  seed: tf.Tensor,
  ratio: float,
  last: bool = True,
) -> tf.Tensor:
  """Shuffles `ceil(ratio · s)` of the s sentences among themselves.

  The chosen sentences fall on one another's places in an order drawn from all orders,
  fixed points included.

  Args:
    size: int32 scalar n, tokens of the text.
    sentence_starts: int32 [s].
    seed: int64 [2].
    ratio: share of the sentences, above 0.
    last: whether the last sentence takes part.

  Returns:
    int32 [n]: for each place the index of the token that comes there.
  """
  count = tf.size(sentence_starts)
  movable = count if last else tf.maximum(count - 1, 0)
  # The largest of some uniform numbers are a random subset in random order.
  draws = uniform_draws(movable, seed)
  chosen = tf.math.top_k(draws, ceil_share(ratio, movable)).indices
  if last and ratio == 1:
    order = chosen
  else:
    order = tf.tensor_scatter_nd_update(
      tf.range(count), tf.sort(chosen)[:, tf.newaxis], chosen
    )
  ends = tf.concat([sentence_starts[1:], [size]], 0)
  return tensors.joined_ranges(
    tf.gather(sentence_starts, order), tf.gather(ends, order)
  )


def _word_starts(
  tokens: tf.Tensor,
  sentence_starts: tf.Tensor,
  refs: tf.Tensor,
  ids: Ids,
  recipe: Recipe,
) -> tf.Tensor | None:
  """Where words begin in the (permuted) text; None if units are tokens."""
  if not recipe.whole_words:
    return None
  # A sentence begins a word, with or without a space before it.
  begins = tf.tensor_scatter_nd_update(
    tf.gather(tf.constant(ids.word_start), tokens),
    tf.expand_dims(sentence_starts, 1),
    sentence_starts >= 0,  # all true
  )
  return tf.cast(tensors.places(tf.gather(begins, refs - 1)), tf.int32)


# Token by token.


def mask_tokens(refs: tf.Tensor, seed: tf.Tensor, ratio: float, mask: int) -> tf.Tensor:
  """Turns `ceil(ratio · n)` of the n clean tokens into masks, one by one."""
  chosen = _choose_clean(refs, seed, ratio)
  return tf.where(chosen, -mask, refs)


def delete_tokens(refs: tf.Tensor, seed: tf.Tensor, ratio: float) -> tf.Tensor:
  """Deletes `ceil(ratio · n)` of the n clean tokens."""
  return tensors.select(refs, ~_choose_clean(refs, seed, ratio))


def insert_masks(
  refs: tf.Tensor, seed: tf.Tensor, ratio: float, mask: int
) -> tf.Tensor:
  """Inserts `ceil(ratio · m)` masks at random places, the two ends included."""
  size = tf.size(refs)
  draws = uniform_draws(ceil_share(ratio, size), seed)
  return spans.insert_at(refs, spans.span_gaps(draws, size), mask)


def randomize_masks(
  refs: tf.Tensor, seed: tf.Tensor, ratio: float, mask: int, ordinary: np.ndarray
) -> tf.Tensor:
  """Turns each mask, with probability `ratio`, into a random ordinary token."""
  places = tf.where(refs == -mask)
  whether, which = spans.uniform_pairs(tf.size(places), seed)
  index = tf.cast(which * len(ordinary), tf.int32)
  drawn = tf.gather(tf.constant(-ordinary, tf.int32), index)
  values = tf.where(whether < ratio, drawn, -mask)
  return tf.tensor_scatter_nd_update(refs, places, values)


def rotate(refs: tf.Tensor, seed: tf.Tensor, probability: float) -> tf.Tensor:
  """With a probability, makes the text begin at a random one of its elements."""
  uniform = uniform_draws(2, seed)
  size = tf.size(refs)
  begin = tf.cast(uniform[1] * tf.cast(size, tf.float32), tf.int32)
  begin = tf.where(uniform[0] < probability, begin, 0)
  return tf.concat([refs[begin:], refs[:begin]], 0)


def _choose_clean(refs: tf.Tensor, seed: tf.Tensor, ratio: float) -> tf.Tensor:
  """bool [m]: exactly `ceil(ratio · n)` of the n references to clean tokens."""
  clean = refs > 0
  count = ceil_share(ratio, tf.math.count_nonzero(clean, dtype=tf.int32))
  # New tokens come last: they are never chosen.
  draws = tf.where(clean, uniform_draws(tf.size(refs), seed), -1.0)
  places = tf.math.top_k(draws, count).indices
  return sums_at(places, tf.ones_like(places), tf.size(refs)) > 0


def longest_source(recipe: Recipe, length: int, draws: int = 1000) -> int:
  """The encoder length that a recipe needs, by trying.

  Units are taken as tokens. Spans of words mostly cover more; a text of which they
  cover so little that it would not fit is given spans of tokens by `corrupt`.

  Args:
    recipe: the noise.
    length: of the clean piece with `<s>` and `</s>`.
    draws: how often to try.

  Returns:
    A length, with `<s>` and `</s>`: the longest seen, or six standard deviations above
    the mean if that is more; about one piece in a hundred million is longer.
  """
  recipe = dataclasses.replace(
    recipe, permute_ratio=0, whole_words=False, random_ratio=0, rotate_probability=0
  )
  tokens = tf.ones([max(length - 2, 0)], tf.int32)
  ids = Ids(bos=1, eos=2, mask=4, ordinary=np.zeros(0), word_start=np.zeros(0))

  @do_not_convert
  def source_length(draw):
    starts = tf.zeros([0], tf.int32)
    return tf.size(corrupt(tokens, starts, tf.stack([draw, 0]), recipe, ids).source)

  lengths = tf.data.Dataset.range(draws).map(
    source_length, num_parallel_calls=tf.data.AUTOTUNE
  )
  seen = next(iter(lengths.batch(draws))).numpy()
  return math.ceil(max(seen.max(), seen.mean() + 6 * seen.std()))


def _stream(seed: tf.Tensor, transformation: int) -> tf.Tensor:
  return seed + tf.constant([0, transformation], tf.int64)
