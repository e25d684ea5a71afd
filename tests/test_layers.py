"""The parts, against formulas and hand-made cases."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bart_t5x import layers

INIT = nn.initializers.normal(0.3)


def test_gelu_is_the_exact_one():
  x = np.linspace(-9, 9, 2001).astype(np.float32)
  phi = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.astype(float)])
  # Four roundings of the larger of 1 and x.
  spacing = np.finfo(np.float32).eps * np.maximum(1, np.abs(x))
  assert (np.abs(layers.gelu(x) - x * phi) <= 2 * spacing).all()
  # The tanh approximation, JAX's default, is farther off than that.
  assert np.abs(jax.nn.gelu(x) - x * phi).max() > 1e-4


def test_layer_norm_is_the_formula_with_epsilon_1e_5():
  x = np.random.default_rng(0).normal(0.1, 1e-2, (2, 3, 8)).astype(np.float32)
  scale, bias = np.linspace(0.5, 2, 8), np.linspace(-1, 1, 8)
  got = layers.LayerNorm(jnp.float32).apply(
    {'params': {'scale': scale, 'bias': bias}}, x
  )
  x = x.astype(np.float64)
  spread = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  wanted = (x - x.mean(-1, keepdims=True)) / spread * scale + bias
  np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)


def test_layer_norm_of_bfloat16_is_taken_in_float32():
  x = jnp.asarray(np.random.default_rng(0).normal(100, 1, (1, 2, 64)), jnp.bfloat16)
  params = {'params': {'scale': np.ones(64), 'bias': np.zeros(64)}}
  low = layers.LayerNorm(jnp.bfloat16).apply(params, x)
  high = layers.LayerNorm(jnp.float32).apply(params, x.astype(jnp.float32))
  assert low.dtype == jnp.bfloat16
  np.testing.assert_array_equal(low, high.astype(jnp.bfloat16))


def _positions(**kwargs):
  return layers.PositionEmbedder(6, 3, jnp.float32, INIT, **kwargs)


TABLE = np.arange(24, dtype=np.float32).reshape(8, 3)


def test_positions_lie_two_rows_further_on():
  params = {'params': {'embedding': TABLE}}
  tokens = np.ones((2, 4), int)
  counted = _positions().apply(params, tokens)
  np.testing.assert_array_equal(counted, TABLE[None, 2:6])
  packed = np.array([[0, 1, 0, 1], [0, 1, 2, 5]])
  got = _positions().apply(params, tokens, packed)
  np.testing.assert_array_equal(got, TABLE[packed + 2])


def test_positions_count_steps_in_the_cache():
  module, params = _positions(decode=True), {'params': {'embedding': TABLE}}
  _, cache = module.apply(params, np.ones((2, 4), int), mutable=['cache'])
  for step in range(3):
    got, cache = module.apply(
      {**params, **cache}, np.ones((2, 1), int), mutable=['cache']
    )
    np.testing.assert_array_equal(got, np.broadcast_to(TABLE[2 + step], (2, 1, 3)))


def test_too_many_positions_are_refused():
  with pytest.raises(ValueError, match='row of 7 tokens .* the model has 6'):
    _positions().init(jax.random.key(0), np.ones((1, 7), int))


def test_unknown_ids_embed_as_nan():
  module = layers.TokenEmbedder(8, 3, jnp.float32, INIT)
  got = module.apply({'params': {'embedding': TABLE}}, np.array([[7, 8]]))
  np.testing.assert_array_equal(got[0, 0], TABLE[7])
  assert np.isnan(got[0, 1]).all()


@pytest.mark.parametrize(
  ('index', 'wanted'),
  [(5, [5] * 4), ([1, 2], [1, 1, 2, 2]), ([[1, 2], [3, 4]], [1, 2, 3, 4])],
)
def test_indices_spread_over_beams(index, wanted):
  np.testing.assert_array_equal(layers.per_row(jnp.asarray(index), 4), wanted)


def _attention(**kwargs):
  return layers.Attention(2, jnp.float32, 0.0, INIT, **kwargs)


def test_the_cache_takes_one_position_at_a_time():
  module, x = _attention(causal=True, decode=True), np.ones((2, 4, 6), np.float32)
  variables = module.init(jax.random.key(0), x, x)
  variables.pop('params_axes')
  with pytest.raises(ValueError, match=r'one position .*\[2, 1\]. Got: \[2, 4\]'):
    module.apply(variables, x, x, mutable=['cache'])


def test_a_prompt_needs_a_cache_of_its_own_shape():
  made, x = _attention(causal=True, decode=True), np.ones((2, 4, 6), np.float32)
  variables = made.init(jax.random.key(0), x, x)
  variables.pop('params_axes')
  module, lengths = _attention(causal=True, prefill=True), np.array([1, 1])
  with pytest.raises(ValueError, match='needs a cache'):
    module.apply(
      {'params': variables['params']}, x, x, None, None, lengths, mutable=['cache']
    )
  shorter = x[:, :3]
  with pytest.raises(ValueError, match=r'room for keys \(2, 4, 2, 3\)'):
    module.apply(variables, shorter, shorter, None, None, lengths, mutable=['cache'])


def test_attention_is_the_formula():
  rng = np.random.default_rng(1)
  queries, keys = rng.normal(size=(1, 3, 6)), rng.normal(size=(1, 4, 6))
  module = _attention()
  variables = module.init(jax.random.key(0), queries, keys)
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), variables['params'])
  got = module.apply({'params': params}, queries, keys)
  heads = []
  for head in (slice(0, 3), slice(3, 6)):
    q, k, v = (
      x @ params[name]['kernel'][:, head] + params[name]['bias'][head]
      for name, x in (('query', queries), ('key', keys), ('value', keys))
    )
    scores = np.exp((q / math.sqrt(3)) @ k.transpose(0, 2, 1))
    heads.append(scores / scores.sum(-1, keepdims=True) @ v)
  out = params['out']
  wanted = np.concatenate(heads, -1) @ out['kernel'] + out['bias']
  np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)
