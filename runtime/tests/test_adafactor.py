"""Adafactor against steps by hand, and against optax where the two agree."""

import flax.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from t5x import adafactor

Factor = adafactor.FactorDim


def plain(**kwargs):
  """An Adafactor without parameter scale and clipping."""
  settings = {'multiply_by_parameter_scale': False, 'clipping_threshold': None}
  return adafactor.Adafactor(**{'learning_rate': 0.1, **settings, **kwargs})


def run(rule, params, grads_by_step):
  optimizer = rule.create(params)
  for grads in grads_by_step:
    optimizer = optimizer.apply_gradient(grads)
  return optimizer


@pytest.mark.parametrize('decay_rate', [0.8, 0.5])
def test_unfactored_steps_by_hand(decay_rate):
  params = {'b': jnp.array([1.0, -2.0])}
  g1, g2 = np.array([3.0, -4.0]), np.array([1.0, 2.0])
  rule = plain(decay_rate=decay_rate)
  optimizer = run(rule, params, [{'b': jnp.array(g1)}])
  # In the first step 1 - 1**-c = 0 of the old moments is kept: a step of the sign.
  np.testing.assert_allclose(optimizer.target['b'], [0.9, -1.9], rtol=1e-6)
  np.testing.assert_allclose(optimizer.state.param_states['b'].v, g1**2, rtol=1e-6)

  optimizer = run(rule, params, [{'b': jnp.array(g)} for g in (g1, g2)])
  kept = 1 - 2**-decay_rate
  v = kept * g1**2 + (1 - kept) * g2**2
  want = np.array([0.9, -1.9]) - 0.1 * g2 / np.sqrt(v)
  np.testing.assert_allclose(optimizer.target['b'], want, rtol=1e-6)
  assert optimizer.state.step == 2


def test_factored_step_by_hand():
  # Factoring is exact for squares of rank one, so the step is the sign again.
  grad = np.outer([1.0, 2.0], [1.0, 3.0, 5.0])
  params = {'w': jnp.zeros((2, 3))}
  optimizer = run(plain(min_dim_size_to_factor=2), params, [{'w': jnp.array(grad)}])
  np.testing.assert_allclose(optimizer.target['w'], np.full((2, 3), -0.1), rtol=1e-5)
  entry = optimizer.state.param_states['w']
  np.testing.assert_allclose(entry.v_row, (grad**2).mean(1), rtol=1e-6)
  np.testing.assert_allclose(entry.v_col, (grad**2).mean(0), rtol=1e-6)
  assert entry.v.shape == (1,) and entry.m.shape == (1,)

  # In general v = rows x columns / mean.
  grad = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]])
  optimizer = run(plain(min_dim_size_to_factor=2), params, [{'w': jnp.array(grad)}])
  rows, columns = (grad**2).mean(1), (grad**2).mean(0)
  v = np.outer(rows, columns) / rows.mean()
  np.testing.assert_allclose(optimizer.target['w'], -0.1 * grad / np.sqrt(v), rtol=1e-5)


def test_settings_by_hand():
  params = {'b': jnp.array([3.0, 4.0])}
  grads = [{'b': jnp.array([0.5, 0.5])}]
  rms = np.sqrt(12.5)

  def step(**kwargs):
    return np.asarray(params['b'] - run(plain(**kwargs), params, grads).target['b'])

  np.testing.assert_allclose(step(), 0.1, rtol=1e-5)
  np.testing.assert_allclose(
    step(multiply_by_parameter_scale=True), 0.1 * rms, rtol=1e-5
  )
  np.testing.assert_allclose(
    step(multiply_by_parameter_scale=True, max_parameter_scale=2.0), 0.2, rtol=1e-5
  )
  np.testing.assert_allclose(
    step(multiply_by_parameter_scale=True, epsilon2=50.0), 5.0, rtol=1e-5
  )
  np.testing.assert_allclose(step(clipping_threshold=0.25), 0.025, rtol=1e-5)
  np.testing.assert_allclose(step(clipping_threshold=4.0), 0.1, rtol=1e-5)
  np.testing.assert_allclose(
    step(weight_decay_rate=0.01), 0.1 + 0.01 * np.array([3.0, 4.0]), rtol=1e-5
  )
  np.testing.assert_allclose(
    step(weight_decay_rate_lr_exponent=2.0), 0.1 + 0.01 * np.array([3, 4]), rtol=1e-5
  )
  np.testing.assert_allclose(
    step(weight_decay_rate=0.5, weight_decay_rate_lr_exponent=2.0),
    0.1 + 0.005 * np.array([3, 4]),
    rtol=1e-5,
  )
  np.testing.assert_allclose(step(beta1=0.9), 0.01, rtol=1e-4)
  # The gradient's square is 0.25, so the root of the moments is 1.
  np.testing.assert_allclose(step(epsilon1=0.75), 0.05, rtol=1e-5)
  state = plain(beta1=0.9, dtype_momentum=jnp.bfloat16).init_state(params)
  assert state.param_states['b'].m.dtype == jnp.bfloat16


