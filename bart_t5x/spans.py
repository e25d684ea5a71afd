"""Text infilling: replaces spans by masks (arXiv 1910.13461, section 2.2).

Spans cover a share of a text's units (tokens or words). Each becomes one `<mask>` (or
none, or one per token), and a span of length 0 inserts a `<mask>`. Texts are vectors of
references, see `noise`.
"""

import math

import tensorflow as tf

from bart_t5x.tensors import joined_ranges, select, sums_at


def infill(
  refs: tf.Tensor,
  unit_starts: tf.Tensor | None,
  seed: tf.Tensor,
  mask: int,
  ratio: float,
  mean: float,
  insertions: bool = True,
  replace_length: int = 1,
  overlap: bool = False,
  merge_adjacent: bool = False,
) -> tf.Tensor:
  """Covers `ceil(ratio · units)` units by spans and replaces the spans.

  Args:
    refs: int32 [n].
    unit_starts: int32 [u], first indices of words; None if each element is a unit.
    seed: int64 [2].
    mask: id of `<mask>`.
    ratio: share of the units; the other parameters are fields of `noise.Recipe`.

  Returns:
    References, int32 [m].
  """
  size = tf.size(refs)
  units = size if unit_starts is None else tf.size(unit_starts)
  edges, draws = draw_spans(units, seed, ratio, mean, insertions)
  bounds = None
  if unit_starts is not None:
    bounds = tf.concat([unit_starts, tf.shape(refs)], 0)
  if not overlap:
    gaps = span_gaps(draws, units - ceil_share(ratio, units))
    begins, ends = gaps + edges[:-1], gaps + edges[1:]
    if bounds is not None:
      begins, ends = tf.gather(bounds, begins), tf.gather(bounds, ends)
    return replace_spans(refs, begins, ends, replace_length, mask)
  lengths = edges[1:] - edges[:-1]
  spans = select(lengths, lengths > 0)
  inserts = tf.size(lengths) - tf.size(spans)
  draws = uniform_draws(units + inserts, seed + tf.constant([1, 0], tf.int64))
  begins = tf.math.top_k(draws[:units], tf.size(spans)).indices
  ends = tf.minimum(begins + spans, units)
  if bounds is not None:
    begins, ends = tf.gather(bounds, begins), tf.gather(bounds, ends)
  out = _replace_overlapping(refs, begins, ends, replace_length, merge_adjacent, mask)
  return insert_at(out, span_gaps(draws[units:], tf.size(out)), mask)


def draw_spans(
  units: tf.Tensor, seed: tf.Tensor, ratio: float, mean: float, insertions: bool
) -> tuple[tf.Tensor, tf.Tensor]:
  """Draws cumulative span lengths, int32 [k + 1], and uniforms for places, [k]."""
  budget = ceil_share(ratio, units)
  for_lengths, for_places = uniform_pairs(_most_draws(budget, mean), seed)
  edges = span_edges(for_lengths, budget, mean)
  if not insertions:
    edges = tf.concat([[0], select(edges[1:], edges[1:] > edges[:-1])], 0)
  return edges, tf.slice(for_places, [0], tf.shape(edges) - 1)


def span_edges(uniform: tf.Tensor, budget: tf.Tensor, mean: float) -> tf.Tensor:
  """Draws Poisson span lengths until they cover the budget; clips the last one.

  Args:
    uniform: float32 [d] in [0, 1), one per span; more than will be needed.
    budget: int32 scalar, units to cover.

  Returns:
    Cumulative lengths, int32 [k + 1], from 0 to `budget`.
  """
  lengths = tf.raw_ops.Bucketize(input=uniform, boundaries=_poisson_cdf(mean))
  before = tf.cumsum(lengths, exclusive=True)
  needed = tf.reduce_sum(tf.cast(before < budget, tf.int32), keepdims=True)
  return tf.concat([tf.slice(before, [0], needed), tf.expand_dims(budget, 0)], 0)


def span_gaps(uniform: tf.Tensor, kept: tf.Tensor) -> tf.Tensor:
  """Places spans: returns the number of kept units before each, int32 [k], sorted.

  The `kept + 1` gaps are equally likely. Spans in the same gap are adjacent, but each
  leaves its own mask.
  """
  falling = tf.math.top_k(uniform, tf.size(uniform)).values
  return kept - tf.cast(falling * tf.cast(kept + 1, tf.float32), tf.int32)


