"""Whole cycles: initialise, save, lose, restore, on meshes of several shapes."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning as flax_partitioning
from saved_states import (
  Net,
  assert_equal,
  flat,
  initializer,
  mesh_partitioner,
  restore_cfg,
  resume,
  save_cfg,
  state_at,
  write,
  write_previous_layout,
)

from t5x import checkpoints, checkpoints_utils, restore
from t5x.checkpointing import manager as checkpoint_manager


def test_from_scratch_is_sharded_and_reproducible():
  start = initializer()
  state = start.from_scratch(jax.random.PRNGKey(1))
  wi = state.params['wi']
  assert wi.sharding.shard_shape(wi.shape) == (16 // 4, 32 // 2)
  assert int(state.step) == 0
  assert_equal(state, start.from_scratch(jax.random.PRNGKey(1)))
  assert start.global_train_state_shape.params['wi'].shape == (16, 32)
  inference = initializer(optimizer=False).from_scratch(jax.random.PRNGKey(1))
  np.testing.assert_array_equal(inference.params['wi'], wi)


@pytest.mark.parametrize('mesh', [(8, 1), (4, 2), (1, 8), (2, 2), (1, 1)])
def test_a_checkpoint_is_read_on_other_meshes(tmp_path, mesh):
  saved = write(tmp_path, 10)[10]
  start = initializer(mesh_partitioner(*mesh))
  state, _ = resume(tmp_path, start)
  assert_equal(state, saved)
  wi = state.params['wi']
  assert wi.sharding.shard_shape(wi.shape) == (16 // mesh[0], 32 // mesh[1])
  # And it trains on.
  grads = jax.tree.map(jnp.ones_like, state.params)
  assert int(state.apply_gradient(grads, learning_rate=0.1).step) == 11


def test_step_zero_is_found(tmp_path):
  saved = write(tmp_path, 0)[0]
  state, _ = resume(tmp_path)
  assert_equal(state, saved)
  assert checkpoints_utils.latest_step(tmp_path) == 0


def test_modes(tmp_path):
  saved = write(tmp_path, 0, 10, 20)
  start = initializer()
  folders = [str(tmp_path / f'checkpoint_{step}') for step in (0, 10, 20)]
  every = list(start.from_checkpoints([restore_cfg(tmp_path, mode='all')]))
  assert [path for _, path in every] == folders
  for (state, _), step in zip(every, (0, 10, 20)):
    assert_equal(state, saved[step])
  assert_equal(start.from_checkpoint([restore_cfg(tmp_path)]), saved[20])
  specific = restore_cfg(folders[1], mode='specific')
  assert_equal(start.from_checkpoint([specific]), saved[10])
  with pytest.raises(ValueError, match='3 checkpoints match'):
    start.from_checkpoint([restore_cfg(tmp_path, mode='all')])


def test_the_first_configuration_with_checkpoints_counts(tmp_path):
  (tmp_path / 'run').mkdir()
  write(tmp_path / 'pretrained', 10)
  own = restore_cfg(tmp_path / 'run')
  initial = restore_cfg(tmp_path / 'pretrained/checkpoint_10', mode='specific')
  find = restore.get_first_valid_restore_config_and_paths
  assert find([own, initial]) == (initial, [initial.path])
  assert find([own]) == (None, [])
  assert find([]) == (None, [])
  write(tmp_path / 'run', 20)
  assert find([own, initial]) == (own, [str(tmp_path / 'run/checkpoint_20')])
  none = restore.RestoreCheckpointConfig(path=[])
  assert find([none]) == (None, [])


def test_from_scratch_where_there_is_no_checkpoint(tmp_path):
  start, rng = initializer(), jax.random.PRNGKey(3)
  state = start.from_checkpoint_or_scratch([restore_cfg(tmp_path)], init_rng=rng)
  assert_equal(state, start.from_scratch(rng))
  assert start.from_checkpoint([restore_cfg(tmp_path)]) is None
  saved = write(tmp_path, 10)[10]
  found = start.from_checkpoint_or_scratch([restore_cfg(tmp_path)], init_rng=rng)
  assert_equal(found, saved)


@pytest.mark.parametrize(
  'path, message',
  [('nowhere', 'is no folder'), ('checkpoint_10', "Set mode = 'specific'")],
)
def test_folders_that_are_none(tmp_path, path, message):
  write(tmp_path, 10)
  with pytest.raises(ValueError, match=message):
    restore.get_first_valid_restore_config_and_paths([restore_cfg(tmp_path / path)])


def test_a_missing_checkpoint_names_those_there(tmp_path):
  write(tmp_path, 10, 20)
  cfg = restore_cfg(tmp_path / 'checkpoint_15', mode='specific')
  with pytest.raises(FileNotFoundError, match=r'checkpoint_15.*\[10, 20\]'):
    initializer().from_checkpoint([cfg])


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', None])
def test_restore_dtype_acts_on_parameters_only(tmp_path, dtype):
  saved = write(tmp_path, 10)[10]
  state, _ = resume(tmp_path, dtype=dtype)
  for name, value in flat(state).items():
    original = flat(saved)[name]
    expected = np.dtype(dtype or 'float32') if 'target/' in name else original.dtype
    assert value.dtype == expected, name
    np.testing.assert_array_equal(value, original.astype(expected))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', None])
def test_save_dtype_acts_on_parameters_only(tmp_path, dtype):
  saved = write(tmp_path, 10, dtype=dtype)[10]
  state, _ = resume(tmp_path)
  for name, value in flat(state).items():
    original = flat(saved)[name]
    expected = np.dtype(dtype or 'float32') if 'target/' in name else original.dtype
    assert value.dtype == expected, name
    np.testing.assert_array_equal(value, original.astype(expected))


def test_inference_reads_a_training_checkpoint(tmp_path):
  saved = write(tmp_path, 10)[10]
  state, manager = resume(tmp_path, initializer(optimizer=False), strict=False)
  assert int(state.step) == 10
  np.testing.assert_array_equal(state.params['wi'], saved.params['wi'])
  assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint_10']
  assert manager.latest_step() == 10


def test_training_from_parameters_without_an_optimizer(tmp_path):
  start = initializer(optimizer=False)
  manager = checkpoints.OrbaxCheckpointManagerInterface(
    str(tmp_path), start.global_train_state_shape, start._partitioner
  )
  saved = start.from_scratch(jax.random.PRNGKey(5))
  manager.save(saved)
  manager.close()
  with pytest.raises(ValueError, match='lacks .*param_states'):
    resume(tmp_path)
  state, _ = resume(tmp_path, strict=False)
  np.testing.assert_array_equal(state.params['wi'], saved.params['wi'])
  fresh = initializer().from_scratch(jax.random.PRNGKey(0))
  for name, value in flat(state).items():
    if 'param_states' in name:
      np.testing.assert_array_equal(value, flat(fresh)[name])


def test_another_width_is_named(tmp_path):
  write(tmp_path, 10)
  with pytest.raises(ValueError, match=r'\(32,\), the model has \(64,\)'):
    resume(tmp_path, initializer(net=Net(width=64)))


OTHER_HEAD = Net(head='lm_head')


def test_a_missing_array_is_named(tmp_path):
  write(tmp_path, 10)
  with pytest.raises(ValueError, match='lacks .*target/lm_head.*assignment_map'):
    resume(tmp_path, initializer(net=OTHER_HEAD))


def test_assignment_map_renames(tmp_path):
  saved = write(tmp_path, 10)[10]
  state, _ = resume(
    tmp_path,
    initializer(net=OTHER_HEAD),
    assignment_map=[(r'(.*)lm_head(.*)', r'\1head\2')],
  )
  np.testing.assert_array_equal(state.params['lm_head'], saved.params['head'])
  old, new = flat(saved), flat(state)
  assert {n.replace('lm_head', 'head') for n in new} == set(old)
  for name, value in new.items():
    np.testing.assert_array_equal(value, old[name.replace('lm_head', 'head')])


def test_two_arrays_may_share_a_source(tmp_path):
  saved = write(tmp_path, 10)[10]

  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
      param = functools.partial(flax_partitioning.param_with_axes, module=self)
      init = nn.initializers.normal(1.0)
      x @ param('wi', init, (16, 32), axes=('embed', 'mlp'))
      return x @ param('wi_twin', init, (16, 32), axes=('mlp', 'embed'))

  state, _ = resume(
    tmp_path,
    initializer(net=Twice()),
    assignment_map=[(r'(.*)wi_twin(.*)', r'\1wi\2')],
  )
  for name, shard in (('wi', (4, 16)), ('wi_twin', (8, 8))):
    got = state.params[name]
    np.testing.assert_array_equal(got, saved.params['wi'])
    assert got.sharding.shard_shape(got.shape) == shard


def test_fallback_to_scratch_initialises_what_is_dropped(tmp_path):
  saved = write(tmp_path, 10)[10]
  start, rng = initializer(net=OTHER_HEAD), jax.random.PRNGKey(8)
  drop = [(r'.*lm_head.*', None)]
  state, _ = resume(
    tmp_path, start, rng=rng, assignment_map=drop, fallback_to_scratch=True
  )
  fresh = flat(start.from_scratch(rng))
  for name, value in flat(state).items():
    source = fresh if 'lm_head' in name else flat(saved)
    np.testing.assert_array_equal(value, source[name])
  lm_head = state.params['lm_head']
  assert lm_head.sharding.shard_shape(lm_head.shape) == (16, 4)
  with pytest.raises(ValueError, match='no random key'):
    resume(tmp_path, start, assignment_map=drop, fallback_to_scratch=True)
  with pytest.raises(ValueError, match='without assignment_map'):
    resume(tmp_path, start, rng=rng, fallback_to_scratch=True)


def test_replacing_a_configuration_does_not_double_its_map():
  rules = [('a', 'b')]
  cfg = restore_cfg('x', assignment_map=rules, state_transformation_fns=(len,))
  again = dataclasses.replace(cfg, strict=False)
  assert again.state_transformation_fns == (restore.AssignmentMap(rules), len)


def test_state_transformations_act_both_ways(tmp_path):
  def double(state_dict, infos):
    assert infos['target']['wi'].name == 'target/wi'
    assert infos['target']['wi'].mesh_axes == jax.sharding.PartitionSpec(
      'data', 'model'
    )
    target = {**state_dict['target'], 'bias': state_dict['target']['bias'] * 2}
    return {**state_dict, 'target': target}, infos

  def swapped(saved, wanted):
    assert saved['target']['bias'].shape == wanted['target']['bias'].shape == (32,)
    zeros = np.zeros((16, 32), np.float32)
    return {**saved, 'target': {**saved['target'], 'wi': zeros}}

  start = initializer()
  saved = state_at(10)
  manager = checkpoints.OrbaxCheckpointManagerInterface(
    str(tmp_path), start.global_train_state_shape, start._partitioner
  )
  manager.save(saved, [double])
  manager.close()
  state, _ = resume(tmp_path, state_transformation_fns=[swapped])
  np.testing.assert_array_equal(state.params['bias'], saved.params['bias'] * 2)
  np.testing.assert_array_equal(state.params['wi'], 0)


def test_the_interface_from_before_orbax(tmp_path):
  state, manager = resume_without_checkpoint(tmp_path)
  assert state is None
  saved = state_at(10)
  manager.save(saved)
  assert manager.all_steps() == [10]
  manager.wait_until_finished()
  manager.close()
  state, manager = resume(tmp_path, save=save_cfg(), use_orbax=False)
  assert_equal(state, saved)
  path = str(tmp_path / 'checkpoint_10')
  assert_equal(manager.restore([path], restore_cfg(tmp_path)), saved)
  assert manager.latest_step() == 10


def resume_without_checkpoint(folder):
  start = initializer()
  return restore.create_checkpoint_manager_and_restore(
    start,
    start._partitioner,
    restore_cfg(folder),
    None,
    None,
    save_checkpoint_cfg=save_cfg(),
    model_dir=str(folder),
  )


def test_the_previous_layout_is_read_by_the_same_means(tmp_path):
  saved = state_at(10)
  write_previous_layout(tmp_path / 'checkpoint_10', saved)
  assert_equal(resume(tmp_path)[0], saved)
  for path in ('checkpoint_10', 'checkpoint_10/checkpoint'):
    cfg = restore_cfg(tmp_path / path, mode='specific')
    assert_equal(initializer().from_checkpoint([cfg]), saved)
  renamed, _ = resume(
    tmp_path,
    initializer(net=OTHER_HEAD),
    assignment_map=[(r'(.*)lm_head(.*)', r'\1head\2')],
  )
  np.testing.assert_array_equal(renamed.params['lm_head'], saved.params['head'])
  # A run goes on from it in the new layout.
  _, manager = resume(tmp_path, save=save_cfg())
  assert manager.all_steps() == [10]
  manager.save(state_at(20))
  manager.close()
  assert_equal(resume(tmp_path)[0], state_at(20))


def test_tensorflow_checkpoints_go_to_the_importer(tmp_path, monkeypatch):
  saved = state_at(10)
  got = []

  def read(state_dict, path, *, strict, translator):
    assert state_dict.keys() == saved.state_dict().keys()
    got.append((path, strict, translator))
    return jax.tree.map(np.asarray, saved.state_dict())

  monkeypatch.setattr(
    checkpoint_manager.checkpoint_importer, 'restore_from_t5_checkpoint', read
  )
  for step in (5, 10):
    (tmp_path / f'model.ckpt-{step}.index').write_text('')
  (tmp_path / 'checkpoint').write_text(
    'model_checkpoint_path: "model.ckpt-10"\n'
    'all_model_checkpoint_paths: "model.ckpt-5"\n'
    'all_model_checkpoint_paths: "model.ckpt-10"\n'
  )
  path = str(tmp_path / 'model.ckpt-10')
  for cfg in (
    restore_cfg(path, mode='specific', strict=False),
    restore_cfg(tmp_path, dtype='bfloat16'),
  ):
    state = initializer().from_checkpoint([cfg])
  assert got == [(path, False, None), (path, True, None)]
  assert state.params['wi'].dtype == jnp.bfloat16
  assert state.params['wi'].sharding.shard_shape((16, 32)) == (4, 16)
  every = initializer().from_checkpoints([restore_cfg(tmp_path, mode='all')])
  assert [p for _, p in every] == [str(tmp_path / f'model.ckpt-{s}') for s in (5, 10)]
  with pytest.raises(ValueError, match='Convert it first'):
    initializer().from_checkpoint(
      [restore_cfg(path, mode='specific', state_transformation_fns=[len])]
    )
  start = initializer()
  checkpoints.Checkpointer(
    start.global_train_state_shape, start._partitioner, str(tmp_path / 'new')
  ).convert_from_tf_checkpoint(path)
  assert_equal(resume(tmp_path / 'new')[0], saved)


def test_model_info(tmp_path):
  start = initializer()
  file = tmp_path / 'model-info.txt'
  restore.log_model_info(str(file), start.global_train_state_shape, start._partitioner)
  text = file.read_text()
  total = 16 * 32 + 32 + 32 * 16
  assert f'Total number of parameters: {total}' in text
  line = next(x for x in text.splitlines() if x.startswith('Variable wi '))
  assert 'size 512' in line and '(embed=16, mlp=32)' in line
  assert "('data', 'model')" in line
