"""Rules, layouts and partitioned functions on eight CPU devices."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning as flax_partitioning
from jax.sharding import PartitionSpec

from t5x import optimizers, partitioning, train_state

BATCH, EMBED, MLP, VOCAB = 16, 8, 16, 24


class TinyModel(nn.Module):
  """An embedding and a feed-forward block, with T5X's axis names throughout."""

  @nn.compact
  def __call__(self, tokens):
    def weight(name, shape, axes):
      return flax_partitioning.param_with_axes(
        name, nn.initializers.normal(0.5), shape, jnp.float32, axes=axes
      )

    table = weight('table', (VOCAB, EMBED), ('vocab', 'embed'))
    x = table[tokens]
    x = flax_partitioning.with_sharding_constraint(x, ('batch', 'length', 'embed'))
    x = nn.gelu(x @ weight('wi', (EMBED, MLP), ('embed', 'mlp')))
    x = flax_partitioning.with_sharding_constraint(x, ('batch', 'length', 'mlp'))
    x = x @ weight('wo', (MLP, EMBED), ('mlp', 'embed'))
    x = x * weight('scale', (EMBED,), ('embed',))
    return x @ table.T


def loss_fn(params, tokens):
  logits = TinyModel().apply({'params': params}, tokens)
  logp = jax.nn.log_softmax(logits[:, :-1])
  picked = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)
  return -jnp.mean(picked)


def batch():
  return np.random.default_rng(0).integers(0, VOCAB, (BATCH, 6)).astype(np.int32)


def make_state(optimizer=None):
  variables = TinyModel().init(jax.random.key(0), batch())
  return train_state.FlaxOptimTrainState.create(
    optimizer or optimizers.adamw(learning_rate=0.1), variables
  )


class FirstDevices(partitioning.PjitPartitioner):
  """A partitioner over the first `count` of the eight devices."""

  def __init__(self, count, **kwargs):
    self._count = count
    super().__init__(**kwargs)

  @property
  def mesh(self):
    return partitioning.get_mesh(
      (1, self._num_partitions), jax.devices()[: self._count]
    )


def one_step(partitioner):
  """(loss, gradients, parameters after one update), and the state on devices."""
  state = make_state()
  axes = partitioner.get_mesh_axes(state)
  placed = partitioner.move_params_to_devices(state, axes)

  def step(state, tokens):
    loss, grads = jax.value_and_grad(loss_fn)(state.params, tokens)
    return state.apply_gradient(grads, learning_rate=0.1), loss, grads

  run = partitioner.partition(
    step,
    in_axis_resources=(axes, partitioner.data_partition_spec),
    out_axis_resources=(axes, None, axes.params),
  )
  after, loss, grads = run(placed, batch())
  return jax.device_get((loss, grads, after.params)), after


