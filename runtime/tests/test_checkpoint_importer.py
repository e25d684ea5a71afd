"""The checkpoint layout before Orbax, written as T5X wrote it."""

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from t5x import checkpoint_importer, checkpoints
from t5x.checkpoints import DamagedCheckpointError, Destination

STATE = {
  'state': {
    'step': np.int32(7),
    'param_states': {'enc': {'kernel': {'v_row': np.ones(4, np.float32)}}},
  },
  'target': {
    'enc': {
      'kernel': np.arange(32, dtype=np.float32).reshape(4, 8),
      'half': np.arange(8, dtype=jnp.bfloat16),
    },
    'bias': np.array([1.5, -2.5], np.float32),  # Not partitioned, so in the index.
  },
}
IN_INDEX = {'state/step', 'target/bias', 'state/param_states/enc/kernel/v_row'}


def write(folder, state=STATE, version=3, driver='file', old_paths=False):
  """Writes a checkpoint like T5X's first Checkpointer."""
  folder.mkdir(parents=True)
  index = {}
  for name, value in flax.traverse_util.flatten_dict(state, sep='/').items():
    if name in IN_INDEX or value is None:
      index[name] = value
      continue
    path = name.replace('/', '.')
    spec = {
      'driver': 'zarr',
      'dtype': value.dtype.name,
      'kvstore': {'driver': 'file', 'path': str(folder / path) + '/'},
      'metadata': {
        'shape': list(value.shape),
        'chunks': [max(1, n // 2) for n in value.shape],
        'compressor': {'id': 'gzip', 'level': 1},
      },
    }
    tensorstore.open(spec, create=True).result().write(value).result()
    spec['kvstore'] = {'driver': driver}
    if driver == 'gcs':
      spec['kvstore']['bucket'] = 't5x-dummy-bucket'
    (spec if old_paths else spec['kvstore'])['path'] = path
    index[name] = spec
  tree = flax.traverse_util.unflatten_dict(index, sep='/')
  contents = {'version': version, 'optimizer': tree}
  packed = flax.serialization.msgpack_serialize(contents)
  (folder / 'checkpoint').write_bytes(packed)


def assert_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_writes_what_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint_importer, '_CHUNK_BYTES', 100)
  mesh = jax.make_mesh((2, 4), ('data', 'model'))
  sharding = NamedSharding(mesh, PartitionSpec('data'))
  kernel = np.arange(240, dtype=np.float32).reshape(12, 20)
  state = {
    'state': {'step': jnp.int32(7), 'param_states': {'a': None, 'b': {}}},
    'target': {
      'kernel': jax.device_put(kernel, sharding),
      'half': jnp.arange(8, dtype=jnp.bfloat16),
      'empty': np.zeros((0, 4), np.float32),
    },
  }
  dtypes = {f'target/{name}': x.dtype for name, x in state['target'].items()}
  dtypes |= {'state/step': np.dtype(np.int32), 'target/kernel': np.dtype('float16')}
  tree = checkpoint_importer.write_arrays(tmp_path, state, dtypes)
  checkpoint_importer.write_index(tmp_path, tree)
  moved = tmp_path.rename(tmp_path.parent / 'moved')
  files = [p.name for p in (moved / 'target.kernel').iterdir() if p.name[0] != '.']
  assert len(files) == 8  # 6 rows of 20 per shard, in pieces of up to 100 bytes.
  got = checkpoints.load_t5x_checkpoint(str(moved))
  assert_equal(got, state)
  assert got['target']['kernel'].dtype == np.float16
  assert got['target']['half'].dtype == jnp.bfloat16


@pytest.mark.parametrize('driver', ['file', 'gfile', 'gcs'])
def test_reads_checkpoints_of_any_driver(tmp_path, driver):
  write(tmp_path / 'checkpoint_7', driver=driver, old_paths=driver == 'gfile')
  # Paths are relative, so the folder may have been moved.
  moved = (tmp_path / 'checkpoint_7').rename(tmp_path / 'checkpoint_8')
  assert_equal(checkpoints.load_t5x_checkpoint(str(moved)), STATE)


def test_finds_the_checkpoint(tmp_path):
  for step in (5, 10):
    state = {**STATE, 'state': {**STATE['state'], 'step': np.int32(step)}}
    write(tmp_path / f'checkpoint_{step}', state)

  def step_of(*args):
    return checkpoints.load_t5x_checkpoint(*args)['state']['step']

  assert step_of(str(tmp_path)) == 10
  assert step_of(str(tmp_path), 5) == 5
  assert step_of(str(tmp_path / 'checkpoint_5')) == 5
  assert step_of(str(tmp_path / 'checkpoint_5/checkpoint')) == 5
  with pytest.raises(ValueError, match='checkpoint_6'):
    step_of(str(tmp_path), 6)
  with pytest.raises(ValueError, match='nowhere'):
    step_of(str(tmp_path / 'nowhere'))


def test_index_is_read_without_the_arrays(tmp_path):
  write(tmp_path / 'checkpoint_7')
  (tmp_path / 'checkpoint_7' / 'target.enc.kernel' / '0.0').unlink()
  tree = checkpoint_importer.saved_tree(tmp_path / 'checkpoint_7')
  kernel = tree['target']['enc']['kernel']
  assert (kernel.shape, kernel.dtype) == ((4, 8), np.float32)
  assert tree['state']['step'] == 7


def test_each_device_reads_its_part(tmp_path):
  write(tmp_path / 'checkpoint_7')
  kernel = checkpoint_importer.saved_tree(tmp_path / 'checkpoint_7')
  kernel = kernel['target']['enc']['kernel']
  mesh = jax.make_mesh((2, 4), ('data', 'model'))
  for spec in (PartitionSpec('data', 'model'), PartitionSpec()):
    got = kernel.read(NamedSharding(mesh, spec), jnp.bfloat16)
    assert got.sharding.spec == spec and got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, STATE['target']['enc']['kernel'])


