"""Steps by the names of folders."""

import subprocess
import sys

import gin
import pytest

from t5x import checkpoints_utils


def test_steps(tmp_path):
  assert checkpoints_utils.all_steps(tmp_path / 'nowhere') == []
  assert checkpoints_utils.latest_step(tmp_path) is None
  for name in (
    'checkpoint_100',
    'checkpoint_0',
    'checkpoint_20',
    'checkpoint_',
    'checkpoint_x',
    'checkpoint_30.orbax-checkpoint-tmp',
    'checkpoint_40.tmp-1234',
    'damaged_checkpoint_50',
    'deleting_checkpoint_60',
    'train',
  ):
    (tmp_path / name).mkdir()
  assert checkpoints_utils.all_steps(tmp_path) == [0, 20, 100]
  assert checkpoints_utils.latest_step(str(tmp_path)) == 100


def test_folders_of_object_stores_must_be_committed(tmp_path, monkeypatch):
  for step, file in ((1, 'commit_success.txt'), (2, '_METADATA'), (3, 'checkpoint')):
    (tmp_path / f'checkpoint_{step}').mkdir()
    (tmp_path / f'checkpoint_{step}' / file).write_text('')
  monkeypatch.setattr(checkpoints_utils, 'renames_at_once', lambda path: False)
  assert checkpoints_utils.all_steps(tmp_path) == [1, 3]


def test_data_positions(tmp_path):
  for path in (
    'checkpoint_1/train_ds-000-of-001.index',  # The previous layout.
    'checkpoint_2/dataset/train_ds-000-of-001.index',
    'checkpoint_3/dataset/process_1-of-2/train_ds-001-of-002.index',
    'checkpoint_4/state/train_ds',
  ):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text('')
  assert checkpoints_utils.all_dataset_checkpoint_steps(tmp_path) == [1, 2, 3]


def test_paths():
  path = checkpoints_utils.get_checkpoint_dir
  assert path('/m', 7) == '/m/checkpoint_7'
  assert path('/m', 7, 4) == '/m/checkpoint_0007'
  back = checkpoints_utils.get_step_from_checkpoint_dir
  for text in ('/m/checkpoint_7', '/m/checkpoint_7/', '/m/checkpoint_0007'):
    assert back(text) == ('/m', 7)
  for text in ('/m', '/m/checkpoint_', '/m/checkpoint_7/state', '/m/xcheckpoint_7'):
    with pytest.raises(ValueError, match='no checkpoint'):
      back(text)


def test_the_prefix_is_configurable(tmp_path):
  (tmp_path / 'model_3').mkdir()
  try:
    with gin.unlock_config():
      gin.bind_parameter('checkpoints_utils.get_checkpoint_prefix.prefix', 'model')
    assert checkpoints_utils.all_steps(tmp_path) == [3]
    assert checkpoints_utils.get_checkpoint_dir('m', 3) == 'm/model_3'
  finally:
    gin.clear_config()


def test_needs_neither_jax_nor_tensorflow():
  code = (
    'import sys, t5x.checkpoints_utils;'
    'print([m for m in ("jax", "tensorflow", "orbax") if m in sys.modules])'
  )
  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert out.stdout.strip() == '[]'