def test_step_offset_restarts_the_decay():
  params = {'b': jnp.ones(2)}
  state = plain().init_state(params)
  old = state.replace(step=jnp.int32(100))
  grads = {'b': jnp.array([2.0, -2.0])}
  rule = plain(step_offset=100)
  new, _ = rule.apply_gradient(rule.hyper_params, params, old, grads)
  np.testing.assert_allclose(new['b'], [0.9, 1.1], rtol=1e-6)


def test_gradients_are_clipped_together():
  params = {'a': jnp.zeros(1), 'b': jnp.zeros(1)}
  grads = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}
  rule = plain(global_norm_clip_threshold=1.0)
  states = run(rule, params, [grads]).state.param_states
  np.testing.assert_allclose(states['a'].v, [0.36], rtol=1e-6)
  np.testing.assert_allclose(states['b'].v, [0.64], rtol=1e-6)
  rule = plain(global_norm_clip_threshold=10.0)
  np.testing.assert_allclose(
    run(rule, params, [grads]).state.param_states['b'].v, [16.0], rtol=1e-6
  )


def test_nan_updates_can_be_skipped():
  params = {'b': jnp.array([1.0, 1.0])}
  grads = [{'b': jnp.array([jnp.nan, 1.0])}]
  assert jnp.isnan(run(plain(), params, grads).target['b'][0])
  optimizer = run(plain(skip_nan_updates=True), params, grads)
  np.testing.assert_allclose(optimizer.target['b'], [1.0, 0.9], rtol=1e-6)
  np.testing.assert_allclose(optimizer.state.param_states['b'].v, [0.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize('shape', [(5,), (4, 6), (6, 4), (4, 4), (200, 130)])
def test_against_optax(shape):
  # Clipping and scaling, in different order, commute here.
  rng = np.random.default_rng(0)
  params = {'w': jnp.asarray(rng.normal(size=shape), jnp.float32)}
  reference = optax.adafactor(
    0.01, min_dim_size_to_factor=4, multiply_by_parameter_scale=True
  )
  inner, theirs = reference.init(params), params
  ours = adafactor.Adafactor(0.01, min_dim_size_to_factor=4).create(params)
  for _ in range(5):
    grads = {'w': jnp.asarray(rng.normal(size=shape) ** 3, jnp.float32)}
    updates, inner = reference.update(grads, inner, theirs)
    theirs = optax.apply_updates(theirs, updates)
    ours = ours.apply_gradient(grads)
    np.testing.assert_allclose(ours.target['w'], theirs['w'], rtol=2e-5, atol=1e-6)


AXES = {
  'kernel': PartitionSpec('embed', 'heads', 'kv'),
  'stacked': PartitionSpec('layers', 'embed', 'mlp'),
  'bias': PartitionSpec('layers', 'mlp'),
  'scale': PartitionSpec('embed'),
}
SHAPES = {'kernel': (4, 2, 3), 'stacked': (2, 3, 5), 'bias': (2, 5), 'scale': (4,)}


def by_axes(**kwargs):
  rule = plain(logical_factor_rules=adafactor.standard_logical_factor_rules(), **kwargs)
  rule.set_param_axes(AXES)
  return rule


def test_logical_rules_decide_shapes():
  params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
  states = by_axes().init_state(params).param_states
  assert states['kernel'].v_row.shape == (4,)
  assert states['kernel'].v_col.shape == (2, 3)
  assert states['stacked'].v_row.shape == (2, 3)
  assert states['stacked'].v_col.shape == (2, 5)
  assert states['bias'].v.shape == (2, 5)
  assert states['scale'].v.shape == (4,)


def test_stacked_parameters_are_updated_as_separate_ones():
  rng = np.random.default_rng(1)
  stacked = jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32)
  grad = jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32)
  settings = dict(clipping_threshold=0.5, multiply_by_parameter_scale=True)
  together = by_axes(**settings)
  got = run(together, {'stacked': stacked}, [{'stacked': grad}]).target['stacked']
  alone = plain(min_dim_size_to_factor=1, **settings)
  for layer in range(2):
    want = run(alone, {'w': stacked[layer]}, [{'w': grad[layer]}]).target['w']
    np.testing.assert_allclose(got[layer], want, rtol=1e-5)


