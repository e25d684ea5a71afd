"""Metrics are found again in TensorBoard's files."""

import struct

import pytest
from tensorboard.compat.proto import event_pb2, summary_pb2

from t5x.checkpointing import best_metrics


def write(folder, tag, values):
  """An event file; TensorBoard's own writer would import TensorFlow."""
  folder.mkdir(parents=True, exist_ok=True)
  number = len(list(folder.iterdir()))
  with (folder / f'events.out.tfevents.{number}').open('wb') as file:
    for step, value in values.items():
      summary = summary_pb2.Summary(
        value=[summary_pb2.Summary.Value(tag=tag, simple_value=value)]
      )
      event = event_pb2.Event(step=step, summary=summary).SerializeToString()
      # Two checksums, which the reader does not look at.
      file.write(struct.pack('<QI', len(event), 0) + event + struct.pack('<I', 0))


def test_finds_steps_wanted(tmp_path):
  write(tmp_path / 'train', 'accuracy', {0: 0.5, 10: 0.25, 20: 0.75})
  find = best_metrics.populate_metrics_for_steps
  assert find(str(tmp_path), 'train/accuracy', [10, 20, 30]) == {10: 0.25, 20: 0.75}
  assert find(str(tmp_path), 'train/loss', [10]) == {}
  assert find(str(tmp_path), 'eval/accuracy', [10]) == {}
  assert find(str(tmp_path), 'accuracy', [10]) == {}


def test_slashes_on_both_sides(tmp_path):
  write(tmp_path / 'inference_eval' / 'task', 'eval/bleu', {5: 0.5})
  name = 'inference_eval/task/eval/bleu'
  assert best_metrics.populate_metrics_for_steps(tmp_path, name, [5]) == {5: 0.5}
  # A folder of the tag's name, without the tag, is no hindrance.
  (tmp_path / 'inference_eval' / 'task' / 'eval').mkdir()
  assert best_metrics.populate_metrics_for_steps(tmp_path, name, [5]) == {5: 0.5}


def test_a_resumed_run_writes_another_file(tmp_path):
  write(tmp_path / 'train', 'loss', {1: 1.0, 2: 2.0})
  write(tmp_path / 'train', 'loss', {3: 3.0})
  found = best_metrics.populate_metrics_for_steps(tmp_path, 'train/loss', range(9))
  assert found == {1: 1.0, 2: 2.0, 3: 3.0}


def test_a_file_that_is_being_written(tmp_path):
  write(tmp_path / 'train', 'loss', {1: 1.0, 2: 2.0})
  (file,) = (tmp_path / 'train').iterdir()
  file.write_bytes(file.read_bytes()[:-3])
  found = best_metrics.populate_metrics_for_steps(tmp_path, 'train/loss', [1, 2])
  assert found == {1: 1.0}


@pytest.mark.slow
def test_reads_what_the_runtime_writes(tmp_path):
  from clu import metric_writers  # Imports TensorFlow.

  writer = metric_writers.SummaryWriter(str(tmp_path / 'train'))
  writer.write_scalars(4, {'loss': 0.5, 'accuracy': 0.125})
  writer.flush()
  found = best_metrics.populate_metrics_for_steps(tmp_path, 'train/accuracy', [4])
  assert found == {4: 0.125}
