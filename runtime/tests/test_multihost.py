"""Joining and synchronising processes."""

import os
import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from t5x import multihost


@pytest.fixture
def calls(monkeypatch):
  """Records the arguments of `jax.distributed.initialize` in place of calling it."""
  made = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda **kw: made.append(kw))
  monkeypatch.setattr(multihost, '_on_tpu_vm', lambda: False)
  for name in ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE'):
    monkeypatch.delenv(name, raising=False)
  return made


def test_runs_alone_by_default(calls):
  multihost.initialize()
  assert calls == []
  assert multihost.is_host_0()
  multihost.sync('nothing')
  multihost.assert_same({'a': np.ones(2)}, 'it')
  assert multihost.broadcast_int(2**31 - 1) == 2**31 - 1


def test_arguments_are_passed_to_jax(calls):
  multihost.initialize('host:12', 2, 1)
  multihost.initialize(multiprocess_gpu=True, initialization_timeout=9)
  given = {'coordinator_address': 'host:12', 'num_processes': 2, 'process_id': 1}
  assert calls == [given, {'initialization_timeout': 9}]


def test_clusters_are_detected(calls, monkeypatch):
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1')
  multihost.initialize()
  assert calls == []
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '4')
  assert multihost.detect_cluster() == 'Slurm'
  multihost.initialize()
  assert calls == [{}]
  # process_count = 1 overrides the cluster.
  multihost.initialize(process_count=1)
  assert calls == [{}]
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1')
  monkeypatch.setattr(multihost, '_on_tpu_vm', lambda: True)
  assert multihost.detect_cluster() == 'TPU VM'


def test_environment_excludes_tpus(monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert not multihost._on_tpu_vm()
  monkeypatch.setenv('JAX_PLATFORMS', 'tpu,cpu')
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  assert not multihost._on_tpu_vm()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'process_count': 0}, 'at least 1'),
    ({'process_index': -1}, 'at least 0'),
    ({'process_count': 2, 'process_index': 2}, '2 of 2'),
    ({'coordinator_address': 'host'}, "'host'"),
  ],
)
def test_contradicting_arguments_are_errors(calls, arguments, message):
  with pytest.raises(ValueError, match=message):
    multihost.initialize(**arguments)
  assert calls == []


def test_failure_to_join_is_an_error(monkeypatch, calls):
  def fail(**_):
    raise ValueError('no idea')

  monkeypatch.setattr(jax.distributed, 'initialize', fail)
  with pytest.raises(ValueError, match='no idea'):
    multihost.initialize(multiprocess_gpu=True)


CHILD = """
    import sys
    from t5x import multihost
    port, index = sys.argv[1], int(sys.argv[2])
    multihost.initialize('localhost:' + port, 2, index)
    import jax
    import numpy as np
    assert jax.process_count() == 2 and jax.device_count() == 4
    assert multihost.is_host_0() == (index == 0)
    assert multihost.broadcast_int(10 + index) == 10
    tree = multihost.broadcast({'x': np.arange(3) + index})
    np.testing.assert_array_equal(tree['x'], [0, 1, 2])
    multihost.sync('start')
    multihost.assert_same(np.arange(3), 'the order')
    try:
      multihost.assert_same(np.arange(3) + index, 'the order')
    except ValueError as error:
      assert 'the order must be the same' in str(error)
    else:
      assert index == 0
    print('done', index)
"""


def test_two_processes():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = str(free.getsockname()[1])
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
  }
  children = [
    subprocess.Popen(
      [sys.executable, '-c', textwrap.dedent(CHILD), port, str(index)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(2)
  ]
  for index, child in enumerate(children):
    output, _ = child.communicate(timeout=120)
    assert child.returncode == 0, output
    assert f'done {index}' in output
