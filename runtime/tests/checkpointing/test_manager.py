"""Writing checkpoints: in the background, kept by rules, whole or not at all."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
from etils import epath
from one_array import (
  Counter,
  assert_restores,
  manager,
  partitioner,
  save_all,
  state_at,
)

from t5x import checkpoints, checkpoints_utils
from t5x.checkpointing import dataset_position, writing

# Where a child process finds what these tests share.
TESTS = str(pathlib.Path(__file__).parent.parent)

# -- Saving ---------------------------------------------------------------------


def test_layout_on_disk(tmp_path):
  made = manager(tmp_path, dataset_iterator=Counter(3).as_clu())
  made.save(state_at(7))
  made.close()
  folder = tmp_path / 'checkpoint_7'
  assert {p.name for p in folder.iterdir() if p.is_dir()} == {'state', 'dataset'}
  assert (folder / 'state/_METADATA').exists()
  assert (folder / 'dataset/train_ds-000-of-001').read_text() == '3'
  assert [p.name for p in tmp_path.iterdir()] == ['checkpoint_7']


def test_a_relative_folder_is_one_of_the_working_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  save_all('runs/tiny', [3])
  made = manager('runs/tiny')
  assert (tmp_path / 'runs/tiny/checkpoint_3').is_dir()
  for restored in (made.restore(3), made.restore(path='runs/tiny/checkpoint_3')):
    np.testing.assert_array_equal(
      restored.tree['target']['w'], state_at(3).tree['target']['w']
    )


def test_saving_goes_on_in_the_background(tmp_path, monkeypatch):
  made = manager(tmp_path)
  released = threading.Event()
  finish = made._checkpointer.wait_until_finished
  monkeypatch.setattr(
    made._checkpointer, 'wait_until_finished', lambda: (released.wait(), finish())
  )
  counter = Counter(5)
  made._dataset_iterator = counter.as_clu()
  # The first wait is that of AsyncCheckpointer.save for the save before.
  threading.Timer(0.2, released.set).start()
  state = state_at(1)
  assert made.save(state)
  # What is saved is what was there, whatever becomes of it.
  counter.position = 99
  jax.tree.map(lambda x: x.delete(), state.tree)
  made.close()
  assert_restores(tmp_path, 1)
  assert (tmp_path / 'checkpoint_1/dataset/train_ds-000-of-001').read_text() == '5'


def test_a_step_is_saved_once(tmp_path):
  made = manager(tmp_path)
  assert made.save(state_at(3))
  assert 3 in made.all_steps()
  assert not made.save(state_at(3))
  made.close()
  assert not manager(tmp_path).save(state_at(3))


def test_force_acts(tmp_path):
  made = manager(tmp_path, period=5)
  assert not made.save(state_at(4), force=False)
  assert made.save(state_at(5), force=False)
  assert made.save(state_at(6))
  made.close()
  assert made.all_steps() == [5, 6]
  assert made.latest_step() == 6
  assert made.directory == epath.Path(tmp_path)


@pytest.mark.parametrize('period', [None, 0])
def test_without_a_period_nothing_is_due_but_saving_works(tmp_path, period):
  made = manager(tmp_path / 'new', period=period, checkpoint_steps=None)
  assert not (tmp_path / 'new').exists()
  assert not made.should_save(0)
  assert made.save(state_at(2))
  made.close()
  assert_restores(tmp_path / 'new', 2)


def test_checkpoint_steps_act(tmp_path):
  made = manager(tmp_path, period=None, checkpoint_steps=[0, 3])
  assert [made.should_save(step) for step in range(5)] == [
    True,
    False,
    False,
    True,
    False,
  ]


def test_resumed_runs_save_at_the_same_steps(tmp_path):
  def run(first, last):
    made = manager(tmp_path, period=4)
    saved = [s for s in range(first, last) if made.save(state_at(s), force=False)]
    made.close()
    return saved

  assert run(0, 7) == [0, 4]
  assert run(7, 13) == [8, 12]


# -- Trouble --------------------------------------------------------------------


def test_an_unwritable_folder_fails_at_once(tmp_path):
  (tmp_path / 'file').write_text('in the way')
  with pytest.raises(
    checkpoints.CheckpointSaveError, match='file/model.*another MODEL_DIR'
  ):
    manager(tmp_path / 'file' / 'model')
  manager(tmp_path / 'file' / 'model', period=None)  # Readers do not care.


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_a_read_only_folder_fails_at_once(tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(checkpoints.CheckpointSaveError, match='writable'):
    manager(tmp_path)


def test_too_little_space_is_told_beforehand(tmp_path, monkeypatch):
  made = manager(tmp_path)
  monkeypatch.setattr(
    writing.shutil, 'disk_usage', lambda _: types.SimpleNamespace(free=100)
  )
  with pytest.raises(checkpoints.CheckpointSaveError, match='keep'):
    made.save(state_at(1))
  assert not any(tmp_path.iterdir())


def test_a_failing_write_is_told_once_and_leaves_nothing(tmp_path, monkeypatch):
  made = manager(tmp_path)
  made.save(state_at(1))
  made.wait_until_finished()
  handler = made._checkpointer.handler

  def no_space(directory):
    raise OSError(28, 'No space left on device', str(directory))

  monkeypatch.setattr(handler, 'finalize', no_space)
  made.save(state_at(2))
  with pytest.raises(
    checkpoints.CheckpointSaveError, match='checkpoint_2.*No space.*keep.*whole'
  ):
    made.wait_until_finished()
  assert [p.name for p in tmp_path.iterdir()] == ['checkpoint_1']
  monkeypatch.undo()
  assert made.save(state_at(2))
  made.close()
  assert_restores(tmp_path, 2)


def test_a_failed_save_is_removed_when_nobody_writes_to_it(tmp_path, monkeypatch):
  made = manager(tmp_path)
  folder = tmp_path / 'checkpoint_1.orbax-checkpoint-tmp'

  def write_late():
    time.sleep(0.5)
    folder.mkdir(exist_ok=True)
    (folder / 'late').write_text('')

  def no_space(directory):
    writer.start()
    raise OSError(28, 'No space left on device', str(directory))

  writer = threading.Thread(target=write_late)
  monkeypatch.setattr(made._checkpointer.handler, 'finalize', no_space)
  made.save(state_at(1))
  late = types.SimpleNamespace(result=lambda timeout: writer.join(timeout))
  made._writes._pending = [*made._writes._pending, late]
  with pytest.raises(checkpoints.CheckpointSaveError):
    made.wait_until_finished()
  writer.join()
  assert not any(tmp_path.iterdir())


def test_the_next_save_tells_of_the_failure(tmp_path, monkeypatch):
  made = manager(tmp_path)

  def broken(directory):
    raise OSError('broken')

  monkeypatch.setattr(made._checkpointer.handler, 'finalize', broken)
  made.save(state_at(1))
  with pytest.raises(checkpoints.CheckpointSaveError, match='checkpoint_1'):
    made.save(state_at(2))


SIZE_LIMITED = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
import conftest
import one_array as t
made = t.manager({folder!r})
made.save(t.state_at(1)); made.wait_until_finished()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
  # The limit is a file's: each device's part is over it, in however many files.
  made.save(t.state_at(2, size=2**18)); made.wait_until_finished()
except t.checkpoints.CheckpointSaveError as error:
  print('TOLD', error)
"""

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