def test_three_axes_are_factored_as_a_matrix():
  rng = np.random.default_rng(2)
  grad = jnp.asarray(rng.normal(size=(4, 2, 3)), jnp.float32)
  params = {'kernel': jnp.ones((4, 2, 3))}
  got = run(by_axes(), params, [{'kernel': grad}]).target['kernel']
  want = run(
    plain(min_dim_size_to_factor=1),
    {'w': jnp.ones((4, 6))},
    [{'w': grad.reshape(4, 6)}],
  ).target['w']
  np.testing.assert_allclose(got.reshape(4, 6), want, rtol=1e-5)


def test_logical_axes_of_the_state():
  params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
  rule = by_axes(beta1=0.9)
  got = rule.derive_logical_axes(rule.create(params), flax.core.freeze(AXES))
  assert got.target == AXES and got.state.step is None
  entry = got.state.param_states['kernel']
  assert entry.v_row is entry.v_col is entry.v is None
  assert entry.m == AXES['kernel']
  assert got.state.param_states['bias'].v == AXES['bias']


def test_maps_by_path():
  rules = adafactor.HParamMap([('bias', False), ('.*', True)])
  assert rules({'x': {'bias': 1, 'w': 2}}) == {'x': {'bias': False, 'w': True}}
  params = {'w': jnp.full(2, 4.0), 'bias': jnp.full(2, 4.0)}
  target = run(plain(multiply_by_parameter_scale=rules), params, [params]).target
  np.testing.assert_allclose(target['w'], 3.6, rtol=1e-6)
  np.testing.assert_allclose(target['bias'], 3.9, rtol=1e-6)
  with pytest.raises(KeyError, match='a/b'):
    adafactor.HParamMap([('x', 1)])['a/b']

  factor_map = adafactor.HParamMap([('.*', (Factor.ROW, Factor.COLUMN, Factor.COLUMN))])
  states = plain(factor_map=factor_map).init_state({'k': jnp.ones((4, 2, 3))})
  assert states.param_states['k'].v_col.shape == (2, 3)


def test_equality_and_hash():
  assert by_axes() == by_axes() and hash(by_axes()) == hash(by_axes())
  assert by_axes() != by_axes(beta1=0.1)


def test_errors():
  with pytest.raises(ValueError, match='learning rate'):
    run(plain(learning_rate=None), {'b': jnp.ones(2)}, [{'b': jnp.ones(2)}])
  with pytest.raises(ValueError, match="'k'"):
    plain().init_state({'k': jnp.ones((2, 2, 2))})
  with pytest.raises(ValueError, match='1 axes'):
    factor_map = adafactor.HParamMap([('.*', (Factor.ROW,))])
    plain(factor_map=factor_map).init_state({'k': jnp.ones((2, 2, 2))})
  with pytest.raises(ValueError, match='factor_map'):
    plain(factored=False, factor_map=adafactor.HParamMap([]))
  with pytest.raises(ValueError, match='multiply_by_parameter_scale'):
    plain(multiply_by_parameter_scale=1.0)
  with pytest.raises(ValueError, match='unheard_of'):
    rule = plain(logical_factor_rules={'embed': 'row'})
    rule.set_param_axes({'k': PartitionSpec('embed', 'unheard_of')})
  with pytest.raises(ValueError, match='NONE'):
    rule = plain(logical_factor_rules={'a': 'row', 'b': 'col', 'c': 'none'})
    rule.set_param_axes({'k': PartitionSpec('a', 'b', 'c')})
  with pytest.raises(ValueError, match='diagonal'):
    adafactor.factor_name_to_factordim('diagonal')
  assert adafactor.factor_name_to_factordim('Column') is Factor.COLUMN
  assert adafactor.factor_name_to_factordim(Factor.ROW) is Factor.ROW
