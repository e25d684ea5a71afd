"""Attention implementations against the plain one, and which one runs where."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bart_t5x import attention, flash


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


def test_query_without_visible_keys_gets_finite_values():
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

  def value_and_gradients(attend, *given, **kwargs):
    def total(q, k, v):
      return jnp.sum(jnp.sin(attend(q, k, v, *given, causal=causal, **kwargs)))

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


def test_chunks_have_different_dropout():
  """Equal queries in two chunks lose different weights, at the given rate."""
  q, k = np.zeros((1, 8, 1, 4), np.float32), np.zeros((1, 512, 1, 4), np.float32)
  v = np.broadcast_to(np.eye(512, dtype=np.float32)[None, :, None], (1, 512, 1, 512))
  attended = attention.chunked_attention(
    q, k, v, dropout_rate=0.25, dropout_key=jax.random.key(0), chunk_length=4
  )
  dropped = np.asarray(attended)[0, :, 0] == 0  # [query, key]
  assert abs(dropped.mean() - 0.25) < 5 * np.sqrt(0.1875 / dropped.size)
  assert not (dropped[:4] == dropped[4:]).all(-1).any()


@pytest.mark.parametrize(
  ('platform', 'fields', 'lengths', 'wanted'),
  [
    ('cpu', {}, (8, 8), 'plain'),
    ('tpu', {}, (1024, 896), 'flash'),
    ('tpu', {}, (8, 4096), 'chunked'),
    ('tpu', {'head_dim': 48}, (8, 8), 'chunked'),
    ('8.0', {'dtype': 'bfloat16'}, (8, 8), 'plain'),  # drops attention weights
    ('8.0', {'dtype': 'bfloat16', 'dropout_rate': 0.0}, (8, 8), 'cudnn'),
    ('12.0', {'dtype': 'bfloat16', 'dropout_rate': 0.0}, (8, 8), 'cudnn'),
    ('7.5', {'dtype': 'bfloat16', 'dropout_rate': 0.0}, (8, 8), 'plain'),
    ('gfx90a', {'dtype': 'bfloat16', 'dropout_rate': 0.0}, (8, 8), 'plain'),
    ('8.0', {'dropout_rate': 0.0}, (8, 8), 'plain'),  # float32
    ('8.0', {'dtype': 'bfloat16', 'dropout_rate': 0.0}, (7, 8), 'plain'),
  ],
)
def test_automatic_by_platform(monkeypatch, platform, fields, lengths, wanted):
  # `platform` may also be a GPU's compute capability.
  device = types.SimpleNamespace(platform=platform, device_kind='?')
  if platform not in ('cpu', 'tpu'):
    device.platform, device.compute_capability = 'gpu', platform
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  settings = {'head_dim': 64, 'dtype': 'float32', 'dropout_rate': 0.1, **fields}
  query, key = (
    jnp.ones((1, n, 2, settings['head_dim']), settings['dtype']) for n in lengths
  )
  assert attention.automatic(query, key, settings['dropout_rate']) == wanted


@pytest.mark.parametrize(
  ('impl', 'recompute'),
  [('auto', True), ('chunked', False), ('flash', True)],
)
def test_implementations_equal_plain(impl, recompute):
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=(2, 8, 2, 4)).astype(np.float32) for _ in range(3)]
  segments = np.array([[1, 1, 1, 2, 2, 2, 3, 3], [1] * 8])

  def run(name, recompute):
    def total(*arrays):
      attended = attention.attend(
        name, *arrays, segments, segments, causal=True, chunk_length=3,
        recompute=recompute,
      )  # fmt: skip
      return jnp.sum(jnp.sin(attended))

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*arrays)

  with flash.interpreted():
    ours = run(impl, recompute)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    ours,
    run('plain', False),
  )


def test_step_attention_equals_plain():
  """Two queries of a row see the same keys, as two beams of an example do."""
  rng = np.random.default_rng(0)
  query = rng.normal(size=(3, 2, 2, 4)).astype(np.float32)
  keys, values = (rng.normal(size=(3, 7, 2, 4)).astype(np.float32) for _ in range(2))
  seen = rng.integers(0, 2, (3, 7))
  stored = attention.heads_first(keys), attention.heads_first(values)
  np.testing.assert_allclose(
    attention.step_attention(query, *stored, seen > 0),
    attention.plain_attention(query, keys, values, np.ones((3, 2), int), seen),
    rtol=1e-5,
    atol=1e-6,
  )


def test_decoding_steps_are_always_plain():
  x, keys = jnp.ones((2, 1, 2, 4)), jnp.ones((2, 8, 2, 4))
  got = attention.attend('flash', x, keys, keys, chunk_length=4)
  np.testing.assert_allclose(got, 1)


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('packed', [False, True])
def test_call_of_cudnn_equals_plain_attention(causal, packed):
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=(2, 7, 3, 4)).astype(np.float32) for _ in range(3)]
  row = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 3, 3]])
  segments = (row, row) if packed else ()

  def run(attend):
    def total(*arrays):
      return jnp.sum(jnp.sin(attend(*arrays, *segments, causal=causal)))

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*arrays)

  ours = run(functools.partial(attention.cudnn_attention, implementation='xla'))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6),
    ours,
    run(attention.plain_attention),
  )


@pytest.mark.parametrize(
  ('kind', 'capability', 'dtype'),
  [
    ('V100', (7, 0), 'bfloat16'),
    ('MI300', None, 'bfloat16'),
    ('H100', (9, 0), 'float32'),
  ],
)
def test_cudnn_needs_a_recent_gpu_and_16_bits(monkeypatch, kind, capability, dtype):
  monkeypatch.setattr(flash, 'device', lambda: flash.Device('gpu', kind, capability))
  x = jnp.ones((1, 4, 1, 8), dtype)
  with pytest.raises(ValueError, match=f'Got: {kind} and {dtype}'):
    attention.cudnn_attention(x, x, x)
  with pytest.raises(ValueError, match='Got: 0.1'):
    attention.cudnn_attention(x, x, x, dropout_rate=0.1, dropout_key=jax.random.key(0))
