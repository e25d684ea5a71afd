"""Every setting of checkpoints reaches what it names, or is refused."""

import functools
import types

import pytest
from saved_states import initializer, restore_cfg, save_cfg

from t5x import (
  checkpoints,
  restore,
)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'dtype': 'float16'}, "dtype is 'float16'"),
    ({'period': -1}, 'period is -1'),
    ({'keep': 0}, 'keep is 0'),
    ({'checkpoint_steps': [5, -2]}, r'\[-2\]'),
    ({'keep_dataset_checkpoints': 1}, 'save_dataset is False'),
  ],
)
def test_bad_save_configurations(changes, message):
  with pytest.raises(ValueError, match=message):
    restore.SaveCheckpointConfig(**changes)


@pytest.mark.parametrize(
  'changes, message',
  [({'mode': 'newest'}, "mode is 'newest'"), ({'dtype': 'int8'}, "dtype is 'int8'")],
)
def test_bad_restore_configurations(changes, message):
  with pytest.raises(ValueError, match=message):
    restore_cfg('x', **changes)


def manager_of(folder, **changes):
  start = initializer()
  return restore.create_orbax_checkpoint_manager(
    save_cfg=save_cfg(**changes),
    train_state=start.global_train_state_shape,
    partitioner=start._partitioner,
    model_dir=str(folder),
  )


def test_save_settings_reach_the_manager(tmp_path):
  manager = manager_of(tmp_path, period=4, checkpoint_steps=[5], keep=3)
  assert [s for s in range(10) if manager.should_save(s)] == [0, 4, 5, 8]
  assert manager._retention.keep == 3
  for period in (0, None):
    quiet = manager_of(tmp_path, period=period)
    assert not any(quiet.should_save(s) for s in range(10))


@pytest.mark.parametrize('wrapped', [False, True])
def test_save_best_checkpointer_reaches_the_manager(tmp_path, wrapped):
  cls = checkpoints.SaveBestCheckpointer
  if wrapped:
    cls = functools.partial(
      cls,
      metric_name_to_monitor='eval/loss',
      metric_mode='min',
      keep_checkpoints_without_metrics=False,
      force_keep_period=40,
    )
  rules = manager_of(tmp_path, checkpointer_cls=cls, keep=2)._retention
  assert rules.keep == 2
  expected = (
    ('eval/loss', 'min', False, 40)
    if wrapped
    else ('train/accuracy', 'max', True, None)
  )
  assert (
    rules.metric_name,
    rules.metric_mode,
    rules.keep_without_metrics,
    rules.force_keep_period,
  ) == expected


def test_save_best_checkpointer_bound_by_gin(tmp_path):
  import gin

  gin.clear_config()
  try:
    with gin.unlock_config():
      gin.parse_config("""
        checkpoints.SaveBestCheckpointer.metric_name_to_monitor = 'train/loss'
        checkpoints.SaveBestCheckpointer.metric_mode = 'min'
        checkpoints.SaveBestCheckpointer.keep = 5
      """)
    rules = manager_of(
      tmp_path, checkpointer_cls=checkpoints.SaveBestCheckpointer
    )._retention
  finally:
    gin.clear_config()
  assert (rules.metric_name, rules.metric_mode, rules.keep) == ('train/loss', 'min', 5)


def test_foreign_checkpointers_are_refused(tmp_path):
  with pytest.raises(ValueError, match='SimpleNamespace.*checkpoint_manager_cls'):
    manager_of(tmp_path, checkpointer_cls=types.SimpleNamespace)


def test_other_managers_may_be_given(tmp_path):
  got = {}
  start = initializer()
  restore.create_orbax_checkpoint_manager(
    save_cfg=save_cfg(
      checkpoint_manager_cls=lambda **kw: got.update(kw), dtype='bfloat16'
    ),
    train_state=start.global_train_state_shape,
    partitioner=start._partitioner,
    model_dir='somewhere',
  )
  assert got['directory'] == 'somewhere'
  assert got['save_dtype'] == 'bfloat16' and got['period'] == 10
  assert 'keep' not in got and 'checkpoint_steps' not in got
  with pytest.raises(ValueError, match='different checkpoint_manager_cls'):
    restore.create_orbax_checkpoint_manager(
      save_cfg=save_cfg(checkpoint_manager_cls=dict),
      restore_cfg=restore_cfg('x'),
      train_state=None,
      partitioner=None,
      model_dir='somewhere',
    )
