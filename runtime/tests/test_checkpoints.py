"""Checkpoints of one array: saving, failures, retention, names and dataset states."""

import pathlib
import signal
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from etils import epath
from one_array import (
  Counter,
  assert_restores,
  manager,
  partitioner,
  save_all,
  state_at,
)

from t5x import checkpoints

TESTS = str(pathlib.Path(__file__).parent)

# -- Saving ---------------------------------------------------------------------


def test_layout_on_disk(tmp_path):
  made = manager(tmp_path, dataset_iterator=Counter(3).as_clu())
  made.save(state_at(7))
  made.close()
  folder = tmp_path / 'checkpoint_7'
  assert {p.name for p in folder.iterdir() if p.is_dir()} == {'state', 'dataset'}
  assert (folder / 'state/_METADATA').exists()
  assert (folder / 'dataset/train_ds-000-of-001').read_text() == '3'
  subprocess.run(
    ['sha256sum', '--check', '--quiet', 'SHA256SUMS'], cwd=folder, check=True
  )
  assert [p.name for p in tmp_path.iterdir()] == ['checkpoint_7']


def test_relative_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  save_all('runs/tiny', [3])
  made = manager('runs/tiny')
  assert (tmp_path / 'runs/tiny/checkpoint_3').is_dir()
  for restored in (made.restore(3), made.restore(path='runs/tiny/checkpoint_3')):
    np.testing.assert_array_equal(
      restored.tree['target']['w'], state_at(3).tree['target']['w']
    )


def test_saves_in_the_background(tmp_path, monkeypatch):
  made = manager(tmp_path)
  released = threading.Event()
  finish = made._manager.wait_until_finished
  monkeypatch.setattr(
    made._manager, 'wait_until_finished', lambda: (released.wait(), finish())
  )
  counter = Counter(5)
  made._dataset_iterator = counter.as_clu()
  # The first wait is that of CheckpointManager.save for the previous save.
  threading.Timer(0.2, released.set).start()
  state = state_at(1)
  assert made.save(state)
  counter.position = 99
  jax.tree.map(lambda x: x.delete(), state.tree)
  made.close()
  assert_restores(tmp_path, 1)
  assert (tmp_path / 'checkpoint_1/dataset/train_ds-000-of-001').read_text() == '5'


def test_checkpointer_writes_the_layout_before_orbax(tmp_path):
  def checkpointer(counter):
    return checkpoints.Checkpointer(
      state_at(0),
      partitioner(),
      str(tmp_path),
      counter.as_clu(),
      keep_dataset_checkpoints=1,
      save_dtype='bfloat16',
    )

  (tmp_path / 'checkpoint_1.unfinished').mkdir()
  writer = checkpointer(Counter(5))
  for step in (3, 4):
    assert writer.save(state_at(step))
  assert not writer.save(state_at(4))
  assert {p.name for p in tmp_path.iterdir()} == {'checkpoint_3', 'checkpoint_4'}
  names = {p.name for p in (tmp_path / 'checkpoint_4').iterdir()}
  assert names == {'checkpoint', 'target.w', 'train_ds-000-of-001', 'SHA256SUMS'}
  assert not (tmp_path / 'checkpoint_3/train_ds-000-of-001').exists()
  counter = Counter()
  restored = checkpointer(counter).restore(4)
  assert counter.position == 5
  expected = state_at(4).tree['target']['w'].astype(jnp.bfloat16)
  np.testing.assert_array_equal(restored.tree['target']['w'], expected)
  save_all(tmp_path / 'orbax', [4], save_dtype='bfloat16')
  for path in (str(tmp_path), str(tmp_path / 'orbax')):
    loaded = checkpoints.load_t5x_checkpoint(path)
    np.testing.assert_array_equal(loaded['target']['w'], expected)
    assert loaded['state']['step'] == 4


def test_existing_step_is_not_saved_again(tmp_path):
  made = manager(tmp_path)
  assert made.save(state_at(3))
  assert 3 in made.all_steps()
  assert not made.save(state_at(3))
  made.close()
  assert not manager(tmp_path).save(state_at(3))


# -- Failures -------------------------------------------------------------------