def destination(state=STATE, **kwargs):
  mesh = jax.make_mesh((2, 4), ('data', 'model'))
  axes = {'target': {'enc': {'kernel': PartitionSpec(None, 'model')}}}
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
  return Destination(shapes, axes, mesh, **kwargs)


def test_train_state_is_placed_on_the_mesh(tmp_path):
  write(tmp_path / 'checkpoint_7')
  wanted = destination(dtype=jnp.bfloat16)
  state = checkpoints.read_state(tmp_path / 'checkpoint_7', wanted)
  assert_equal(state, STATE)
  kernel = state['target']['enc']['kernel']
  assert kernel.sharding == NamedSharding(wanted.mesh, PartitionSpec(None, 'model'))
  assert kernel.dtype == state['target']['bias'].dtype == jnp.bfloat16
  assert state['state']['param_states']['enc']['kernel']['v_row'].dtype == np.float32


def test_train_state_with_renamed_and_missing_parts(tmp_path):
  write(tmp_path / 'checkpoint_7')
  other = {
    'state': STATE['state'],
    'target': {'encoder': STATE['target']['enc'], 'new': np.ones(2, np.float32)},
  }

  def rename(saved, wanted):
    assert set(wanted['target']) == {'encoder', 'new'}
    return {**saved, 'target': {'encoder': saved['target']['enc']}}

  read = checkpoints.read_state
  with pytest.raises(ValueError, match='target/new'):
    read(tmp_path / 'checkpoint_7', destination(other), [rename])
  got = read(tmp_path / 'checkpoint_7', destination(other), [rename], other)
  assert_equal(got, other)
  other['target']['encoder'] = {**STATE['target']['enc'], 'kernel': np.ones((2, 2))}
  with pytest.raises(ValueError, match='another model'):
    read(tmp_path / 'checkpoint_7', destination(other), [rename], other)


