"""Joining processes, and two processes that work together."""

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
  """Arguments of the calls of `jax.distributed.initialize`, which is replaced."""
  made = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda **kw: made.append(kw))
  monkeypatch.setattr(multihost, '_on_tpu_vm', lambda: False)
  for name in ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE'):
    monkeypatch.delenv(name, raising=False)
  return made


def test_a_single_process_by_default(calls):
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
  multihost.initialize(process_count=1)  # Overrides the cluster.
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
    ({'process_count': 0}, 'process_count.* 0'),
    ({'process_index': -1}, 'process_index.* -1'),
    ({'process_count': 2, 'process_index': 2}, '2 of 2'),
    ({'coordinator_address': 'host'}, "'host'"),
  ],
)
def test_invalid_arguments_of_initialize_are_errors(calls, arguments, message):
  with pytest.raises(ValueError, match=message):
    multihost.initialize(**arguments)
  assert calls == []


def test_a_failure_to_join_is_an_error(calls, monkeypatch):
  def fail(**_):
    raise RuntimeError('no idea')

  monkeypatch.setattr(jax.distributed, 'initialize', fail)
  with pytest.raises(ValueError, match='no idea'):
    multihost.initialize(multiprocess_gpu=True)


def run_two_processes(code, devices):
  """Runs `code`, which finds `index` and has joined, and checks that it succeeds."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  start = f"""
    import sys
    from t5x import multihost
    index = int(sys.argv[1])
    multihost.initialize('localhost:{port}', 2, index)
    import jax
    import numpy as np
  """
  flag = f'--xla_force_host_platform_device_count={devices}'
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} {flag}',
  }
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', textwrap.dedent(start) + textwrap.dedent(code), index],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in ('0', '1')
  ]
  for process in processes:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]


def test_two_processes_join_and_communicate():
  code = """
    assert jax.process_count() == 2 and jax.device_count() == 4
    assert multihost.is_host_0() == (index == 0)
    assert multihost.broadcast_int(10 + index) == 10
    tree = multihost.broadcast({'x': np.arange(3) + index})
    np.testing.assert_array_equal(tree['x'], [0, 1, 2])
    multihost.sync('both are here')
    multihost.assert_same(np.arange(3), 'the order')
    try:
      multihost.assert_same(np.arange(3) + index, 'the order')
    except ValueError as error:
      assert 'the order must be the same' in str(error)
    else:
      raise AssertionError('not reported')
  """
  run_two_processes(code, devices=2)


@pytest.mark.slow
def test_every_host_gets_all_inferences():
  code = """
    import tensorflow as tf
    from t5x import inference, partitioning
    from t5x.train_state import InferenceState

    def state_of(scale):
      step = jax.numpy.zeros((), 'int32')
      return InferenceState(step=step, params={'scale': scale}, flax_mutables={})

    def infer_step(params, batch, rng=None):
      return batch['x'] * params['scale'], {'scores': batch['x'] + 0.5}

    def dataset(size):
      x = np.arange(size, dtype=np.int32)
      return tf.data.Dataset.from_tensor_slices({'x': x}).enumerate()

    state = state_of(np.float32(3.0))
    for num_partitions in (1, 8):
      partitioner = partitioning.PjitPartitioner(num_partitions=num_partitions)
      infer = inference.get_infer_fn(infer_step, 8, state_of(None), partitioner)
      for size in (1, 8, 19):
        results, aux = infer(dataset(size), state, rng=jax.random.PRNGKey(0))
        assert results == [(i, 3.0 * i) for i in range(size)], results
        assert aux == {'scores': [i + 0.5 for i in range(size)]}, aux
    try:
      infer(dataset(3 + index), state)
    except ValueError as error:
      assert 'same in every process' in str(error), error
    else:
      raise AssertionError('not reported')
  """
  run_two_processes(code, devices=4)
