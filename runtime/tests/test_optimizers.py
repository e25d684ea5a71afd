"""Wrapped optax optimizers, MultiOptimizer and learning rate schedules."""

import inspect
import math

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from t5x import adafactor, optimizers

PARAMS = {
  'enc': {'kernel': jnp.full((3, 4), 0.5), 'bias': jnp.ones(4)},
  'out': {'kernel': jnp.ones((4, 2))},
}
AXES = {
  'enc': {'kernel': P('embed', 'mlp'), 'bias': P('mlp')},
  'out': {'kernel': P('mlp', 'vocab')},
}
GRADS = jax.tree.map(
  lambda p: jnp.cos(jnp.arange(p.size * 1.0)).reshape(p.shape), PARAMS
)


def matrices(params):
  """A weight decay mask."""
  return jax.tree.map(lambda p: p.ndim > 1, params)


NAMED = dict.fromkeys(
  'adabelief adagrad adam fromage lamb lars lion radam rmsprop yogi'.split(), {}
) | {'adamw': {'mask': matrices}, 'noisy_sgd': {'key': 0}, 'sgd': {'momentum': 0.9}}

CHAINS = {
  'clip and decay': optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(0.1, mask=matrices), optax.ema(0.9)
  ),
  'multi_transform': optax.multi_transform(
    {'a': optax.adam(0.1), 'b': optax.sgd(0.1, momentum=0.9)},
    {'enc': 'a', 'out': 'b'},
  ),
  'masked': optax.masked(optax.adam(0.1), {'enc': True, 'out': False}),
  'inject': optax.inject_hyperparams(optax.adamw)(learning_rate=lambda step: 0.1),
  'multi steps': optax.MultiSteps(optax.adam(0.1), 2),
  'finite': optax.apply_if_finite(optax.lion(0.1), 3),
  'factored': optax.adafactor(0.1, min_dim_size_to_factor=2),
  'schedule': optax.adamw(lambda step: 0.1 / (1 + step)),
  'trust ratio': optax.chain(optax.scale_by_trust_ratio(), optax.zero_nans()),
}


@pytest.mark.parametrize('name', NAMED)
def test_named_optimizers_equal_optax(name):
  wrapped, original = getattr(optimizers, name), getattr(optax, name)
  assert inspect.signature(wrapped) == inspect.signature(original)
  ours = wrapped(0.1, **NAMED[name]).create(PARAMS)
  rule = original(0.1, **NAMED[name])
  state, params = rule.init(PARAMS), PARAMS
  for _ in range(3):
    updates, state = rule.update(GRADS, state, params)
    params = optax.apply_updates(params, updates)
    # The learning rate that the trainer passes does not reach optax.
    ours = ours.apply_gradient(GRADS, learning_rate=99.0)
  assert ours.state.step == 3
  jax.tree.map(np.testing.assert_array_equal, ours.target, params)
  for got, want in zip(
    jax.tree.leaves(ours.state.param_states), jax.tree.leaves(state), strict=True
  ):
    if not jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
      np.testing.assert_array_equal(got, want)


def test_chain_and_dpsgd():
  rule = optimizers.chain([optax.clip_by_global_norm(0.1), optax.sgd(1.0)])
  target = rule.create(PARAMS).apply_gradient(GRADS).target
  step = jax.tree.map(jnp.subtract, PARAMS, target)
  squares = sum(jnp.sum(x**2) for x in jax.tree.leaves(step))
  np.testing.assert_allclose(squares, 0.01, rtol=1e-4)
  with pytest.raises(ValueError, match='optax.adamw'):
    optimizers.chain([optimizers.adam(0.1)])
  with pytest.raises(ValueError, match='@optax.adam'):
    optimizers.OptaxWrapper(optax.adam)

  rule = optimizers.dpsgd(0.1, l2_norm_clip=1.0, noise_multiplier=0.0, seed=0)
  per_example = jax.tree.map(lambda g: jnp.stack([g, g]), GRADS)
  assert rule.create(PARAMS).apply_gradient(per_example).state.step == 1


@pytest.mark.parametrize('name', [*NAMED, *CHAINS])
def test_axes_of_optax_states(name):
  if name in NAMED:
    rule = getattr(optimizers, name)(0.1, **NAMED[name])
  else:
    rule = optimizers.OptaxWrapper(CHAINS[name])
  optimizer = rule.create(PARAMS)
  derived = rule.derive_logical_axes(optimizer, flax.core.freeze(AXES))
  assert derived.target == AXES and derived.state.step is None

  def is_leaf(x):
    return x is None or isinstance(x, P)

  # The shapes of all parameters differ.
  by_shape = {
    p.shape: a
    for p, a in zip(
      jax.tree.leaves(PARAMS), jax.tree.leaves(AXES, is_leaf=is_leaf), strict=True
    )
  }
  arrays = jax.tree.leaves(optimizer.state.param_states)
  axes = jax.tree.leaves(derived.state.param_states, is_leaf=is_leaf)
  assert len(arrays) == len(axes)
  if name == 'factored':
    # v_row of the out kernel has the shape [4] of the bias.
    assert sum(a is not None for a in axes) == 1
    return
  assert [by_shape.get(x.shape) for x in arrays] == axes


