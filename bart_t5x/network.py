"""BART (Lewis et al. 2019) as a Flax module with T5X's encoder-decoder contract.

Token ids here are the internal ones: padding 0, `<s>` 1, `</s>` 2. The model is Hugging
Face's `BartForConditionalGeneration`: learned positions, a layer norm after the
embeddings and after every sublayer, biases everywhere, exact GELU, tied embeddings
with a constant bias on the logits.

Parameters are float32 with logical axis names; activations have `BartConfig.dtype`,
softmax and layer norm run in float32 at least.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Num, PyTree

from bart_t5x import attention, dropout, flash, loss

PAD_ID = 0
DECODER_START_ID = 2  # </s>, which also ends a sequence

# Row r of a position table is position r - 2: fairseq reserved the first rows for
# padding, and every BART checkpoint has them.
POSITION_OFFSET = 2

LAYER_NORM_EPSILON = 1e-5

# Checkpoint name of the attention output, for the policy 'dots'.
ATTENDED = 'attended'

_ATTENTION_IMPLS = ('auto', 'plain', 'chunked', 'flash', 'cudnn')
_REMAT_POLICIES = ('none', 'attention', 'dots', 'full')


def _float_dtype(dtype: Any) -> jnp.dtype:
  try:
    found = jnp.dtype(dtype)
  except TypeError:
    found = None
  if found is None or not jnp.issubdtype(found, jnp.floating):
    raise ValueError(
      'BartConfig.dtype (COMPUTE_DTYPE) must be a floating-point type, such as '
      f"'float32' or 'bfloat16'. Got: {dtype!r}"
    )
  return found


@dataclasses.dataclass(frozen=True)
class BartConfig:
  """Hyperparameters of the model; the defaults are those of bart-base.

  `remat_policy` is what the backward pass recomputes: 'none'; 'attention', scores and
  weights (which only 'plain' stores); 'dots', everything but projections and attention
  outputs; 'full', whole layers.

  `attention_impl` is one of 'plain', all scores at once; 'chunked', scores of
  `attention_chunk_length` queries at a time, with less memory and more time; 'flash',
  our TPU kernel, which never stores scores and drops the same weights as 'plain';
  'cudnn', in 16 bits and without dropout on attention weights; and 'auto', the fastest
  that changes nothing on the platform.

  Raises:
    ValueError: for values that do not make a model.
  """

  vocab_size: int  # Without the rows that pad the token table.
  emb_dim: int = 768
  num_heads: int = 12
  num_encoder_layers: int = 6
  num_decoder_layers: int = 6
  mlp_dim: int = 3072
  max_positions: int = 1024
  dropout_rate: float = 0.1  # After the embeddings and every sublayer.
  attention_dropout_rate: float = 0.1  # On attention weights.
  activation_dropout_rate: float = 0.1  # Inside the feed-forward block.
  dtype: Any = jnp.float32  # Of the computation.
  init_std: float = 0.02
  # The token table is padded to a multiple of it, to divide over devices and lanes.
  vocab_multiple_of: int = 128
  # Loops over stacked parameters: compiles faster, runs slower. `bart_t5x.restack`
  # converts checkpoints.
  scan_layers: bool = False
  remat_policy: str = 'none'
  attention_impl: str = 'auto'
  attention_chunk_length: int = 256

  def __post_init__(self):
    object.__setattr__(self, 'dtype', _float_dtype(self.dtype))
    counts = (
        'vocab_size', 'emb_dim', 'num_heads', 'num_encoder_layers',
        'num_decoder_layers', 'mlp_dim', 'max_positions', 'vocab_multiple_of',
        'attention_chunk_length',
    )  # fmt: skip
    for name in counts:
      if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
        raise ValueError(
          f'BartConfig.{name} must be a positive integer. Got: {getattr(self, name)!r}'
        )
    for name in ('dropout_rate', 'attention_dropout_rate', 'activation_dropout_rate'):
      rate = getattr(self, name)
      if isinstance(rate, str) or not 0 <= rate < 1:
        raise ValueError(
          f'BartConfig.{name} must be a number, at least 0 and below 1. Got: {rate!r}'
        )
    if self.emb_dim % self.num_heads:
      raise ValueError(
        'BartConfig.num_heads must divide emb_dim. '
        f'Got: {self.num_heads} / {self.emb_dim}'
      )
    for name, choices in (
      ('remat_policy', _REMAT_POLICIES),
      ('attention_impl', _ATTENTION_IMPLS),
    ):
      if getattr(self, name) not in choices:
        raise ValueError(
          f'BartConfig.{name} must be one of {", ".join(choices)}. '
          f'Got: {getattr(self, name)!r}'
        )
    if self.attention_impl == 'cudnn' and self.attention_dropout_rate:
      raise ValueError(
        "BartConfig.attention_impl = 'cudnn' has no dropout on attention weights, so "
        'it needs attention_dropout_rate = 0 (which changes the recipe). '
        f'Got: {self.attention_dropout_rate}'
      )

  @property
  def head_dim(self) -> int:
    """Width of an attention head."""
    return self.emb_dim // self.num_heads

  @property
  def padded_vocab_size(self) -> int:
    """Rows of the token table."""
    return -(-self.vocab_size // self.vocab_multiple_of) * self.vocab_multiple_of

  @property
  def kernel_init(self) -> nn.initializers.Initializer:
    """BART draws every kernel and table from one normal distribution."""
    return nn.initializers.normal(self.init_std)


@dataclasses.dataclass(frozen=True)
class Mode:
  """How a call runs; static, so that each mode compiles to its own program."""

  deterministic: bool = True  # Without dropout.
  decode: bool = False  # With the cache, one position at a time.
  prefill: bool = False  # Fills the cache with a prompt.


class Rows(NamedTuple):
  """Token ids; for packed rows also the segment and position of each token."""

  tokens: Int[Array, 'b l']
  segments: Int[Array, 'b l'] | None = None
  positions: Int[Array, 'b l'] | None = None


# ---- layers --------------------------------------------------------------------


def _parameter(name, init, shape, axes, module=None):
  return partitioning.param_with_axes(
    name, init, shape, jnp.float32, axes=axes, module=module
  )


def constrain_hidden(x: Float[Array, 'b l d']) -> Float[Array, 'b l d']:
  """Annotates hidden states with their logical axes."""
  return partitioning.with_sharding_constraint(x, ('batch', 'length', 'embed'))


def gelu(x: Float[Array, '...']) -> Float[Array, '...']:
  """The exact GELU, x * Phi(x).

  By `erf`: `jax.nn.gelu(approximate=False)` goes through `erfc`, which costs several
  times as much for digits that BART never sees.
  """
  return 0.5 * x * (1 + jax.lax.erf(x * jnp.asarray(math.sqrt(0.5), x.dtype)))


class Linear(nn.Module):
  """y = x W + b over the last axis; `axes` are the kernel's logical axis names."""

  features: int
  axes: tuple[str, str]
  config: BartConfig

  @nn.compact
  def __call__(self, x: Float[Array, 'b l i']) -> Float[Array, 'b l o']:
    shape, dtype = (x.shape[-1], self.features), self.config.dtype
    kernel = _parameter('kernel', self.config.kernel_init, shape, self.axes)
    bias = _parameter('bias', nn.initializers.zeros_init(), shape[1:], self.axes[1:])
    return jnp.dot(x, kernel.astype(dtype)) + bias.astype(dtype)


