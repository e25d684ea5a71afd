"""The two TPU kernels of `flash`: what one program computes.

A program has one block of queries of one row, the whole row's keys and values, and
the heads that lie side by side in its lanes. Other heads' lanes are set to zero in
one factor of a product, which costs nothing: a product takes 128 lanes anyway.

Scores lie as [key, query]: sums over keys then run down the sublanes, and what each
query has one of is a dense row.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from bart_t5x import attention, dropout

LANES = 128

# Queries of one program: [1024, 256] scores in float32 are 1 MB of the 16 MB that a
# core of a v3 works in, and the backward kernel holds about six such arrays.
QUERY_BLOCK = 256


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


def _product(left, right, contracted, settings):
  """A matrix product summed in float32, over the given axis of each."""
  if settings.widened:
    left, right = left.astype(jnp.float32), right.astype(jnp.float32)
  dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
  return jax.lax.dot_general(
    left, right, dimensions, preferred_element_type=jnp.float32
  )


def _own_lanes(head, settings):
  """[1, lanes]: those of one head of the block."""
  lanes = settings.group * settings.head_dim
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
  return lane // settings.head_dim == head


def _visible(query_segments, key_segments, first, limit, causal):
  """[key, query]: which scores count."""
  mask = key_segments[:limit, :] == query_segments[...]
  if causal:
    queries = first + jax.lax.broadcasted_iota(jnp.int32, mask.shape, 1)
    mask &= jax.lax.broadcasted_iota(jnp.int32, mask.shape, 0) <= queries
  return mask


def _weights(key, query, mask, settings):
  """[key, query] weights of one head, and [1, query]: whether any key is visible."""
  hidden = attention.HIDDEN_SCORE
  scores = jnp.where(mask, _product(key, query, (1, 1), settings), hidden)
  top = jnp.max(scores, axis=0, keepdims=True)
  exps = jnp.exp(scores - top)
  return exps * (1 / jnp.sum(exps, axis=0, keepdims=True)), top > hidden


def _first_row(scalars, settings):
  """The number of this program's row and first head, among those of all."""
  row = scalars[1] + pl.program_id(0)
  return row * settings.heads + scalars[2] + pl.program_id(1) * settings.group


def _dropper(scalars, key_bits, row, first, shape, settings):
  """A function that drops weights [key, query] as `dropout.dropout` would."""
  rate = settings.dropout_rate
  if not rate:
    return lambda weights: weights
  seed = jax.lax.bitcast_convert_type(scalars[0], jnp.uint32)
  rows = row * settings.queries + first
  rows = rows + jax.lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
  row_bits = dropout.row_bits(rows.astype(jnp.uint32), seed)
  bits = dropout.joined_bits(row_bits, key_bits[: shape[0], :])
  kept = bits >= jnp.uint32(dropout.threshold(rate))
  return lambda weights: jnp.where(kept, weights * (1 / (1 - rate)), 0)


def forward_kernel(
  settings, scalars, query_segments, key_segments, key_bits, query, key, value, out
):
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
  """
  first_row = _first_row(scalars, settings)

  def block(first, limit):
    mask = _visible(query_segments, key_segments, first, limit, settings.causal)
    mixed = jnp.zeros(query.shape, jnp.float32)
    for head in range(settings.group):
      drop = _dropper(scalars, key_bits, first_row + head, first, mask.shape, settings)
      own = _own_lanes(head, settings)
      asked = jnp.where(own, query[...], 0)
      weights, _ = _weights(key[:limit, :], asked, mask, settings)
      weights = drop(weights).astype(value.dtype)
      head_mixed = _product(weights, value[:limit, :], (0, 0), settings)
      mixed = jnp.where(own, head_mixed, mixed)
    out[...] = mixed.astype(out.dtype)

  queries = query.shape[0] * pl.num_programs(2)
  _for_own_block(block, queries, key.shape[0], settings.causal)


def backward_kernel(settings, scalars, query_segments, key_segments, key_bits, *refs):
  """Gradients of one block of queries; after the last, of keys and values.

  Args:
    settings: constants.
    scalars: as in `forward_kernel`, and so the next three.
    query_segments: [1, queries].
    key_segments: [keys, 1].
    key_bits: [keys, 1].
    *refs: query, key, value; gradients of the mixed values [queries, lanes]; the
      three gradients, written; sums [keys, lanes] in float32 for the last two.
  """
  query, key, value, by_mixed, by_query, by_key, by_value, *sums = refs
  key_sums, value_sums = sums
  first_row = _first_row(scalars, settings)

  @pl.when(pl.program_id(2) == 0)
  def start():
    key_sums[...] = jnp.zeros_like(key_sums)
    value_sums[...] = jnp.zeros_like(value_sums)

  def block(first, limit):
    mask = _visible(query_segments, key_segments, first, limit, settings.causal)
    query_sum = jnp.zeros(query.shape, jnp.float32)
    for head in range(settings.group):
      drop = _dropper(scalars, key_bits, first_row + head, first, mask.shape, settings)
      own = _own_lanes(head, settings)
      asked = jnp.where(own, query[...], 0)
      wanted = jnp.where(own, by_mixed[...], 0)
      weights, any_seen = _weights(key[:limit, :], asked, mask, settings)
      by_weights = drop(_product(value[:limit, :], wanted, (1, 1), settings))
      dropped = drop(weights).astype(query.dtype)
      value_sums[:limit, :] += _product(dropped, wanted, (1, 0), settings)
      # From the weights, not from what they mixed, as flash attention usually has
      # it: rounded to bfloat16, that more than doubles the gradients' error.
      inner = jnp.sum(weights * by_weights, axis=0, keepdims=True)
      by_scores = jnp.where(any_seen, weights, 0) * (by_weights - inner)
      by_scores = by_scores.astype(query.dtype)
      key_sums[:limit, :] += _product(by_scores, asked, (1, 0), settings)
      by_asked = _product(by_scores, key[:limit, :], (0, 0), settings)
      query_sum = jnp.where(own, by_asked, query_sum)
    by_query[...] = query_sum.astype(by_query.dtype)

  queries = query.shape[0] * pl.num_programs(2)
  _for_own_block(block, queries, key.shape[0], settings.causal)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def end():
    by_key[...] = key_sums[...].astype(by_key.dtype)
    by_value[...] = value_sums[...].astype(by_value.dtype)