def test_parameter_without_axes():
  rule = optimizers.adam(0.1)
  axes = {'enc': AXES['enc'], 'out': {}}
  with pytest.raises(ValueError, match='kernel'):
    rule.derive_logical_axes(rule.create(PARAMS), axes)


# Masks and labels need the structure of the parameters, so dicts only.
@pytest.mark.parametrize(
  ('name', 'freeze'),
  [(name, False) for name in CHAINS]
  + [(name, True) for name in CHAINS if name not in ('masked', 'multi_transform')],
)
def test_state_dict_round_trip_without_empty_dicts(name, freeze):
  params = flax.core.freeze(PARAMS) if freeze else PARAMS
  rule = optimizers.OptaxWrapper(CHAINS[name])
  grads = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(GRADS))
  optimizer = rule.create(params).apply_gradient(grads)
  saved = optimizer.state_dict()
  assert set(saved) == {'target', 'state'}
  flat = traverse_util.flatten_dict(saved, keep_empty_nodes=True)
  assert all(v is not traverse_util.empty_node for v in flat.values())
  assert all(isinstance(k, str) for path in flat for k in path)
  restored = rule.create(params).restore_state(saved)
  assert jax.tree.structure(restored) == jax.tree.structure(optimizer)
  jax.tree.map(np.testing.assert_array_equal, restored, optimizer)


def test_paths_of_a_saved_adamw():
  # As in T5X's checkpoints.
  saved = optimizers.adamw(0.1).create({'w': jnp.ones(2)}).state_dict()
  flat = traverse_util.flatten_dict(saved, sep='/')
  assert set(flat) == {
    'state/step',
    'state/param_states/0/count',
    'state/param_states/0/mu/w',
    'state/param_states/0/nu/w',
    'target/w',
  }


def test_state_of_another_optimizer():
  saved = optimizers.sgd(0.1, momentum=0.9).create(PARAMS).state_dict()
  with pytest.raises(ValueError, match='Missing: .*mu/enc/bias.*Unknown: .*trace'):
    optimizers.adam(0.1).create(PARAMS).restore_state(saved)


def test_hyper_param_overrides():
  rule = adafactor.Adafactor(0.1)
  assert rule.update_hyper_params(learning_rate=0.5).learning_rate == 0.5
  other = rule.hyper_params.replace(beta1=0.5)
  got = rule.update_hyper_params(hyper_params=other, learning_rate=0.2)
  assert (got.beta1, got.learning_rate) == (0.5, 0.2)
  assert rule.hyper_params.learning_rate == 0.1


# ---- MultiOptimizer ----

KERNELS = traverse_util.ModelParamTraversal(lambda path, _: path.endswith('kernel'))
BIASES = traverse_util.ModelParamTraversal(lambda path, _: path.endswith('bias'))
VECTORS = traverse_util.ModelParamTraversal(lambda _, value: value.ndim == 1)


def plain_adafactor():
  return adafactor.Adafactor(0.1, multiply_by_parameter_scale=False)


@pytest.mark.parametrize('freeze', [False, True])
def test_multi_optimizer_of_adafactors(freeze):
  params = flax.core.freeze(PARAMS) if freeze else PARAMS
  grads = flax.core.freeze(GRADS) if freeze else GRADS
  rule = optimizers.MultiOptimizer([(KERNELS, plain_adafactor())])
  optimizer = rule.create(params).apply_gradient(grads, learning_rate=0.2)
  # One tree shaped as the parameters, None where no optimizer applies.
  assert optimizer.state.param_states['enc']['bias'] is None
  np.testing.assert_array_equal(optimizer.target['enc']['bias'], PARAMS['enc']['bias'])
  alone = plain_adafactor().create({'k': PARAMS['enc']['kernel']})
  alone = alone.apply_gradient({'k': GRADS['enc']['kernel']}, learning_rate=0.2)
  np.testing.assert_array_equal(optimizer.target['enc']['kernel'], alone.target['k'])
  restored = rule.create(params).restore_state(optimizer.state_dict())
  assert jax.tree.structure(restored) == jax.tree.structure(optimizer)
  derived = rule.derive_logical_axes(optimizer, AXES)
  assert derived.state.param_states['enc']['kernel'].v == AXES['enc']['kernel']
  assert derived.state.param_states['enc']['bias'] is None


