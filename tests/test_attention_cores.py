"""Which attention a config gets, and what each says where it cannot run."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bart_t5x import attention_cores, flash, network, placement

CONFIG = functools.partial(
    network.BartConfig, vocab_size=40, emb_dim=128, num_heads=2, num_encoder_layers=1,
    num_decoder_layers=1, mlp_dim=16, max_positions=16,
)  # fmt: skip


@pytest.mark.parametrize(
  ('platform', 'fields', 'lengths', 'wanted'),
  [
    ('cpu', {}, (8, 8), 'plain'),
    ('tpu', {}, (1024, 896), 'flash'),
    ('tpu', {}, (8, 4096), 'chunked'),
    ('tpu', {'emb_dim': 96}, (8, 8), 'chunked'),  # heads of 48
    ('8.0', {'dtype': 'bfloat16'}, (8, 8), 'plain'),  # drops attention weights
    ('8.0', {'dtype': 'bfloat16', 'attention_dropout_rate': 0.0}, (8, 8), 'cudnn'),
    ('12.0', {'dtype': 'bfloat16', 'attention_dropout_rate': 0.0}, (8, 8), 'cudnn'),
    ('7.5', {'dtype': 'bfloat16', 'attention_dropout_rate': 0.0}, (8, 8), 'plain'),
    ('gfx90a', {'dtype': 'bfloat16', 'attention_dropout_rate': 0.0}, (8, 8), 'plain'),
    ('8.0', {'attention_dropout_rate': 0.0}, (8, 8), 'plain'),  # float32
    ('8.0', {'dtype': 'bfloat16', 'attention_dropout_rate': 0.0}, (7, 8), 'plain'),
  ],
)
def test_automatic_by_platform(monkeypatch, platform, fields, lengths, wanted):
  """The platform, or a GPU's compute capability."""
  device = types.SimpleNamespace(platform=platform, device_kind='?')
  if platform not in ('cpu', 'tpu'):
    device.platform, device.compute_capability = 'gpu', platform
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  assert attention_cores.automatic(CONFIG(**fields), *lengths) == wanted


@pytest.mark.parametrize(
  ('impl', 'remat_policy'),
  [('auto', 'attention'), ('chunked', 'none'), ('flash', 'attention')],
)
def test_every_core_that_runs_here_equals_plain(impl, remat_policy):
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=(2, 8, 2, 4)).astype(np.float32) for _ in range(3)]
  segments = np.array([[1, 1, 1, 2, 2, 2, 3, 3], [1] * 8])

  def run(name, remat_policy):
    config = CONFIG(
      attention_impl=name, attention_chunk_length=3, remat_policy=remat_policy
    )
    core = attention_cores.core(config)

    def total(*arrays):
      mixed = core(
        *arrays, segments, segments, causal=True, dropout_rate=0.0, dropout_key=None
      )
      return jnp.sum(jnp.sin(mixed))

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*arrays)

  with flash.interpreted():
    ours = run(impl, remat_policy)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    ours,
    run('plain', 'none'),
  )


def test_a_step_of_decoding_is_plain_whatever_is_asked_for():
  x = jnp.ones((2, 1, 2, 4))
  keys = jnp.ones((2, 8, 2, 4))
  core = attention_cores.core(CONFIG(attention_impl='flash'))
  got = core(x, keys, keys, causal=False, dropout_rate=0.0, dropout_key=None)
  np.testing.assert_allclose(got, 1)


def test_cudnn_and_dropout_on_weights_exclude_each_other():
  with pytest.raises(ValueError, match='needs attention_dropout_rate = 0 .*Got: 0.1'):
    CONFIG(attention_impl='cudnn')


def test_the_device_is_that_of_the_mesh_in_force():
  mesh = jax.make_mesh((8,), ('data',), (jax.sharding.AxisType.Auto,))
  assert placement.device().platform == 'cpu'
  with jax.set_mesh(mesh):
    assert placement.mesh().shape['data'] == 8
    assert placement.device().platform == 'cpu'
  assert placement.mesh() is None
