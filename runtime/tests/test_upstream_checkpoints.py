"""T5X reads the checkpoints written here, and the other way round, bit by bit."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).with_name('upstream_checkpoints.py')

pytestmark = [
  pytest.mark.upstream,
  pytest.mark.slow,
  pytest.mark.skipif(
    'UPSTREAM_T5X' not in os.environ, reason='UPSTREAM_T5X is not set'
  ),
]


def run(mode, folder, upstream):
  path = {'PYTHONPATH': os.environ['UPSTREAM_T5X']} if upstream else {}
  out = folder.parent / f'{mode}-{upstream}.npz'
  subprocess.run(
    [sys.executable, SCRIPT, mode, folder, out],
    env={**os.environ, **path},
    check=True,
  )
  return dict(np.load(out))


def assert_same(left, right):
  assert left.keys() == right.keys()
  for name, value in left.items():
    assert value.dtype == right[name].dtype, name
    np.testing.assert_array_equal(value, right[name], err_msg=name)


@pytest.mark.parametrize('upstream_writes', [True, False])
def test_what_one_writes_the_other_reads(tmp_path, upstream_writes):
  folder = tmp_path / 'model'
  folder.mkdir()
  written = run('write', folder, upstream_writes)
  assert_same(run('read', folder, not upstream_writes), written)


def test_the_layout_before_orbax_is_read(tmp_path):
  folder = tmp_path / 'model'
  folder.mkdir()
  written = run('write_previous', folder, upstream=True)
  assert_same(run('read', folder, upstream=False), written)
