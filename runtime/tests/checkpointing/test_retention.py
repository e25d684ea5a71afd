"""Which checkpoints are kept, and what is left of them."""

import struct

import pytest
from one_array import Counter, manager, save_all
from tensorboard.compat.proto import event_pb2, summary_pb2

from t5x import (
  checkpoint_utils,
  checkpoints_utils,
)


def test_keep_acts(tmp_path):
  assert save_all(tmp_path, range(5), keep=2) == [3, 4]


def test_force_keep_period_acts(tmp_path):
  assert save_all(tmp_path, range(6), keep=1, force_keep_period=3) == [0, 3, 5]


def test_pinned_checkpoints_stay(tmp_path):
  def pin(step):
    if step == 1:
      checkpoint_utils.pin_checkpoint(str(tmp_path / 'checkpoint_1'), 'the paper')

  assert save_all(tmp_path, range(5), pin, keep=1) == [1, 4]


def test_best_checkpoints_and_the_newest_stay(tmp_path):
  folder = tmp_path / 'eval' / 'task'
  folder.mkdir(parents=True)
  accuracy = {0: 0.1, 1: 0.9, 2: 0.3, 3: 0.8, 4: 0.2}

  def evaluate(step):
    # Metrics come after the checkpoint, as in a run.
    value = summary_pb2.Summary.Value(tag='eval/accuracy', simple_value=accuracy[step])
    event = event_pb2.Event(step=step, summary=summary_pb2.Summary(value=[value]))
    record = event.SerializeToString()
    (folder / f'events.out.tfevents.{step}').write_bytes(
      struct.pack('<QI', len(record), 0) + record + bytes(4)
    )

  name = 'eval/task/eval/accuracy'
  kept = save_all(tmp_path, range(5), evaluate, keep=2, metric_name_to_monitor=name)
  assert kept == [1, 3, 4]
  kept = save_all(tmp_path, [5], keep=1, metric_name_to_monitor=name, metric_mode='min')
  assert kept == [4, 5]


@pytest.mark.parametrize('keep_without, kept', [(True, [0, 1, 2, 3]), (False, [2, 3])])
def test_keep_checkpoints_without_metrics_acts(tmp_path, keep_without, kept):
  assert kept == save_all(
    tmp_path,
    range(4),
    keep=1,
    metric_name_to_monitor='train/accuracy',
    keep_checkpoints_without_metrics=keep_without,
  )


def test_keep_dataset_checkpoints_acts(tmp_path):
  steps = save_all(
    tmp_path,
    range(4),
    keep_dataset_checkpoints=2,
    dataset_iterator=Counter().as_clu(),
  )
  assert steps == [0, 1, 2, 3]
  assert checkpoints_utils.all_dataset_checkpoint_steps(tmp_path) == [2, 3]
  for step in steps:
    assert int(manager(tmp_path).restore(step).step) == step


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'keep': 0}, 'keep is 0'),
    ({'period': -5}, 'period is -5'),
    ({'keep_dataset_checkpoints': 0}, 'keep_dataset_checkpoints is 0'),
    ({'force_keep_period': -1}, 'force_keep_period is -1'),
    ({'metric_mode': 'best'}, "metric_mode is 'best'"),
  ],
)
def test_bad_settings(tmp_path, settings, message):
  with pytest.raises(ValueError, match=message):
    manager(tmp_path, **settings)
