"""BART (Lewis et al. 2019) as a Flax module with T5X's encoder-decoder contract.

Token ids here are the inside ones: padding 0, `<s>` 1, `</s>` 2. The model is that
of Hugging Face's `BartForConditionalGeneration`: learned positions, a norm after
the embeddings and after every sublayer, biases everywhere, exact GELU, tied
embeddings with a constant bias on the logits.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning
from jaxtyping import Array, Float, Int, Num, PyTree

from bart_t5x import attention, blocks, dropout, layers, loss
from bart_t5x.config import BartConfig

__all__ = ['BartConfig', 'Decoder', 'Encoder', 'Transformer', 'weight_decay_mask']

PAD_ID = 0
DECODER_START_ID = 2  # </s>, which is also what ends a sequence


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
      blocks.kernel_init(config),
      decode=mode.decode,
      name='position_embedder',
    )(tokens, positions)
    x = layers.LayerNorm(config.dtype, name='embedding_layer_norm')(located)
    if not mode.deterministic:
      x = dropout.dropout(x, config.dropout_rate, self.make_rng('dropout'))
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
    mode: blocks.Mode,
  ) -> Float[Array, 'b l d']:
    """Encodes; see `Transformer.encode` for the arguments."""
    x = self.start(embedded, tokens, positions, mode)
    queries, keys = _encoder_segments(tokens, segments)
    config = self.config
    return blocks.run_layers(
      blocks.EncoderLayer, config.num_encoder_layers, config, mode, x, queries, keys
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
    prefill_lengths: Int[Array, ' b'] | None,
    mode: blocks.Mode,
  ) -> Float[Array, 'b l d']:
    """Decodes; see `Transformer.decode` for the arguments."""
    x = self.start(embedded, tokens, positions, mode)
    queries = jnp.ones_like(tokens) if segments is None else segments
    config = self.config
    return blocks.run_layers(
        blocks.DecoderLayer, config.num_decoder_layers, config, mode, x,
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

  Tokens may have any dtype: T5X makes a model's parameters with tokens of float32.

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
      config.padded_vocab_size,
      config.emb_dim,
      config.dtype,
      blocks.kernel_init(config),
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
    encoder_input_tokens: Num[Array, 'b k'],
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
      blocks.Mode(deterministic=not enable_dropout),
    )

  def decode_hidden(
    self,
    encoded: Float[Array, 'b k d'],
    encoder_input_tokens: Num[Array, 'b k'],
    decoder_input_tokens: Num[Array, 'b l'],
    encoder_segment_ids: Int[Array, 'b k'] | None = None,
    decoder_segment_ids: Int[Array, 'b l'] | None = None,
    decoder_positions: Int[Array, 'b l'] | None = None,
    enable_dropout: bool = True,
    decode: bool = False,
    prefill: bool = False,
    prefill_lengths: Int[Array, ' b'] | None = None,
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
      blocks.Mode(not enable_dropout, decode, prefill),
    )

  def project(self, hidden: Float[Array, 'b l d']) -> Float[Array, 'b l v']:
    """Decoder states -> logits, float32 at least; padded columns are -1e9."""
    table, bias = self.output_weights()
    logits = loss.masked_logits(hidden, table, bias, self.config.vocab_size)
    return layers.constrain(logits, ('batch', 'length', 'vocab'))

  def output_weights(self) -> tuple[Float[Array, 'v d'], Float[Array, ' v']]:
    """What `project` uses: the token table and the constant bias.

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
    encoder_input_tokens: Num[Array, 'b k'],
    decoder_input_tokens: Num[Array, 'b l'],
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
    return self.project(
        self.hidden(
            encoder_input_tokens, decoder_input_tokens, encoder_segment_ids,
            decoder_segment_ids, encoder_positions, decoder_positions,
            enable_dropout=enable_dropout, decode=decode,
        )
    )  # fmt: skip
