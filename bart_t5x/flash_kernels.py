"""The two TPU kernels of `flash`: what one program computes.

A program has one block of queries of one row, the whole row's keys and values, and
the heads that lie side by side in its lanes. Other heads' lanes are set to zero in
one factor of a product, which costs nothing: a product takes 128 lanes anyway.

Scores lie as [key, query]: sums over keys then run down the sublanes, and what each
query has one of is a dense row.

Both kernels work on some keys at a time, so that most of what happens to a score
happens in registers, and store what a second pass over the keys needs. Three things
cost more than they seem to on a v3, by its machine code: turning float32 into bfloat16
and back, which its products do by themselves; a mask that is used twice; and arrays of
whole rows, whose every element is stored and loaded for each operation.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from bart_t5x import attention, dropout

LANES = 128

# Queries of one program: [1024, 256] scores in float32 are 1 MB of the 16 MB that a
# core of a v3 works in, and the backward kernel holds two such arrays and four of half
# that size.
QUERY_BLOCK = 256

# Keys whose scores are worked on at a time. By the machine code for v3, 256 take a
# quarter longer, and all 1024 at once save 3 % for twice the code.
KEY_BLOCK = 512

# Stands for the log of the sum of a query that sees no key: all its weights are then 0.
UNSEEN = 1e30


class Settings(NamedTuple):
  """The constants of a kernel.

  Attributes:
    causal: whether queries see keys at their index and before.
    dropout_rate: dropout on the weights, 0 for none.
    heads: heads of the whole model, which number the rows of dropout.
    head_dim: width of one.
    group: heads side by side in the lanes of one program.
    queries: queries of a row before it was filled up.
    widened: whether products are taken in float32.
    interpret: whether to interpret the kernel.
  """

  causal: bool
  dropout_rate: float
  heads: int
  head_dim: int
  group: int
  queries: int
  widened: bool
  interpret: bool


def query_block(queries: int) -> int:
  """Queries of one program: divides them, and fills lanes unless it is them all."""
  if queries <= LANES:
    return queries
  return LANES if queries % QUERY_BLOCK else QUERY_BLOCK


def key_limits(queries: int, keys: int, causal: bool) -> list[int]:
  """How many keys each block of queries may see."""
  size = query_block(queries)
  return [
    min(keys, first + size) if causal else keys for first in range(0, queries, size)
  ]


def key_block(keys: int) -> int:
  """Keys of one turn of a loop: an even part of them, in rows that fill registers."""
  parts = -(-keys // KEY_BLOCK)
  return keys // parts if keys % (16 * parts) == 0 else keys


def _for_own_block(body, queries, keys, causal):
  """Runs body(first query, keys seen) for this program's block of queries.

  Where the number of keys differs, each block has code of its own: shapes are
  static, and what a causal query cannot see is then never computed.
  """
  here, size = pl.program_id(2), query_block(queries)
  if not causal:
    body(here * size, keys)
    return
  for index, limit in enumerate(key_limits(queries, keys, causal)):
    pl.when(here == index)(functools.partial(body, index * size, limit))


def _for_key_blocks(body, limit, start):
  """Folds body(rows of keys, carry) over the blocks of the keys seen.

  A loop, not code for each block: within a block the compiler keeps scores in registers
  where it would store and load them again, and it overlaps products with the rest.
  """
  size = key_block(limit)
  if size == limit:
    return body(pl.ds(0, size), start)

  def step(index, carry):
    return body(pl.ds(pl.multiple_of(index * size, size), size), carry)

  return jax.lax.fori_loop(0, limit // size, step, start)


def _product(left, right, contracted, settings):
  """A matrix product summed in float32, over the given axis of each."""
  dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
  return jax.lax.dot_general(
    left, right, dimensions, preferred_element_type=jnp.float32
  )


def _factor(x, dtype, settings):
  """x as a factor of a product; one that takes float32 rounds by itself."""
  return x.astype(jnp.float32 if settings.widened else dtype)


def _own_lanes(head, settings):
  """[1, lanes]: those of one head of the block."""
  lanes = settings.group * settings.head_dim
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
  return lane // settings.head_dim == head


def _scores(settings, query_segments, key_segments, keys, asked, *, rows, first):
  """[key, query] scores of some keys; those that do not count are HIDDEN_SCORE."""
  scores = _product(keys, asked, (1, 1), settings)
  mask = key_segments[rows, :] == query_segments[...]
  if settings.causal:
    queries = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    place = rows.start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    mask &= place <= queries
  return jnp.where(mask, scores, attention.HIDDEN_SCORE)


def _widened(key, value, wide):
  """Keys and values as products take them, made so once for all blocks of queries."""
  if not wide:
    return key, value

  @pl.when(pl.program_id(2) == 0)
  def widen():
    for narrow, copy in zip((key, value), wide, strict=True):
      copy[...] = narrow[...].astype(jnp.float32)

  return wide


def _first_row(scalars, settings):
  """The number of this program's row and first head, among those of all."""
  row = scalars[1] + pl.program_id(0)
  return row * settings.heads + scalars[2] + pl.program_id(1) * settings.group


