"""Train and inference states: creation, updates, state dicts and logical axes."""

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning as flax_partitioning
from flax.linen.partitioning import AxisMetadata
from jax.sharding import PartitionSpec as P

from t5x import adafactor, optimizers, train_state


class Layer(nn.Module):
  """One kernel, one bias and a running mean."""

  @nn.compact
  def __call__(self, x):
    kernel = flax_partitioning.param_with_axes(
      'kernel', nn.initializers.ones, (3, 2), axes=('embed', 'mlp')
    )
    bias = flax_partitioning.param_with_axes(
      'bias', nn.initializers.zeros, (2,), axes=('mlp',)
    )
    mean = flax_partitioning.variable_with_axes(
      'stats', 'mean', jnp.zeros, (2,), axes=('mlp',)
    )
    mean.value = mean.value + 1
    return x @ kernel + bias


@pytest.fixture
def variables():
  return Layer().init(jax.random.key(0), jnp.ones((1, 3)))


def ones_like(tree):
  return jax.tree.map(jnp.ones_like, tree)


def test_create_and_update(variables):
  rule = optimizers.sgd(0.5)
  state = train_state.FlaxOptimTrainState.create(rule, variables)
  assert isinstance(state, train_state.TrainState)
  assert state.step == 0 and set(state.params) == {'kernel', 'bias'}
  assert set(state.flax_mutables) == {'stats'}
  stats = flax.core.freeze({'stats': {'mean': jnp.full(2, 7.0)}})
  state = state.apply_gradient(ones_like(state.params), 0.1, stats)
  assert state.step == 1 and state.flax_mutables == stats
  np.testing.assert_array_equal(state.params['bias'], [-0.5, -0.5])


def test_state_dict_round_trip(variables):
  rule = optimizers.adam(0.5)
  state = train_state.FlaxOptimTrainState.create(rule, variables)
  moved = state.apply_gradient(ones_like(state.params), 0.1, state.flax_mutables)
  saved = moved.state_dict()
  assert set(saved) == {'target', 'state', 'flax_mutables'}
  assert set(saved['state']) == {'step', 'param_states'}
  restored = state.restore_state(saved)
  jax.tree.map(np.testing.assert_array_equal, restored, moved)
  assert jax.tree.structure(restored) == jax.tree.structure(moved)
  del saved['flax_mutables']
  assert state.restore_state(saved).flax_mutables == train_state.EMPTY_DICT


@pytest.mark.parametrize(
  'rule',
  [
    optimizers.adam(0.5),
    adafactor.Adafactor(
      0.1, logical_factor_rules=adafactor.standard_logical_factor_rules()
    ),
  ],
)
def test_logical_axes(variables, rule):
  def create(v):
    return train_state.FlaxOptimTrainState.create(rule, v)

  for state in (create(variables), jax.eval_shape(create, variables)):
    axes = state.as_logical_axes()
    assert axes.params == {'kernel': P('embed', 'mlp'), 'bias': P('mlp')}
    assert axes.flax_mutables == {'stats': {'mean': P('mlp')}}
    assert axes.step is None
    # Axes can be zipped with arrays.
    filled = jax.tree.map(lambda _: 0, axes, is_leaf=lambda x: x is None)
    assert len(jax.tree.leaves(filled)) >= len(jax.tree.leaves(state.params))


def test_inference_state(variables):
  state = train_state.InferenceState.create(variables)
  assert state.step == 0
  saved = state.replace_step(jnp.int32(5)).state_dict()
  assert set(saved) == {'target', 'state', 'flax_mutables'}
  assert state.restore_state(saved).step == 5
  trained = train_state.FlaxOptimTrainState.create(optimizers.adam(0.5), variables)
  saved = trained.replace_step(jnp.int32(3)).state_dict()
  restored = state.restore_state(saved)
  assert restored.step == 3
  np.testing.assert_array_equal(restored.params['kernel'], trained.params['kernel'])
  axes = state.as_logical_axes()
  assert axes.step is None
  assert axes.params == {'kernel': P('embed', 'mlp'), 'bias': P('mlp')}
  assert axes.flax_mutables == {'stats': {'mean': P('mlp')}}
  for use in (lambda: state.param_states, state.apply_gradient):
    with pytest.raises(NotImplementedError, match='no optimizer'):
      use()


def test_errors(variables):
  create = train_state.FlaxOptimTrainState.create
  with pytest.raises(ValueError, match="'params'"):
    create(optimizers.sgd(0.1), {'batch_stats': {}})
  nameless = {'params': variables['params']}
  state = create(optimizers.sgd(0.1), nameless)
  with pytest.raises(ValueError, match='param_with_axes'):
    state.as_logical_axes()
  with pytest.raises(ValueError, match='param_with_axes'):
    create(adafactor.Adafactor(0.1), nameless)
  partial = {
    **nameless,
    'params_axes': {'kernel_axes': AxisMetadata(names=P('embed', 'mlp'))},
  }
  with pytest.raises(ValueError, match='bias'):
    create(optimizers.sgd(0.1), partial)

  class Bare(optimizers.OptimizerDef):
    def init_state(self, params):
      return optimizers.OptimizerState(jnp.int32(0), {})

  with pytest.raises(ValueError, match='Bare'):
    create(Bare(None), variables).as_logical_axes()