def test_transformations(tmp_path):
  write(tmp_path / 'checkpoint_7')

  def rename(saved, wanted):
    assert wanted == {}
    return {'target': {'encoder': saved['target']['enc']}}

  load = checkpoints.load_t5x_checkpoint
  state = load(str(tmp_path), state_transformation_fns=[rename])
  assert set(state) == {'target'}
  np.testing.assert_array_equal(
    state['target']['encoder']['kernel'], STATE['target']['enc']['kernel']
  )
  assert 'state' in load(str(tmp_path), state_transformation_fns=[rename], remap=False)


@pytest.mark.parametrize('lazy', [False, True])
def test_only_parameters_are_cast(tmp_path, lazy):
  write(tmp_path / 'checkpoint_7')
  state = checkpoints.load_t5x_checkpoint(
    str(tmp_path), restore_dtype=jnp.bfloat16, lazy_parameters=lazy
  )
  if lazy:
    kernel = state['target']['enc']['kernel']
    assert isinstance(kernel, checkpoints.LazyArray) and kernel.nbytes == 64
    state = jax.tree.map(lambda x: x.get() if hasattr(x, 'get') else x, state)
  assert_equal(state, STATE)
  assert state['target']['enc']['kernel'].dtype == jnp.bfloat16
  assert state['target']['bias'].dtype == jnp.bfloat16
  kept = state['state']['param_states']['enc']['kernel']['v_row']
  assert kept.dtype == np.float32


def test_empty_optimizer_states_are_kept_as_none(tmp_path):
  state = {'state': {'param_states': {'a': None}}, 'target': {'a': np.ones(3)}}
  write(tmp_path / 'checkpoint_1', state)
  got = checkpoints.load_t5x_checkpoint(str(tmp_path))
  assert got['state']['param_states'] == {'a': None}


def test_unsupported_and_damaged_indices(tmp_path):
  load = checkpoints.load_t5x_checkpoint
  write(tmp_path / 'checkpoint_1', version=1)
  with pytest.raises(ValueError, match='version 1'):
    load(str(tmp_path))
  write(tmp_path / 'checkpoint_2')
  index = tmp_path / 'checkpoint_2' / 'checkpoint'
  index.write_bytes(index.read_bytes()[:200])
  with pytest.raises(DamagedCheckpointError, match='checkpoint_2'):
    load(str(tmp_path))
  write(tmp_path / 'checkpoint_3', {'target': {'a': np.ones(3, np.uint16)}})
  with pytest.raises(ValueError, match='uint16'):
    load(str(tmp_path))


def test_damaged_array_is_named(tmp_path):
  write(tmp_path / 'checkpoint_7')
  metadata = tmp_path / 'checkpoint_7' / 'target.enc.kernel' / '.zarray'
  kernel = tmp_path / 'checkpoint_7' / 'target.enc.kernel' / '0.0'
  kernel.write_bytes(b'nonsense')
  with pytest.raises(DamagedCheckpointError, match='target/enc/kernel'):
    checkpoints.load_t5x_checkpoint(str(tmp_path))
  metadata.unlink()
  with pytest.raises(DamagedCheckpointError, match='target/enc/kernel'):
    checkpoints.load_t5x_checkpoint(str(tmp_path))


def test_lazy_array_reads_on_demand():
  reads = []

  def read():
    reads.append(1)
    return np.ones((2, 3), np.float32)

  lazy = checkpoint_importer.LazyArray((2, 3), np.float32, read)
  assert (lazy.shape, lazy.dtype, lazy.nbytes) == ((2, 3), np.float32, 24)
  half = lazy.astype(jnp.bfloat16)
  assert half.nbytes == 12 and not reads
  assert half.get().dtype == jnp.bfloat16
  assert lazy.get().dtype == np.float32
  assert len(reads) == 2
