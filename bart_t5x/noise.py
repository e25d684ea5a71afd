"""BART's noise for one piece of text (arXiv 1910.13461, section 2.2).

Everything here is stateless TensorFlow on one 1-D example: equal arguments give equal
results, eagerly and inside `tf.data`.

The noise transforms a vector of *references*, int32 [m]. A positive reference is a
position in the clean text (`<s>` is position 0, the text's own tokens are 1 … n). A
negative one is minus the id of a token that the noise inserted, `<mask>` or a random
one. Each transformation maps references to references without looking at the tokens.
The final references give the origin of every source token, and thereby which target
tokens can be copied. `<s>` and `</s>` are not among the references, so no
transformation can touch them.

`spans` implements text infilling; the other transformations are here. Each has a seed
of its own, int64 [2].
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

# Values of the feature `targets_noised`; 0 is padding.
COPIED = 1
INFILLED = 2
END = 3

# Random streams of the transformations.
_PERMUTE, _INFILL, _RANDOM, _MASK, _DELETE, _INSERT, _ROTATE = range(7)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Recipe:
  """The kinds and amounts of noise.

  Applied in this order: permutation, infilling, masks, deletion, insertion, random
  tokens, rotation. The defaults are the paper's choice for large models: all sentences
  permuted, 30 % of the tokens infilled, spans of mean 3. Runs take
  gin/noise/default.gin, which differs.
  """

  # Share of the sentences that are shuffled among themselves, and whether the last
  # sentence may move.
  permute_ratio: float = 1.0
  permute_last: bool = True
  # Share of the units that spans cover, rounded up in each example, and the mean of
  # the Poisson distribution of span lengths, in units.
  infill_ratio: float = 0.3
  span_mean: float = 3.0
  # Whether a span of length 0 inserts a mask; otherwise it does nothing.
  insertions: bool = True
  # A span becomes one mask (1), nothing (0) or one mask per token (-1). An insertion
  # is always one mask.
  replace_length: int = 1
  # Units are words rather than tokens. Where very long words would leave the source
  # longer than the encoder, the text gets spans of tokens instead (see `corrupt`).
  whole_words: bool = False
  # Spans may overlap, as in fairseq. They then cover less than `infill_ratio`, and a
  # span that begins inside another leaves no mask.
  overlap: bool = False
  # Touching spans share a mask. Needs `overlap` and `replace_length` 1.
  merge_adjacent: bool = False
  # Shares of single tokens masked, deleted, and of masks inserted at random places.
  mask_ratio: float = 0.0
  delete_ratio: float = 0.0
  insert_ratio: float = 0.0
  # Probability that a mask becomes a random ordinary token.
  random_ratio: float = 0.0
  # Probability that an example is rotated to begin at a random token.
  rotate_probability: float = 0.0

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if name.endswith(('_ratio', '_probability')) and not 0 <= value <= 1:
        raise ValueError(f'noise.Recipe.{name} must be between 0 and 1. Got: {value}')
    if self.span_mean < 1:
      raise ValueError(
        'noise.Recipe.span_mean must be at least 1: with less, most spans are '
        f'insertions and lengthen the source. Got: {self.span_mean}'
      )
    if self.replace_length not in (-1, 0, 1):
      raise ValueError(
        'noise.Recipe.replace_length must be 1 (one mask per span), 0 (none) or -1 '
        f'(one per token). Got: {self.replace_length}'
      )
    if self.merge_adjacent and not (self.overlap and self.replace_length == 1):
      raise ValueError(
        'noise.Recipe.merge_adjacent needs overlap = True and replace_length = 1. Got: '
        f'{self}'
      )


class Noised(NamedTuple):
  """The result of `corrupt` for n clean tokens."""

  source: tf.Tensor  # int32 [m]: `<s>`, the noised text, `</s>`
  target: tf.Tensor  # int32 [n + 2]: `<s>`, the clean text, `</s>`
  codes: tf.Tensor  # int32 [n + 2]: COPIED or INFILLED, and END for the `</s>`
  references: tf.Tensor  # int32 [m - 2]: of the source without `<s>` and `</s>`
  dropped: tf.Tensor  # int32: number of source tokens cut off
  in_tokens: tf.Tensor  # bool: spans are of tokens although the recipe has whole_words


@dataclasses.dataclass(frozen=True)
class Ids:
  """Token ids that the noise uses."""

  bos: int
  eos: int
  mask: int
  ordinary: np.ndarray  # int32 [v]: ids that may replace a mask
  word_start: np.ndarray  # bool [vocabulary]: whether a token begins a word

  @classmethod
  def of(cls, vocabulary) -> 'Ids':
    """Returns the ids of a `BartVocabulary`."""
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
    sentence_starts: int32 [s], strictly increasing from 0 (empty if n is 0).
    seed: int64 [2].
    encoder_length: maximal length of the source; None for no limit. With
      `whole_words`, a text whose source would be longer is noised again from the same
      seed with tokens as units. Tokens that still don't fit are cut off before the
      `</s>` and counted in `dropped`; `longest_source` helps to avoid that.
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
  """Returns the references after sentence permutation, int32 [size]."""
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


def _assemble(
  tokens: tf.Tensor,
  refs: tf.Tensor,
  ids: Ids,
  dropped: tf.Tensor,
  in_tokens: tf.Tensor,
) -> Noised:
  target = tf.concat([[ids.bos], tokens, [ids.eos]], 0)
  # References of new tokens are not positions: look up any, here that of `<s>`.
  clean = tf.gather(target, tf.maximum(refs, 0))
  source = tf.concat([[ids.bos], tf.where(refs > 0, clean, -refs), [ids.eos]], 0)
  # Each position occurs at most once; negative references are ignored.
  copies = sums_at(refs - 1, tf.ones_like(refs), tf.size(tokens))
  codes = INFILLED - copies  # COPIED where a copy exists
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
  """Shuffles `ceil(ratio · s)` of s sentences; all their orders are equally likely.

  Returns:
    int32 [size]: the index of the token that moves to each place.
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
  if not recipe.whole_words:
    return None
  # A sentence begins a word, with or without a space before it.
  begins = tf.tensor_scatter_nd_update(
    tf.gather(tf.constant(ids.word_start), tokens),
    tf.expand_dims(sentence_starts, 1),
    sentence_starts >= 0,  # all true
  )
  return tf.cast(tensors.places(tf.gather(begins, refs - 1)), tf.int32)


