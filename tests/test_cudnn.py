"""The call to cuDNN: its arguments, by JAX's own implementation of the same call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bart_t5x import attention, cudnn


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('packed', [False, True])
def test_equals_plain_attention(causal, packed):
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=(2, 7, 3, 4)).astype(np.float32) for _ in range(3)]
  row = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 3, 3]])
  segments = (row, row) if packed else ()

  def run(core):
    def total(*arrays):
      return jnp.sum(jnp.sin(core(*arrays, *segments, causal=causal)))

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*arrays)

  ours = run(functools.partial(cudnn.cudnn_attention, implementation='xla'))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6),
    ours,
    run(attention.plain_attention),
  )


def test_refuses_what_it_would_ignore_or_cannot_do(monkeypatch):
  x = jnp.ones((1, 4, 1, 8), jnp.bfloat16)
  with pytest.raises(ValueError, match="'cudnn' needs an NVIDIA GPU .*Got: cpu"):
    cudnn.cudnn_attention(x, x, x)
  gpu = cudnn.placement.Device('gpu', 'H100', (9, 0))
  monkeypatch.setattr(cudnn.placement, 'device', lambda: gpu)
  with pytest.raises(ValueError, match='drops no attention weights. Got: .*0.1'):
    cudnn.cudnn_attention(x, x, x, dropout_rate=0.1, dropout_key=jax.random.key(0))
  wide = x.astype(jnp.float32)
  with pytest.raises(ValueError, match='in 16 bits. Got: BartConfig.dtype = float32'):
    cudnn.cudnn_attention(wide, wide, wide)


@pytest.mark.parametrize(
  ('kind', 'capability', 'got'),
  [
    ('V100', (7, 0), r'V100 \(7\.0\)'),
    ('T4', (7, 5), r'T4 \(7\.5\)'),
    ('MI300', None, r'MI300 \(no compute capability\)'),
  ],
)
def test_refuses_gpus_before_ampere_and_others(monkeypatch, kind, capability, got):
  gpu = cudnn.placement.Device('gpu', kind, capability)
  monkeypatch.setattr(cudnn.placement, 'device', lambda: gpu)
  x = jnp.ones((1, 4, 1, 8), jnp.bfloat16)
  with pytest.raises(ValueError, match=rf'8\.0 or later \(Ampere\)\. Got: {got}'):
    cudnn.cudnn_attention(x, x, x)
