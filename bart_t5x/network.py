"""BART (Lewis et al. 2019) as a Flax module with T5X's encoder-decoder contract.

Equivalent to Hugging Face's `BartForConditionalGeneration`, but with the token ids of
`tokenization`: learned positions, layer norm after the embeddings and after every
sublayer, biases everywhere, exact GELU, tied embeddings with a constant bias on the
logits.

Parameters are float32 with logical axis names; activations have `BartConfig.dtype`;
softmax and layer norm run in float32 or wider.
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
from bart_t5x.tokenization import EOS_ID, PAD_ID

DECODER_START_ID = EOS_ID

# Row r of a position table is position r - 2: fairseq reserved two rows for padding,
# and every BART checkpoint has them.
POSITION_OFFSET = 2

LAYER_NORM_EPSILON = 1e-5

# Checkpoint name of attention outputs, for the policy 'dots'.
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
  """Hyperparameters of the model; the defaults are bart-base's.

  `remat_policy` sets what the backward pass recomputes: 'none'; 'attention', scores and
  weights (which only 'plain' stores); 'dots', everything but projections and attention
  outputs; 'full', whole layers.

  `attention_impl` is one of 'plain', all scores at once; 'chunked', scores of
  `attention_chunk_length` queries at a time, with less memory and more time; 'flash',
  our TPU kernel, which never stores scores and drops the same weights as 'plain';
  'cudnn', in 16 bits and without dropout on attention weights; and 'auto', the fastest
  on the platform with the same results as 'plain' or 'chunked'.
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
  activation_dropout_rate: float = 0.1  # After GELU.
  dtype: Any = jnp.float32  # Of activations.
  init_std: float = 0.02
  vocab_multiple_of: int = 128  # The token table is padded to a multiple of it.
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
    """Features per attention head."""
    return self.emb_dim // self.num_heads

  @property
  def padded_vocab_size(self) -> int:
    """Rows of the token table, padding included."""
    return -(-self.vocab_size // self.vocab_multiple_of) * self.vocab_multiple_of

  @property
  def kernel_init(self) -> nn.initializers.Initializer:
    """Initializer of all kernels and tables."""
    return nn.initializers.normal(self.init_std)


@dataclasses.dataclass(frozen=True)
class Mode:
  """Static flags of a call."""

  deterministic: bool = True  # Disables dropout.
  decode: bool = False  # Uses the cache, one position at a time.
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
  """Constrains hidden states to the sharding of their logical axes."""
  return partitioning.with_sharding_constraint(x, ('batch', 'length', 'embed'))


def gelu(x: Float[Array, '...']) -> Float[Array, '...']:
  """Exact GELU, x * Phi(x)."""
  # jax.nn.gelu(approximate=False) uses erfc, which costs several times as much as erf
  # and only improves digits that do not matter here.
  return 0.5 * x * (1 + jax.lax.erf(x * jnp.asarray(math.sqrt(0.5), x.dtype)))


class Linear(nn.Module):
  """y = x W + b over the last axis; `axes` are logical axis names of the kernel."""

  features: int
  axes: tuple[str, str]
  config: BartConfig

  @nn.compact
  def __call__(self, x: Float[Array, 'b l i']) -> Float[Array, 'b l o']:
    shape, dtype = (x.shape[-1], self.features), self.config.dtype
    kernel = _parameter('kernel', self.config.kernel_init, shape, self.axes)
    bias = _parameter('bias', nn.initializers.zeros_init(), shape[1:], self.axes[1:])
    kernel, bias = kernel.astype(dtype), bias.astype(dtype)
    if x.shape[1] == 1 and flash.device().platform == 'cpu':
      # XLA's product of a large and a small matrix is faster in this order, and the
      # barrier makes it transpose the kernel before the loop of decoding.
      kernel = jax.lax.optimization_barrier(kernel.T)
      return jnp.dot(kernel, x[:, 0].T).T[:, None] + bias
    return jnp.dot(x, kernel) + bias


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
  """Token embeddings, tied to the output projection (see `loss`)."""

  config: BartConfig

  def setup(self):
    shape = self.config.padded_vocab_size, self.config.emb_dim
    self.embedding = _parameter(
      'embedding', self.config.kernel_init, shape, ('vocab', 'embed'), module=self
    )

  def __call__(self, ids: Int[Array, 'b l']) -> Float[Array, 'b l d']:
    """Embeds ids; an id outside the table gives NaN."""
    return jnp.take(self.embedding.astype(self.config.dtype), ids, axis=0)


def per_row(index: Int[Array, '...'], rows: int) -> Int[Array, ' rows']:
  """Broadcasts a cache index to one per row.

  The index is a scalar; one per row after a prompt; and with beams (adjacent copies of
  rows) one per group of copies or an array [batch, beams].
  """
  flat = index.reshape(-1)
  return jnp.repeat(flat, rows // flat.size, total_repeat_length=rows)


class PositionEmbedder(nn.Module):
  """Learned positions; with `decode`, the cache counts steps."""

  config: BartConfig
  decode: bool = False

  @nn.compact
  def __call__(self, rows: Rows) -> Float[Array, 'b_or_1 l d']:
    """Embeds the positions of rows, by default 0, 1, 2 …

    Raises:
      ValueError: rows are longer than the table.
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
  """Multi-head attention, with a cache for decoding if causal.

  With `mode.decode` the first call creates the cache, as long as its input, and each
  later call takes one position. With `mode.prefill` a call stores whole prompts.
  """

  config: BartConfig
  mode: Mode
  causal: bool = False

  @nn.compact
  def __call__(
    self,
    query_input: Float[Array, 'b q d'],
    key_input: Float[Array, 'n k d'],
    query_segments: Int[Array, 'b q'] | None = None,
    key_segments: Int[Array, 'n k'] | None = None,
    prefill_lengths: Int[Array, ' b'] | None = None,
  ) -> Float[Array, 'b q d']:
    """Attends; see `attention.visible` for segments.

    In a step, adjacent rows of queries, b / n each, may share a row of keys.
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

    # Fusing the three projections takes 3 % longer by XLA's estimate for a v3 (batch
    # 32 x 1024, width 768) and twice the memory, because of the slices.
    query = heads(query_input, 'query')
    query = query * jnp.asarray(config.head_dim**-0.5, config.dtype)
    key = heads(key_input, 'key')
    value = heads(key_input, 'value')
    caches = self.mode.decode or self.mode.prefill
    stored = map(attention.heads_first, (key, value)) if caches else ()
    seen = key_segments
    if causal and self.mode.prefill:
      self._fill_cache(*stored, prefill_lengths)
    elif causal and self.mode.decode:
      *stored, seen = self._step_cache(*stored)
    dropout_key = None
    if not self.mode.deterministic and config.attention_dropout_rate > 0:
      dropout_key = self.make_rng('dropout')
    if self.mode.decode and query.shape[1] == 1 and seen is not None:
      grouped = query.reshape(len(seen), -1, *query.shape[2:])  # [n, b / n, h, d / h]
      attended = attention.step_attention(grouped, *stored, seen > 0)
    else:
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
    """Stores prompts; positions past their ends are overwritten step by step."""
    if not self.has_variable('cache', 'cached_key'):
      raise ValueError(
        'Prefilling needs a cache: first call the model with decode=True and '
        "mutable=['cache'], then pass that cache."
      )
    cached_key, cached_value, index = self._cache(key, value)
    if cached_key.value.shape != key.shape:
      raise ValueError(
        'A prompt must have the batch size and length of the cache. '
        f'Got: {key.shape[::2]} / {cached_key.value.shape[::2]}'
      )
    cached_key.value, cached_value.value = key, value
    index.value = lengths

  def _step_cache(self, key, value):
    """Adds one position; returns keys, values and which are filled (None: none yet)."""
    stepping = self.has_variable('cache', 'cached_key')
    cached_key, cached_value, index = self._cache(key, value)
    if not stepping:
      return key, value, None
    batch, _, length, _ = cached_key.value.shape
    if key.shape[::2] != (batch, 1):
      raise ValueError(
        'Cached decoding takes one position per row at a time, '
        f'[{batch}, 1]. Got: {list(key.shape[::2])}'
      )
    here = per_row(index.value, batch)[:, None]
    slot = jnp.arange(length)[None]
    for cached, new in ((cached_key, key), (cached_value, value)):
      if index.value.ndim:
        write = (slot == here)[:, None, :, None]
        cached.value = jnp.where(write, new, cached.value)
      else:  # Written in place.
        start = (0, 0, index.value, 0)
        cached.value = jax.lax.dynamic_update_slice(cached.value, new, start)
    index.value = index.value + 1
    return cached_key.value, cached_value.value, slot <= here


class FeedForward(nn.Module):
  """Linear, GELU, dropout, linear."""

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
  """Sublayers with residuals, dropout and post-norm."""

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
    """Returns hidden states, and None as the output of a scan."""
    x = self.attend('self_attention', x, x, query_segments, key_segments)
    return self.feed_forward(x), None


class DecoderLayer(_Layer):
  """Causal self-attention, cross-attention, feed-forward."""

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'b l d'],
    encoded: Float[Array, 'n k d'],
    segments: Int[Array, 'b l'] | None,
    key_segments: Int[Array, 'n k'],
    prefill_lengths: Int[Array, ' b'] | None,
  ) -> tuple[Float[Array, 'b l d'], None]:
    """Returns hidden states, and None as the output of a scan.

    `segments` belong to the decoder's packed rows, `key_segments` to `encoded`.
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
    """Returns hidden states; `shared` are further arguments of every layer."""
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
    """Returns the layer's class, wrapped by the policies 'dots' and 'full'."""
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
    # A scan already prevents the compiler from merging the two passes.
    prevent_cse = not self.config.scan_layers
    return partitioning.remat(
      self.layer, prevent_cse=prevent_cse, policy=policies[policy]
    )


