"""Damaged checkpoints: named, set aside where the run saves, and passed over."""

import shutil

import pytest
from saved_states import (
  Net,
  assert_equal,
  initializer,
  restore_cfg,
  resume,
  save_cfg,
  state_at,
  write,
  write_previous_layout,
)

from t5x import (
  checkpoints,
  checkpoints_utils,
)


def spoil(folder, how):
  state = folder / 'state'
  if how == 'no state':
    shutil.rmtree(state)
  elif how == 'no description':
    (state / '_METADATA').unlink()
  elif how == 'no manifest':
    (state / 'manifest.ocdbt').unlink()
  elif how == 'truncated data':
    largest = max((f for f in state.rglob('d/*')), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  elif how == 'flipped bits':
    for file in state.rglob('d/*'):
      content = bytearray(file.read_bytes())
      content[len(content) // 2] ^= 255
      file.write_bytes(bytes(content))


DAMAGES = [
  'no state',
  'no description',
  'no manifest',
  'truncated data',
  'flipped bits',
]


@pytest.mark.parametrize(
  'how, use_orbax', [*((how, True) for how in DAMAGES), ('no state', False)]
)
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(
  tmp_path, how, use_orbax, caplog
):
  saved = write(tmp_path, 10, 20, 30)
  spoil(tmp_path / 'checkpoint_30', how)
  state, manager = resume(tmp_path, save=save_cfg(), use_orbax=use_orbax)
  assert_equal(state, saved[20])
  assert 'checkpoint_30' in caplog.text and 'damaged' in caplog.text
  # It no longer stands in the way of step 30.
  assert (tmp_path / 'damaged_checkpoint_30').is_dir()
  assert manager.all_steps() == [10, 20]
  manager.save(saved[30])
  manager.close()
  assert_equal(resume(tmp_path)[0], saved[30])


def test_a_folder_named_with_a_slash_is_the_same_folder(tmp_path):
  saved = write(tmp_path, 10, 20)
  spoil(tmp_path / 'checkpoint_20', 'no state')
  state, manager = resume(f'{tmp_path}/', save=save_cfg())
  manager.close()
  assert_equal(state, saved[10])
  assert (tmp_path / 'damaged_checkpoint_20').is_dir()


def test_readers_leave_damaged_checkpoints_where_they_are(tmp_path):
  saved = write(tmp_path, 10, 20)
  spoil(tmp_path / 'checkpoint_20', 'no manifest')
  state, _ = resume(tmp_path)
  assert_equal(state, saved[10])
  assert_equal(initializer().from_checkpoint([restore_cfg(tmp_path)]), saved[10])
  names = sorted(p.name for p in tmp_path.iterdir())
  assert names == ['checkpoint_10', 'checkpoint_20']


def test_a_damaged_checkpoint_asked_for_by_name_is_an_error(tmp_path):
  write(tmp_path, 10, 20)
  spoil(tmp_path / 'checkpoint_20', 'no manifest')
  cfg = restore_cfg(tmp_path / 'checkpoint_20', mode='specific')
  with pytest.raises(checkpoints.DamagedCheckpointError, match='checkpoint_20'):
    initializer().from_checkpoint([cfg])


def test_a_run_is_not_taken_for_a_damaged_checkpoint(tmp_path):
  write(tmp_path, 10, 20)
  cfg = restore_cfg(tmp_path, mode='specific')
  message = r'folder of a run, .* \[10, 20\]. Name one of them: .*/checkpoint_20\.'
  with pytest.raises(ValueError, match=message):
    initializer().from_checkpoint([cfg])


def test_all_checkpoints_damaged_is_an_error(tmp_path):
  write(tmp_path, 10, 20)
  for step in (10, 20):
    spoil(tmp_path / f'checkpoint_{step}', 'no manifest')
  with pytest.raises(checkpoints.DamagedCheckpointError, match=r'\[10, 20\]'):
    resume(tmp_path, save=save_cfg())
  assert (tmp_path / 'checkpoint_20').is_dir()


def test_another_model_is_not_taken_for_damage(tmp_path):
  write(tmp_path, 10, 20)
  with pytest.raises(ValueError, match='another model'):
    resume(tmp_path, initializer(net=Net(width=64)), save=save_cfg())
  assert checkpoints_utils.all_steps(tmp_path) == [10, 20]


def test_a_damaged_checkpoint_of_the_previous_layout_is_passed_over(tmp_path):
  write_previous_layout(tmp_path / 'checkpoint_10', state_at(10))
  write_previous_layout(tmp_path / 'checkpoint_20', state_at(20))
  index = tmp_path / 'checkpoint_20' / 'checkpoint'
  index.write_bytes(index.read_bytes()[:100])
  assert_equal(resume(tmp_path)[0], state_at(10))
