"""The parts of BART: projections, norm, embeddings, attention, feed-forward.

Every parameter is float32 and bears logical axis names; activations are in the
module's `dtype`, softmax and layer norm in float32 at least. All parameters start
from N(0, 0.02) or a constant, as BART's do.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from bart_t5x import attention, dropout

Initializer = Callable[..., jax.Array]

# Row r of a position table is position r - 2: fairseq reserved the first rows
# for padding, and every BART checkpoint carries them.
POSITION_OFFSET = 2

LAYER_NORM_EPSILON = 1e-5

# What attention mixes, by the name that recomputation knows it by.
ATTENDED = 'attended'

constrain = partitioning.with_sharding_constraint


def constrain_hidden(x: Float[Array, 'b l d']) -> Float[Array, 'b l d']:
  """Says how hidden states lie on the devices."""
  return constrain(x, ('batch', 'length', 'embed'))


def gelu(x: Float[Array, '...']) -> Float[Array, '...']:
  """The exact GELU, x * Phi(x).

  By `erf`: `jax.nn.gelu(approximate=False)` goes through `erfc`, which costs
  several times as much for digits that BART never sees.
  """
  return 0.5 * x * (1 + jax.lax.erf(x * jnp.asarray(math.sqrt(0.5), x.dtype)))


class Linear(nn.Module):
  """y = x W + b over the last axis.

  Attributes:
    features: size of the output.
    axes: logical names of the kernel's two axes.
    dtype: dtype of the computation.
    kernel_init: initializer of the kernel; the bias starts at 0.
  """

  features: int
  axes: tuple[str, str]
  dtype: Any
  kernel_init: Initializer

  @nn.compact
  def __call__(self, x: Float[Array, 'b l i']) -> Float[Array, 'b l o']:
    kernel = partitioning.param_with_axes(
      'kernel',
      self.kernel_init,
      (x.shape[-1], self.features),
      jnp.float32,
      axes=self.axes,
    )
    bias = partitioning.param_with_axes(
      'bias',
      nn.initializers.zeros_init(),
      (self.features,),
      jnp.float32,
      axes=self.axes[1:],
    )
    return jnp.dot(x, kernel.astype(self.dtype)) + bias.astype(self.dtype)


class LayerNorm(nn.Module):
  """Layer normalisation with scale and bias (Ba et al. 2016), epsilon 1e-5.

  Attributes:
    dtype: dtype of the result; mean and variance are float32 at least.
  """

  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, 'b l d']) -> Float[Array, 'b l d']:
    declare = functools.partial(partitioning.param_with_axes, axes=('embed',))
    shape = x.shape[-1:]
    scale = declare('scale', nn.initializers.ones_init(), shape, jnp.float32)
    bias = declare('bias', nn.initializers.zeros_init(), shape, jnp.float32)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
    return (normed * scale + bias).astype(self.dtype)


class TokenEmbedder(nn.Module):
  """The token table; transposed, it also gives the logits (see `loss`).

  Attributes:
    rows: number of rows, padding of the vocabulary included.
    features: size of an embedding.
    dtype: dtype of the embeddings returned.
    embedding_init: initializer of the table.
  """

  rows: int
  features: int
  dtype: Any
  embedding_init: Initializer

  def setup(self):
    self.embedding = partitioning.param_with_axes(
      'embedding',
      self.embedding_init,
      (self.rows, self.features),
      jnp.float32,
      axes=('vocab', 'embed'),
      module=self,
    )

  def __call__(self, ids: Int[Array, 'b l']) -> Float[Array, 'b l d']:
    """Embeds ids; an id outside the table gives NaN, never another row."""
    return jnp.take(self.embedding.astype(self.dtype), ids, axis=0)


def per_row(index: Int[Array, '...'], rows: int) -> Int[Array, ' rows']:
  """One index a row from an index of one for all, a row, or a group of rows.

  A decoder counts steps in one scalar; after a prompt in one number a row; and
  where rows were expanded into beams (copies side by side), in one number for
  each group of copies or in an array [batch, beams].
  """
  flat = index.reshape(-1)
  return jnp.repeat(flat, rows // flat.size, total_repeat_length=rows)


class PositionEmbedder(nn.Module):
  """Learned positions, row = position + 2.

  Attributes:
    max_positions: how many positions there are; the table has two rows more.
    features: size of an embedding.
    dtype: dtype of the embeddings returned.
    embedding_init: initializer of the table.
    decode: whether to count steps in the cache (`position_embedder_index`).
  """

  max_positions: int
  features: int
  dtype: Any
  embedding_init: Initializer
  decode: bool = False

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, 'b l'],
    positions: Int[Array, 'b l'] | None = None,
  ) -> Float[Array, 'b_or_1 l d']:
    """Embeds positions, 0, 1, 2 … where none are given.

    Args:
      tokens: the ids the positions belong to; only their shape counts.
      positions: positions within each packed example, or None.

    Returns:
      Embeddings [batch, length, d], or [1, length, d] for plain counting.

    Raises:
      ValueError: for rows longer than the table.
    """
    batch, length = tokens.shape
    if length > self.max_positions:
      raise ValueError(
        f'A row of {length} tokens needs as many positions, and the model has '
        f'{self.max_positions}: shorten the rows (TASK_FEATURE_LENGTHS) or '
        'raise BartConfig.max_positions.'
      )
    table = partitioning.param_with_axes(
      'embedding',
      self.embedding_init,
      (self.max_positions + POSITION_OFFSET, self.features),
      jnp.float32,
      axes=('abspos_buckets', 'embed'),
    ).astype(self.dtype)
    if self.decode:
      stepping = self.has_variable('cache', 'position_embedder_index')
      index = self.variable(
        'cache', 'position_embedder_index', jnp.zeros, (), jnp.int32
      )
      if stepping:
        positions = per_row(index.value, batch)[:, None]
        index.value = index.value + 1
    if positions is None:
      return table[None, POSITION_OFFSET : POSITION_OFFSET + length]
    return jnp.take(table, positions + POSITION_OFFSET, axis=0)


class Attention(nn.Module):
  """Multi-head attention with biases and, for decoding, a cache.

  Attributes:
    num_heads: number of heads; divides the width.
    dtype: dtype of the computation.
    dropout_rate: dropout on the attention weights.
    kernel_init: initializer of the four kernels.
    core: the function that attends, see `attention.plain_attention`.
    causal: whether queries see earlier keys only.
    deterministic: whether dropout is off.
    decode: keep keys and values in the cache: the first call makes room for as
      many as it is given, each later call takes one position.
    prefill: fill the cache, made before, with a whole prompt at once.
  """

  num_heads: int
  dtype: Any
  dropout_rate: float
  kernel_init: Initializer
  core: Callable[..., jax.Array] = attention.plain_attention
  causal: bool = False
  deterministic: bool = True
  decode: bool = False
  prefill: bool = False

  @nn.compact
  def __call__(
    self,
    query_input: Float[Array, 'b q d'],
    key_input: Float[Array, 'b k d'],
    query_segments: Int[Array, 'b q'] | None = None,
    key_segments: Int[Array, 'b k'] | None = None,
    prefill_lengths: Int[Array, ' b'] | None = None,
  ) -> Float[Array, 'b q d']:
    """Lets every query position gather from the key positions it may see.

    Args:
      query_input: what asks.
      key_input: what is asked; the same array in self-attention.
      query_segments: see `attention.visible`.
      key_segments: see `attention.visible`.
      prefill_lengths: tokens in each row's prompt, with `prefill` only.

    Returns:
      An array like query_input.
    """
    width = query_input.shape[-1]
    head_dim = width // self.num_heads

    def heads(x, name):  # [b, l, d] -> [b, l, h, d / h]
      projected = Linear(
        width, ('embed', 'joined_kv'), self.dtype, self.kernel_init, name=name
      )(x)
      split = projected.reshape(*x.shape[:2], self.num_heads, head_dim)
      return constrain(split, ('batch', 'length', 'heads', 'kv'))

    # Three products: one of joined kernels takes 3 % longer by XLA's estimate for a
    # v3 (batch 32 x 1024, width 768) and twice the memory, for the parts to be cut.
    query = heads(query_input, 'query')
    query = query * jnp.asarray(head_dim**-0.5, self.dtype)
    key = heads(key_input, 'key')
    value = heads(key_input, 'value')
    causal = self.causal
    if self.prefill:
      self._fill_cache(key, value, prefill_lengths)
    elif self.decode:
      stepping = self.has_variable('cache', 'cached_key')
      key, value, seen = self._step_cache(key, value)
      if stepping:
        causal = False
        query_segments, key_segments = jnp.ones(query.shape[:2], jnp.int32), seen
    dropout_key = None
    if not self.deterministic and self.dropout_rate > 0:
      dropout_key = self.make_rng('dropout')
    mixed = self.core(
        query, key, value, query_segments, key_segments, causal=causal,
        dropout_rate=self.dropout_rate, dropout_key=dropout_key,
    )  # fmt: skip
    mixed = constrain(mixed, ('batch', 'length', 'heads', 'kv'))
    mixed = checkpoint_name(mixed, ATTENDED)
    return Linear(
      width, ('joined_kv', 'embed'), self.dtype, self.kernel_init, name='out'
    )(mixed.reshape(*query.shape[:2], width))

  def _cache(self, key, value):
    """The cache variables; made with room for the positions given."""
    return (
      self.variable('cache', 'cached_key', jnp.zeros_like, key),
      self.variable('cache', 'cached_value', jnp.zeros_like, value),
      self.variable('cache', 'cache_index', jnp.zeros, (), jnp.int32),
    )

  def _fill_cache(self, key, value, lengths):
    """Stores a prompt; what lies beyond its end is overwritten step by step."""
    if not self.has_variable('cache', 'cached_key'):
      raise ValueError(
        'Prefilling needs a cache: call the model once with decode=True and '
        "mutable=['cache'] first, and pass that cache in."
      )
    cached_key, cached_value, index = self._cache(key, value)
    if cached_key.value.shape != key.shape:
      raise ValueError(
        f'The cache has room for keys {cached_key.value.shape}, the prompt '
        f'gives {key.shape}: batch and length must be those the cache was '
        'made with.'
      )
    cached_key.value, cached_value.value = key, value
    index.value = lengths

  def _step_cache(self, key, value):
    """Adds one position; returns all of them and which are filled (1 or 0)."""
    stepping = self.has_variable('cache', 'cached_key')
    cached_key, cached_value, index = self._cache(key, value)
    if not stepping:
      return key, value, None
    batch, length = cached_key.value.shape[:2]
    if key.shape[:2] != (batch, 1):
      raise ValueError(
        'Cached decoding takes one position of every row at a time, '
        f'[{batch}, 1]. Got: {list(key.shape[:2])}'
      )
    here = per_row(index.value, batch)[:, None]
    slot = jnp.arange(length)[None]
    write = (slot == here)[:, :, None, None]
    cached_key.value = jnp.where(write, key, cached_key.value)
    cached_value.value = jnp.where(write, value, cached_value.value)
    index.value = index.value + 1
    seen = (slot <= here).astype(jnp.int32)
    return cached_key.value, cached_value.value, seen


class FeedForward(nn.Module):
  """Linear, exact GELU, dropout, linear.

  Attributes:
    hidden: size between the two projections.
    dtype: dtype of the computation.
    dropout_rate: dropout after the GELU.
    kernel_init: initializer of both kernels.
    deterministic: whether dropout is off.
  """

  hidden: int
  dtype: Any
  dropout_rate: float
  kernel_init: Initializer
  deterministic: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, 'b l d']) -> Float[Array, 'b l d']:
    make = functools.partial(Linear, dtype=self.dtype, kernel_init=self.kernel_init)
    hidden = gelu(make(self.hidden, ('embed', 'mlp'), name='wi')(x))
    if not self.deterministic:
      hidden = dropout.dropout(hidden, self.dropout_rate, self.make_rng('dropout'))
    hidden = constrain(hidden, ('batch', 'length', 'mlp'))
    return make(x.shape[-1], ('mlp', 'embed'), name='wo')(hidden)
