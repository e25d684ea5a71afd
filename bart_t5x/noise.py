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

Each transformation draws from its own seed (two int64), and the draws are made apart
from the placing, so that a test can give the same draws to a reference implementation.
"""

import dataclasses
import math
from typing import NamedTuple

import gin
import numpy as np
import tensorflow as tf

# Codes of the feature `targets_noised`. Not 0, which is padding.
COPIED = 1
INFILLED = 2
END = 3

# One stream of random numbers for each transformation.
_PERMUTE, _INFILL, _RANDOM, _MASK, _DELETE, _INSERT, _ROTATE = range(7)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Recipe:
  """Which noise, and how much. Applied in the order of the fields.

  The defaults are the paper's recipe for large models: all sentences permuted, 30 % of
  the tokens infilled in spans of mean length 3.

  Attributes:
    permute_ratio: share of the sentences that change places among themselves.
    infill_ratio: share of the units that spans cover, rounded up, in each example.
    span_mean: mean of the Poisson distribution of span lengths, in units, at least 1.
      A span of length 0 is an insertion.
    replace_length: what a span becomes: 1 one mask, 0 nothing, -1 one mask a token.
      An insertion is one mask in any case.
    random_ratio: share of the masks that become a random ordinary token instead.
    whole_words: whether a unit is a word, not a token.
    overlap: whether spans may overlap, as in fairseq. They then cover less than
      `infill_ratio`, and a span that begins inside another leaves no mask.
    mask_ratio: share of the tokens that become masks, one by one.
    delete_ratio: share of the tokens that are deleted.
    insert_ratio: masks inserted at random places, as a share of the tokens.
    rotate_probability: share of the examples that begin at a random token.
  """

  permute_ratio: float = 1.0
  infill_ratio: float = 0.3
  span_mean: float = 3.0
  replace_length: int = 1
  random_ratio: float = 0.0
  whole_words: bool = False
  overlap: bool = False
  mask_ratio: float = 0.0
  delete_ratio: float = 0.0
  insert_ratio: float = 0.0
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

  def longest_source(self, length: int, doubt: float = 1e-3) -> int:
    """How long the source of a piece may become, in tokens.

    Args:
      length: of the clean piece with `<s>` and `</s>`.
      doubt: chance that it becomes longer all the same.

    Returns:
      A length with `<s>` and `</s>`.
    """
    n = max(length - 2, 0)
    longest = n
    if self.infill_ratio:
      budget = math.ceil(self.infill_ratio * n - 1e-9)
      draws = _draws_needed(budget, self.span_mean, doubt)
      zeros = _binomial_quantile(draws, math.exp(-self.span_mean), doubt)
      if self.overlap or self.whole_words:
        # Covered tokens vary: spans hide one another, words differ in length.
        covered = n * (1 - math.exp(-budget / n)) if n else 0
        covered = max(0, math.floor(covered - 3 * math.sqrt(n)))
      else:
        covered = budget
      left = {1: n - covered + draws, 0: n - covered + zeros, -1: n + zeros}
      longest = left[self.replace_length]
    longest -= _ceil_share(self.delete_ratio, n - budget if self.infill_ratio else n)
    longest += _ceil_share(self.insert_ratio, n)
    return longest + 2


class Noised(NamedTuple):
  """What `corrupt` returns, for a clean text of n tokens.

  Attributes:
    source: int32 [m], `<s>` … `</s>` with the noise in it.
    target: int32 [n + 2], `<s>`, the clean text, `</s>`.
    codes: int32 [n + 2], whether a target token is in the source: `COPIED` or
      `INFILLED`, and `END` for the `</s>`.
    references: int32 [m - 2], of the source's interior.
    dropped: int32 scalar, interior elements of the source that found no room.
  """

  source: tf.Tensor
  target: tf.Tensor
  codes: tf.Tensor
  references: tf.Tensor
  dropped: tf.Tensor


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
    encoder_length: the most tokens that the source may have; None for any number.
      What has no room is left out before the `</s>` and counted in `dropped`.

  Returns:
    The source, the target, and how they hang together.
  """
  size = tf.size(tokens)
  refs = tf.range(1, size + 1)
  if recipe.permute_ratio:
    order = permute_sentences(
      size, sentence_starts, _stream(seed, _PERMUTE), recipe.permute_ratio
    )
    refs = order + 1
  if recipe.infill_ratio:
    starts = _word_starts(tokens, sentence_starts, refs, ids, recipe)
    refs = infill(refs, starts, seed, recipe, ids)
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
  dropped = tf.zeros([], tf.int32)
  if encoder_length is not None:
    dropped = tf.maximum(tf.size(refs) - (encoder_length - 2), 0)
    refs = refs[: encoder_length - 2]
  return _assemble(tokens, refs, ids, dropped)


