"""Dot-product attention in four implementations, and the choice between them.

Masks are given by segment ids and a causal flag, never as an array, so that each
implementation can build its mask block by block. A query sees the keys of its own
segment; keys of segment `PAD_SEGMENT` are padding and seen by padding only.

All implementations compute what `plain_attention` does and take its arguments.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bart_t5x import dropout, flash

PAD_SEGMENT = 0


def visible(
  query_segments: Int[Array, 'b q'] | None,
  key_segments: Int[Array, 'b k'] | None,
  causal: bool,
  query_length: int,
  key_length: int,
  first_query: Int[Array, ''] | int = 0,
) -> Bool[Array, '_ 1 q k'] | None:
  """Returns the mask, [batch or 1, 1, query, key]; None if all keys are visible.

  Segment ids are both None without packing and padding. Causal queries see keys up to
  their own index; `first_query` is the index of the first query.
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

  Queries must already be scaled. Scores and softmax are computed in float32 or wider,
  the two products in the dtype of their operands. Dropout acts on the weights if there
  is a `dropout_key`. See `visible` for the other arguments.
  """
  wide = jnp.promote_types(query.dtype, jnp.float32)
  scores = jnp.einsum('bqhd,bkhd->bhqk', query, key, preferred_element_type=wide)
  mask = visible(
    query_segments, key_segments, causal, query.shape[1], key.shape[1], first_query
  )
  if mask is not None:
    scores = jnp.where(mask, scores, jnp.asarray(flash.HIDDEN_SCORE, wide))
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  weights = dropout.dropout(weights, dropout_rate, dropout_key)
  return jnp.einsum('bhqk,bkhd->bqhd', weights, value)


def heads_first(x: Float[Array, 'b k h d']) -> Float[Array, 'b h k d']:
  """Transposes keys or values to the layout of `step_attention`."""
  # In a loop XLA moves a transposition of constants out of it only behind a barrier.
  return jax.lax.optimization_barrier(x.swapaxes(1, 2))


def step_attention(
  query: Float[Array, 'b q h d'],
  key: Float[Array, 'b h k d'],
  value: Float[Array, 'b h k d'],
  seen: Bool[Array, 'b k'],
) -> Float[Array, 'b q h d']:
  """`plain_attention` for steps of decoding: its products read keys as they are stored.

  All queries of a row see the same keys.
  """
  wide = jnp.promote_types(query.dtype, jnp.float32)
  scores = jnp.einsum('bqhd,bhkd->bhqk', query, key, preferred_element_type=wide)
  scores = jnp.where(seen[:, None, None], scores, flash.HIDDEN_SCORE)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  return jnp.einsum('bhqk,bhkd->bhqd', weights, value).swapaxes(1, 2)


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
  """`plain_attention` of `chunk_length` queries at a time, in both passes.

  Only one chunk's scores exist at a time: the backward pass recomputes them (Rabe and
  Staats 2021, but with whole rows of keys). Dropout bits differ from
  `plain_attention`'s, since each chunk has its own key.
  """
  length = query.shape[1]
  size = min(chunk_length, length)
  count = -(-length // size)

  def split(x):  # [b, q, …] -> [chunks, b, chunk, …]
    padding = [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2)
    parts = jnp.pad(x, padding).reshape(x.shape[0], count, size, *x.shape[2:])
    return jnp.moveaxis(parts, 1, 0)

  @jax.checkpoint
  def attend_chunk(index, query, segments):
    chunk_key = None
    if dropout_key is not None:
      chunk_key = jax.random.fold_in(dropout_key, index)
    return plain_attention(
        query, key, value, segments, key_segments, causal=causal,
        dropout_rate=dropout_rate, dropout_key=chunk_key, first_query=index * size,
    )  # fmt: skip

  chunks = jnp.arange(count), split(query), jax.tree.map(split, query_segments)
  attended = jax.lax.map(lambda chunk: attend_chunk(*chunk), chunks)
  attended = jnp.moveaxis(attended, 0, 1)
  return attended.reshape(attended.shape[0], count * size, *attended.shape[3:])[
    :, :length
  ]


def cudnn_attention(
  query: Float[Array, 'b q h d'],
  key: Float[Array, 'b k h d'],
  value: Float[Array, 'b k h d'],
  query_segments: Int[Array, 'b q'] | None = None,
  key_segments: Int[Array, 'b k'] | None = None,
  *,
  causal: bool = False,
  dropout_rate: float = 0.0,
  dropout_key: jax.Array | None = None,
  implementation: str = 'cudnn',
) -> Float[Array, 'b q h d']:
  """`plain_attention` by cuDNN's fused kernel, without dropout.

  The output of a query that sees no key is unspecified.

  Raises:
    ValueError: there is no such GPU, the dtype does not have 16 bits, or dropout.
  """
  if dropout_key is not None and dropout_rate > 0:
    raise ValueError(f"'cudnn' has no dropout on weights. Got: {dropout_rate}")
  device = flash.device()
  if implementation == 'cudnn' and not _has_cudnn(device, query.dtype):
    raise ValueError(
      "BartConfig.attention_impl = 'cudnn' needs an NVIDIA GPU of compute capability "
      "8.0 or later (Ampere) and BartConfig.dtype = 'bfloat16' or 'float16'. Got: "
      f'{device.kind} and {query.dtype}. '
      "Use 'auto', or 'plain' or 'chunked', which run everywhere."
    )
  mask = visible(query_segments, key_segments, False, query.shape[1], key.shape[1])
  return jax.nn.dot_product_attention(
      query, key, value, mask=mask, scale=1.0, is_causal=causal,
      implementation=implementation,
  )  # fmt: skip


def _has_cudnn(device, dtype):
  # cuDNN's fused attention runs on Ampere and later
  # (https://docs.nvidia.com/deeplearning/cudnn, "Scaled Dot Product Attention").
  recent = device.platform == 'gpu' and (device.capability or (0, 0)) >= (8, 0)
  return recent and dtype.itemsize == 2


def automatic(
  query: Float[Array, 'b q h d'], key: Float[Array, 'b k h d'], dropout_rate: float
) -> str:
  """Returns the implementation that 'auto' selects on the current platform.

  1. TPU: 'flash', or 'chunked' for shapes that the kernel does not support.
  2. NVIDIA GPU, Ampere or later: 'cudnn' in 16 bits without dropout, for shapes that
     JAX passes to cuDNN with a mask and gradients.
  3. Otherwise 'plain'.
  """
  (_, queries, _, head_dim), keys = query.shape, key.shape[1]
  device = flash.device()
  if device.platform == 'tpu':
    return 'chunked' if flash.unsupported(head_dim, max(queries, keys)) else 'flash'
  fits = head_dim % 8 == 0 and head_dim <= 128 and queries % 2 == keys % 2 == 0
  if _has_cudnn(device, query.dtype) and fits and not dropout_rate:
    return 'cudnn'
  return 'plain'


def attend(
  implementation: str,
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
  recompute: bool = False,
) -> Float[Array, 'b q h d']:
  """Runs the implementation that `BartConfig.attention_impl` names.

  With `recompute`, 'plain' stores only its arguments for the backward pass.
  """
  if query.shape[1] == 1:  # A step of cached decoding.
    implementation = 'plain'
  elif implementation == 'auto':
    implementation = automatic(query, key, dropout_rate)
  run = {
    'plain': plain_attention,
    'chunked': functools.partial(chunked_attention, chunk_length=chunk_length),
    'flash': flash.flash_attention,
    'cudnn': cudnn_attention,
  }[implementation]

  def call(dropout_key, *arrays):
    return run(
      *arrays, causal=causal, dropout_rate=dropout_rate, dropout_key=dropout_key
    )

  if implementation == 'plain' and recompute:
    call = jax.checkpoint(call)
  return call(dropout_key, query, key, value, query_segments, key_segments)
