"""Which function attends: `BartConfig.attention_impl`, by name or by platform.

All compute what `attention.plain_attention` does and take its arguments.
"""

import functools
from collections.abc import Callable

import jax

from bart_t5x import attention, cudnn, flash, placement
from bart_t5x.config import BartConfig

Core = Callable[..., jax.Array]


def core(config: BartConfig) -> Core:
  """The function that attends, as the config has it.

  Args:
    config: the model's numbers; of them `attention_impl`, `attention_chunk_length`
      and whether `remat_policy` is 'attention'.

  Returns:
    A function with the arguments of `attention.plain_attention`.
  """

  def attend(query, key, *arrays, **options):
    name = config.attention_impl
    if query.shape[1] == 1:  # a step of cached decoding has one row of scores
      name = 'plain'
    elif name == 'auto':
      name = automatic(config, query.shape[1], key.shape[1])
    return _named(name, config)(query, key, *arrays, **options)

  return attend


def automatic(config: BartConfig, queries: int, keys: int) -> str:
  """What 'auto' means on the platform that is traced for.

  Args:
    config: the model's numbers.
    queries: length of the rows of queries.
    keys: length of the rows of keys.

  Returns:
    1. On a TPU 'flash', or 'chunked' where the shapes are not for it.
    2. On an NVIDIA GPU from Ampere on 'cudnn' if nothing is dropped, the computation
       has 16 bits and the shapes are for it.
    3. Else 'plain'.
  """
  device = placement.device()
  if device.platform == 'tpu':
    takes = flash.refusal(config.head_dim, max(queries, keys)) is None
    return 'flash' if takes else 'chunked'
  if cudnn.runs_on(device) and not config.attention_dropout_rate:
    return 'cudnn' if _fits_cudnn(config, queries, keys) else 'plain'
  return 'plain'


def _fits_cudnn(config: BartConfig, queries: int, keys: int) -> bool:
  """Whether JAX hands attention with a mask, trained too, to cuDNN."""
  heads = config.head_dim % 8 == 0 and config.head_dim <= 128
  return config.dtype.itemsize == 2 and heads and queries % 2 == keys % 2 == 0


def _named(name: str, config: BartConfig) -> Core:
  plain = attention.plain_attention
  if config.remat_policy == 'attention':  # the others keep no scores as they are
    plain = _recomputed(plain)
  return {
    'plain': plain,
    'chunked': functools.partial(
      attention.chunked_attention, chunk_length=config.attention_chunk_length
    ),
    'flash': flash.flash_attention,
    'cudnn': cudnn.cudnn_attention,
  }[name]


def _recomputed(attend: Core) -> Core:
  """The same, keeping nothing for the backward pass but its arguments."""

  def recomputed(*arrays, causal, dropout_rate, dropout_key):
    def run(dropout_key, *arrays):
      return attend(
        *arrays, causal=causal, dropout_rate=dropout_rate, dropout_key=dropout_key
      )

    return jax.checkpoint(run)(dropout_key, *arrays)

  return recomputed