def _assemble(
  tokens: tf.Tensor, refs: tf.Tensor, ids: Ids, dropped: tf.Tensor
) -> Noised:
  target = tf.concat([[ids.bos], tokens, [ids.eos]], 0)
  # A new token's reference falls on position 0: `<s>`, which is always copied.
  positions = tf.maximum(refs, 0)
  inner = tf.where(refs > 0, tf.gather(target, positions), -refs)
  source = tf.concat([[ids.bos], inner, [ids.eos]], 0)
  copies = tf.scatter_nd(
    positions[:, tf.newaxis], tf.ones_like(positions), [tf.size(target) - 1]
  )
  codes = tf.concat([tf.where(copies > 0, COPIED, INFILLED), [END]], 0)
  # `<s>` is copied also where no new token points at it.
  codes = tf.concat([[COPIED], codes[1:]], 0)
  return Noised(source, target, codes, refs, dropped)


# Sentence permutation.


def permute_sentences(
  size: tf.Tensor, sentence_starts: tf.Tensor, seed: tf.Tensor, ratio: float
) -> tf.Tensor:
  """Shuffles `ceil(ratio · s)` of the s sentences among themselves.

  The chosen sentences, the last one among them as likely as any, fall on one
  another's places in an order drawn from all orders, fixed points included.

  Args:
    size: int32 scalar n, tokens of the text.
    sentence_starts: int32 [s].
    seed: int64 [2].
    ratio: share of the sentences, above 0.

  Returns:
    int32 [n]: for each place the index of the token that comes there.
  """
  count = tf.size(sentence_starts)
  moved = _ceil_share(ratio, count)
  # The largest of `count` uniform numbers are a random subset in random order.
  chosen = tf.math.top_k(_uniform(count, seed), moved).indices
  if ratio < 1:
    order = tf.tensor_scatter_nd_update(
      tf.range(count), tf.sort(chosen)[:, tf.newaxis], chosen
    )
  else:
    order = chosen
  ends = tf.concat([sentence_starts[1:], size[tf.newaxis]], 0)
  starts = tf.gather(sentence_starts, order)
  lengths = tf.gather(ends, order) - starts
  places = tf.cumsum(lengths, exclusive=True)
  # A sentence's tokens all move by one shift: write where it changes, then sum up.
  shifts = starts - places
  changes = shifts - tf.concat([[0], shifts[:-1]], 0)[:count]
  moves = tf.scatter_nd(places[:, tf.newaxis], changes, size[tf.newaxis])
  return tf.range(size) + tf.cumsum(moves)


# Text infilling.


def infill(
  refs: tf.Tensor,
  unit_starts: tf.Tensor | None,
  seed: tf.Tensor,
  recipe: Recipe,
  ids: Ids,
) -> tf.Tensor:
  """Covers `ceil(ratio · units)` units by spans and replaces those.

  Args:
    refs: int32 [n].
    unit_starts: int32 [u], where units (words) begin, the first at 0; None if each
      element is a unit.
    seed: int64 [2].
    recipe: of which the fields from `infill_ratio` to `overlap` are read, but not
      `random_ratio`.
    ids: of the vocabulary.

  Returns:
    int32 [m], references.
  """
  size = tf.size(refs)
  units = size if unit_starts is None else tf.size(unit_starts)
  budget = _ceil_share(recipe.infill_ratio, units)
  uniform = _uniform(2 * _most_draws(budget, recipe.span_mean), _stream(seed, _INFILL))
  uniform = tf.reshape(uniform, [2, -1])
  edges = span_edges(uniform[0], budget, recipe.span_mean)
  count = tf.size(edges) - 1
  if recipe.overlap:
    return _infill_overlapping(refs, unit_starts, seed, edges, recipe, ids)
  gaps = span_gaps(uniform[1, :count], units - budget)
  begins = gaps + edges[:-1]
  ends = gaps + edges[1:]
  if unit_starts is not None:
    bounds = tf.concat([unit_starts, size[tf.newaxis]], 0)
    begins, ends = tf.gather(bounds, begins), tf.gather(bounds, ends)
  return _replace_spans(refs, begins, ends, recipe.replace_length, ids.mask)


def span_edges(uniform: tf.Tensor, budget: tf.Tensor, mean: float) -> tf.Tensor:
  """Poisson span lengths, drawn until their sum reaches the budget.

  The span that crosses the budget is clipped, so the sum is exact.

  Args:
    uniform: float32 [d] in [0, 1), a draw a span; more than will be needed.
    budget: int32 scalar, units to cover.
    mean: of the Poisson distribution.

  Returns:
    int32 [k + 1]: running sums of the k lengths, from 0 to `budget`.
  """
  lengths = tf.raw_ops.Bucketize(input=uniform, boundaries=_poisson_cdf(mean))
  before = tf.cumsum(lengths, exclusive=True)
  count = tf.math.count_nonzero(before < budget, dtype=tf.int32)
  return tf.concat([before[:count], budget[tf.newaxis]], 0)


