"""BART (Lewis et al. 2019) as a Flax module with T5X's encoder-decoder contract.

Token ids here are the inside ones: padding 0, `<s>` 1, `</s>` 2. The model is that
of Hugging Face's `BartForConditionalGeneration`: learned positions, a norm after
the embeddings and after every sublayer, biases everywhere, exact GELU, tied
embeddings with a constant bias on the logits.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning
from jaxtyping import Array, Float, Int, PyTree

from bart_t5x import attention, layers, loss

PAD_ID = 0
DECODER_START_ID = 2  # </s>, which is also what ends a sequence

_ATTENTION_IMPLS = ('plain', 'chunked')

# What the backward pass finds stored, from most memory to least.
_REMAT_POLICIES = ('none', 'attention', 'dots', 'full')


@dataclasses.dataclass(frozen=True)
class BartConfig:
  """Every number of the model; the defaults are those of bart-base.

  Attributes:
    vocab_size: ids of the vocabulary, without padding.
    emb_dim: width of the hidden states.
    num_heads: attention heads, in encoder and decoder.
    num_encoder_layers: layers of the encoder.
    num_decoder_layers: layers of the decoder.
    mlp_dim: width inside the feed-forward blocks.
    max_positions: longest row, in tokens.
    dropout_rate: dropout after the embeddings and after every sublayer.
    attention_dropout_rate: dropout on attention weights.
    activation_dropout_rate: dropout inside the feed-forward blocks.
    dtype: dtype of the computation; parameters are float32 whatever it is.
    init_std: standard deviation of the initial kernels and embeddings.
    vocab_multiple_of: the token table's rows are rounded up to a multiple of
      this, so that it divides over devices and fills lanes.
    scan_layers: compile one layer and loop over stacked parameters, which
      compiles faster, instead of writing every layer out, which runs faster.
    remat_policy: what the backward pass recomputes: 'none'; 'attention', scores
      and weights; 'dots', everything but projections; 'full', whole layers.
    attention_impl: 'plain', all scores at once; 'chunked', scores of some queries
      at a time, which takes less memory and more time.
    attention_chunk_length: how many queries, for 'chunked'.

  Raises:
    ValueError: for values that make no model.
  """

  vocab_size: int
  emb_dim: int = 768
  num_heads: int = 12
  num_encoder_layers: int = 6
  num_decoder_layers: int = 6
  mlp_dim: int = 3072
  max_positions: int = 1024
  dropout_rate: float = 0.1
  attention_dropout_rate: float = 0.1
  activation_dropout_rate: float = 0.1
  dtype: Any = jnp.float32
  init_std: float = 0.02
  vocab_multiple_of: int = 128
  scan_layers: bool = False
  remat_policy: str = 'none'
  attention_impl: str = 'plain'
  attention_chunk_length: int = 256

  def __post_init__(self):
    object.__setattr__(self, 'dtype', jnp.dtype(self.dtype))
    counts = (
        'vocab_size', 'emb_dim', 'num_heads', 'num_encoder_layers',
        'num_decoder_layers', 'mlp_dim', 'max_positions', 'vocab_multiple_of',
        'attention_chunk_length',
    )  # fmt: skip
    for name in counts:
      if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
        raise ValueError(
            f'BartConfig.{name} must be a positive integer. '
            f'Got: {getattr(self, name)!r}'
        )
    for name in ('dropout_rate', 'attention_dropout_rate', 'activation_dropout_rate'):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(
            f'BartConfig.{name} must be at least 0 and below 1. '
            f'Got: {getattr(self, name)!r}'
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

  @property
  def padded_vocab_size(self) -> int:
    """Rows of the token table."""
    return -(-self.vocab_size // self.vocab_multiple_of) * self.vocab_multiple_of


def weight_decay_mask(params: PyTree) -> PyTree:
  """Which parameters weight decay may shrink: kernels and tables, as in BERT.

  Biases and norms are left alone, and so is `final_logits_bias`, which no training
  changes. Bind it to the optimizer's `mask`.

  Args:
    params: the model's parameters, or any tree with their names.

  Returns:
    A tree of the same structure, of booleans.
  """
  return jax.tree_util.tree_map_with_path(
      lambda path, _: path[-1].key in ('kernel', 'embedding'), params
  )


@dataclasses.dataclass(frozen=True)
class _Mode:
  """How a call runs; static, so that it compiles to one program each.

  Attributes:
    deterministic: whether dropout is off.
    decode: whether to use the cache, a position at a time.
    prefill: whether to fill the cache with a prompt.
  """

  deterministic: bool = True
  decode: bool = False
  prefill: bool = False


class _Layer(nn.Module):
  """What encoder and decoder layers share.

  Attributes:
    config: the model's numbers.
    mode: how this call runs.
  """

  config: BartConfig
  mode: _Mode

  def attend(self, name, query_input, key_input, *call_args, **attributes):
    """The attention sublayer called `name`, with its residual and norm."""
    config = self.config
    attended = layers.Attention(
        config.num_heads,
        config.dtype,
        config.attention_dropout_rate,
        _kernel_init(config),
        core=_attention_core(config),
        deterministic=self.mode.deterministic,
        name=name,
        **attributes,
    )(query_input, key_input, *call_args)
    return self.join(name, query_input, attended)

  def feed_forward(self, x):
    """The feed-forward sublayer, with its residual and norm."""
    config = self.config
    changed = layers.FeedForward(
        config.mlp_dim,
        config.dtype,
        config.activation_dropout_rate,
        _kernel_init(config),
        deterministic=self.mode.deterministic,
        name='mlp',
    )(x)
    return self.join('mlp', x, changed)

  def join(self, name, before, change):
    """Residual, then norm: BART norms after each sublayer."""
    if not self.mode.deterministic:
      change = attention.dropout(
          change, self.config.dropout_rate, self.make_rng('dropout')
      )
    norm = layers.LayerNorm(self.config.dtype, name=f'{name}_layer_norm')
    return layers.constrain_hidden(norm(before + change))


class EncoderLayer(_Layer):
  """Self-attention, then feed-forward."""

  @nn.compact
  def __call__(
      self,
      x: Float[Array, 'b l d'],
      query_segments: Int[Array, 'b l'],
      key_segments: Int[Array, 'b l'],
  ) -> tuple[Float[Array, 'b l d'], None]:
    """Returns the new hidden states, and None for the scan's sake."""
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
      query_segments: Int[Array, 'b l'],
      key_segments: Int[Array, 'b k'],
      prefill_lengths: Int[Array, 'b'] | None,
  ) -> tuple[Float[Array, 'b l d'], None]:
    """Returns the new hidden states, and None for the scan's sake.

    Args:
      x: hidden states of the decoder.
      encoded: what the encoder returned.
      segments: segment ids of packed rows, for self-attention, or None.
      query_segments: segment ids of x, for attention to the encoder.
      key_segments: segment ids of `encoded`, 0 for padding.
      prefill_lengths: lengths of the prompts while the cache is filled.
    """
    x = self.attend(
        'self_attention', x, x, segments, segments, prefill_lengths,
        causal=True, decode=self.mode.decode, prefill=self.mode.prefill,
    )  # fmt: skip
    x = self.attend(
        'encoder_decoder_attention', x, encoded, query_segments, key_segments
    )
    return self.feed_forward(x), None


