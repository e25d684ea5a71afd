"""Meshes, rules, layouts and partitioned functions, on eight CPU devices and on fake
devices of TPU and GPU hosts.
"""

import collections
import dataclasses
import itertools
import os
import subprocess
import sys

import flax.core
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
    with partitioning.meshes_of(jax.devices()[: self._count]):
      return partitioning.default_mesh(self._num_partitions)


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
def test_same_loss_and_gradients_on_every_mesh(count, activation, parameter):
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


def test_sharding_of_parameters_and_optimizer_states():
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


def test_sharding_constraints_on_cpus():
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


def test_constraint_outside_a_mesh():
  x = np.ones((3, 5))
  assert not partitioning.global_mesh_defined()
  assert partitioning.with_sharding_constraint(x, PartitionSpec('data')) is x


def test_nested_partitioned_functions():
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


def test_moving_to_devices_copies():
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


def test_local_arrays_on_one_host():
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


@pytest.mark.parametrize('size', [0, 6, 3])
def test_batch_that_does_not_divide(size):
  partitioner = partitioning.PjitPartitioner(num_partitions=2)
  with pytest.raises(ValueError, match=f'{size} over 4'):
    partitioner.get_data_layout(size)


def test_batch_over_slices():
  partitioner = partitioning.PjitPartitioner(
    ici_mesh_shape=(1, 2, 2), dcn_mesh_shape=(2, 1, 1)
  )
  assert partitioner.data_partition_spec == PartitionSpec(('replica', 'data'))
  assert partitioner.data_mesh_size == 4
  assert ('batch', ('replica', 'data')) in partitioner.logical_axis_rules
  loss, _ = one_step(partitioner)
  want, _ = one_step(FirstDevices(1, num_partitions=1))
  np.testing.assert_allclose(loss[0], want[0], rtol=1e-5)


def test_replicated_batch():
  rules = (('batch', None), ('mlp', 'model'))
  partitioner = partitioning.PjitPartitioner(8, logical_axis_rules=rules)
  assert partitioner.data_partition_spec == PartitionSpec(None)
  assert partitioner.get_data_layout(5) == partitioning.DataLayout(5, 0, 1, True)


def test_submesh_with_the_run_files_num_partitions():
  partitioner = partitioning.PjitPartitioner(
    num_partitions=1, model_parallel_submesh=(1, 1, 1, 2)
  )
  assert dict(partitioner.mesh.shape) == {'data': 4, 'model': 2}


def test_dimension_that_does_not_divide():
  partitioner = FirstDevices(6, num_partitions=3)
  with pytest.raises(ValueError, match=r'16 of .*wi'):
    partitioner.get_mesh_axes(make_state())


def test_rule_for_an_unknown_mesh_axis():
  partitioner = partitioning.PjitPartitioner(
    2, logical_axis_rules=[('batch', 'data'), ('mlp', 'modle')]
  )
  with pytest.raises(ValueError, match=r"\('mlp', 'modle'\)"):
    partitioner.get_mesh_axes(make_state())


def test_same_axis_name_twice_in_a_parameter():
  state = make_state()
  params_axes = flax.core.unfreeze(state.params_axes)
  params_axes['wi_axes'] = flax_partitioning.AxisMetadata(names=('mlp', 'mlp'))
  state = state.replace(params_axes=params_axes)
  with pytest.raises(ValueError, match='wi'):
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


def test_base_class_has_no_logical_axes():
  class Plain(partitioning.BasePjitPartitioner):
    pass

  state = train_state.InferenceState.create({'params': {'w': np.ones(2)}})
  axes = Plain(1).get_logical_axes(state)
  assert axes.params['w'] is None
  with pytest.raises(NotImplementedError, match='Plain'):
    Plain(1).get_mesh_axes(state)


# ---- Meshes ----


@dataclasses.dataclass(frozen=True)
class FakeDevice:
  """A TPU core, or a GPU where it has no coordinates."""

  id: int
  process_index: int
  coords: tuple[int, int, int] | None = None
  core_on_chip: int = 0
  platform: str = 'tpu'
  device_kind: str = 'TPU v3'


