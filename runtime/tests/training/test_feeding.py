"""Batches on the devices, of one process and of two that really run."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from t5x import partitioning
from t5x.training import feeding

SCRIPT = pathlib.Path(__file__).parents[1] / 'two_process_training.py'


def test_a_batch_lies_over_the_data_axis():
  partitioner = partitioning.PjitPartitioner(num_partitions=2)
  batch = {'x': np.arange(16.0).reshape(8, 2), 'scale': np.float32(2)}
  placed = feeding.put_on_devices(batch, partitioner, parts_of_step=2)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), batch)
  assert placed['x'].sharding.spec == PartitionSpec('data')
  assert placed['x'].sharding.shard_shape((8, 2)) == (2, 2)
  assert placed['scale'].sharding.is_fully_replicated
  # What lies there already stays.
  again = feeding.put_on_devices(placed, partitioner)
  assert again['x'] is placed['x'] or again['x'].sharding == placed['x'].sharding


@pytest.mark.parametrize(('rows', 'parts'), [(6, 1), (12, 2), (8, 3)])
def test_rows_that_do_not_divide(rows, parts):
  partitioner = partitioning.PjitPartitioner(num_partitions=2)
  message = f"{rows} rows of 'x', {parts} microbatches, 4 data partitions"
  with pytest.raises(ValueError, match=message):
    feeding.put_on_devices({'x': np.ones((rows, 2))}, partitioner, parts)


def test_one_host_is_in_step_with_itself():
  assert list(feeding.in_step_with_other_hosts('task', [1, 2, 3])) == [1, 2, 3]


def run_processes(count, num_partitions, folder):
  """Outputs of `count` processes that have eight devices in all."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={8 // count}',
  }
  arguments = [str(port), str(count)]
  running = [
    subprocess.Popen(
      [sys.executable, SCRIPT, *arguments, str(i), str(num_partitions), folder],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(count)
  ]
  try:
    outputs = [process.communicate(timeout=240) for process in running]
  finally:
    for process in running:
      process.kill()
  for process, (_, log) in zip(running, outputs):
    assert process.returncode == 0, log
  return [json.loads(text.splitlines()[-1]) for text, _ in outputs]


@pytest.mark.slow
@pytest.mark.parametrize(('num_partitions', 'shards'), [(2, 2), (8, 1)])
def test_two_processes_train_like_one(tmp_path, num_partitions, shards):
  (want,) = run_processes(1, num_partitions, str(tmp_path / 'one'))
  both = run_processes(2, num_partitions, str(tmp_path / 'two'))
  for got in both:
    assert got['shards'] == shards
    np.testing.assert_allclose(got['losses'], want['losses'], rtol=1e-5)
    np.testing.assert_allclose(got['evaluated'], want['evaluated'], rtol=1e-5)
    assert "batches of 'task': 1 of 2" in got['uneven']
  # With two shards both processes have a bad row of their own; the step is one.
  assert [got['stopped'] for got in (want, *both)] == [5, 5, 5]
  kept = sorted(path.name for path in (tmp_path / 'two').glob('nonfinite*'))
  assert kept == [f'nonfinite_step_5_process_{i}.npz' for i in (0, 1)]
