"""Partitioning on eight CPU devices, and meshes of fake TPU and GPU hosts."""

import collections
import dataclasses
import importlib.util
import itertools

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning as flax_partitioning
from jax.sharding import PartitionSpec

from t5x import optimizers, partitioning, planning, train_state

BATCH, EMBED, MLP, VOCAB = 16, 8, 16, 24


class TinyModel(nn.Module):
  """An embedding and a feed-forward block with T5X's axis names."""

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


def make_state():
  variables = TinyModel().init(jax.random.key(0), batch())
  return train_state.FlaxOptimTrainState.create(optimizers.adamw(0.1), variables)


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
  """Returns (loss, gradients, new parameters) and the new state on devices."""
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
  leaves = [x for x in jax.tree.leaves(state) if x.shape == (EMBED, MLP)]
  # The parameter and two moments.
  assert len(leaves) == 3
  for leaf in leaves:
    assert leaf.sharding.shard_shape(leaf.shape) == (EMBED, MLP // 4)


def test_sharding_constraints_on_cpus():
  partitioner = partitioning.PjitPartitioner(num_partitions=2)

  def constrain(x):
    assert partitioning.global_mesh_defined()
    by_name = flax_partitioning.with_sharding_constraint(x, ('batch', 'mlp'))
    return by_name, partitioning.with_sharding_constraint(x, PartitionSpec('model'))

  # No shardings are set for its results, so they are those of the constraints.
  run = partitioning.PjittedFnWithContext(
    jax.jit(constrain), partitioner.mesh, partitioner.logical_axis_rules
  )
  by_name, by_mesh = run(np.ones((8, 8), np.float32))
  assert by_name.sharding.spec == PartitionSpec('data', 'model')
  assert by_mesh.sharding.spec == PartitionSpec('model')

  assert not partitioning.global_mesh_defined()
  x = np.ones((3, 5))
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


def test_host_local_arrays_on_one_host():
  partitioner = partitioning.PjitPartitioner(num_partitions=2)
  tree = {'a': np.arange(8.0), 'b': {'c': np.ones((4, 2)), 'd': np.int32(3)}}
  specs = {'a': PartitionSpec('data'), 'b': None}
  got = partitioning.host_local_array_to_global_array(tree, partitioner.mesh, specs)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), tree)
  assert got['a'].sharding.shard_shape((8,)) == (2,)
  assert got['b']['c'].sharding.is_fully_replicated


def test_data_layout_on_one_host():
  partitioner = partitioning.PjitPartitioner(num_partitions=2)
  assert partitioner.get_data_layout(16) == partitioning.DataLayout(16, 0, 1, True)
  assert partitioner.get_data_layout().batch_size == partitioner.data_mesh_size == 4
  assert (partitioner.data_shards, partitioner.data_shard_id) == (1, 0)
  assert partitioner.data_partition_spec == PartitionSpec('data')
  for size in (0, 6, 3):
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


def test_invalid_mesh_axes():
  state = make_state()
  with pytest.raises(ValueError, match=r'16 of .*wi'):
    FirstDevices(6, num_partitions=3).get_mesh_axes(state)
  rules = [('batch', 'data'), ('mlp', 'modle')]
  partitioner = partitioning.PjitPartitioner(2, logical_axis_rules=rules)
  with pytest.raises(ValueError, match=r"\('mlp', 'modle'\)"):
    partitioner.get_mesh_axes(state)
  # The same name twice in a parameter.
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
  # 'vocab', 'mlp', 'heads' precede 'embed', so they get the axis 'model'.
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


# ---- Meshes ----


@dataclasses.dataclass(frozen=True)
class FakeDevice:
  """A TPU core, or a GPU if it has no coordinates."""

  id: int
  process_index: int
  coords: tuple[int, int, int] | None = None
  core_on_chip: int = 0
  platform: str = 'tpu'
  device_kind: str = 'TPU v3'