def torus(x, y, z, cores, host=(2, 2, 1), device_kind='TPU v3'):
  """All cores of an x × y × z torus, with hosts of `host` chips in row-major order."""
  hosts = [-(-whole // part) for whole, part in zip((x, y, z), host)]
  devices = []
  for place in itertools.product(range(x), range(y), range(z), range(cores)):
    chip, core = place[:3], place[3]
    process = np.ravel_multi_index([c // h for c, h in zip(chip, host)], hosts)
    devices.append(
      FakeDevice(len(devices), int(process), chip, core, device_kind=device_kind)
    )
  # Backends promise no order.
  np.random.default_rng(0).shuffle(devices)
  return devices


def gpus(hosts, per_host):
  return [FakeDevice(i, i // per_host, platform='gpu') for i in range(hosts * per_host)]


def use_devices(monkeypatch, devices):
  monkeypatch.setattr(jax, 'devices', lambda backend=None: devices)


@pytest.mark.parametrize(
  ('partitions', 'model_hosts'), [(1, 1), (2, 1), (4, 1), (8, 2), (16, 4)]
)
def test_copies_of_the_model_on_few_hosts(monkeypatch, partitions, model_hosts):
  use_devices(monkeypatch, gpus(hosts=4, per_host=4))
  made = partitioning.default_mesh(partitions)
  for copy in made.devices:
    assert len({device.process_index for device in copy}) == model_hosts


def test_submesh_over_hosts(monkeypatch):
  use_devices(monkeypatch, gpus(hosts=2, per_host=2))
  made = partitioning.default_mesh(1, model_parallel_submesh=(2, 1))
  assert [[d.id for d in row] for row in made.devices] == [[0, 2], [1, 3]]


def test_meshes_of_slices():
  made = partitioning.default_mesh(
    1, ici_mesh_shape=(1, 2, 2), dcn_mesh_shape=(2, 1, 1)
  )
  assert dict(made.shape) == {'replica': 2, 'data': 2, 'model': 2}
  assert [d.id for d in made.devices.flat] == list(range(8))
  made = partitioning.default_mesh(
    1, ici_mesh_shape=(1, 2, 2), dcn_mesh_shape=(1, 2, 1)
  )
  ids = np.vectorize(lambda d: d.id)(made.devices)
  np.testing.assert_array_equal(ids[0], [[0, 1], [2, 3], [4, 5], [6, 7]])


def test_slices_that_do_not_fit():
  with pytest.raises(ValueError, match='8 devices'):
    partitioning.default_mesh(1, ici_mesh_shape=(1, 2, 2), dcn_mesh_shape=(3, 1, 1))


@pytest.mark.parametrize('partitions', [1, 2, 4, 8])
def test_num_partitions_on_cpus(partitions):
  made = partitioning.default_mesh(partitions)
  assert dict(made.shape) == {'data': 8 // partitions, 'model': partitions}
  # One copy of the model is on neighbours.
  assert [d.id for d in made.devices.flat] == [d.id for d in jax.devices()]


@pytest.mark.parametrize('partitions', [3, 16])
def test_num_partitions_that_do_not_fit(partitions):
  with pytest.raises(ValueError, match=f'{partitions} partitions, 8 devices'):
    partitioning.default_mesh(partitions)


def test_one_device_holds_the_whole_model(monkeypatch, caplog):
  use_devices(monkeypatch, jax.devices()[:1])
  with caplog.at_level('WARNING'):
    partitioner = partitioning.PjitPartitioner(num_partitions=2)
    assert dict(partitioner.mesh.shape) == {'data': 1, 'model': 1}
  assert 'num_partitions is 2' in caplog.text
  loss, _ = one_step(partitioner)
  want, _ = one_step(FirstDevices(1, num_partitions=1))
  np.testing.assert_array_equal(loss[0], want[0])


@pytest.mark.parametrize(
  'arguments',
  [
    {},
    {'num_partitions': 4, 'model_parallel_submesh': (1, 2)},
    {'num_partitions': 1, 'ici_mesh_shape': (1, 4, 2)},
    {
      'model_parallel_submesh': (1, 2),
      'ici_mesh_shape': (1, 4, 2),
      'dcn_mesh_shape': (1, 1, 1),
    },
  ],
)
def test_contradictory_arguments(arguments):
  with pytest.raises(ValueError, match='one way'):
    partitioning.PjitPartitioner(**arguments)


@pytest.mark.parametrize(
  'shape', [(2, 2, 1, 2), (4, 4, 1, 2), (4, 4, 4, 1), (8, 4, 1, 1)]
)
def test_hosts_of_a_torus_share_the_data(monkeypatch, shape):
  kind = 'TPU v3' if shape[3] == 2 else 'TPU v4'
  devices = torus(*shape, device_kind=kind)
  use_devices(monkeypatch, devices)
  hosts = {device.process_index for device in devices}
  partitions = 1
  while partitions <= len(devices):
    partitioner = partitioning.PjitPartitioner(partitions)
    mesh = partitioner.mesh
    assert dict(mesh.shape) == {'data': len(devices) // partitions, 'model': partitions}
    assert {d.id for d in mesh.devices.flat} == {d.id for d in devices}
    layouts = [partitioner.get_data_layout(host_index=host) for host in hosts]
    readers = collections.Counter(layout.shard_id for layout in layouts)
    assert set(readers) == set(range(partitioner.data_shards))
    assert len(set(readers.values())) == 1
    writers = sum(layout.is_first_host_in_replica_set for layout in layouts)
    assert writers == partitioner.data_shards
    partitions *= 2


def test_submesh_on_a_torus(monkeypatch):
  use_devices(monkeypatch, torus(4, 4, 1, 2))
  partitioner = partitioning.PjitPartitioner(model_parallel_submesh=(2, 1, 1, 2))
  rows = [
    [(*d.coords, d.core_on_chip) for d in row] for row in partitioner.mesh.devices
  ]
  assert rows[1] == [(0, 1, 0, 0), (0, 1, 0, 1), (1, 1, 0, 0), (1, 1, 0, 1)]
  assert partitioner.data_shards == 4
  with pytest.raises(ValueError, match=r'\(3, 1, 1, 2\)'):
    partitioning.default_mesh(1, model_parallel_submesh=(3, 1, 1, 2))


def test_data_layout_by_hand(monkeypatch):
  # Four hosts of four devices; a copy of the model spans two hosts.
  use_devices(monkeypatch, gpus(hosts=4, per_host=4))
  partitioner = partitioning.PjitPartitioner(num_partitions=8)
  layouts = [partitioner.get_data_layout(16, host) for host in range(4)]
  assert [layout.shard_id for layout in layouts] == [0, 0, 1, 1]
  assert [layout.is_first_host_in_replica_set for layout in layouts] == [
    True,
    False,
    True,
    False,
  ]
  assert {layout.num_shards for layout in layouts} == {2}


def test_hosts_with_overlapping_parts(monkeypatch):
  use_devices(monkeypatch, gpus(hosts=2, per_host=6))
  with pytest.raises(ValueError, match='disjoint parts'):
    partitioning.PjitPartitioner(num_partitions=4).get_data_layout()


# Prints a line for each mesh of the generations' topologies, from libtpu alone.
_EVERY_GENERATION = """
from jax.experimental import topologies
from t5x import partitioning

for name in {names}:
  devices = topologies.get_topology_desc(platform='tpu', topology_name=name).devices
  partitions = 1
  while partitions <= len(devices):
    with partitioning.meshes_of(devices):
      made = partitioning.PjitPartitioner(partitions)
      made.get_data_layout()
    print(name, len(devices), partitions, *made.mesh.shape.values())
    partitions *= 2
"""


@pytest.mark.tpu
@pytest.mark.slow
def test_every_tpu_generation():
  pytest.importorskip('libtpu')
  names = ['v2:2x2', 'v3:4x4', 'v5e:4x4', 'v5p:2x2x2', 'v6e:4x4']
  done = subprocess.run(
    [sys.executable, '-c', _EVERY_GENERATION.format(names=names)],
    env={
      **os.environ,
      'TPU_SKIP_MDS_QUERY': '1',
      'TPU_WORKER_HOSTNAMES': 'localhost',
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    },
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert done.returncode == 0, done.stderr
  lines = [line.split() for line in done.stdout.splitlines()]
  assert {name for name, *_ in lines} == set(names)
  for _, *numbers in lines:
    devices, partitions, data, model = map(int, numbers)
    assert model == partitions and data * model == devices


# ---- Overridden axis names ----


@pytest.fixture
def variables():
  return flax.core.freeze(
    {
      'params': {
        'logits': np.zeros((2, 4)),
        'mlp': {'wo': {'kernel': np.zeros((4, 6)), 'bias': np.zeros(6)}},
      },
      'params_axes': {
        'logits_axes': flax_partitioning.AxisMetadata(names=('vocab', 'embed')),
        'mlp': {
          'wo': {'kernel_axes': flax_partitioning.AxisMetadata(names=('embed', 'mlp'))}
        },
      },
    }
  )


def axes_of(variables, overrides):
  return partitioning.override_params_axes_names(variables, overrides)['params_axes']


def test_first_matching_pattern(variables):
  axes = axes_of(
    variables,
    [
      ('wo/kernel', ('a', 'b')),
      ('.*/wo/kernel', ('c', 'd')),
      ('mlp/wo/kernel', ('e', 'f')),
    ],
  )
  assert axes['mlp']['wo']['kernel_axes'].names == ('c', 'd')
  assert axes['logits_axes'].names == ('vocab', 'embed')


def test_override_adds_names(variables):
  axes = axes_of(variables, [('mlp/wo/bias', ('mlp',))])
  assert axes['mlp']['wo']['bias_axes'].names == ('mlp',)
  assert 'bias_axes' not in variables['params_axes']['mlp']['wo']


def test_invalid_overrides(variables):
  with pytest.raises(ValueError, match='logits'):
    axes_of(variables, [('logits', ('a',))])
  with pytest.raises(ValueError, match='params_axes'):
    axes_of({'params': variables['params']}, [])
