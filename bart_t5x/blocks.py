"""The encoder's and the decoder's layer, and how a stack of them is run."""

import dataclasses

import jax
from flax import linen as nn
from flax.linen import partitioning
from jaxtyping import Array, Float, Int

from bart_t5x import attention_cores, dropout, flash, layers
from bart_t5x.config import BartConfig


@dataclasses.dataclass(frozen=True)
class Mode:
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
  mode: Mode

  def attend(self, name, query_input, key_input, *call_args, **attributes):
    """The attention sublayer called `name`, with its residual and norm."""
    config = self.config
    attended = layers.Attention(
      config.num_heads,
      config.dtype,
      config.attention_dropout_rate,
      kernel_init(config),
      core=attention_cores.core(config),
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
      kernel_init(config),
      deterministic=self.mode.deterministic,
      name='mlp',
    )(x)
    return self.join('mlp', x, changed)

  def join(self, name, before, change):
    """Residual, then norm: BART norms after each sublayer."""
    if not self.mode.deterministic:
      change = dropout.dropout(
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
    prefill_lengths: Int[Array, ' b'] | None,
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


def kernel_init(config):
  """BART draws every kernel and table from one normal distribution."""
  return nn.initializers.normal(config.init_std)


def run_layers(layer, count, config, mode, x, *shared):
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
    'dots': jax.checkpoint_policies.save_from_both_policies(
      jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
      jax.checkpoint_policies.save_only_these_names(layers.ATTENDED, flash.LOG_SUMS),
    ),
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