def _dropper(scalars, key_bits, row, first, size, settings):
  """A function of rows of keys; it gives what drops as `dropout.dropout` would."""
  rate = settings.dropout_rate
  if not rate:
    return lambda rows: lambda weights: weights
  seed = jax.lax.bitcast_convert_type(scalars[0], jnp.uint32)
  numbers = row * settings.queries + first
  numbers = numbers + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
  row_bits = dropout.row_bits(numbers.astype(jnp.uint32), seed)

  def of_keys(rows):
    bits = dropout.joined_bits(row_bits, key_bits[rows, :])
    kept = bits >= jnp.uint32(dropout.threshold(rate))
    return lambda weights: jnp.where(kept, weights, 0)

  return of_keys


def forward_kernel(
  settings, scalars, query_segments, key_segments, key_bits, query, key, value, out,
  log_sums, scores, mixed, *wide
):  # fmt: skip
  """Mixes values for one block of queries.

  Args:
    settings: constants.
    scalars: int32 [3]: dropout's seed, this part's first row and first head.
    query_segments: [1, queries].
    key_segments: [keys, 1].
    key_bits: [keys, 1], what each key adds to dropout's bits.
    query: [queries, lanes].
    key: [keys, lanes].
    value: [keys, lanes].
    out: [queries, lanes], written.
    log_sums: [heads of the block, queries], written: log of the sum of exp(score);
      UNSEEN where a query sees no key.
    scores: [keys, queries] in float32, for working in.
    mixed: [queries, lanes] in float32, for working in.
    *wide: where products take float32, two arrays [keys, lanes] of it.
  """
  first_row, size = _first_row(scalars, settings), query.shape[0]
  key, value = _widened(key, value, wide)
  score = functools.partial(_scores, settings, query_segments, key_segments)

  def block(first, limit):
    result = jnp.zeros(query.shape, jnp.float32)
    for head in range(settings.group):
      drop = _dropper(scalars, key_bits, first_row + head, first, size, settings)
      own = _own_lanes(head, settings)
      asked = jnp.where(own, _factor(query[...], query.dtype, settings), 0)

      def look(rows, top, asked=asked):
        found = score(key[rows, :], asked, rows=rows, first=first)
        scores[rows, :] = found
        return jnp.maximum(top, jnp.max(found, axis=0, keepdims=True))

      least = jnp.full((1, size), attention.HIDDEN_SCORE, jnp.float32)
      top = _for_key_blocks(look, limit, least)
      mixed[...] = jnp.zeros_like(mixed)

      def mix(rows, total, top=top, drop=drop):
        exps = jnp.exp(scores[rows, :] - top)
        dropped = _factor(drop(rows)(exps), value.dtype, settings)
        mixed[...] += _product(dropped, value[rows, :], (0, 0), settings)
        return total + jnp.sum(exps, axis=0, keepdims=True)

      total = _for_key_blocks(mix, limit, jnp.zeros((1, size), jnp.float32))
      scale = 1 / (total * (1 - settings.dropout_rate))
      log_sum = jnp.where(top > attention.HIDDEN_SCORE, top + jnp.log(total), UNSEEN)
      log_sums[head : head + 1, :] = log_sum
      by_query = jnp.broadcast_to(scale, (query.shape[1], size)).T
      result = jnp.where(own, mixed[...] * by_query, result)
    out[...] = result.astype(out.dtype)

  queries = size * pl.num_programs(2)
  _for_own_block(block, queries, key.shape[0], settings.causal)


