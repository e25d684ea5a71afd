"""The core of attention: queries, keys and values in, mixed values out.

What may attend to what is said by segment ids and one flag, never by a mask
array: every implementation can then build its own mask where it needs one,
block by block. A query of segment s sees the keys of segment s; a key of segment
`PAD_SEGMENT` is padding and is seen by padding only.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

PAD_SEGMENT = 0

# Far below every score, yet finite in every dtype: a row with no visible key
# then gets equal weights instead of NaN.
_HIDDEN_SCORE = -1e9


def visible(
  query_segments: Int[Array, 'b q'] | None,
  key_segments: Int[Array, 'b k'] | None,
  causal: bool,
  query_length: int,
  key_length: int,
  first_query: Int[Array, ''] | int = 0,
) -> Bool[Array, '_ 1 q k'] | None:
  """Which key each query may see, as [batch or 1, 1, query, key].

  Args:
    query_segments: a segment id per query, None where all belong to one.
    key_segments: a segment id per key; None only if query_segments is None.
    causal: whether a query at index i sees keys at indices <= i only.
    query_length: number of queries.
    key_length: number of keys.
    first_query: index of the first query, where these are some of many.

  Returns:
    The mask, or None where everything is visible.
  """
  mask = None
  if query_segments is not None:
    mask = (query_segments[:, :, None] == key_segments[:, None, :])[:, None]
  if causal:
    queries = first_query + jnp.arange(query_length)
    earlier = (queries[:, None] >= jnp.arange(key_length))[None, None]
    mask = earlier if mask is None else mask & earlier
  return mask


def plain_attention(
  query: Float[Array, 'b q h d'],
  key: Float[Array, 'b k h d'],
  value: Float[Array, 'b k h d'],
  query_segments: Int[Array, 'b q'] | None = None,
  key_segments: Int[Array, 'b k'] | None = None,
  *,
  causal: bool = False,
  dropout_rate: float = 0.0,
  dropout_key: jax.Array | None = None,
  first_query: Int[Array, ''] | int = 0,
) -> Float[Array, 'b q h d']:
  """Softmax attention with all scores at once (Vaswani et al. 2017, 3.2.1).

  Queries come scaled already. Scores and softmax are computed in float32 at
  least, the two products in the dtype of their operands.

  Args:
    query: scaled queries.
    key: keys.
    value: values.
    query_segments: see `visible`.
    key_segments: see `visible`.
    causal: see `visible`.
    dropout_rate: dropout on the weights.
    dropout_key: its random key, None for no dropout.
    first_query: see `visible`.

  Returns:
    One mixed value per query and head.
  """
  wide = jnp.promote_types(query.dtype, jnp.float32)
  scores = jnp.einsum('bqhd,bkhd->bhqk', query, key, preferred_element_type=wide)
  mask = visible(
    query_segments, key_segments, causal, query.shape[1], key.shape[1], first_query
  )
  if mask is not None:
    scores = jnp.where(mask, scores, jnp.asarray(_HIDDEN_SCORE, wide))
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  weights = dropout(weights, dropout_rate, dropout_key)
  return jnp.einsum('bhqk,bkhd->bqhd', weights, value)


def chunked_attention(
  query: Float[Array, 'b q h d'],
  key: Float[Array, 'b k h d'],
  value: Float[Array, 'b k h d'],
  query_segments: Int[Array, 'b q'] | None = None,
  key_segments: Int[Array, 'b k'] | None = None,
  *,
  causal: bool = False,
  dropout_rate: float = 0.0,
  dropout_key: jax.Array | None = None,
  chunk_length: int,
) -> Float[Array, 'b q h d']:
  """The same for `chunk_length` queries at a time, in either pass.

  Scores exist for one chunk only: the backward pass computes them again (Rabe and
  Staats 2021, with whole rows of keys, so that every value is `plain_attention`'s).
  Takes its arguments; dropout draws other bits, since each chunk draws its own.
  """
  length = query.shape[1]
  size = min(chunk_length, length)
  count = -(-length // size)

  def split(x):  # [b, q, …] -> [chunks, b, chunk, …]
    padding = [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2)
    parts = jnp.pad(x, padding).reshape(x.shape[0], count, size, *x.shape[2:])
    return jnp.moveaxis(parts, 1, 0)

  @jax.checkpoint
  def attend(index, query, segments):
    chunk_key = None
    if dropout_key is not None:
      chunk_key = jax.random.fold_in(dropout_key, index)
    return plain_attention(
        query, key, value, segments, key_segments, causal=causal,
        dropout_rate=dropout_rate, dropout_key=chunk_key, first_query=index * size,
    )  # fmt: skip

  chunks = jnp.arange(count), split(query), jax.tree.map(split, query_segments)
  mixed = jax.lax.map(lambda chunk: attend(*chunk), chunks)
  mixed = jnp.moveaxis(mixed, 0, 1)
  return mixed.reshape(mixed.shape[0], count * size, *mixed.shape[3:])[:, :length]


# ---- dropout -----------------------------------------------------------------


def _mixed(bits: UInt32[Array, '...']) -> UInt32[Array, '...']:
  """A bijection of 32 bits in which every input bit moves every output bit.

  Two multiplications and three shifts (the constants are those of C. Wellons'
  `hash-prospector`, bias 0.107). JAX's threefry takes some 50 operations for
  the same 32 bits, which made dropout a sixth of a training step on a CPU.
  """
  bits = (bits ^ (bits >> 16)) * jnp.uint32(0x21F0AAAD)
  bits = (bits ^ (bits >> 15)) * jnp.uint32(0x735A2D97)
  return bits ^ (bits >> 15)


def dropout_bits(key: jax.Array, shape: tuple[int, ...]) -> UInt32[Array, '...']:
  """Random bits for dropout, a function of the key and of each one's index.

  Every element depends on its own index alone, so the compiler fuses this into
  the multiplication that uses it, and a sharded array gets the same bits as a
  whole one. Good enough for dropout; not a generator for anything else.

  Args:
    key: a JAX random key of any kind.
    shape: the shape wanted.

  Returns:
    uint32 of that shape.
  """
  row_seed, column_seed = jax.random.bits(key, (2,), jnp.uint32)
  row = jnp.zeros(shape[:-1] + (1,), jnp.uint32)
  for axis, size in enumerate(shape[:-1]):
    row = row * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, row.shape, axis)
  column_shape = (1,) * (len(shape) - 1) + shape[-1:]
  column = jax.lax.broadcasted_iota(jnp.uint32, column_shape, len(shape) - 1)
  # Mixed apart and joined by xor: two rows then never share a shifted run of
  # bits, as they would if columns were steps along one sequence.
  return _mixed(_mixed(_mixed(row ^ row_seed)) ^ _mixed(column ^ column_seed))


def dropout(
  x: Float[Array, '...'], rate: float, key: jax.Array | None
) -> Float[Array, '...']:
  """Sets each element to zero with probability `rate`, scaling up the rest.

  Args:
    x: values; every element is drawn on its own, nothing is broadcast.
    rate: probability of zero, in [0, 1).
    key: a random key, or None to leave x as it is.

  Returns:
    An array like x with the same expectation.
  """
  if key is None or rate == 0:
    return x
  threshold = min(round(rate * 2**32), 2**32 - 1)
  keep = dropout_bits(key, x.shape) >= jnp.uint32(threshold)
  return jnp.where(keep, x * jnp.asarray(1 / (1 - rate), x.dtype), 0)