def test_without_period_first_save_creates_the_folder(tmp_path):
  made = manager(tmp_path / 'new', period=None)
  assert not (tmp_path / 'new').exists()
  assert made.save(state_at(2))
  made.close()
  assert_restores(tmp_path / 'new', 2)


def test_unwritable_folder_raises_at_once(tmp_path):
  (tmp_path / 'file').write_text('in the way')
  with pytest.raises(checkpoints.CheckpointSaveError, match='file/model'):
    manager(tmp_path / 'file' / 'model')
  manager(tmp_path / 'file' / 'model', period=None)  # A reader does not write.


def test_full_disk_raises_before_writing(tmp_path, monkeypatch):
  made = manager(tmp_path)
  usage = types.SimpleNamespace(free=100)
  monkeypatch.setattr(checkpoints.shutil, 'disk_usage', lambda _: usage)
  with pytest.raises(checkpoints.CheckpointSaveError, match='keep'):
    made.save(state_at(1))
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('reported_by', ['wait_until_finished', 'save'])
def test_failed_save_can_be_repeated(tmp_path, monkeypatch, reported_by):
  made = manager(tmp_path)
  made.save(state_at(1))
  made.wait_until_finished()

  def no_space(*args):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(made._manager._checkpointer.handler, 'finalize', no_space)
    made.save(state_at(2))
    with pytest.raises(checkpoints.CheckpointSaveError, match='checkpoint_2.*No space'):
      if reported_by == 'save':
        made.save(state_at(3))
      else:
        made.wait_until_finished()
  assert made.all_steps() == [1]
  assert_restores(tmp_path, 1)
  assert made.save(state_at(2))
  made.close()
  assert {p.name for p in tmp_path.iterdir()} == {'checkpoint_1', 'checkpoint_2'}
  assert_restores(tmp_path, 2)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import conftest