@pytest.mark.parametrize(
  ('count', 'activation', 'parameter'),
  [(1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (4, 2, 1), (4, 1, 2), (4, 2, 2)],
)
def test_every_mesh_gives_the_same_loss_and_gradients(count, activation, parameter):
  tokens = batch()
  state = make_state()
  loss, grads = jax.value_and_grad(loss_fn)(state.params, tokens)
  params = state.apply_gradient(grads, learning_rate=0.1).params
  rules = partitioning.standard_logical_axis_rules(activation, parameter)
  model_sizes = [size for size in (1, 2, 4, 8) if size <= count]
  for size in model_sizes:
    partitioner = FirstDevices(count, num_partitions=size, logical_axis_rules=rules)
    assert dict(partitioner.mesh.shape) == {'data': count // size, 'model': size}
    got, _ = one_step(partitioner)
    want = jax.device_get((loss, grads, params))
    jax.tree.map(
      lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, want
    )


def test_parameters_and_optimizer_states_lie_where_the_rules_say():
  _, state = one_step(partitioning.PjitPartitioner(num_partitions=4))
  assert state.params['wi'].sharding.spec == PartitionSpec(None, 'model')
  assert state.params['wi'].sharding.shard_shape((EMBED, MLP)) == (EMBED, MLP // 4)
  moments = [
    leaf for leaf in jax.tree.leaves(state.param_states) if leaf.shape == (EMBED, MLP)
  ]
  assert len(moments) == 2
  for leaf in moments:
    assert leaf.sharding.shard_shape(leaf.shape) == (EMBED, MLP // 4)


def test_mesh_axes_of_a_state():
  rules = partitioning.standard_logical_axis_rules(parameter_partitioning_dims=2)
  partitioner = partitioning.PjitPartitioner(2, logical_axis_rules=rules)
  axes = partitioner.get_mesh_axes(make_state())
  assert axes.params['table'] == PartitionSpec('model', 'data')
  assert axes.params['wi'] == PartitionSpec('data', 'model')
  assert axes.params['scale'] == PartitionSpec('data')
  assert axes.step is None


def test_constraints_of_the_model_act_on_cpus():
  partitioner = partitioning.PjitPartitioner(num_partitions=2)

  def constrain(x):
    assert partitioning.global_mesh_defined()
    by_name = flax_partitioning.with_sharding_constraint(x, ('batch', 'mlp'))
    return by_name, partitioning.with_sharding_constraint(x, PartitionSpec('model'))

  # Without shardings for its results, what the constraints left can be seen.
  run = partitioning.PjittedFnWithContext(
    jax.jit(constrain), partitioner.mesh, partitioner.logical_axis_rules
  )
  by_name, by_mesh = run(np.ones((8, 8), np.float32))
  assert by_name.sharding.spec == PartitionSpec('data', 'model')
  assert by_mesh.sharding.spec == PartitionSpec('model')


def test_a_constraint_outside_a_mesh_does_nothing():
  x = np.ones((3, 5))
  assert not partitioning.global_mesh_defined()
  assert partitioning.with_sharding_constraint(x, PartitionSpec('data')) is x


def test_a_partitioned_function_inside_another():
  partitioner = partitioning.PjitPartitioner(num_partitions=2)
  inner = partitioner.partition(
    lambda x: flax_partitioning.with_sharding_constraint(2 * x, ('batch', 'mlp')),
    (PartitionSpec('data'),),
    PartitionSpec('data', 'model'),
  )
  assert jax.eval_shape(inner, np.ones((8, 4))).shape == (8, 4)
  outer = jax.jit(lambda x: inner(x) + 1)
  np.testing.assert_array_equal(outer(np.ones((8, 4))), np.full((8, 4), 3.0))
  assert not partitioning.global_mesh_defined()


def test_static_and_donated_arguments_and_compile():
  partitioner = partitioning.PjitPartitioner(num_partitions=1)
  axes = PartitionSpec('data')
  fn = partitioner.partition(
    lambda x, times: x * times, (axes,), axes, static_argnums=1, donate_argnums=0
  )
  x = jax.device_put(
    np.ones(8, np.float32), jax.sharding.NamedSharding(partitioner.mesh, axes)
  )
  compiled = partitioner.compile(fn, x, 3)
  np.testing.assert_array_equal(compiled(x), np.full(8, 3.0))
  assert x.is_deleted()


def test_resources_of_another_kind_are_refused():
  partitioner = partitioning.PjitPartitioner(num_partitions=1)
  with pytest.raises(ValueError, match="trees of PartitionSpec.*Got: 'data'"):
    partitioner.partition(lambda x: x, ('data',), None)


def test_moving_to_devices_leaves_the_source_alone():
  partitioner = partitioning.PjitPartitioner(num_partitions=2)
  state = jax.device_get(make_state())
  before = jax.tree.map(np.copy, state)
  axes = partitioner.get_mesh_axes(state)
  placed = partitioner.move_params_to_devices(state, axes)
  wipe = partitioner.partition(
    lambda s: jax.tree.map(jnp.zeros_like, s), (axes,), axes, donate_argnums=0
  )
  jax.block_until_ready(wipe(placed))
  jax.tree.map(np.testing.assert_array_equal, state, before)


def test_local_arrays_of_one_host_are_the_whole():
  partitioner = partitioning.PjitPartitioner(num_partitions=2)
  tree = {'a': np.arange(8.0), 'b': {'c': np.ones((4, 2)), 'd': np.int32(3)}}
  specs = {'a': PartitionSpec('data'), 'b': None}
  got = partitioning.host_local_array_to_global_array(tree, partitioner.mesh, specs)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), tree)
  assert got['a'].sharding.shard_shape((8,)) == (2,)
  assert got['b']['c'].sharding.is_fully_replicated


def test_data_layout():
  partitioner = partitioning.PjitPartitioner(num_partitions=2)
  layout = partitioner.get_data_layout(16)
  assert layout == partitioning.DataLayout(16, 0, 1, True)
  assert partitioner.get_data_layout().batch_size == 4
  assert partitioner.get_data_layout(16, host_index=0) == layout
  assert partitioner.data_mesh_size == 4
  assert partitioner.data_shards == 1
  assert partitioner.data_shard_id == 0
  assert partitioner.data_partition_spec == PartitionSpec('data')
  info = partitioner.get_local_chunk_info((8, 8), ('data', None))
  assert info.slice == (slice(0, 8), slice(None))


@pytest.mark.parametrize('size', [0, 6, 3])
def test_a_batch_that_does_not_divide_names_the_numbers(size):
  partitioner = partitioning.PjitPartitioner(num_partitions=2)
  with pytest.raises(ValueError, match=f'a batch of {size} over 4 data partitions'):
    partitioner.get_data_layout(size)


def test_slices_split_the_batch_over_replica_and_data():
  partitioner = partitioning.PjitPartitioner(
    ici_mesh_shape=(1, 2, 2), dcn_mesh_shape=(2, 1, 1)
  )
  assert partitioner.data_partition_spec == PartitionSpec(('replica', 'data'))
  assert partitioner.data_mesh_size == 4
  assert ('batch', ('replica', 'data')) in partitioner.logical_axis_rules
  loss, _ = one_step(partitioner)
  want, _ = one_step(FirstDevices(1, num_partitions=1))
  np.testing.assert_allclose(loss[0], want[0], rtol=1e-5)


def test_batches_may_be_replicated_by_rule():
  rules = (('batch', None), ('mlp', 'model'))
  partitioner = partitioning.PjitPartitioner(8, logical_axis_rules=rules)
  assert partitioner.data_partition_spec == PartitionSpec(None)
  assert partitioner.get_data_layout(5) == partitioning.DataLayout(5, 0, 1, True)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({}, 'Got: num_partitions=None, model_parallel_submesh=None'),
    ({'num_partitions': 4, 'model_parallel_submesh': (1, 2)}, 'num_partitions=4'),
    ({'num_partitions': 1, 'ici_mesh_shape': (1, 4, 2)}, 'dcn_mesh_shape=None'),
    (
      {
        'model_parallel_submesh': (1, 2),
        'ici_mesh_shape': (1, 4, 2),
        'dcn_mesh_shape': (1, 1, 1),
      },
      r'excludes.*Got: \(1, 2\)',
    ),
  ],
)
def test_contradictions_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    partitioning.PjitPartitioner(**arguments)


