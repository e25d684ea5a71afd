"""Two processes write one checkpoint, each its part and its dataset state."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from t5x import checkpoints

SCRIPT = pathlib.Path(__file__).with_name('two_process_checkpoints.py')


def run(folder, mode):
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=4'
  outs = [folder.parent / f'{mode}-{i}.npz' for i in range(2)]
  processes = [
    subprocess.Popen(
      [sys.executable, SCRIPT, str(port), str(i), folder, mode, outs[i]],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags},
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  for process in processes:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
  return [list(np.load(out).values()) for out in outs]


@pytest.mark.slow
def test_save_and_restore(tmp_path):
  folder = tmp_path / 'model'
  written = run(folder, 'write')
  assert checkpoints.all_steps(folder) == [2, 3]
  dataset_states = sorted(
    str(p.relative_to(folder / 'checkpoint_3'))
    for p in (folder / 'checkpoint_3').glob('dataset/process_*/*.index')
  )
  assert dataset_states == [
    'dataset/process_0-of-2/train_ds-000-of-002.index',
    'dataset/process_1-of-2/train_ds-001-of-002.index',
  ]
  assert not np.array_equal(written[0], written[1])
  for before, after in zip(written, run(folder, 'read')):
    np.testing.assert_array_equal(before, after)