def replace_spans(
  refs: tf.Tensor,
  begins: tf.Tensor,
  ends: tf.Tensor,
  replace_length: int,
  mask: int,
) -> tf.Tensor:
  """Replaces disjoint sorted spans [begins, ends); empty ones are insertions."""
  lengths = ends - begins
  most = 1
  if replace_length == 1:
    masks = tf.ones_like(lengths)
  elif replace_length == 0:
    masks = tf.cast(lengths < 1, tf.int32)
  else:
    masks = tf.maximum(lengths, 1)
    most = tf.maximum(tf.reduce_max(lengths), 1)
  # With masks appended to the text, the result is a sequence of ranges: the kept
  # elements before a span, the span's masks, …, the elements after the last span.
  ready = tf.concat([refs, tf.fill([most], -mask)], 0)
  size = tf.shape(refs)
  after = tf.zeros_like(ends) + size
  range_begins = tf.concat([[0], tf.reshape(tf.stack([after, ends], 1), [-1])], 0)
  range_ends = tf.stack([begins, after + masks], 1)
  range_ends = tf.concat([tf.reshape(range_ends, [-1]), size], 0)
  return tf.gather(ready, joined_ranges(range_begins, range_ends))


def _replace_overlapping(
  refs: tf.Tensor,
  begins: tf.Tensor,
  ends: tf.Tensor,
  replace_length: int,
  merge_adjacent: bool,
  mask: int,
) -> tf.Tensor:
  """Replaces spans [begins, ends) with distinct begins, in any order."""
  size = tf.size(refs)
  # Number of spans that cover each element.
  ones = tf.ones_like(begins)
  begun = sums_at(begins, ones, size + 1)
  cover = tf.cumsum(begun - sums_at(ends, ones, size + 1))[:size]
  covered = cover > 0
  if replace_length == -1:
    return tf.where(covered, -mask, refs)
  if replace_length == 0:
    return select(refs, ~covered)
  if merge_adjacent:
    leads = covered & ~tf.concat([[False], covered], 0)[:size]
  else:
    # A start inside another span loses its mask, as in fairseq.
    leads = (begun[:size] > 0) & (cover == 1)
  return select(tf.where(leads, -mask, refs), leads | ~covered)


def insert_at(refs: tf.Tensor, gaps: tf.Tensor, mask: int) -> tf.Tensor:
  """Inserts a mask after each number of elements in `gaps`, int32 [k], sorted."""
  return replace_spans(refs, gaps, gaps, 1, mask)


# Draws.


def uniform_draws(count: tf.Tensor | int, seed: tf.Tensor) -> tf.Tensor:
  """Draws uniform numbers in [0, 1), float32 [count]."""
  return _uniform(tf.reshape(count, [1]), seed)


def uniform_pairs(count: tf.Tensor, seed: tf.Tensor) -> list[tf.Tensor]:
  """Returns the two halves of `uniform_draws(2 * count, seed)`."""
  return tf.unstack(_uniform(tf.stack([2, count]), seed))


def _uniform(shape: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
  # The raw op takes a quarter of the time of tf.random.stateless_uniform.
  return tf.raw_ops.StatelessRandomUniform(shape=shape, seed=seed, dtype=tf.float32)


def ceil_share(ratio: float, count: tf.Tensor) -> tf.Tensor:
  """Returns `ceil(ratio · count)`, int32; 0.07 · 100 is exactly 7."""
  if ratio == 1:
    return count
  return tf.cast(tf.math.ceil(tf.cast(count, tf.float64) * ratio - 1e-9), tf.int32)


def _poisson_cdf(mean: float) -> list[float]:
  """P(X ≤ 0), P(X ≤ 1), … until the tail is below float32's resolution."""
  total, term, cdf = 0.0, math.exp(-mean), []
  for k in range(1, 10_000):
    total += term
    if total >= 1 - 2.0**-23:
      break
    cdf.append(total)
    term *= mean / k
  return cdf


def _most_draws(budget: tf.Tensor, mean: float) -> tf.Tensor:
  # The expected sum of the lengths is at least 2 · budget + 40, and the probability of
  # less than the budget below 1e-17 (`span_edges` then lengthens the last span).
  return (2 * budget + 40) // math.floor(mean) + 1