def child(code, folder):
  return subprocess.Popen(
    [
      sys.executable,
      '-c',
      code.format(tests=TESTS, folder=str(folder)),
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
def test_a_disk_that_takes_no_more(tmp_path):
  out, err = child(SIZE_LIMITED, tmp_path).communicate(timeout=120)
  assert 'TOLD' in out, err
  assert 'checkpoint_2' in out
  assert [p.name for p in tmp_path.iterdir()] == ['checkpoint_1']
  assert_restores(tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize('after', [0, 1, 3, 6])
def test_killed_in_the_middle_of_a_save(tmp_path, after):
  process = child(KILLED, tmp_path)
  for line in process.stdout:
    if line.startswith(f'SAVING {after}'):
      break
  process.send_signal(signal.SIGKILL)
  process.communicate()
  left = {p.name for p in tmp_path.iterdir()}
  steps = checkpoints_utils.all_steps(tmp_path)
  assert all(f'checkpoint_{s}' in left for s in steps)
  assert after == 0 or steps[-1] in (after, after - 1)
  for step in steps:
    state = manager(tmp_path, size=100_000, period=None).restore(step)
    np.testing.assert_array_equal(
      state.tree['target']['w'], state_at(step, 100_000).tree['target']['w']
    )
  # The next run clears up and saves on.
  made = manager(tmp_path)
  assert {p.name for p in tmp_path.iterdir()} == {f'checkpoint_{s}' for s in steps}
  assert made.save(state_at(after + 1))
  made.close()
  assert_restores(tmp_path, after + 1)


def test_leftovers_are_cleared_by_those_who_save_only(tmp_path):
  save_all(tmp_path, [1])
  (tmp_path / 'checkpoint_2.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
  (tmp_path / 'deleting_checkpoint_0').mkdir()
  (tmp_path / 'train').mkdir()
  reader = manager(tmp_path, period=None)
  assert reader.all_steps() == [1]
  assert len(list(tmp_path.iterdir())) == 4
  manager(tmp_path)
  assert {p.name for p in tmp_path.iterdir()} == {'checkpoint_1', 'train'}


# -- Restoring ------------------------------------------------------------------


def test_by_step_by_path_and_newest(tmp_path):
  save_all(tmp_path, [1, 2])
  elsewhere = manager(tmp_path / 'elsewhere', period=None)
  path = str(tmp_path / 'checkpoint_1')
  assert int(elsewhere.restore(path=path).step) == 1
  assert int(elsewhere.restore(path=path + '/').step) == 1
  assert int(manager(tmp_path).restore(1).step) == 1
  assert int(manager(tmp_path).restore().step) == 2
  assert manager(tmp_path / 'checkpoint_1').directory == epath.Path(tmp_path)
  with pytest.raises(ValueError, match='not both'):
    elsewhere.restore(1, path)
  with pytest.raises(FileNotFoundError, match=r'\[1, 2\]'):
    manager(tmp_path).restore(7)
  with pytest.raises(FileNotFoundError, match='there is none'):
    elsewhere.restore()


def test_lazy_parameters_are_refused(tmp_path):
  save_all(tmp_path, [1])
  with pytest.raises(ValueError, match='lazy_parameters'):
    manager(tmp_path).restore(lazy_parameters=True)


def test_the_data_position_is_restored(tmp_path):
  save_all(tmp_path, [1], dataset_iterator=Counter(42).as_clu())
  counter = Counter()
  manager(tmp_path, dataset_iterator=counter.as_clu()).restore()
  assert counter.position == 42


def test_a_position_in_other_data_is_refused(tmp_path):
  def iterator(position, **source):
    made = Counter(position).as_clu()
    made.source = {'task': 'nb', 'split': 'train', 'files': 'a1', **source}
    return made

  def restored(counting):
    manager(tmp_path, dataset_iterator=counting).restore()

  save_all(tmp_path, [1], dataset_iterator=iterator(42))
  restored(iterator(0))
  for source, message in (
    (
      {'task': 'nn'},
      "the task was 'nb' and is 'nn'.*another MODEL_DIR.*begin the data",
    ),
    ({'files': 'b2'}, 'its files have other names or sizes'),
  ):
    with pytest.raises(dataset_position.DataPositionError, match=message):
      restored(iterator(0, **source))
  # Those of upstream, and iterators of other makers, have no description.
  restored(Counter().as_clu())
  (tmp_path / 'checkpoint_1/dataset/train_ds-000-of-001.source.json').unlink()
  restored(iterator(0, task='nn'))


def test_every_host_of_a_shard_restores_and_one_writes(tmp_path):
  second = partitioner(shard_id=1, num_shards=2)
  save_all(tmp_path, [1], part=second, dataset_iterator=Counter(7).as_clu())
  names = [p.name for p in (tmp_path / 'checkpoint_1/dataset').iterdir()]
  assert [n for n in names if n.startswith('train_ds')] == ['train_ds-001-of-002']
  replica = partitioner(shard_id=1, num_shards=2, first=False)
  counter = Counter()
  manager(tmp_path, replica, dataset_iterator=counter.as_clu()).restore()
  assert counter.position == 7
  save_all(tmp_path, [2], part=replica, dataset_iterator=counter.as_clu())
  assert checkpoints_utils.all_dataset_checkpoint_steps(tmp_path) == [1]


def test_another_number_of_shards_is_told(tmp_path):
  save_all(tmp_path, [1], dataset_iterator=Counter().as_clu())
  two = manager(tmp_path, partitioner(0, 2), dataset_iterator=Counter().as_clu())
  with pytest.raises(
    dataset_position.DataPositionError, match='train_ds-000-of-001.*as many'
  ):
    two.restore()


def test_a_checkpoint_without_position_is_told(tmp_path):
  save_all(tmp_path, [1])
  with pytest.raises(dataset_position.DataPositionError, match='save_dataset'):
    manager(tmp_path, dataset_iterator=Counter().as_clu()).restore()


def test_an_unsaveable_position_leaves_nothing(tmp_path):
  class Stateful(Counter):
    def as_clu(self):
      iterator = super().as_clu()

      def fail(filename):
        raise RuntimeError('PyFunc is stateful')

      iterator.save = fail
      return iterator

  made = manager(tmp_path, dataset_iterator=Stateful().as_clu())
  with pytest.raises(dataset_position.DataPositionError, match='PyFunc.*Cache'):
    made.save(state_at(1))
  assert not any(tmp_path.iterdir())
