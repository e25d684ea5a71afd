"""Attention cores and dropout bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bart_t5x import attention


def test_visible_by_hand():
  queries, keys = np.array([[1, 1, 2, 0]]), np.array([[1, 2, 0]])
  got = attention.visible(queries, keys, False, 4, 3)
  wanted = [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
  np.testing.assert_array_equal(got[0, 0], np.array(wanted, bool))
  segments = np.array([[1, 1, 2, 2]])
  got = attention.visible(segments, segments, True, 4, 4)
  wanted = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
  np.testing.assert_array_equal(got[0, 0], np.array(wanted, bool))
  assert attention.visible(None, None, False, 4, 4) is None


def test_a_query_that_sees_nothing_gets_finite_values():
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(1, 2, 1, 4)).astype(np.float32) for _ in range(3))
  ones, zeros = np.ones((1, 2), int), np.zeros((1, 2), int)
  assert np.isfinite(attention.plain_attention(q, k, v, ones, zeros)).all()


@pytest.mark.parametrize('chunk_length', [1, 3, 7, 100])
@pytest.mark.parametrize('causal', [False, True])
def test_chunked_attention_equals_plain(chunk_length, causal):
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(2, 7, 3, 4)).astype(np.float32) for _ in range(3))
  segments = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 3, 3]])

  def value_and_gradients(core, *given, **kwargs):
    def total(q, k, v):
      return jnp.sum(jnp.sin(core(q, k, v, *given, causal=causal, **kwargs)))

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)

  for given in ((segments, segments), ()):
    plain = value_and_gradients(attention.plain_attention, *given)
    chunked = value_and_gradients(
      attention.chunked_attention, *given, chunk_length=chunk_length
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6),
      chunked,
      plain,
    )


def test_chunks_drop_weights_apart_from_each_other():
  """Equal queries in two chunks lose different weights, at the rate asked for."""
  q, k = np.zeros((1, 8, 1, 4), np.float32), np.zeros((1, 512, 1, 4), np.float32)
  v = np.broadcast_to(np.eye(512, dtype=np.float32)[None, :, None], (1, 512, 1, 512))
  mixed = attention.chunked_attention(
    q, k, v, dropout_rate=0.25, dropout_key=jax.random.key(0), chunk_length=4
  )
  dropped = np.asarray(mixed)[0, :, 0] == 0  # [query, key]
  assert abs(dropped.mean() - 0.25) < 5 * np.sqrt(0.1875 / dropped.size)
  assert not (dropped[:4] == dropped[4:]).all(-1).any()


@pytest.mark.parametrize('shape', [(1000,), (40, 500), (4, 3, 64, 64)])
def test_dropout_keeps_the_share_and_the_expectation(shape):
  x = np.ones(shape, np.float32)
  got = np.asarray(attention.dropout(x, 0.1, jax.random.key(7)))
  kept = got != 0
  count = x.size
  # Five standard deviations of a binomial share.
  assert abs(kept.mean() - 0.9) < 5 * np.sqrt(0.09 / count)
  np.testing.assert_allclose(got[kept], 1 / 0.9, rtol=1e-6)


def test_dropout_off():
  x = np.ones((3, 4), np.float32)
  assert attention.dropout(x, 0.5, None) is x
  assert attention.dropout(x, 0.0, jax.random.key(0)) is x


def test_dropout_is_drawn_for_every_element():
  """Neighbours along each axis, and two keys, agree as often as chance has it."""
  shape = (16, 64, 128)

  def kept(seed):
    bits = attention.dropout_bits(jax.random.key(seed), shape)
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
  bits = np.asarray(attention.dropout_bits(jax.random.key(3), (256, 1024)))
  for shift in (0, 8, 16, 24):
    counts = np.bincount(((bits >> shift) & 255).ravel(), minlength=256)
    expected = bits.size / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # 255 degrees of freedom: mean 255, standard deviation 22.6.
    assert abs(chi_square - 255) < 6 * 22.6, shift


def test_every_kind_of_key_draws():
  for impl in ('threefry2x32', 'rbg', 'unsafe_rbg'):
    bits = attention.dropout_bits(jax.random.key(0, impl=impl), (4, 8))
    assert bits.dtype == jnp.uint32 and len(np.unique(bits)) == 32
  old = attention.dropout_bits(jax.random.PRNGKey(0), (4, 8))
  new = attention.dropout_bits(jax.random.key(0), (4, 8))
  np.testing.assert_array_equal(old, new)


def test_dropout_bits_do_not_depend_on_the_mesh():
  mesh = jax.make_mesh((8,), ('data',))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))

  def draw(key):
    return attention.dropout_bits(key, (16, 32))

  whole = jax.jit(draw)(jax.random.key(5))
  split = jax.jit(draw, out_shardings=sharding)(jax.random.key(5))
  np.testing.assert_array_equal(whole, split)