class LayerNorm(nn.Module):
  """Layer normalisation with scale and bias (Ba et al. 2016), epsilon 1e-5."""

  dtype: Any  # Of the result.

  @nn.compact
  def __call__(self, x: Float[Array, 'b l d']) -> Float[Array, 'b l d']:
    shape = x.shape[-1:]
    scale = _parameter('scale', nn.initializers.ones_init(), shape, ('embed',))
    bias = _parameter('bias', nn.initializers.zeros_init(), shape, ('embed',))
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
    return (normed * scale + bias).astype(self.dtype)


class TokenEmbedder(nn.Module):
  """The token table; its transpose also gives the logits (see `loss`)."""

  config: BartConfig

  def setup(self):
    shape = self.config.padded_vocab_size, self.config.emb_dim
    self.embedding = _parameter(
      'embedding', self.config.kernel_init, shape, ('vocab', 'embed'), module=self
    )

  def __call__(self, ids: Int[Array, 'b l']) -> Float[Array, 'b l d']:
    """Embeds ids; an id outside the table gives NaN, never another row."""
    return jnp.take(self.embedding.astype(self.config.dtype), ids, axis=0)


def per_row(index: Int[Array, '...'], rows: int) -> Int[Array, ' rows']:
  """Spreads a cache index to one per row.

  A decoder counts steps in a scalar; after a prompt in one number per row; and where
  rows were expanded into beams (adjacent copies), in one number per group of copies or
  in an array [batch, beams].
  """
  flat = index.reshape(-1)
  return jnp.repeat(flat, rows // flat.size, total_repeat_length=rows)


class PositionEmbedder(nn.Module):
  """Learned positions; with `decode` counts steps in the cache."""

  config: BartConfig
  decode: bool = False

  @nn.compact
  def __call__(self, rows: Rows) -> Float[Array, 'b_or_1 l d']:
    """Embeds positions, 0, 1, 2 … where none are given.

    Returns:
      Embeddings [batch, length, d], or [1, length, d] for plain counting.

    Raises:
      ValueError: for rows longer than the table.
    """
    (batch, length), positions = rows.tokens.shape, rows.positions
    limit = self.config.max_positions
    if length > limit:
      raise ValueError(
        f'A row of {length} tokens needs as many positions, and the model has '
        f'{limit}: shorten the rows (TASK_FEATURE_LENGTHS) or raise '
        'BartConfig.max_positions.'
      )
    shape = limit + POSITION_OFFSET, self.config.emb_dim
    table = _parameter(
      'embedding', self.config.kernel_init, shape, ('abspos_buckets', 'embed')
    ).astype(self.config.dtype)
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
  """Multi-head attention; causal attention has a cache for decoding.

  With `mode.decode` the first call makes the cache, with room for as many positions as
  it is given, and each later call takes one position. With `mode.prefill` a call fills
  the cache with whole prompts.
  """

  config: BartConfig
  mode: Mode
  causal: bool = False

  @nn.compact
  def __call__(
    self,
    query_input: Float[Array, 'b q d'],
    key_input: Float[Array, 'b k d'],
    query_segments: Int[Array, 'b q'] | None = None,
    key_segments: Int[Array, 'b k'] | None = None,
    prefill_lengths: Int[Array, ' b'] | None = None,
  ) -> Float[Array, 'b q d']:
    """Attends; see `attention.visible` for segments.

    `prefill_lengths` are the tokens in each row's prompt, start token included.
    """
    config, causal = self.config, self.causal

    def constrain(x):
      return partitioning.with_sharding_constraint(
        x, ('batch', 'length', 'heads', 'kv')
      )

    def heads(x, name):  # [b, l, d] -> [b, l, h, d / h]
      projected = Linear(config.emb_dim, ('embed', 'joined_kv'), config, name=name)(x)
      return constrain(
        projected.reshape(*x.shape[:2], config.num_heads, config.head_dim)
      )

    # Three products: one with joined kernels takes 3 % longer by XLA's estimate for a
    # v3 (batch 32 x 1024, width 768) and twice the memory, for slicing the parts.
    query = heads(query_input, 'query')
    query = query * jnp.asarray(config.head_dim**-0.5, config.dtype)
    key = heads(key_input, 'key')
    value = heads(key_input, 'value')
    if causal and self.mode.prefill:
      self._fill_cache(key, value, prefill_lengths)
    elif causal and self.mode.decode:
      stepping = self.has_variable('cache', 'cached_key')
      key, value, seen = self._step_cache(key, value)
      if stepping:
        causal = False
        query_segments, key_segments = jnp.ones(query.shape[:2], jnp.int32), seen
    dropout_key = None
    if not self.mode.deterministic and config.attention_dropout_rate > 0:
      dropout_key = self.make_rng('dropout')
    attended = attention.attend(
        config.attention_impl, query, key, value, query_segments, key_segments,
        causal=causal, dropout_rate=config.attention_dropout_rate,
        dropout_key=dropout_key, chunk_length=config.attention_chunk_length,
        recompute=config.remat_policy == 'attention',
    )  # fmt: skip
    attended = checkpoint_name(constrain(attended), ATTENDED)
    return Linear(config.emb_dim, ('joined_kv', 'embed'), config, name='out')(
      attended.reshape(*query.shape[:2], config.emb_dim)
    )

  def _cache(self, key, value):
    return (
      self.variable('cache', 'cached_key', jnp.zeros_like, key),
      self.variable('cache', 'cached_value', jnp.zeros_like, value),
      self.variable('cache', 'cache_index', jnp.zeros, (), jnp.int32),
    )

  def _fill_cache(self, key, value, lengths):
    """Stores prompts; what follows their ends is overwritten step by step."""
    if not self.has_variable('cache', 'cached_key'):
      raise ValueError(
        'Prefilling needs a cache: call the model once with decode=True and '
        "mutable=['cache'] first, and pass that cache in."
      )
    cached_key, cached_value, index = self._cache(key, value)
    if cached_key.value.shape != key.shape:
      raise ValueError(
        'A prompt must have the batch and length that the cache was made with. '
        f'Got: {key.shape} / {cached_key.value.shape}'
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
  """Linear, exact GELU, dropout, linear."""

  config: BartConfig
  mode: Mode

  @nn.compact
  def __call__(self, x: Float[Array, 'b l d']) -> Float[Array, 'b l d']:
    config = self.config
    hidden = gelu(Linear(config.mlp_dim, ('embed', 'mlp'), config, name='wi')(x))
    if not self.mode.deterministic:
      hidden = dropout.dropout(
        hidden, config.activation_dropout_rate, self.make_rng('dropout')
      )
    hidden = partitioning.with_sharding_constraint(hidden, ('batch', 'length', 'mlp'))
    return Linear(config.emb_dim, ('mlp', 'embed'), config, name='wo')(hidden)


class _Layer(nn.Module):
  """Sublayers with their residuals and norms; BART norms after each sublayer."""

  config: BartConfig
  mode: Mode

  def attend(self, name, x, keys, *segments, causal=False):
    attend = Attention(self.config, self.mode, causal, name=name)
    return self.join(name, x, attend(x, keys, *segments))

  def feed_forward(self, x):
    return self.join('mlp', x, FeedForward(self.config, self.mode, name='mlp')(x))

  def join(self, name, before, change):
    if not self.mode.deterministic:
      change = dropout.dropout(
        change, self.config.dropout_rate, self.make_rng('dropout')
      )
    norm = LayerNorm(self.config.dtype, name=f'{name}_layer_norm')
    return constrain_hidden(norm(before + change))


class EncoderLayer(_Layer):
  """Self-attention, then feed-forward."""

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'b l d'],
    query_segments: Int[Array, 'b l'],
    key_segments: Int[Array, 'b l'],
  ) -> tuple[Float[Array, 'b l d'], None]:
    """Returns the new hidden states, and None as a scan's output."""
    x = self.attend('self_attention', x, x, query_segments, key_segments)
    return self.feed_forward(x), None


