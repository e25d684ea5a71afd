"""Choices that the project has made for good, undone, so that `tpu_plan.py` can say
what each is worth. Bound by `tpu_undonated.gin` and `tpu_padded_heads.gin`.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn

from bart_t5x import flash
from t5x import partitioning


def undonated(
  partitioner: partitioning.PjitPartitioner,
) -> partitioning.PjitPartitioner:
  """The partitioner, whose steps no longer write the new state over the old one."""
  partition = partitioner.partition

  def keeping(*args, donate_argnums=(), **kwargs):
    del donate_argnums
    return partition(*args, **kwargs)

  partitioner.partition = keeping
  return partitioner


def padded_heads(module: nn.Module) -> nn.Module:
  """The module, whose attention kernels have one head a program, alone in its lanes.

  As kernels with arrays [batch, heads, length, width] have it: a TPU keeps these with
  the width filled up to 128 lanes.
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
