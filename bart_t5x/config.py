"""Every number of a BART, in one place."""

import dataclasses
from typing import Any

import jax.numpy as jnp

_ATTENTION_IMPLS = ('auto', 'plain', 'chunked', 'flash', 'cudnn')

# What the backward pass finds stored, from most memory to least.
_REMAT_POLICIES = ('none', 'attention', 'dots', 'full')


def _float_dtype(dtype: Any) -> jnp.dtype:
  """The dtype of activations, from a name or a type.

  Raises:
    ValueError: it is none of floating-point numbers.
  """
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
      compiles faster, instead of writing every layer out, which runs faster. A
      checkpoint of one kind becomes one of the other by `bart_t5x.restack`.
    remat_policy: what the backward pass recomputes: 'none'; 'attention', scores
      and weights (which of all implementations only 'plain' stores); 'dots',
      everything but projections and what attention mixes; 'full', whole layers.
    attention_impl: all compute the same. 'plain', all scores at once; 'chunked',
      scores of some queries at a time, which takes less memory and more time;
      'flash', our kernel for TPUs, which never stores scores and drops the same
      weights as 'plain'; 'cudnn', NVIDIA's, in 16 bits only and without dropout on
      weights: it wants attention_dropout_rate = 0, which BART's recipe has at 0.1;
      'auto', the fastest that changes nothing: 'flash' on TPUs, 'cudnn' on NVIDIA GPUs
      from Ampere on where it may, else 'plain'.
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
        "BartConfig.attention_impl = 'cudnn' drops no attention weights, so it needs "
        'attention_dropout_rate = 0 (a change of the recipe). '
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