def torus(x, y, z, cores, host=(2, 2, 1), device_kind='TPU v3'):
  """Returns the cores of an x × y × z torus; `host` is the shape of a host."""
  hosts = [-(-whole // part) for whole, part in zip((x, y, z), host)]
  devices = []
  for place in itertools.product(range(x), range(y), range(z), range(cores)):
    chip, core = place[:3], place[3]
    process = np.ravel_multi_index([c // h for c, h in zip(chip, host)], hosts)
    devices.append(
      FakeDevice(len(devices), int(process), chip, core, device_kind=device_kind)
    )
  # Backends guarantee no order.
  np.random.default_rng(0).shuffle(devices)
  return devices


def gpus(hosts, per_host):
  return [FakeDevice(i, i // per_host, platform='gpu') for i in range(hosts * per_host)]


def use_devices(monkeypatch, devices):
  monkeypatch.setattr(jax, 'devices', lambda backend=None: devices)


@pytest.mark.parametrize(
  ('partitions', 'model_hosts'), [(1, 1), (2, 1), (4, 1), (8, 2), (16, 4)]
)
def test_model_replicas_span_few_hosts(monkeypatch, partitions, model_hosts):
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


@pytest.mark.parametrize(
  ('partitions', 'shapes'),
  [
    (3, {}),
    (16, {}),
    (1, {'ici_mesh_shape': (1, 2, 2), 'dcn_mesh_shape': (3, 1, 1)}),
  ],
)
def test_sizes_that_do_not_fit_the_devices(partitions, shapes):
  with pytest.raises(ValueError, match='8 devices'):
    partitioning.default_mesh(partitions, **shapes)


def test_num_partitions_on_one_device(monkeypatch, caplog):
  use_devices(monkeypatch, jax.devices()[:1])
  with caplog.at_level('WARNING'):
    partitioner = partitioning.PjitPartitioner(num_partitions=2)
    assert dict(partitioner.mesh.shape) == {'data': 1, 'model': 1}
  assert 'num_partitions is 2' in caplog.text
  loss, _ = one_step(partitioner)
  want, _ = one_step(FirstDevices(1, num_partitions=1))
  np.testing.assert_array_equal(loss[0], want[0])


# num_partitions, model_parallel_submesh, ici_mesh_shape and dcn_mesh_shape
@pytest.mark.parametrize(
  'sizes',
  [
    (None, None, None, None),
    (4, (1, 2), None, None),
    (1, None, (1, 4, 2), None),
    (None, (1, 2), (1, 4, 2), (1, 1, 1)),
  ],
)
def test_contradictory_sizes(sizes):
  partitions, submesh, ici, dcn = sizes
  with pytest.raises(ValueError, match='one way'):
    partitioning.PjitPartitioner(
      partitions, submesh, ici_mesh_shape=ici, dcn_mesh_shape=dcn
    )


@pytest.mark.parametrize(
  'shape', [(2, 2, 1, 2), (4, 4, 1, 2), (4, 4, 4, 1), (8, 4, 1, 1)]
)
def test_data_layout_on_a_torus(monkeypatch, shape):
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
  # Four hosts with four devices each; a model replica spans two hosts.
  use_devices(monkeypatch, gpus(hosts=4, per_host=4))
  partitioner = partitioning.PjitPartitioner(num_partitions=8)
  layouts = [partitioner.get_data_layout(16, host) for host in range(4)]
  assert layouts == [
    partitioning.DataLayout(16, shard, 2, first)
    for shard in (0, 1)
    for first in (True, False)
  ]


def test_hosts_with_overlapping_parts(monkeypatch):
  use_devices(monkeypatch, gpus(hosts=2, per_host=6))
  with pytest.raises(ValueError, match='disjoint parts'):
    partitioning.PjitPartitioner(num_partitions=4).get_data_layout()


@pytest.mark.tpu
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='needs libtpu')
@pytest.mark.parametrize('name', planning.TOPOLOGIES)
def test_every_tpu_generation(name, monkeypatch):
  monkeypatch.setattr(jax.config, 'update', lambda *_: None)  # JAX has its devices.
  devices = planning.devices_of(planning.TOPOLOGIES[name])
  for partitions in (1, 2, 4, len(devices)):
    with partitioning.meshes_of(devices):
      partitioner = partitioning.PjitPartitioner(partitions)
      assert dict(partitioner.mesh.shape) == {
        'data': len(devices) // partitions,
        'model': partitions,
      }
    assert partitioner.get_data_layout().num_shards == 1


# ---- Overridden axis names ----


def test_overridden_axis_names():
  axis_names = flax_partitioning.AxisMetadata
  variables = {
    'params': {
      'logits': np.zeros((2, 4)),
      'wo': {'w': np.ones((4, 6)), 'b': np.ones(6)},
    },
    'params_axes': {
      'logits_axes': axis_names(names=('vocab', 'embed')),
      'wo': {'w_axes': axis_names(names=('embed', 'mlp'))},
    },
  }
  override = partitioning.override_params_axes_names
  # Whole paths only, and the first match counts; names can be added.
  overrides = [('w', 'ab'), ('.*/w', 'cd'), ('wo/w', 'ef'), ('wo/b', ('mlp',))]
  assert override(variables, overrides)['params_axes'] == {
    'logits_axes': axis_names(names=('vocab', 'embed')),
    'wo': {
      'w_axes': axis_names(names=('c', 'd')),
      'b_axes': axis_names(names=('mlp',)),
    },
  }
  assert 'b_axes' not in variables['params_axes']['wo']
  with pytest.raises(ValueError, match='logits'):
    override(variables, [('logits', ('a',))])
  with pytest.raises(ValueError, match='params_axes'):
    override({'params': variables['params']}, [])
