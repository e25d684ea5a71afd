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