# ---- the model -----------------------------------------------------------------


def weight_decay_mask(params: PyTree) -> PyTree:
  """Returns a tree of booleans: weight decay acts on kernels and tables, as in BERT.

  Bind it to the optimizer's `mask`.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key in ('kernel', 'embedding'), params
  )


def _encoder_segments(rows: Rows):
  """Returns segment ids of the encoder's (queries, keys); padding keys are 0."""
  real = rows.tokens != PAD_ID
  if rows.segments is None:
    return jnp.ones_like(rows.tokens), real.astype(jnp.int32)
  return rows.segments, jnp.where(real, rows.segments, attention.PAD_SEGMENT)


def _checked(side: str, rows: Rows) -> Rows:
  if rows.segments is not None and rows.positions is None:
    raise ValueError(
      f'{side}_segment_ids needs {side}_positions, which start at 0 in each example '
      'of a packed row. Pass both or neither.'
    )
  return rows._replace(tokens=rows.tokens.astype(jnp.int32))


class Transformer(nn.Module):
  """BART with the methods that T5X calls: `__call__`, `encode`, `decode`.

  Tokens may have any dtype: T5X initializes parameters with float32 tokens. Packed rows
  have segment ids 1, 2, … (0 for padding) and positions that start at 0 in each
  example; both are None without packing.
  """

  config: BartConfig
  # Not a field: T5X repeats `encoded` for the beams of models without it.
  shares_encoded = True

  @property
  def scan_layers(self) -> bool:
    """Whether cache leaves begin with a layer axis; T5X's models read it."""
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
    """Encodes noised tokens; dropout needs the rng `dropout`."""
    rows = Rows(encoder_input_tokens, encoder_segment_ids, encoder_positions)
    rows = _checked('encoder', rows)
    return self.encoder(
      self.token_embedder(rows.tokens),
      rows,
      Mode(deterministic=not enable_dropout),
      *_encoder_segments(rows),
    )

  def _decode_hidden(self, encoded, source, target, mode, prefill_lengths=None):
    target = _checked('decoder', target)
    if mode.decode and source.segments is not None:
      raise ValueError(
        'Cached decoding takes one example per row, and got encoder_segment_ids: '
        'use a feature converter with pack=False.'
      )
    # T5X starts decoder inputs with id 0, BART with </s>. Padding is read as </s> too,
    # which is harmless: it comes last and has no loss weight.
    tokens = jnp.where(target.tokens == PAD_ID, DECODER_START_ID, target.tokens)
    source = source._replace(tokens=source.tokens.astype(jnp.int32))
    _, key_segments = _encoder_segments(source)
    return self.decoder(
        self.token_embedder(tokens), target._replace(tokens=tokens), mode,
        encoded, target.segments, key_segments, prefill_lengths,
    )  # fmt: skip

  def project(self, hidden: Float[Array, 'b l d']) -> Float[Array, 'b l v']:
    """Returns logits, float32 or wider; padded columns are -1e9."""
    table, bias = self.output_weights()
    logits = loss.masked_logits(hidden, table, bias, self.config.vocab_size)
    return partitioning.with_sharding_constraint(logits, ('batch', 'length', 'vocab'))

  def output_weights(self) -> tuple[Float[Array, 'v d'], Float[Array, ' v']]:
    """Returns the token table and the bias, which BART never trains."""
    return self.token_embedder.embedding, jax.lax.stop_gradient(self.final_logits_bias)

  def decode(
    self,
    encoded: Float[Array, 'n k d'],
    encoder_input_tokens: Num[Array, 'n k'],
    decoder_input_tokens: Num[Array, 'b l'],
    decoder_target_tokens: Num[Array, 'b l'],
    encoder_segment_ids: Int[Array, 'n k'] | None = None,
    decoder_segment_ids: Int[Array, 'b l'] | None = None,
    decoder_positions: Int[Array, 'b l'] | None = None,
    enable_dropout: bool = True,
    decode: bool = False,
    max_decode_length: int | None = None,
    prefill: bool = False,
    prefill_lengths: Int[Array, ' b'] | None = None,
  ) -> Float[Array, 'b l v']:
    """Returns logits over the padded vocabulary.

    `encoder_input_tokens` shows where `encoded` is padding; 0 in `decoder_input_tokens`
    is read as `</s>`; targets are ignored. With `decode` the call takes one position
    per row and updates the cache, which must be mutable; adjacent rows may share a row
    of `encoded`. With `prefill` it stores prompts, whose `prefill_lengths` include the
    start token.
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
    """Returns the decoder states before `project`."""
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
    """Returns logits; with decode=True also creates the cache.

    See `encode` and `decode`.
    """
    del decoder_target_tokens
    source = Rows(encoder_input_tokens, encoder_segment_ids, encoder_positions)
    target = Rows(decoder_input_tokens, decoder_segment_ids, decoder_positions)
    return self.project(self.hidden(source, target, enable_dropout, decode))