# Noise on single tokens.


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
  """Inserts `ceil(ratio · m)` masks at random places, including both ends."""
  size = tf.size(refs)
  draws = uniform_draws(ceil_share(ratio, size), seed)
  return spans.insert_at(refs, spans.span_gaps(draws, size), mask)


def randomize_masks(
  refs: tf.Tensor, seed: tf.Tensor, ratio: float, mask: int, ordinary: np.ndarray
) -> tf.Tensor:
  """Replaces each mask, with probability `ratio`, by a random ordinary token."""
  places = tf.where(refs == -mask)
  whether, which = spans.uniform_pairs(tf.size(places), seed)
  index = tf.cast(which * len(ordinary), tf.int32)
  drawn = tf.gather(tf.constant(-ordinary, tf.int32), index)
  values = tf.where(whether < ratio, drawn, -mask)
  return tf.tensor_scatter_nd_update(refs, places, values)


def rotate(refs: tf.Tensor, seed: tf.Tensor, probability: float) -> tf.Tensor:
  """Rotates the text, with a probability, to begin at a random element."""
  uniform = uniform_draws(2, seed)
  size = tf.size(refs)
  begin = tf.cast(uniform[1] * tf.cast(size, tf.float32), tf.int32)
  begin = tf.where(uniform[0] < probability, begin, 0)
  return tf.concat([refs[begin:], refs[:begin]], 0)


def _choose_clean(refs: tf.Tensor, seed: tf.Tensor, ratio: float) -> tf.Tensor:
  """Chooses exactly `ceil(ratio · n)` of the n references to clean tokens, bool [m]."""
  clean = refs > 0
  count = ceil_share(ratio, tf.math.count_nonzero(clean, dtype=tf.int32))
  # New tokens sort last and are never chosen.
  draws = tf.where(clean, uniform_draws(tf.size(refs), seed), -1.0)
  places = tf.math.top_k(draws, count).indices
  return sums_at(places, tf.ones_like(places), tf.size(refs)) > 0


def longest_source(recipe: Recipe, length: int, draws: int = 1000) -> int:
  """Estimates by simulation the encoder length that a recipe needs.

  Units are taken as tokens: spans of words mostly cover more, and where they cover too
  little, `corrupt` falls back to tokens. Lengths include `<s>` and `</s>`.

  Returns:
    The longest source seen, or six standard deviations above the mean if that is more.
    About one piece in a hundred million is longer.
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
