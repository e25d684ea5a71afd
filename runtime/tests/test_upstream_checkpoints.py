"""Upstream T5X reads our checkpoints and we read its, bit for bit."""

import pathlib

import numpy as np
import pytest
import upstream

SCRIPT = pathlib.Path(__file__).with_name('upstream_checkpoints.py')

pytestmark = upstream.MARKS


def run(mode, folder, on_upstream):
  out = folder.parent / f'{mode}-{on_upstream}.npz'
  return upstream.run(SCRIPT, mode, folder, out=out, on_upstream=on_upstream)


def assert_same(left, right):
  assert left.keys() == right.keys()
  for name, value in left.items():
    assert value.dtype == right[name].dtype, name
    np.testing.assert_array_equal(value, right[name], err_msg=name)


@pytest.mark.parametrize('upstream_writes', [True, False])
def test_checkpoints_are_exchanged(tmp_path, upstream_writes):
  folder = tmp_path / 'model'
  folder.mkdir()
  written = run('write', folder, upstream_writes)
  assert_same(run('read', folder, not upstream_writes), written)


@pytest.mark.parametrize('upstream_writes', [True, False])
def test_layout_before_orbax_is_exchanged(tmp_path, upstream_writes):
  folder = tmp_path / 'model'
  folder.mkdir()
  written = run('write_previous', folder, upstream_writes)
  assert_same(run('read_previous', folder, not upstream_writes), written)