def span_gaps(uniform: tf.Tensor, kept: tf.Tensor) -> tf.Tensor:
  """Where spans go: for each one the number of kept units before it.

  Each of the `kept + 1` gaps is equally likely for each span. Spans in one gap are
  adjacent and stay apart: each leaves its own mask.

  Args:
    uniform: float32 [k] in [0, 1).
    kept: int32 scalar, units that no span covers.

  Returns:
    int32 [k], sorted.
  """
  falling = tf.math.top_k(uniform, tf.size(uniform)).values
  return kept - tf.cast(falling * tf.cast(kept + 1, tf.float32), tf.int32)


def _replace_spans(
  refs: tf.Tensor,
  begins: tf.Tensor,
  ends: tf.Tensor,
  replace_length: int,
  mask: int,
) -> tf.Tensor:
  """Replaces disjoint sorted spans [begins, ends); empty ones are insertions."""
  lengths = ends - begins
  count = tf.size(lengths)
  before = tf.cumsum(lengths, exclusive=True)
  left = tf.size(refs) - tf.reduce_sum(lengths)
  slots = begins - before + tf.range(count)
  # One more than a span's length at its slot, 0 where an element is kept.
  marks = tf.scatter_nd(
    slots[:, tf.newaxis], lengths + 1, tf.reshape(left + count, [1])
  )
  is_span = marks > 0
  steps = tf.where(is_span, marks - 1, 1)
  # The last slot may be a span at the text's end: one element to point at.
  padded = tf.concat([refs, [0]], 0)
  kept = tf.gather(padded, tf.cumsum(steps, exclusive=True))
  out = tf.where(is_span, -mask, kept)
  if replace_length == 0:
    return tf.boolean_mask(out, marks < 2)
  if replace_length == -1:
    return tf.repeat(out, tf.maximum(steps, 1))
  return out


def _infill_overlapping(
  refs: tf.Tensor,
  unit_starts: tf.Tensor | None,
  seed: tf.Tensor,
  edges: tf.Tensor,
  recipe: Recipe,
  ids: Ids,
) -> tf.Tensor:
  """Spans as fairseq places them: distinct random starts, overlaps allowed."""
  size = tf.size(refs)
  units = size if unit_starts is None else tf.size(unit_starts)
  lengths = edges[1:] - edges[:-1]
  spans = tf.boolean_mask(lengths, lengths > 0)
  inserts = tf.size(lengths) - tf.size(spans)
  draws = _uniform(units + inserts, _stream(seed, _INFILL) + [1, 0])
  begins = tf.math.top_k(draws[:units], tf.size(spans)).indices
  ends = tf.minimum(begins + spans, units)
  if unit_starts is not None:
    bounds = tf.concat([unit_starts, size[tf.newaxis]], 0)
    begins, ends = tf.gather(bounds, begins), tf.gather(bounds, ends)
  places = tf.concat([begins, ends], 0)[:, tf.newaxis]
  ones = tf.ones_like(begins)
  shape = size[tf.newaxis] + 1
  changes = tf.scatter_nd(places, tf.concat([ones, -ones], 0), shape)
  cover = tf.cumsum(changes)[:size]
  if recipe.replace_length == -1:
    out = tf.where(cover > 0, -ids.mask, refs)
  else:
    # A start that only its own span covers keeps its mask; one inside another's loses
    # it, as in fairseq.
    is_start = tf.scatter_nd(begins[:, tf.newaxis], ones, shape)[:size] > 0
    own = is_start & (cover == 1)
    if recipe.replace_length == 0:
      out = tf.boolean_mask(refs, cover == 0)
    else:
      out = tf.boolean_mask(tf.where(own, -ids.mask, refs), own | (cover == 0))
  gaps = span_gaps(draws[units:], tf.size(out))
  return _replace_spans(out, gaps, gaps, 1, ids.mask)


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
  begins = tf.gather(tf.constant(ids.word_start), tokens)
  # The first word of a text has no space before it.
  begins = tf.tensor_scatter_nd_update(
    begins, sentence_starts[:, tf.newaxis], tf.ones_like(sentence_starts, tf.bool)
  )
  return tf.cast(tf.where(tf.gather(begins, refs - 1))[:, 0], tf.int32)


# The other transformations.


def mask_tokens(
  refs: tf.Tensor, seed: tf.Tensor, ratio: float, mask: int
) -> tf.Tensor:
  """Turns `ceil(ratio · n)` of the n clean tokens into masks, one by one."""
  chosen = _choose_clean(refs, seed, ratio)
  return tf.where(chosen, -mask, refs)


