"""Attention by cuDNN, on NVIDIA GPUs, through JAX's own interface to it.

Not run on a GPU: tests run it with JAX's XLA implementation behind the same call.
"""

from typing import Literal

import jax
from jaxtyping import Array, Float, Int

from bart_t5x import attention, placement

# Ampere: cuDNN's fused attention runs on it and on what came later
# (https://docs.nvidia.com/deeplearning/cudnn, "Scaled Dot Product Attention").
OLDEST_CAPABILITY = (8, 0)


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
  implementation: Literal['cudnn', 'xla'] = 'cudnn',
) -> Float[Array, 'b q h d']:
  """`attention.plain_attention` by cuDNN's fused kernel; takes its arguments.

  Segments become a mask [batch, 1, query, key], which is small beside the scores
  that never exist. What a query that sees no key gets is unspecified.

  Args:
    query: as in `attention.plain_attention`, and so the others.
    key: keys.
    value: values.
    query_segments: segments of the queries.
    key_segments: segments of the keys.
    causal: whether queries see earlier keys only.
    dropout_rate: must be 0 where dropout_key is given.
    dropout_key: see dropout_rate.
    implementation: what `jax.nn.dot_product_attention` runs.

  Raises:
    ValueError: without such a GPU, for other than 16 bits, and for dropout.
  """
  if implementation == 'cudnn':
    _check(query)
  if dropout_key is not None and dropout_rate > 0:
    raise ValueError(
      'cuDNN as JAX calls it drops no attention weights. '
      f'Got: dropout_rate={dropout_rate}.'
    )
  mask = attention.visible(
    query_segments, key_segments, False, query.shape[1], key.shape[1]
  )
  return jax.nn.dot_product_attention(
      query, key, value, mask=mask, scale=1.0, is_causal=causal,
      implementation=implementation,
  )  # fmt: skip


def runs_on(device: placement.Device) -> bool:
  """Whether cuDNN's attention runs on a device: an NVIDIA GPU, Ampere or later."""
  return device.platform == 'gpu' and (device.capability or (0, 0)) >= OLDEST_CAPABILITY


def _check(query):
  device = placement.device()
  if not runs_on(device):
    got = device.platform
    if got == 'gpu':
      version = device.capability
      version = '{}.{}'.format(*version) if version else 'no compute capability'
      got = f'{device.kind} ({version})'
    raise ValueError(
      "BartConfig.attention_impl = 'cudnn' needs an NVIDIA GPU of compute capability "
      f"8.0 or later (Ampere). Got: {got}. 'auto' takes what the platform has; 'plain' "
      "and 'chunked' run everywhere."
    )
  if query.dtype.itemsize != 2:
    raise ValueError(
      "attention_impl = 'cudnn' computes in 16 bits. Got: BartConfig.dtype = "
      f"{query.dtype}. Set it to 'bfloat16', or use 'plain'."
    )