def backward_kernel(settings, scalars, query_segments, key_segments, key_bits, *refs):
  """Gradients of one block of queries; after the last, of keys and values.

  Args:
    settings: constants.
    scalars: as in `forward_kernel`, and so the next three.
    query_segments: [1, queries].
    key_segments: [keys, 1].
    key_bits: [keys, 1].
    *refs: query, key, value; gradients of the mixed values [queries, lanes]; log_sums
      as the forward kernel wrote them; the three gradients, written; in float32, for
      working in: sums [keys, lanes] for the last two and [queries, lanes] for the
      first, two arrays [keys, queries], and as in `forward_kernel`.
  """
  query, key, value, by_mixed, log_sums, by_query, by_key, by_value, *work = refs
  key_sums, value_sums, query_sum, weights, by_weights, *wide = work
  key, value = _widened(key, value, wide)
  first_row, size = _first_row(scalars, settings), query.shape[0]
  scale = 1 / (1 - settings.dropout_rate)  # of gradients, not of each weight
  score = functools.partial(_scores, settings, query_segments, key_segments)
  _start_sums(key_sums, value_sums)

  def block(first, limit):
    result = jnp.zeros(query.shape, jnp.float32)
    for head in range(settings.group):
      drop = _dropper(scalars, key_bits, first_row + head, first, size, settings)
      own = _own_lanes(head, settings)
      asked = jnp.where(own, _factor(query[...], query.dtype, settings), 0)
      wanted = jnp.where(own, _factor(by_mixed[...], query.dtype, settings), 0)
      log_sum = log_sums[head : head + 1, :]

      def weigh(rows, inner, asked=asked, wanted=wanted, drop=drop, log_sum=log_sum):
        found = score(key[rows, :], asked, rows=rows, first=first)
        own_weights = jnp.exp(found - log_sum)
        dropped = drop(rows)(own_weights)
        weighted = dropped * _product(value[rows, :], wanted, (1, 1), settings)
        dropped = _factor(dropped, query.dtype, settings)
        value_sums[rows, :] += _product(dropped, wanted, (1, 0), settings)
        weights[rows, :], by_weights[rows, :] = own_weights, weighted
        # From the weights, not from what they mixed, as flash attention usually has
        # it: rounded to bfloat16, that more than doubles the gradients' error.
        return inner + jnp.sum(weighted, axis=0, keepdims=True)

      inner = _for_key_blocks(weigh, limit, jnp.zeros((1, size), jnp.float32))
      query_sum[...] = jnp.zeros_like(query_sum)

      def back(rows, carry, asked=asked, inner=inner):
        exact = by_weights[rows, :] - weights[rows, :] * inner
        by_scores = _factor(exact, query.dtype, settings)
        key_sums[rows, :] += _product(by_scores, asked, (1, 0), settings)
        query_sum[...] += _product(by_scores, key[rows, :], (0, 0), settings)
        return carry

      _for_key_blocks(back, limit, 0)
      result = jnp.where(own, query_sum[...], result)
    by_query[...] = (result * scale).astype(by_query.dtype)

  queries = size * pl.num_programs(2)
  _for_own_block(block, queries, key.shape[0], settings.causal)
  _end_sums((by_key, by_value), (key_sums, value_sums), scale)


def _start_sums(*sums):
  """Sets sums over all blocks of queries to zero before the first."""

  @pl.when(pl.program_id(2) == 0)
  def start():
    for one in sums:
      one[...] = jnp.zeros_like(one)


def _end_sums(outputs, sums, scale):
  """Writes sums over all blocks of queries after the last."""

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def end():
    for out, one in zip(outputs, sums, strict=True):
      out[...] = (one[...] * scale).astype(out.dtype)