class DecoderLayer(_Layer):
  """Causal self-attention, attention to the encoder, feed-forward."""

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'b l d'],
    encoded: Float[Array, 'b k d'],
    segments: Int[Array, 'b l'] | None,
    key_segments: Int[Array, 'b k'],
    prefill_lengths: Int[Array, ' b'] | None,
  ) -> tuple[Float[Array, 'b l d'], None]:
    """Returns the new hidden states, and None as a scan's output.

    `segments` are those of the decoder's packed rows, `key_segments` those of
    `encoded`, 0 for padding.
    """
    x = self.attend(
      'self_attention', x, x, segments, segments, prefill_lengths, causal=True
    )
    queries = jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments
    x = self.attend('encoder_decoder_attention', x, encoded, queries, key_segments)
    return self.feed_forward(x), None


class Stack(nn.Module):
  """The encoder or the decoder: positions, norm, dropout, layers."""

  config: BartConfig
  layer: type[nn.Module]
  layer_count: int

  @nn.compact
  def __call__(
    self, embedded: Float[Array, 'b l d'], rows: Rows, mode: Mode, *shared: Any
  ) -> Float[Array, 'b l d']:
    """Returns hidden states; every layer gets `shared` after its own input."""
    config = self.config
    embed_positions = PositionEmbedder(config, mode.decode, name='position_embedder')
    x = embedded + embed_positions(rows)
    x = LayerNorm(config.dtype, name='embedding_layer_norm')(x)
    if not mode.deterministic:
      x = dropout.dropout(x, config.dropout_rate, self.make_rng('dropout'))
    x = constrain_hidden(x)
    layer = self._recomputed(mode)
    if not config.scan_layers:
      for index in range(self.layer_count):
        x, _ = layer(config, mode, name=f'layers_{index}')(x, *shared)
      return x
    layers = partitioning.scan_with_axes(
      layer,
      variable_axes={'params': 0, 'cache': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=(nn.broadcast,) * len(shared),
      length=self.layer_count,
      axis_name='layers',
    )
    return layers(config, mode, name='layers')(x, *shared)[0]

  def _recomputed(self, mode):
    """The layer's class, under the policies that concern whole layers."""
    policies = {
      'dots': jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
        jax.checkpoint_policies.save_only_these_names(ATTENDED, flash.LOGSUMEXP),
      ),
      'full': None,
    }
    policy = self.config.remat_policy
    if policy not in policies or mode.decode or mode.prefill:
      return self.layer
    # A scan already keeps the compiler from merging the two passes.
    prevent_cse = not self.config.scan_layers
    return partitioning.remat(
      self.layer, prevent_cse=prevent_cse, policy=policies[policy]
    )


