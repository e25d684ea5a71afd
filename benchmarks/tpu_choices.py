"""Undoes fixed choices of the project, so that `tpu_plan.py` can measure their effect.

Bound by `tpu_undonated.gin` and `tpu_padded_heads.gin`.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn

from bart_t5x import flash
from t5x import partitioning


def undonated(
  partitioner: partitioning.PjitPartitioner,
) -> partitioning.PjitPartitioner:
  """Returns the partitioner, without donation of the old state."""
  partition = partitioner.partition

  def keeping(*args, donate_argnums=(), **kwargs):
    del donate_argnums
    return partition(*args, **kwargs)

  partitioner.partition = keeping
  return partitioner


def padded_heads(module: nn.Module) -> nn.Module:
  """Returns the module; attention kernels get one head each, padded to 128 lanes.

  As in kernels with arrays [batch, heads, length, width], which a TPU pads like that.
  """
  attend = flash.flash_attention

  @functools.wraps(attend)
  def padded(query, key, value, *segments, **options):
    width = query.shape[-1]
    wide = [
      jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, flash.LANES - width)))
      for x in (query, key, value)
    ]
    return attend(*wide, *segments, **options)[..., :width]

  flash.flash_attention = padded
  return module