def test_a_submesh_beside_the_default_number_of_the_run_files():
  partitioner = partitioning.PjitPartitioner(
    num_partitions=1, model_parallel_submesh=(1, 1, 1, 2)
  )
  assert dict(partitioner.mesh.shape) == {'data': 4, 'model': 2}


def test_params_on_devices_and_backend():
  partitioner = partitioning.PjitPartitioner(1, params_on_devices=False, backend='cpu')
  assert not partitioner.params_on_devices
  partitioner.params_on_devices = True
  assert partitioner.params_on_devices
  assert partitioner.mesh.devices.flat[0].platform == 'cpu'
  assert partitioner.use_shardy_partitioner == jax.config.jax_use_shardy_partitioner
  with pytest.raises(RuntimeError, match='nonsense'):
    _ = partitioning.PjitPartitioner(1, backend='nonsense').mesh


def test_a_dimension_that_does_not_divide_is_named():
  partitioner = FirstDevices(6, num_partitions=3)
  with pytest.raises(ValueError, match=r'16 of .*wi \(8, 16\) over 3 devices'):
    partitioner.get_mesh_axes(make_state())


def test_a_rule_for_an_unknown_mesh_axis_is_refused():
  partitioner = partitioning.PjitPartitioner(
    2, logical_axis_rules=[('batch', 'data'), ('mlp', 'modle')]
  )
  with pytest.raises(ValueError, match=r"\('mlp', 'modle'\)"):
    partitioner.get_mesh_axes(make_state())