def test_multi_optimizer_of_optax_ones():
  rule = optimizers.MultiOptimizer(
    [(KERNELS, optimizers.adam(0.1)), (VECTORS, optimizers.sgd(0.5, momentum=0.9))]
  )
  optimizer = rule.create(PARAMS)
  step = jax.jit(lambda o, g: o.apply_gradient(g))
  for _ in range(2):
    optimizer = step(optimizer, GRADS)
  want = optimizers.OptaxWrapper(
    optax.multi_transform(
      {'a': optax.adam(0.1), 'b': optax.sgd(0.5, momentum=0.9)},
      {'enc': {'kernel': 'a', 'bias': 'b'}, 'out': 'a'},
    )
  ).create(PARAMS)
  want = want.apply_gradient(GRADS).apply_gradient(GRADS)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
    optimizer.target,
    want.target,
  )
  restored = rule.create(PARAMS).restore_state(optimizer.state_dict())
  jax.tree.map(np.testing.assert_array_equal, restored, optimizer)
  derived = rule.derive_logical_axes(optimizer, AXES)
  assert derived.state.param_states[0][0].mu == {
    'enc': {'kernel': P('embed', 'mlp')},
    'out': {'kernel': P('mlp', 'vocab')},
  }


def test_multi_optimizer_hyper_params():
  rule = optimizers.MultiOptimizer(
    [(KERNELS, plain_adafactor()), (BIASES, plain_adafactor())]
  )
  first, second = rule.hyper_params
  optimizer = rule.create(PARAMS).apply_gradient(
    GRADS, hyper_params=[first, second.replace(learning_rate=0.0)]
  )
  np.testing.assert_array_equal(optimizer.target['enc']['bias'], PARAMS['enc']['bias'])
  assert (optimizer.target['enc']['kernel'] != PARAMS['enc']['kernel']).any()


def test_multi_optimizer_with_overlapping_selections():
  rule = optimizers.MultiOptimizer(
    [(VECTORS, plain_adafactor()), (BIASES, plain_adafactor())]
  )
  with pytest.raises(ValueError, match=r"'enc/bias': \[0, 1\]"):
    rule.create(PARAMS)


def test_multi_optimizer_passes_axes():
  rules = adafactor.standard_logical_factor_rules()
  inner = adafactor.Adafactor(0.1, logical_factor_rules=rules)
  rule = optimizers.MultiOptimizer([(KERNELS, inner), (BIASES, optimizers.sgd(0.1))])
  rule.set_param_axes(AXES)
  assert set(inner.hyper_params.factor_map) == {'enc/kernel', 'out/kernel'}


# ---- Learning rate schedules ----

STEPS = [0, 1, 50, 99, 100, 101, 150, 399, 400, 1000]
W, BASE, DECAY, EVERY, CYCLE = 100, 0.3, 0.01, 150, 300

FORMULAS = {
  'constant': lambda s: BASE,
  'linear_warmup': lambda s: min(1, s / W),
  'linear_decay': lambda s: BASE * min(s / W, 1 + DECAY * (W - s)),
  'rsqrt_decay': lambda s: 1 / math.sqrt(max(s, W)),
  'rsqrt_normalized_decay': lambda s: math.sqrt(W / max(s, W)),
  'decay_every': lambda s: DECAY ** (s // EVERY),
  'cosine_decay': lambda s: (
    0.5 * (1 + math.cos(math.pi * (max(0, (s - W) / CYCLE) % 1)))
  ),
}


def make_schedule(factors, **kwargs):
  return optimizers.create_learning_rate_scheduler(
    factors,
    base_learning_rate=BASE,
    warmup_steps=W,
    decay_factor=DECAY,
    steps_per_decay=EVERY,
    steps_per_cycle=CYCLE,
    **kwargs,
  )


@pytest.mark.parametrize(
  'factors',
  [*FORMULAS, 'constant * linear_warmup * rsqrt_decay', 'constant*cosine_decay'],
)
@pytest.mark.parametrize(('offset', 'minimum'), [(0, 1e-8), (40, 0.1)])
def test_schedule_factors(factors, offset, minimum):
  schedule = make_schedule(factors, step_offset=offset, min_learning_rate=minimum)
  schedule = jax.jit(schedule)
  for step in STEPS:
    since = max(0, step - offset)
    want = math.prod(FORMULAS[name.strip()](since) for name in factors.split('*'))
    got = schedule(jnp.int32(step))
    assert got.dtype == jnp.float32 and got.shape == ()
    np.testing.assert_allclose(got, max(want, minimum), rtol=2e-5, atol=2e-8)


def test_invalid_factors():
  with pytest.raises(ValueError, match="Did you mean 'linear_warmup'"):
    make_schedule('constant * linear_warmpu')
  with pytest.raises(ValueError, match='warmup_steps=0'):
    optimizers.create_learning_rate_scheduler('rsqrt_decay', warmup_steps=0)