def delete_tokens(refs: tf.Tensor, seed: tf.Tensor, ratio: float) -> tf.Tensor:
  """Deletes `ceil(ratio · n)` of the n clean tokens."""
  return tf.boolean_mask(refs, ~_choose_clean(refs, seed, ratio))


def insert_masks(
  refs: tf.Tensor, seed: tf.Tensor, ratio: float, mask: int
) -> tf.Tensor:
  """Inserts `ceil(ratio · m)` masks at random places, the two ends included."""
  size = tf.size(refs)
  gaps = span_gaps(_uniform(_ceil_share(ratio, size), seed), size)
  return _replace_spans(refs, gaps, gaps, 1, mask)


def randomize_masks(
  refs: tf.Tensor, seed: tf.Tensor, ratio: float, mask: int, ordinary: np.ndarray
) -> tf.Tensor:
  """Turns each mask, with probability `ratio`, into a random ordinary token."""
  size = tf.size(refs)
  uniform = tf.reshape(_uniform(2 * size, seed), [2, -1])
  index = tf.cast(uniform[1] * len(ordinary), tf.int32)
  drawn = tf.gather(tf.constant(ordinary, tf.int32), index)
  return tf.where((refs == -mask) & (uniform[0] < ratio), -drawn, refs)


def rotate(refs: tf.Tensor, seed: tf.Tensor, probability: float) -> tf.Tensor:
  """With a probability, makes the text begin at a random one of its elements."""
  uniform = _uniform(2, seed)
  size = tf.size(refs)
  begin = tf.cast(uniform[1] * tf.cast(size, tf.float32), tf.int32)
  begin = tf.where(uniform[0] < probability, begin, 0)
  return tf.concat([refs[begin:], refs[:begin]], 0)


def _choose_clean(refs: tf.Tensor, seed: tf.Tensor, ratio: float) -> tf.Tensor:
  """bool [m]: exactly `ceil(ratio · n)` of the n references to clean tokens."""
  clean = refs > 0
  count = _ceil_share(ratio, tf.math.count_nonzero(clean, dtype=tf.int32))
  # New tokens come last: they are never chosen.
  draws = tf.where(clean, _uniform(tf.size(refs), seed), -1.0)
  places = tf.math.top_k(draws, count).indices
  hits = tf.scatter_nd(
    places[:, tf.newaxis], tf.ones_like(places), tf.shape(refs)
  )
  return hits > 0


# Draws.


def _stream(seed: tf.Tensor, transformation: int) -> tf.Tensor:
  return seed + tf.constant([0, transformation], tf.int64)


def _uniform(count: tf.Tensor | int, seed: tf.Tensor) -> tf.Tensor:
  """float32 [count] in [0, 1). The raw op: a quarter of the public one's cost."""
  return tf.raw_ops.StatelessRandomUniform(
    shape=tf.reshape(count, [1]), seed=seed, dtype=tf.float32
  )


def _ceil_share(ratio: float, count):
  """`ceil(ratio · count)` as on paper, for a Python int or an int32 tensor.

  0.07 · 100 is 7.000000000000001 in floating point, and must be 7.
  """
  if isinstance(count, int):
    return math.ceil(ratio * count - 1e-9)
  return tf.cast(tf.math.ceil(tf.cast(count, tf.float64) * ratio - 1e-9), tf.int32)


def _poisson_cdf(mean: float) -> list[float]:
  """P(X ≤ 0), P(X ≤ 1) … until the tail is below float32's resolution."""
  total, term, cdf = 0.0, math.exp(-mean), []
  for k in range(1, 10_000):
    total += term
    if total >= 1 - 2.0**-23:
      break
    cdf.append(total)
    term *= mean / k
  return cdf


def _most_draws(budget: tf.Tensor, mean: float) -> tf.Tensor:
  """Span lengths to draw so that their sum reaches the budget, beyond doubt.

  Their expected sum is at least 2 · budget + 40; it falls short of the budget with a
  probability below 1e-17 (and `span_edges` then lengthens the last span).
  """
  return (2 * budget + 40) // math.floor(mean) + 1


def _draws_needed(budget: int, mean: float, doubt: float) -> int:
  """Draws after which a Poisson sum has reached the budget but for a doubt."""
  count = math.ceil(budget / mean)
  while budget and _poisson_below(budget, count * mean) > doubt:
    count += 1
  return count


def _poisson_below(bound: int, mean: float) -> float:
  """P(X < bound) for a Poisson variable."""
  logs = (k * math.log(mean) - mean - math.lgamma(k + 1) for k in range(bound))
  return sum(math.exp(value) for value in logs)


def _binomial_quantile(trials: int, share: float, doubt: float) -> int:
  """The smallest count that is exceeded with a probability of at most `doubt`."""
  total = 0.0
  for k in range(trials):
    total += math.comb(trials, k) * share**k * (1 - share) ** (trials - k)
    if total >= 1 - doubt:
      return k
  return trials