def test_names_twice_in_one_parameter_are_refused():
  state = make_state()
  params_axes = flax.core.unfreeze(state.params_axes)
  params_axes['wi_axes'] = flax_partitioning.AxisMetadata(names=('mlp', 'mlp'))
  state = state.replace(params_axes=params_axes)
  with pytest.raises(ValueError, match='of .*wi cannot be mapped'):
    partitioning.PjitPartitioner(2).get_mesh_axes(state)


@pytest.mark.parametrize(
  ('activation', 'parameter', 'spec'),
  [
    (1, 1, (None, 'model')),
    (2, 1, ('model', None)),
    (1, 2, ('data', 'model')),
    (2, 2, ('data', 'model')),
  ],
)
def test_standard_rules(activation, parameter, spec):
  rules = partitioning.standard_logical_axis_rules(activation, parameter)
  to_mesh = flax_partitioning.logical_to_mesh_axes
  assert dict(rules).keys() >= {
    'batch',
    'vocab',
    'embed',
    'mlp',
    'heads',
    'kv',
    'joined_kv',
    'relpos_buckets',
    'abspos_buckets',
    'length',
    'layers',
    'stack',
    'mlp_activations',
  }
  # 'vocab', 'mlp', 'heads' come before 'embed', so they win the axis 'model'.
  for wide in ('vocab', 'mlp', 'heads', 'joined_kv'):
    expected = (None if spec[0] == 'model' else spec[0], 'model')
    assert to_mesh(('embed', wide), rules) == PartitionSpec(*expected)
  activations = to_mesh(('batch', 'length', 'embed'), rules)
  last = 'model' if activation == 2 else None
  assert activations == PartitionSpec('data', None, last)


def test_additional_rules_come_last():
  standard = partitioning.standard_logical_axis_rules()
  more = [('experts', 'data'), ('mine', None)]
  assert partitioning.standard_logical_axis_rules(additional_rules=more) == [
    *standard,
    *more,
  ]


def test_rules_of_other_dimensions_are_refused():
  with pytest.raises(ValueError, match='activation_partitioning_dims must be 1 or 2'):
    partitioning.standard_logical_axis_rules(3)
  with pytest.raises(ValueError, match='parameter_partitioning_dims must be 1 or 2'):
    partitioning.standard_logical_axis_rules(1, 0)


def test_axis_names_are_leaves():
  names = partitioning.AxisNames('embed', 'mlp')
  assert jax.tree.leaves({'a': names}) == [names]
  assert repr(names) == "AxisNames('embed', 'mlp')"


def test_logical_axes_of_the_base_class_are_unnamed():
  class Plain(partitioning.BasePjitPartitioner):
    pass

  state = train_state.InferenceState.create({'params': {'w': np.ones(2)}})
  axes = Plain(1).get_logical_axes(state)
  assert axes.params['w'] is None
  with pytest.raises(NotImplementedError, match='Plain does not map'):
    Plain(1).get_mesh_axes(state)