# ---- the model -----------------------------------------------------------------


def weight_decay_mask(params: PyTree) -> PyTree:
  """Selects the parameters that weight decay shrinks: kernels and tables, as in BERT.

  Biases and norms are left alone, and so is `final_logits_bias`, which is never
  trained. Bind it to the optimizer's `mask`.

  Returns:
    A tree like params, of booleans.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key in ('kernel', 'embedding'), params
  )


def _encoder_segments(rows: Rows):
  """Segment ids of the encoder's tokens as (queries, keys); padding keys are 0."""
  real = rows.tokens != PAD_ID
  if rows.segments is None:
    return jnp.ones_like(rows.tokens), real.astype(jnp.int32)
  return rows.segments, jnp.where(real, rows.segments, attention.PAD_SEGMENT)


def _checked(side: str, rows: Rows) -> Rows:
  if rows.segments is not None and rows.positions is None:
    raise ValueError(
      f'{side}_segment_ids came without {side}_positions: the examples of a '
      'packed row each count their positions from 0. Pass both or neither.'
    )
  return rows._replace(tokens=rows.tokens.astype(jnp.int32))


class Transformer(nn.Module):
  """BART with T5X's contract: `__call__`, `encode`, `decode`.

  Tokens may have any dtype: T5X makes a model's parameters with float32 tokens. Packed
  rows have segment ids 1, 2, … (0 for padding) and positions that count from 0 in each
  example; both are None where each row is one example.
  """

  config: BartConfig

  @property
  def scan_layers(self) -> bool:
    """Whether cache leaves begin with a layer axis; T5X's models ask for it."""
    return self.config.scan_layers

  def setup(self):
    config = self.config
    self.token_embedder = TokenEmbedder(config)
    self.final_logits_bias = _parameter(
      'final_logits_bias',
      nn.initializers.zeros_init(),
      (config.padded_vocab_size,),
      ('vocab',),
      module=self,
    )
    self.encoder = Stack(config, EncoderLayer, config.num_encoder_layers)
    self.decoder = Stack(config, DecoderLayer, config.num_decoder_layers)

  def encode(
    self,
    encoder_input_tokens: Num[Array, 'b k'],
    encoder_segment_ids: Int[Array, 'b k'] | None = None,
    enable_dropout: bool = True,
    encoder_positions: Int[Array, 'b k'] | None = None,
  ) -> Float[Array, 'b k d']:
    """Encodes noised tokens; dropout needs the rng `dropout`.

    Raises:
      ValueError: for segment ids without positions, and for rows too long.
    """
    rows = Rows(encoder_input_tokens, encoder_segment_ids, encoder_positions)
    rows = _checked('encoder', rows)
    return self.encoder(
      self.token_embedder(rows.tokens),
      rows,
      Mode(deterministic=not enable_dropout),
      *_encoder_segments(rows),
    )

  def _decode_hidden(self, encoded, source, target, mode, prefill_lengths=None):
    """Decoder states from encoder states and the rows of both sides."""
    target = _checked('decoder', target)
    if mode.decode and source.segments is not None:
      raise ValueError(
        'Cached decoding takes one example per row, and encoder_segment_ids were '
        'given: use a feature converter with pack=False.'
      )
    # T5X starts every decoder input with id 0 where BART starts with </s>. Real
    # padding is read as </s> too: it comes last and carries no loss weight.
    tokens = jnp.where(target.tokens == PAD_ID, DECODER_START_ID, target.tokens)
    source = source._replace(tokens=source.tokens.astype(jnp.int32))
    _, key_segments = _encoder_segments(source)
    return self.decoder(
        self.token_embedder(tokens), target._replace(tokens=tokens), mode,
        encoded, target.segments, key_segments, prefill_lengths,
    )  # fmt: skip

  def project(self, hidden: Float[Array, 'b l d']) -> Float[Array, 'b l v']:
    """Decoder states -> logits, float32 at least; padded columns are -1e9."""
    table, bias = self.output_weights()
    logits = loss.masked_logits(hidden, table, bias, self.config.vocab_size)
    return partitioning.with_sharding_constraint(logits, ('batch', 'length', 'vocab'))

  def output_weights(self) -> tuple[Float[Array, 'v d'], Float[Array, ' v']]:
    """Returns what `project` uses: the token table and the constant bias.

    The bias is a buffer, not a weight, in every BART checkpoint: never trained.
    """
    return self.token_embedder.embedding, jax.lax.stop_gradient(self.final_logits_bias)

  def decode(
    self,
    encoded: Float[Array, 'b k d'],
    encoder_input_tokens: Num[Array, 'b k'],
    decoder_input_tokens: Num[Array, 'b l'],
    decoder_target_tokens: Num[Array, 'b l'],
    encoder_segment_ids: Int[Array, 'b k'] | None = None,
    decoder_segment_ids: Int[Array, 'b l'] | None = None,
    decoder_positions: Int[Array, 'b l'] | None = None,
    enable_dropout: bool = True,
    decode: bool = False,
    max_decode_length: int | None = None,
    prefill: bool = False,
    prefill_lengths: Int[Array, ' b'] | None = None,
  ) -> Float[Array, 'b l v']:
    """Decodes: all positions at once, or one with the cache, or a prompt into it.

    Args:
      encoded: what `encode` returned.
      encoder_input_tokens: what it was given, for its padding.
      decoder_input_tokens: the targets shifted right by one; 0 is read as `</s>`.
      decoder_target_tokens: ignored: a causal decoder needs no mask of targets.
      encoder_segment_ids: see `Transformer`.
      decoder_segment_ids: see `Transformer`.
      decoder_positions: see `Transformer`.
      enable_dropout: needs the rng `dropout`.
      decode: uses the cache, which must be mutable: one position of every row.
      max_decode_length: the longest output, checked against the positions.
      prefill: fills the cache, made before, with prompts.
      prefill_lengths: tokens in each prompt, the start token included.

    Returns:
      Logits over the padded vocabulary.

    Raises:
      ValueError: for packed rows without positions or with a cache, for lengths
        beyond `max_positions`, for a cache of another shape.
    """
    del decoder_target_tokens
    limit = self.config.max_positions
    if max_decode_length is not None and max_decode_length > limit:
      raise ValueError(
        f'max_decode_length must be at most BartConfig.max_positions, {limit}. '
        f'Got: {max_decode_length}'
      )
    source = Rows(encoder_input_tokens, encoder_segment_ids)
    target = Rows(decoder_input_tokens, decoder_segment_ids, decoder_positions)
    mode = Mode(not enable_dropout, decode, prefill)
    return self.project(
      self._decode_hidden(encoded, source, target, mode, prefill_lengths)
    )

  def hidden(
    self, source: Rows, target: Rows, enable_dropout: bool, decode: bool = False
  ) -> Float[Array, 'b l d']:
    """Encoder and decoder up to the states that `project` turns into logits."""
    encoded = self.encode(
      source.tokens, source.segments, enable_dropout, source.positions
    )
    mode = Mode(not enable_dropout, decode)
    return self._decode_hidden(encoded, source, target, mode)

  def __call__(
    self,
    encoder_input_tokens: Num[Array, 'b k'],
    decoder_input_tokens: Num[Array, 'b l'],
    decoder_target_tokens: Num[Array, 'b l'],
    encoder_segment_ids: Int[Array, 'b k'] | None = None,
    decoder_segment_ids: Int[Array, 'b l'] | None = None,
    encoder_positions: Int[Array, 'b k'] | None = None,
    decoder_positions: Int[Array, 'b l'] | None = None,
    *,
    enable_dropout: bool = True,
    decode: bool = False,
  ) -> Float[Array, 'b l v']:
    """Logits of the targets given the inputs; see `encode` and `decode`.

    With decode=True it makes the cache: the parallel pass gives it its shapes.
    """
    del decoder_target_tokens
    source = Rows(encoder_input_tokens, encoder_segment_ids, encoder_positions)
    target = Rows(decoder_input_tokens, decoder_segment_ids, decoder_positions)
    return self.project(self.hidden(source, target, enable_dropout, decode))
