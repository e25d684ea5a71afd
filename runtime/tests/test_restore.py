"""Initialising, saving and restoring train states on meshes of several shapes."""

import dataclasses
import functools
import shutil

import flax.linen as nn
import gin
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
  manager_of,
  mesh_partitioner,
  restore_cfg,
  resume,
  save_cfg,
  state_at,
  write,
  write_previous_layout,
)

from t5x import checkpoints, restore


def test_initial_state_is_sharded_and_reproducible():
  start = initializer()
  state = start.from_scratch(jax.random.PRNGKey(1))
  wi = state.params['wi']
  assert wi.sharding.shard_shape(wi.shape) == (16 // 4, 32 // 2)
  assert int(state.step) == 0
  assert_equal(state, start.from_scratch(jax.random.PRNGKey(1)))
  assert start.global_train_state_shape.params['wi'].shape == (16, 32)
  inference = initializer(optimizer=False).from_scratch(jax.random.PRNGKey(1))
  np.testing.assert_array_equal(inference.params['wi'], wi)


@pytest.mark.parametrize('mesh', [(8, 1), (2, 2), (1, 1)])
def test_restores_on_other_meshes(tmp_path, mesh):
  saved = write(tmp_path, 10)[10]
  start = initializer(mesh_partitioner(*mesh))
  state, _ = resume(tmp_path, start)
  assert_equal(state, saved)
  wi = state.params['wi']
  assert wi.sharding.shard_shape(wi.shape) == (16 // mesh[0], 32 // mesh[1])
  # The restored state can be trained.
  grads = jax.tree.map(jnp.ones_like, state.params)
  assert int(state.apply_gradient(grads, learning_rate=0.1).step) == 11


def test_resumes_from_step_zero(tmp_path):
  saved = write(tmp_path, 0)[0]
  assert_equal(resume(tmp_path)[0], saved)


def test_restore_modes(tmp_path):
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
  with pytest.raises(ValueError, match='checkpoint_20'):
    start.from_checkpoint([restore_cfg(tmp_path, mode='all')])


def test_first_configuration_with_checkpoints_is_used(tmp_path):
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


def test_initialises_without_a_checkpoint(tmp_path):
  start, rng = initializer(), jax.random.PRNGKey(3)
  state = start.from_checkpoint_or_scratch([restore_cfg(tmp_path)], init_rng=rng)
  assert_equal(state, start.from_scratch(rng))
  assert start.from_checkpoint([restore_cfg(tmp_path)]) is None
  saved = write(tmp_path, 10)[10]
  found = start.from_checkpoint_or_scratch([restore_cfg(tmp_path)], init_rng=rng)
  assert_equal(found, saved)


@pytest.mark.parametrize('path', ['nowhere', 'checkpoint_10'])
def test_mode_latest_requires_a_folder_of_checkpoints(tmp_path, path):
  write(tmp_path, 10)
  with pytest.raises(ValueError, match=path):
    restore.get_first_valid_restore_config_and_paths([restore_cfg(tmp_path / path)])


@pytest.mark.parametrize(
  'save_dtype, restore_dtype',
  [('float32', 'bfloat16'), ('bfloat16', None), (None, 'float16')],
)
def test_dtypes_act_on_parameters_only(tmp_path, save_dtype, restore_dtype):
  saved = flat(write(tmp_path, 10, dtype=save_dtype)[10])
  state, _ = resume(tmp_path, dtype=restore_dtype)
  for name, value in flat(state).items():
    expected = saved[name]
    if 'target/' in name:
      expected = expected.astype(restore_dtype or save_dtype)
    assert value.dtype == expected.dtype, name
    np.testing.assert_array_equal(value, expected)


def test_inference_reads_a_training_checkpoint(tmp_path):
  saved = write(tmp_path, 10)[10]
  state, manager = resume(tmp_path, initializer(optimizer=False), strict=False)
  assert int(state.step) == 10
  np.testing.assert_array_equal(state.params['wi'], saved.params['wi'])
  assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint_10']
  assert manager.latest_step() == 10


def test_training_from_parameters_without_an_optimizer(tmp_path):
  start = initializer(optimizer=False)
  manager = manager_of(tmp_path, start)
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


def test_another_width_is_an_error_but_not_damage(tmp_path):
  write(tmp_path, 10, 20)
  with pytest.raises(ValueError, match=r'\(32,\), the model has \(64,\)'):
    resume(tmp_path, initializer(net=Net(width=64)), save=save_cfg())
  assert checkpoints.all_steps(tmp_path) == [10, 20]


OTHER_HEAD = Net(head='lm_head')


def test_missing_array_is_named(tmp_path):
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
  with pytest.raises(ValueError, match='fallback_init_rng'):
    resume(tmp_path, start, assignment_map=drop, fallback_to_scratch=True)
  with pytest.raises(ValueError, match='without assignment_map'):
    resume(tmp_path, start, rng=rng, fallback_to_scratch=True)


def test_replaced_configuration_has_its_map_once():
  rules = [('a', 'b')]
  cfg = restore_cfg('x', assignment_map=rules, state_transformation_fns=(len,))
  again = dataclasses.replace(cfg, strict=False)
  assert again.state_transformation_fns == (restore.AssignmentMap(rules), len)


def test_state_transformations_on_save_and_restore(tmp_path):
  def double(state_dict, infos):
    wi = infos['target']['wi']
    assert wi.name == 'target/wi' and tuple(wi.mesh_axes) == ('data', 'model')
    target = {**state_dict['target'], 'bias': state_dict['target']['bias'] * 2}
    return {**state_dict, 'target': target}, infos

  def swapped(saved, wanted):
    assert saved['target']['bias'].shape == wanted['target']['bias'].shape == (32,)
    zeros = np.zeros((16, 32), np.float32)
    return {**saved, 'target': {**saved['target'], 'wi': zeros}}

  saved = state_at(10)
  manager = manager_of(tmp_path)
  manager.save(saved, [double])
  manager.close()
  state, _ = resume(tmp_path, state_transformation_fns=[swapped])
  np.testing.assert_array_equal(state.params['bias'], saved.params['bias'] * 2)
  np.testing.assert_array_equal(state.params['wi'], 0)


def test_layout_before_orbax_is_restored(tmp_path):
  saved = write_previous_layout(tmp_path, 10)[10]
  assert_equal(resume(tmp_path)[0], saved)
  for path in ('checkpoint_10', 'checkpoint_10/checkpoint'):
    cfg = restore_cfg(tmp_path / path, mode='specific')
    assert_equal(initializer().from_checkpoint([cfg]), saved)
  # A run resumes from it and saves in the new layout.
  _, manager = resume(tmp_path, save=save_cfg())
  assert manager.all_steps() == [10]
  manager.save(state_at(20))
  manager.close()
  assert_equal(resume(tmp_path)[0], state_at(20))


# -- Damaged checkpoints --


def damage(folder, how='manifest.ocdbt'):
  """Deletes a file or folder of the state, or truncates or flips its data."""
  state = folder / 'state'
  largest = max(state.rglob('d/*'), key=lambda f: f.stat().st_size)
  content = bytearray(largest.read_bytes())
  if how == '.':
    shutil.rmtree(state)
  elif how == 'truncated':
    largest.write_bytes(content[: len(content) // 2])
  elif how == 'flipped bit':
    content[len(content) // 4] ^= 1
    largest.write_bytes(content)
  else:
    (state / how).unlink()


@pytest.mark.parametrize(
  'how', ['.', '_METADATA', 'manifest.ocdbt', 'truncated', 'flipped bit']
)
def test_damaged_newest_checkpoint_is_set_aside(tmp_path, how, caplog):
  saved = write(tmp_path, 10, 20, 30)
  damage(tmp_path / 'checkpoint_30', how)
  state, manager = resume(f'{tmp_path}/', save=save_cfg())
  assert_equal(state, saved[20])
  assert 'checkpoint_30' in caplog.text and 'damaged' in caplog.text
  # Step 30 can be saved again.
  assert (tmp_path / 'damaged_checkpoint_30').is_dir()
  assert manager.all_steps() == [10, 20]
  manager.save(saved[30])
  manager.close()
  assert_equal(resume(tmp_path)[0], saved[30])


def test_checkpoints_without_digests_are_read(tmp_path):
  saved = write(tmp_path, 10)
  (tmp_path / 'checkpoint_10' / checkpoints.DIGESTS).unlink()
  assert_equal(resume(tmp_path)[0], saved[10])


def test_readers_do_not_rename_damaged_checkpoints(tmp_path):
  saved = write(tmp_path, 10, 20)
  damage(tmp_path / 'checkpoint_20')
  state, _ = resume(tmp_path)
  assert_equal(state, saved[10])
  assert_equal(initializer().from_checkpoint([restore_cfg(tmp_path)]), saved[10])
  names = sorted(p.name for p in tmp_path.iterdir())
  assert names == ['checkpoint_10', 'checkpoint_20']


def test_mode_specific_requires_an_undamaged_checkpoint(tmp_path):
  write(tmp_path, 10, 20)
  damage(tmp_path / 'checkpoint_20')
  cfg = restore_cfg(tmp_path / 'checkpoint_20', mode='specific')
  with pytest.raises(checkpoints.DamagedCheckpointError, match='checkpoint_20'):
    initializer().from_checkpoint([cfg])
  # A folder of checkpoints is not a damaged checkpoint.
  with pytest.raises(ValueError, match='checkpoint_20'):
    initializer().from_checkpoint([restore_cfg(tmp_path, mode='specific')])


def test_all_checkpoints_damaged_is_an_error(tmp_path):
  write(tmp_path, 10, 20)
  for step in (10, 20):
    damage(tmp_path / f'checkpoint_{step}')
  with pytest.raises(checkpoints.DamagedCheckpointError, match=r'\[10, 20\]'):
    resume(tmp_path, save=save_cfg())
  assert (tmp_path / 'checkpoint_20').is_dir()


def test_damaged_checkpoint_of_the_layout_before_orbax(tmp_path):
  write_previous_layout(tmp_path, 10, 20)
  index = tmp_path / 'checkpoint_20' / 'checkpoint'
  index.write_bytes(index.read_bytes()[:100])
  assert_equal(resume(tmp_path)[0], state_at(10))


# -- Configurations --


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'dtype': 'float16'}, 'float16'),
    ({'period': -1}, '-1'),
    ({'keep': 0}, 'keep'),
    ({'checkpoint_steps': [5, -2]}, r'\[-2\]'),
    ({'keep_dataset_checkpoints': 1}, 'save_dataset is False'),
  ],
)
def test_bad_save_configurations(changes, message):
  with pytest.raises(ValueError, match=message):
    restore.SaveCheckpointConfig(**changes)


@pytest.mark.parametrize('changes', [{'mode': 'newest'}, {'dtype': 'int8'}])
def test_bad_restore_configurations(changes):
  with pytest.raises(ValueError, match=next(iter(changes.values()))):
    restore_cfg('x', **changes)


METRICS = {'train/accuracy': [1, 6, 2, 5, 3, 4], 'eval/loss': [6, 2, 5, 1, 4, 3]}


def saved_steps(folder, **changes):
  """Saves steps 0, 10, ... 50 with METRICS and returns those that are kept."""
  manager = manager_of(folder, **changes)
  for step in range(0, 60, 10):
    manager.save(state_at(step), metrics={k: v[step // 10] for k, v in METRICS.items()})
  manager.close()
  return checkpoints.all_steps(folder)


def test_configured_retention(tmp_path):
  assert saved_steps(tmp_path / 'a', keep=3) == [30, 40, 50]
  cls = functools.partial(checkpoints.SaveBestCheckpointer, force_keep_period=40)
  kept = saved_steps(tmp_path / 'b', checkpointer_cls=cls, keep=2)
  assert kept == [0, 10, 30, 40, 50]


def test_retention_in_the_layout_before_orbax(tmp_path):
  steps = (0, 10, 20, 30)
  write_previous_layout(tmp_path / 'a', *steps, keep=2)
  assert checkpoints.all_steps(tmp_path / 'a') == [20, 30]
  best = functools.partial(
    checkpoints.SaveBestCheckpointer, metric_name_to_monitor='loss'
  )
  write_previous_layout(tmp_path / 'b', *steps, cls=best, keep=2)
  assert checkpoints.all_steps(tmp_path / 'b') == [0, 10, 30]
  assert len(list((tmp_path / 'b').iterdir())) == 3


@pytest.mark.parametrize(
  'name, checkpointer_cls',
  [
    ('SaveBestCheckpointer', checkpoints.SaveBestCheckpointer),
    ('OrbaxCheckpointManagerInterface', checkpoints.Checkpointer),
  ],
)
def test_retention_bound_by_gin(tmp_path, name, checkpointer_cls):
  gin.clear_config()
  try:
    with gin.unlock_config():
      gin.parse_config(f"""
        checkpoints.{name}.metric_name_to_monitor = 'eval/loss'
        checkpoints.{name}.metric_mode = 'min'
        checkpoints.{name}.keep = 1
      """)
    assert saved_steps(tmp_path, checkpointer_cls=checkpointer_cls) == [30, 50]
  finally:
    gin.clear_config()


def test_model_info(tmp_path):
  start = initializer()
  file = tmp_path / 'model-info.txt'
  restore.log_model_info(str(file), start.global_train_state_shape, start._partitioner)
  text = file.read_text()
  assert f'Total: {16 * 32 + 32 + 32 * 16:,} ' in text
  line = next(x for x in text.splitlines() if x.startswith('| wi '))
  assert '(16, 32)' in line and "('data', 'model')" in line
  assert 'mu/wi' in text
