"""Dropout: rate, independence of its bits, the same bits on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bart_t5x import dropout


@pytest.mark.parametrize('shape', [(1000,), (40, 500), (4, 3, 64, 64)])
def test_dropout_keeps_the_share_and_the_expectation(shape):
  x = np.ones(shape, np.float32)
  got = np.asarray(dropout.dropout(x, 0.1, jax.random.key(7)))
  kept = got != 0
  count = x.size
  # Five standard deviations of a binomial share.
  assert abs(kept.mean() - 0.9) < 5 * np.sqrt(0.09 / count)
  np.testing.assert_allclose(got[kept], 1 / 0.9, rtol=1e-6)


def test_dropout_off():
  x = np.ones((3, 4), np.float32)
  assert dropout.dropout(x, 0.5, None) is x
  assert dropout.dropout(x, 0.0, jax.random.key(0)) is x


def test_elements_are_independent():
  """Neighbours along each axis, and bits of two keys, agree as often as by chance."""
  shape = (16, 64, 128)

  def kept(seed):
    bits = dropout.dropout_bits(jax.random.key(seed), shape)
    return np.asarray(bits) >= 2**31

  first = kept(0)
  bound = 5 * 0.5 / np.sqrt(first.size)
  for axis in range(3):
    for distance in (1, 2, 8):
      again = np.roll(first, distance, axis)
      assert abs((first == again).mean() - 0.5) < bound * 1.1, (axis, distance)
  assert abs((first == kept(1)).mean() - 0.5) < bound
  # No row and no column is biased beyond chance (6 standard deviations).
  for axes in ((0, 1), (1, 2), (0, 2)):
    share = first.mean(axes)
    cells = first.size / share.size
    assert np.abs(share - 0.5).max() < 6 * 0.5 / np.sqrt(cells)


def test_dropout_bits_are_uniform_in_every_byte():
  bits = np.asarray(dropout.dropout_bits(jax.random.key(3), (256, 1024)))
  for shift in (0, 8, 16, 24):
    counts = np.bincount(((bits >> shift) & 255).ravel(), minlength=256)
    expected = bits.size / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # 255 degrees of freedom: mean 255, standard deviation 22.6.
    assert abs(chi_square - 255) < 6 * 22.6, shift


@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_rows_are_independent(rate):
  """In pairs, and in rectangles: with xor alone, three corners determine the fourth."""
  size = 1024
  quadruples = []
  for seed in range(4):
    bits = np.asarray(dropout.dropout_bits(jax.random.key(seed), (size, size)))
    dropped = (bits < dropout.threshold(rate)) - rate
    table = dropped / np.sqrt(rate * (1 - rate))
    products = table @ table.T / np.sqrt(size)
    others = products[~np.eye(size, dtype=bool)]
    quadruples.append(np.mean(others**2))
    # Half a million pairs of rows: 6.5 standard deviations.
    assert np.abs(others).max() < 6.5
  # 1 where bits are independent; 1024 for xor alone at the rate of a half.
  assert abs(np.mean(quadruples) - 1) < 0.02


def test_every_kind_of_key_draws():
  for impl in ('threefry2x32', 'rbg', 'unsafe_rbg'):
    bits = dropout.dropout_bits(jax.random.key(0, impl=impl), (4, 8))
    assert bits.dtype == jnp.uint32 and len(np.unique(bits)) == 32
  old = dropout.dropout_bits(jax.random.PRNGKey(0), (4, 8))
  new = dropout.dropout_bits(jax.random.key(0), (4, 8))
  np.testing.assert_array_equal(old, new)


def test_dropout_bits_do_not_depend_on_the_mesh():
  mesh = jax.make_mesh((8,), ('data',))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))

  def draw(key):
    return dropout.dropout_bits(key, (16, 32))

  whole = jax.jit(draw)(jax.random.key(5))
  split = jax.jit(draw, out_shardings=sharding)(jax.random.key(5))
  np.testing.assert_array_equal(whole, split)
