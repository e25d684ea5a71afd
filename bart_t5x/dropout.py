"""Dropout whose every bit is a function of a key and of the element's own index.

JAX's generators take some 50 operations for 32 bits, which made dropout a sixth of a
training step on a CPU; the hash here takes 11, and none of them is a product: a TPU's
vector units multiply no integers, and its compiler writes 22 shifts and additions for
one. As no bit depends on another, the compiler fuses the hash into what uses it, a
sharded array gets the same bits as a whole one, and a kernel can draw those of the
block before it (`flash`). Good enough for dropout; not a generator for anything else.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32


def _mixed(bits: UInt32[Array, '...']) -> UInt32[Array, '...']:
  """A bijection of 32 bits in which every input bit moves every output bit.

  Shifts, sums and constants are those of Bob Jenkins' integer hash (public domain).
  """
  bits = (bits + jnp.uint32(0x7ED55D16)) + (bits << 12)
  bits = (bits ^ jnp.uint32(0xC761C23C)) ^ (bits >> 19)
  bits = (bits + jnp.uint32(0x165667B1)) + (bits << 5)
  bits = (bits + jnp.uint32(0xD3A2646C)) ^ (bits << 9)
  bits = (bits + jnp.uint32(0xFD7046C5)) + (bits << 3)
  return (bits ^ jnp.uint32(0xB55A4F09)) ^ (bits >> 16)


def _stirred(bits: UInt32[Array, '...']) -> UInt32[Array, '...']:
  """The same for bits that are mixed already, at half the price.

  Carries of the sums are what xor alone would lack: without them the four bits of two
  rows and two columns determine each other.
  """
  bits = bits + (bits << 10)
  bits = bits ^ (bits >> 6)
  bits = bits + (bits << 3)
  bits = bits ^ (bits >> 11)
  return bits + (bits << 15)


def seeds(key: jax.Array) -> tuple[UInt32[Array, ''], UInt32[Array, '']]:
  """The two numbers, for rows and for columns, that all bits of a key depend on."""
  row_seed, column_seed = jax.random.bits(key, (2,), jnp.uint32)
  return row_seed, column_seed


def row_bits(
  row: UInt32[Array, '...'], seed: UInt32[Array, '']
) -> UInt32[Array, '...']:
  """What a row's index adds to its bits; rows count through all axes but the last."""
  return _mixed(_mixed(row ^ seed))


def column_bits(
  column: UInt32[Array, '...'], seed: UInt32[Array, '']
) -> UInt32[Array, '...']:
  """What the index along the last axis adds to the bits."""
  return _mixed(column ^ seed)


def joined_bits(
  row: UInt32[Array, '...'], column: UInt32[Array, '...']
) -> UInt32[Array, '...']:
  """The bits of elements, from `row_bits` and `column_bits` that broadcast.

  Mixed apart and joined by xor: two rows then never share a shifted run of bits, as
  they would if columns were steps along one sequence.
  """
  return _stirred(row ^ column)


def threshold(rate: float) -> int:
  """Bits below it mean zero."""
  return min(round(rate * 2**32), 2**32 - 1)


def dropout_bits(key: jax.Array, shape: tuple[int, ...]) -> UInt32[Array, '...']:
  """Random bits for dropout.

  Args:
    key: a JAX random key of any kind.
    shape: the shape wanted.

  Returns:
    uint32 of that shape.
  """
  row_seed, column_seed = seeds(key)
  row = jnp.zeros(shape[:-1] + (1,), jnp.uint32)
  for axis, size in enumerate(shape[:-1]):
    row = row * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, row.shape, axis)
  column_shape = (1,) * (len(shape) - 1) + shape[-1:]
  column = jax.lax.broadcasted_iota(jnp.uint32, column_shape, len(shape) - 1)
  return joined_bits(row_bits(row, row_seed), column_bits(column, column_seed))


def dropout(
  x: Float[Array, '...'], rate: float, key: jax.Array | None
) -> Float[Array, '...']:
  """Sets each element to zero with probability `rate`, scaling up the rest.

  Args:
    x: values; every element is drawn on its own, nothing is broadcast.
    rate: probability of zero, in [0, 1).
    key: a random key, or None to leave x as it is.

  Returns:
    An array like x with the same expectation.
  """
  if key is None or rate == 0:
    return x
  keep = dropout_bits(key, x.shape) >= jnp.uint32(threshold(rate))
  return jnp.where(keep, x * jnp.asarray(1 / (1 - rate), x.dtype), 0)
