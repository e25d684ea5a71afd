"""Inference over datasets: order, filled-up batches, trees, devices, hosts."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

from t5x import inference, partitioning
from t5x.train_state import InferenceState


def make_state(params, mutables=None):
  return InferenceState(
    step=jnp.zeros((), jnp.int32), params=params, flax_mutables=mutables or {}
  )


STATE = make_state({'scale': jnp.array(3.0)})
AXES = make_state({'scale': None})


def dataset(size, start=0):
  x = np.arange(start, start + size, dtype=np.int32)
  return tf.data.Dataset.from_tensor_slices({'x': x, 'y': np.stack([x, -x], 1)})


def infer(step, size, batch_size=8, num_partitions=1, state=STATE, **options):
  infer_fn = inference.get_infer_fn(
    step,
    batch_size,
    make_state(jax.tree.map(lambda _: None, dict(state.params))),
    partitioning.PjitPartitioner(num_partitions=num_partitions),
    keep_aux_as_numpy=options.pop('keep_aux_as_numpy', False),
  )
  return infer_fn(dataset(size).enumerate(), state, **options)


def scaled(params, batch):
  return batch['x'] * params['scale']


@pytest.mark.parametrize('num_partitions', [1, 2, 8])
@pytest.mark.parametrize('size', [1, 7, 8, 9, 30])
def test_results_come_in_order_whatever_the_size(size, num_partitions):
  results = infer(scaled, size, num_partitions=num_partitions)
  assert results == [(i, 3.0 * i) for i in range(size)]
  assert all(type(i) is int and type(x) is float for i, x in results)


def test_examples_keep_their_indices_in_any_order():
  order = np.random.default_rng(0).permutation(21)
  shuffled = tf.data.Dataset.from_tensor_slices(
    (order.astype(np.int64), {'x': order.astype(np.int32)})
  )
  infer_fn = inference.get_infer_fn(
    scaled, 8, AXES, partitioning.PjitPartitioner(num_partitions=1)
  )
  assert infer_fn(shuffled, STATE) == [(i, 3.0 * i) for i in range(21)]


def test_the_batch_is_spread_over_the_devices():
  seen = []

  def step(params, batch):
    jax.debug.inspect_array_sharding(batch['x'], callback=seen.append)
    return batch['x']

  infer(step, 16, batch_size=16)
  assert seen[0].shard_shape((16,)) == (2,)


def test_trees_are_split_by_example():
  def step(params, batch):
    return {'pair': (batch['x'], batch['y'].astype(jnp.bfloat16))}

  results = infer(step, 3)
  assert results == [(i, {'pair': (i, [float(i), -float(i)])}) for i in range(3)]


def with_aux(params, batch):
  return batch['x'], {'scores': batch['x'] / 2, 'deep': {'pair': (batch['y'],)}}


def test_auxiliary_values_stay_by_name():
  results, aux = infer(with_aux, 9)
  assert results == [(i, i) for i in range(9)]
  assert aux == {
    'scores': [i / 2 for i in range(9)],
    'deep': {'pair': ([[i, -i] for i in range(9)],)},
  }


def test_auxiliary_values_may_stay_arrays():
  _, aux = infer(with_aux, 3, keep_aux_as_numpy=True)
  assert isinstance(aux['scores'], list) and len(aux['scores']) == 3
  pair = aux['deep']['pair'][0]
  np.testing.assert_array_equal(pair, [[0, 0], [1, -1], [2, -2]])
  assert isinstance(pair[0], np.ndarray)


def test_a_step_gets_a_key_for_each_batch_if_it_takes_one():
  def step(params, batch, rng=None):
    assert rng is not None
    return jnp.zeros_like(batch['x']) + jax.random.uniform(rng)

  first = infer(step, 16, rng=jax.random.PRNGKey(1))
  again = infer(step, 16, rng=jax.random.PRNGKey(1))
  assert first == again
  values = [value for _, value in first]
  assert len(set(values[:8])) == len(set(values[8:])) == 1
  assert values[0] != values[8]


def test_a_step_gets_the_mutables_if_it_takes_them():
  def step(params, batch, flax_mutables=None):
    return batch['x'] + flax_mutables['mean']

  state = make_state({'scale': jnp.array(3.0)}, {'mean': jnp.array(10)})
  infer_fn = inference.get_infer_fn(
    step,
    8,
    make_state({'scale': None}, {'mean': None}),
    partitioning.PjitPartitioner(num_partitions=1),
  )
  assert infer_fn(dataset(2).enumerate(), state) == [(0, 10), (1, 11)]


def test_few_results_wait_on_the_devices(monkeypatch):
  copied = []
  on_host = inference._on_host
  monkeypatch.setattr(
    inference, '_on_host', lambda r: copied.append(len(copied)) or on_host(r)
  )
  started = []

  real = inference._padded_batches

  def recorded(*args):
    for batch in real(*args):
      started.append(len(copied))
      yield batch

  monkeypatch.setattr(inference, '_padded_batches', recorded)
  infer(scaled, 80)
  assert started == [0, 0, 0, 1, 2, 3, 4, 5, 6, 7]


def test_datasets_without_a_length_or_with_repeated_indices_are_errors():
  infer_fn = inference.get_infer_fn(
    scaled, 8, AXES, partitioning.PjitPartitioner(num_partitions=1)
  )
  for ds in (dataset(0), dataset(3).repeat(), dataset(3).filter(lambda row: True)):
    with pytest.raises(ValueError, match='length'):
      infer_fn(ds.enumerate(), STATE)
  twice = dataset(3).enumerate().concatenate(dataset(1).enumerate())
  with pytest.raises(ValueError, match='3 of 4'):
    infer_fn(twice, STATE)


WORKER = """
import sys
import jax
jax.config.update('jax_num_cpu_devices', 4)
process, port = map(int, sys.argv[1:])
jax.distributed.initialize(f'localhost:{port}', 2, process)
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
from t5x import inference, partitioning
from t5x.train_state import InferenceState

def state_of(scale):
  return InferenceState(
    step=jnp.zeros((), jnp.int32), params={'scale': scale}, flax_mutables={}
  )

state = state_of(np.float32(3.0))

def step(params, batch, rng=None):
  return batch['x'] * params['scale'], {'scores': batch['x'] + 0.5}

for num_partitions in (1, 8):
  partitioner = partitioning.PjitPartitioner(num_partitions=num_partitions)
  infer_fn = inference.get_infer_fn(step, 8, state_of(None), partitioner)
  for size in (1, 8, 19):
    data = tf.data.Dataset.from_tensor_slices({'x': np.arange(size, dtype=np.int32)})
    results, aux = infer_fn(data.enumerate(), state, rng=jax.random.PRNGKey(0))
    assert results == [(i, 3.0 * i) for i in range(size)], results
    assert aux == {'scores': [i + 0.5 for i in range(size)]}, aux
other = tf.data.Dataset.from_tensor_slices({'x': np.arange(3 + process)})
try:
  infer_fn(other.enumerate(), state)
except ValueError as error:
  assert 'same in every process' in str(error), error
  print('all equal')
"""


@pytest.mark.slow
def test_every_host_gets_all_results(tmp_path):
  script = tmp_path / 'worker.py'
  script.write_text(WORKER)
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1]
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  workers = [
    subprocess.Popen(
      [sys.executable, str(script), str(process), str(port)],
      env=environment | {'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for process in range(2)
  ]
  for worker in workers:
    output, errors = worker.communicate(timeout=300)
    # The collectives' library prints there too.
    assert 'all equal' in output, errors[-3000:]