import one_array as t
made = t.manager({folder!r}, keep=2)
for step in range(10_000):
  made.save(t.state_at(step, size=100_000))
  print('SAVING', step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize('after', [0, 1, 6])
def test_killed_during_a_save(tmp_path, after):
  code = KILLED.format(tests=TESTS, folder=str(tmp_path))
  process = subprocess.Popen(
    [sys.executable, '-c', code], stdout=subprocess.PIPE, text=True
  )
  for line in process.stdout:
    if line.startswith(f'SAVING {after}'):
      break
  process.send_signal(signal.SIGKILL)
  process.communicate()
  left = {p.name for p in tmp_path.iterdir()}
  steps = checkpoints.all_steps(tmp_path)
  assert all(f'checkpoint_{s}' in left for s in steps)
  assert after == 0 or steps[-1] in (after, after - 1)
  for step in steps:
    state = manager(tmp_path, size=100_000, period=None).restore(step)
    np.testing.assert_array_equal(
      state.tree['target']['w'], state_at(step, 100_000).tree['target']['w']
    )
  # The next run removes leftovers and saves.
  made = manager(tmp_path)
  step = max(steps, default=-1) + 1
  assert made.save(state_at(step))
  made.close()
  steps = [*steps, step]
  assert {p.name for p in tmp_path.iterdir()} == {f'checkpoint_{s}' for s in steps}
  assert_restores(tmp_path, step)


def test_only_a_saving_manager_removes_leftovers(tmp_path):
  save_all(tmp_path, [1])
  (tmp_path / 'checkpoint_2.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
  (tmp_path / 'deleting' / 'checkpoint_0').mkdir(parents=True)
  (tmp_path / 'deleting_checkpoint_0').mkdir()  # of earlier versions
  (tmp_path / 'train').mkdir()
  reader = manager(tmp_path, period=None)
  assert reader.all_steps() == [1]
  assert len(list(tmp_path.iterdir())) == 5
  save_all(tmp_path, [3])
  names = {'checkpoint_1', 'checkpoint_3', 'train'}
  assert {p.name for p in tmp_path.iterdir()} == names


def test_checkpoint_is_renamed_before_deletion(tmp_path, monkeypatch):
  made = manager(tmp_path, keep=1)
  made.save(state_at(1))
  made.wait_until_finished()
  # As if the process were killed before anything was deleted.
  monkeypatch.setattr(type(epath.Path(tmp_path)), 'rmtree', lambda self: None)
  made.save(state_at(2))
  made.close()
  assert checkpoints.all_steps(tmp_path) == [2]
  assert (tmp_path / 'deleting/checkpoint_1/state/_METADATA').exists()
  monkeypatch.undo()
  manager(tmp_path)
  assert not (tmp_path / 'deleting').exists()


# -- Retention ------------------------------------------------------------------


def test_keep_and_force_keep_period(tmp_path):
  assert save_all(tmp_path / 'a', range(5), keep=2) == [3, 4]
  assert save_all(tmp_path / 'b', range(6), keep=1, force_keep_period=3) == [0, 3, 5]


def save_measured(folder, values, **settings):
  """Saves a step for each value of the metric 'loss'; None for a save without."""
  made = manager(folder, metric_name_to_monitor='loss', **settings)
  for step, value in values.items():
    made.save(state_at(step), metrics=None if value is None else {'loss': value})
  made.close()
  return checkpoints.all_steps(folder)


def test_best_and_newest_checkpoints_are_kept(tmp_path):
  values = {0: 0.1, 1: 0.9, 2: np.nan, 3: 0.8, 4: 0.2}
  assert save_measured(tmp_path, values, keep=2) == [1, 3, 4]
  # A resumed run reads the metrics of earlier checkpoints.
  kept = save_measured(tmp_path, {5: 0.5}, keep=1, metric_mode='min')
  assert kept == [4, 5]
  # The newest is the best.
  assert save_measured(tmp_path, {6: 0.1}, keep=1, metric_mode='min') == [6]


@pytest.mark.parametrize('keep_without, kept', [(True, [0, 1, 2, 4]), (False, [1, 4])])
def test_keep_checkpoints_without_metrics(tmp_path, keep_without, kept):
  values = {0: None, 1: 0.9, 2: None, 3: 0.5, 4: 0.4}
  settings = {'keep': 1, 'keep_checkpoints_without_metrics': keep_without}
  assert save_measured(tmp_path, values, **settings) == kept


def test_keep_dataset_checkpoints(tmp_path):
  iterator = Counter().as_clu()
  steps = save_all(
    tmp_path, range(4), keep_dataset_checkpoints=2, dataset_iterator=iterator
  )
  assert steps == [0, 1, 2, 3]
  kept = [s for s in steps if (tmp_path / f'checkpoint_{s}/dataset').exists()]
  assert kept == [2, 3]
  for step in steps:
    assert int(manager(tmp_path).restore(step).step) == step


@pytest.mark.parametrize('name, value', [('keep', 0), ('metric_mode', 'best')])
def test_bad_settings(tmp_path, name, value):
  with pytest.raises(ValueError, match=name):
    manager(tmp_path, **{name: value})


# -- Names ----------------------------------------------------------------------


def test_steps_in_folder_names(tmp_path):
  assert checkpoints.all_steps(tmp_path / 'nowhere') == []
  assert checkpoints.latest_step(tmp_path) is None
  others = ('_', '_x', '_30.orbax-checkpoint-tmp')
  for suffix in ('_100', '_0', '_20', *others):
    (tmp_path / f'checkpoint{suffix}').mkdir()
  (tmp_path / 'damaged_checkpoint_50').mkdir()
  assert checkpoints.all_steps(tmp_path) == [0, 20, 100]
  assert checkpoints.latest_step(str(tmp_path)) == 100
  assert checkpoints.get_checkpoint_dir('/m', 7) == '/m/checkpoint_7'
  assert checkpoints.is_checkpoint(f'{tmp_path}/checkpoint_20/')
  assert not checkpoints.is_checkpoint(tmp_path / 'checkpoint_21')
  assert not checkpoints.is_checkpoint(tmp_path)


# -- Restoring ------------------------------------------------------------------


def test_restores_by_step_by_path_and_newest(tmp_path):
  save_all(tmp_path, [1, 2])
  elsewhere = manager(tmp_path / 'elsewhere', period=None)
  path = str(tmp_path / 'checkpoint_1')
  assert int(elsewhere.restore(path=path).step) == 1
  assert int(elsewhere.restore(path=path + '/').step) == 1
  assert int(manager(tmp_path).restore(1).step) == 1
  assert int(manager(tmp_path).restore().step) == 2
  with pytest.raises(FileNotFoundError, match=r'\[1, 2\]'):
    manager(tmp_path).restore(7)
  with pytest.raises(FileNotFoundError, match='none'):
    elsewhere.restore()


def test_dataset_state_of_other_data_is_an_error(tmp_path):
  def iterator(position, **source):
    made = Counter(position).as_clu()
    made.source = {'task': 'nb', 'split': 'train', 'files': 'a1', **source}
    return made

  def restored(counting):
    manager(tmp_path, dataset_iterator=counting).restore()

  save_all(tmp_path, [1], dataset_iterator=iterator(42))
  restored(iterator(0))
  for source, message in (({'task': 'nn'}, "'nb'.*'nn'"), ({'files': 'b2'}, 'files')):
    with pytest.raises(checkpoints.DatasetStateError, match=message):
      restored(iterator(0, **source))
  # Upstream's checkpoints and other iterators have no description.
  restored(Counter().as_clu())
  (tmp_path / 'checkpoint_1/dataset/train_ds-000-of-001.source.json').unlink()
  restored(iterator(0, task='nn'))


def test_one_host_of_a_shard_saves_and_all_restore(tmp_path):
  second = partitioner(shard_id=1, num_shards=2)
  save_all(tmp_path, [1], part=second, dataset_iterator=Counter(7).as_clu())
  names = [p.name for p in (tmp_path / 'checkpoint_1/dataset').iterdir()]
  assert [n for n in names if n.startswith('train_ds')] == ['train_ds-001-of-002']
  replica = partitioner(shard_id=1, num_shards=2, first=False)
  counter = Counter()
  manager(tmp_path, replica, dataset_iterator=counter.as_clu()).restore()
  assert counter.position == 7
  save_all(tmp_path, [2], part=replica, dataset_iterator=counter.as_clu())
  assert not any((tmp_path / 'checkpoint_2/dataset').glob('train_ds*'))


def test_dataset_state_of_this_shard_is_missing(tmp_path):
  iterator = Counter().as_clu()
  save_all(tmp_path, [1], dataset_iterator=iterator)
  two_shards = manager(tmp_path, partitioner(0, 2), dataset_iterator=iterator)
  with pytest.raises(checkpoints.DatasetStateError, match='train_ds-000-of-001'):
    two_shards.restore()
  save_all(tmp_path, [2])
  with pytest.raises(checkpoints.DatasetStateError, match='save_dataset'):
    two_shards.restore()


def test_iterator_that_cannot_be_saved_leaves_no_checkpoint(tmp_path):
  iterator = Counter().as_clu()
  iterator.save = lambda filename: [][0]
  made = manager(tmp_path, dataset_iterator=iterator)
  with pytest.raises(checkpoints.CheckpointSaveError, match='checkpoint_1'):
    made.save(state_at(1))
  assert checkpoints.all_steps(tmp_path) == []


def tf_iterator():
  return iter(
    tf.data.Dataset.range(100).map(lambda i: i + 1).shuffle(10, seed=7).batch(2)
  )


@pytest.mark.parametrize('suffix', ['index', 'data-00000-of-00001'])
@pytest.mark.parametrize('length', [None, 50])
def test_damaged_dataset_state(tmp_path, suffix, length):
  save_all(tmp_path, [1], dataset_iterator=tf_iterator())
  file = tmp_path / f'checkpoint_1/dataset/train_ds-000-of-001.{suffix}'
  whole = file.read_bytes()
  file.unlink() if length is None else file.write_bytes(whole[:length])
  with pytest.raises(checkpoints.DamagedCheckpointError, match='train_ds'):
    manager(tmp_path, dataset_iterator=tf_iterator()).restore()


def test_dataset_state_of_another_pipeline_is_an_error(tmp_path):
  iterator = tf_iterator()
  next(iterator)
  save_all(tmp_path, [1], dataset_iterator=iterator)
  resumed = tf_iterator()
  manager(tmp_path, dataset_iterator=resumed).restore()
  np.testing.assert_array_equal(next(resumed), next(iterator))
  other = iter(tf.data.Dataset.range(9).batch(3).map(lambda i: i))
  with pytest.raises(checkpoints.DatasetStateError, match='train_ds'):
    manager(tmp_path, dataset_iterator=other).restore()