def _kernel_init(config):
  """BART draws every kernel and table from one normal distribution."""
  return nn.initializers.normal(config.init_std)


def _attention_core(config):
  """The function that attends, as the config has it."""
  core = attention.plain_attention
  if config.attention_impl == 'chunked':
    core = functools.partial(
        attention.chunked_attention, chunk_length=config.attention_chunk_length
    )
  if config.remat_policy != 'attention':
    return core

  def recomputed(*arrays, causal, dropout_rate, dropout_key):
    def run(dropout_key, *arrays):
      return core(
          *arrays, causal=causal, dropout_rate=dropout_rate, dropout_key=dropout_key
      )

    return jax.checkpoint(run)(dropout_key, *arrays)

  return recomputed


def _run_layers(layer, count, config, mode, x, *shared):
  """Applies `count` layers in turn, inside a compact method.

  Args:
    layer: EncoderLayer or DecoderLayer.
    count: how many.
    config: the model's numbers.
    mode: how this call runs.
    x: hidden states [batch, length, d].
    *shared: what every layer gets beside x.

  Returns:
    Hidden states like x.
  """
  policies = {
      'dots': jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
      'full': None,
  }
  if config.remat_policy in policies and not (mode.decode or mode.prefill):
    layer = partitioning.remat(
        layer,
        # A scan already keeps the compiler from merging the two passes.
        prevent_cse=not config.scan_layers,
        policy=policies[config.remat_policy],
    )
  if not config.scan_layers:
    for index in range(count):
      x, _ = layer(config, mode, name=f'layers_{index}')(x, *shared)
    return x
  stack = partitioning.scan_with_axes(
      layer,
      variable_axes={'params': 0, 'cache': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=(nn.broadcast,) * len(shared),
      length=count,
      axis_name='layers',
  )
  return stack(config, mode, name='layers')(x, *shared)[0]


class _Stack(nn.Module):
  """What encoder and decoder share: embedding, norm, dropout.

  Attributes:
    config: the model's numbers.
  """

  config: BartConfig

  def start(self, embedded, tokens, positions, mode):
    """Token embeddings -> what the first layer reads: + positions, norm, dropout."""
    config = self.config
    located = embedded + layers.PositionEmbedder(
        config.max_positions,
        config.emb_dim,
        config.dtype,
        _kernel_init(config),
        decode=mode.decode,
        name='position_embedder',
    )(tokens, positions)
    x = layers.LayerNorm(config.dtype, name='embedding_layer_norm')(located)
    if not mode.deterministic:
      x = attention.dropout(x, config.dropout_rate, self.make_rng('dropout'))
    return layers.constrain_hidden(x)


class Encoder(_Stack):
  """Embedded tokens -> encoded tokens."""

  @nn.compact
  def __call__(
      self,
      embedded: Float[Array, 'b l d'],
      tokens: Int[Array, 'b l'],
      positions: Int[Array, 'b l'] | None,
      segments: Int[Array, 'b l'] | None,
      mode: _Mode,
  ) -> Float[Array, 'b l d']:
    """Encodes; see `Transformer.encode` for the arguments."""
    x = self.start(embedded, tokens, positions, mode)
    queries, keys = _encoder_segments(tokens, segments)
    config = self.config
    return _run_layers(
        EncoderLayer, config.num_encoder_layers, config, mode, x, queries, keys
    )


class Decoder(_Stack):
  """Embedded tokens and encoded inputs -> the hidden states that give logits."""

  @nn.compact
  def __call__(
      self,
      embedded: Float[Array, 'b l d'],
      tokens: Int[Array, 'b l'],
      positions: Int[Array, 'b l'] | None,
      segments: Int[Array, 'b l'] | None,
      encoded: Float[Array, 'b k d'],
      key_segments: Int[Array, 'b k'],
      prefill_lengths: Int[Array, 'b'] | None,
      mode: _Mode,
  ) -> Float[Array, 'b l d']:
    """Decodes; see `Transformer.decode` for the arguments."""
    x = self.start(embedded, tokens, positions, mode)
    queries = jnp.ones_like(tokens) if segments is None else segments
    config = self.config
    return _run_layers(
        DecoderLayer, config.num_decoder_layers, config, mode, x,
        encoded, segments, queries, key_segments, prefill_lengths,
    )  # fmt: skip


def _encoder_segments(tokens, segments):
  """Segment ids of the encoder's tokens as (queries, keys); padding keys are 0."""
  real = tokens != PAD_ID
  if segments is None:
    return jnp.ones_like(tokens), real.astype(jnp.int32)
  return segments, jnp.where(real, segments, attention.PAD_SEGMENT)


def _check_packing(side, segments, positions):
  """Packed rows need both: learned positions start anew in each segment."""
  if segments is not None and positions is None:
    raise ValueError(
        f'{side}_segment_ids came without {side}_positions: the examples of a '
        'packed row each count their positions from 0. Pass both or neither.'
    )


class Transformer(nn.Module):
  """BART with T5X's contract: `__call__`, `encode`, `decode`.

  Attributes:
    config: the model's numbers.
  """

  config: BartConfig

  @property
  def scan_layers(self) -> bool:
    """Whether cache leaves begin with a layer axis; T5X's models ask for it."""
    return self.config.scan_layers

  def setup(self):
    config = self.config
    self.token_embedder = layers.TokenEmbedder(
        config.padded_vocab_size, config.emb_dim, config.dtype, _kernel_init(config)
    )
    self.final_logits_bias = partitioning.param_with_axes(
        'final_logits_bias',
        nn.initializers.zeros_init(),
        (config.padded_vocab_size,),
        jnp.float32,
        axes=('vocab',),
        module=self,
    )
    self.encoder = Encoder(config)
    self.decoder = Decoder(config)

  def encode(
      self,
      encoder_input_tokens: Int[Array, 'b k'],
      encoder_segment_ids: Int[Array, 'b k'] | None = None,
      enable_dropout: bool = True,
      encoder_positions: Int[Array, 'b k'] | None = None,
  ) -> Float[Array, 'b k d']:
    """Encodes noised tokens.

    Args:
      encoder_input_tokens: ids; 0 is padding.
      encoder_segment_ids: 1, 2, … for the examples of a packed row, 0 for
        padding; None where each row is one example.
      enable_dropout: whether dropout acts (needs the rng `dropout`).
      encoder_positions: positions within each packed example.

    Returns:
      Encoder states.

    Raises:
      ValueError: for segment ids without positions, and for rows too long.
    """
    _check_packing('encoder', encoder_segment_ids, encoder_positions)
    tokens = encoder_input_tokens.astype(jnp.int32)
    return self.encoder(
        self.token_embedder(tokens),
        tokens,
        encoder_positions,
        encoder_segment_ids,
        _Mode(deterministic=not enable_dropout),
    )

  def decode_hidden(
      self,
      encoded: Float[Array, 'b k d'],
      encoder_input_tokens: Int[Array, 'b k'],
      decoder_input_tokens: Int[Array, 'b l'],
      encoder_segment_ids: Int[Array, 'b k'] | None = None,
      decoder_segment_ids: Int[Array, 'b l'] | None = None,
      decoder_positions: Int[Array, 'b l'] | None = None,
      enable_dropout: bool = True,
      decode: bool = False,
      prefill: bool = False,
      prefill_lengths: Int[Array, 'b'] | None = None,
  ) -> Float[Array, 'b l d']:
    """`decode` without its last step: the states that `project` makes logits of."""
    _check_packing('decoder', decoder_segment_ids, decoder_positions)
    if decode and encoder_segment_ids is not None:
      raise ValueError(
          'Cached decoding takes one example a row, and encoder_segment_ids were '
          'given: use a feature converter with pack=False.'
      )
    tokens = decoder_input_tokens.astype(jnp.int32)
    # T5X starts every decoder input with id 0 where BART starts with </s>. Real
    # padding is read as </s> too: it comes last and carries no loss weight.
    tokens = jnp.where(tokens == PAD_ID, DECODER_START_ID, tokens)
    _, key_segments = _encoder_segments(
        encoder_input_tokens.astype(jnp.int32), encoder_segment_ids
    )
    return self.decoder(
        self.token_embedder(tokens),
        tokens,
        decoder_positions,
        decoder_segment_ids,
        encoded,
        key_segments,
        prefill_lengths,
        _Mode(not enable_dropout, decode, prefill),
    )

  def project(self, hidden: Float[Array, 'b l d']) -> Float[Array, 'b l v']:
    """Decoder states -> logits, float32 at least; padded columns are -1e9."""
    table, bias = self.output_weights()
    logits = loss.masked_logits(hidden, table, bias, self.config.vocab_size)
    return layers.constrain(logits, ('batch', 'length', 'vocab'))

  def output_weights(self) -> tuple[Float[Array, 'v d'], Float[Array, 'v']]:
    """What `project` uses: the token table and the constant bias.

    The bias is a buffer, not a weight, in every BART checkpoint: never trained.
    """
    return self.token_embedder.embedding, jax.lax.stop_gradient(self.final_logits_bias)

  def decode(
      self,
      encoded: Float[Array, 'b k d'],
      encoder_input_tokens: Int[Array, 'b k'],
      decoder_input_tokens: Int[Array, 'b l'],
      decoder_target_tokens: Int[Array, 'b l'],
      encoder_segment_ids: Int[Array, 'b k'] | None = None,
      decoder_segment_ids: Int[Array, 'b l'] | None = None,
      decoder_positions: Int[Array, 'b l'] | None = None,
      enable_dropout: bool = True,
      decode: bool = False,
      max_decode_length: int | None = None,
      prefill: bool = False,
      prefill_lengths: Int[Array, 'b'] | None = None,
  ) -> Float[Array, 'b l v']:
    """Decodes: all positions at once, or one with the cache, or a prompt into it.

    Args:
      encoded: what `encode` returned.
      encoder_input_tokens: what it was given, for its padding.
      decoder_input_tokens: the targets moved right by one; 0 is read as `</s>`.
      decoder_target_tokens: not read: a causal decoder needs no mask of targets.
      encoder_segment_ids: see `encode`.
      decoder_segment_ids: the same for the decoder.
      decoder_positions: positions within each packed example of the decoder.
      enable_dropout: whether dropout acts (needs the rng `dropout`).
      decode: use the cache, which must be mutable: one position of every row.
      max_decode_length: the longest output meant, checked against the positions.
      prefill: fill the cache, made before, with prompts.
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
    return self.project(
        self.decode_hidden(
            encoded, encoder_input_tokens, decoder_input_tokens,
            encoder_segment_ids, decoder_segment_ids, decoder_positions,
            enable_dropout, decode, prefill, prefill_lengths,
        )
    )  # fmt: skip

  def hidden(
      self,
      encoder_input_tokens: Int[Array, 'b k'],
      decoder_input_tokens: Int[Array, 'b l'],
      encoder_segment_ids: Int[Array, 'b k'] | None = None,
      decoder_segment_ids: Int[Array, 'b l'] | None = None,
      encoder_positions: Int[Array, 'b k'] | None = None,
      decoder_positions: Int[Array, 'b l'] | None = None,
      *,
      enable_dropout: bool = True,
      decode: bool = False,
  ) -> Float[Array, 'b l d']:
    """Encoder and decoder up to the states that `project` makes logits of."""
    encoded = self.encode(
        encoder_input_tokens, encoder_segment_ids, enable_dropout, encoder_positions
    )
    return self.decode_hidden(
        encoded, encoder_input_tokens, decoder_input_tokens,
        encoder_segment_ids, decoder_segment_ids, decoder_positions,
        enable_dropout, decode,
    )  # fmt: skip

  def __call__(
      self,
      encoder_input_tokens: Int[Array, 'b k'],
      decoder_input_tokens: Int[Array, 'b l'],
      decoder_target_tokens: Int[Array, 'b l'],
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
    return self.project(
        self.hidden(
            encoder_input_tokens, decoder_input_tokens, encoder_segment_ids,
            decoder_segment_ids, encoder_positions, decoder_positions,
            enable_dropout=enable_dropout, decode=decode,
        )
    )  # fmt: skip
