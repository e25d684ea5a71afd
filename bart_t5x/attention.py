"""The core of attention: queries, keys and values in, mixed values out.

What may attend to what is said by segment ids and one flag, never by a mask
array: every implementation can then build its own mask where it needs one,
block by block. A query of segment s sees the keys of segment s; a key of segment
`PAD_SEGMENT` is padding and is seen by padding only.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bart_t5x import dropout

PAD_SEGMENT = 0

# Far below every score, yet finite in every dtype: a row with no visible key
# then gets equal weights instead of NaN.
HIDDEN_SCORE = -1e9


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
  value: Float[Array, 'b k h e'],
  query_segments: Int[Array, 'b q'] | None = None,
  key_segments: Int[Array, 'b k'] | None = None,
  *,
  causal: bool = False,
  dropout_rate: float = 0.0,
  dropout_key: jax.Array | None = None,
  first_query: Int[Array, ''] | int = 0,
) -> Float[Array, 'b q h e']:
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
    scores = jnp.where(mask, scores, jnp.asarray(HIDDEN_SCORE, wide))
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  weights = dropout.dropout(weights, dropout_rate, dropout_key)
  return jnp.einsum('bhqk,bkhd->bqhd', weights, value)


def chunked_attention(
  query: Float[Array, 'b q h d'],
  key: Float[Array, 'b k h d'],
  value: Float[Array, 'b k h e'],
  query_segments: Int[Array, 'b q'] | None = None,
  key_segments: Int[Array, 'b k'] | None = None,
  *,
  causal: bool = False,
  dropout_rate: float = 0.0,
  dropout_key: jax.Array | None = None,
  chunk_length: int,
) -> Float[Array, 'b q h e']:
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
