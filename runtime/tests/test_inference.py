"""Inference over datasets: order, padded batches, trees and devices."""

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


def dataset(size):
  x = np.arange(size, dtype=np.int32)
  return tf.data.Dataset.from_tensor_slices({'x': x, 'y': np.stack([x, -x], 1)})


def make_infer_fn(step, batch_size=8, num_partitions=1, axes=AXES, **options):
  partitioner = partitioning.PjitPartitioner(num_partitions=num_partitions)
  return inference.get_infer_fn(step, batch_size, axes, partitioner, **options)


def infer(step, size, rng=None, **options):
  return make_infer_fn(step, **options)(dataset(size).enumerate(), STATE, rng=rng)


def scaled(params, batch):
  return batch['x'] * params['scale']


@pytest.mark.parametrize('num_partitions', [1, 2, 8])
@pytest.mark.parametrize('size', [1, 7, 8, 9, 30])
def test_results_of_any_size_are_in_order(size, num_partitions):
  results = infer(scaled, size, num_partitions=num_partitions)
  assert results == [(i, 3.0 * i) for i in range(size)]
  assert all(type(i) is int and type(x) is float for i, x in results)


def test_examples_keep_their_indices_in_any_order():
  order = np.random.default_rng(0).permutation(21)
  shuffled = tf.data.Dataset.from_tensor_slices(
    (order.astype(np.int64), {'x': order.astype(np.int32)})
  )
  assert make_infer_fn(scaled)(shuffled, STATE) == [(i, 3.0 * i) for i in range(21)]


def test_the_batch_is_sharded_over_the_devices():
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


def test_auxiliary_values_are_lists_by_name():
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


def test_a_step_may_take_a_key_per_batch():
  def step(params, batch, rng=None):
    assert rng is not None
    return jnp.zeros_like(batch['x']) + jax.random.uniform(rng)

  first = infer(step, 16, rng=jax.random.PRNGKey(1))
  again = infer(step, 16, rng=jax.random.PRNGKey(1))
  assert first == again
  values = [value for _, value in first]
  assert len(set(values[:8])) == len(set(values[8:])) == 1
  assert values[0] != values[8]


def test_a_step_may_take_the_mutables():
  def step(params, batch, flax_mutables=None):
    return batch['x'] + flax_mutables['mean']

  state = make_state({'scale': jnp.array(3.0)}, {'mean': jnp.array(10)})
  infer_fn = make_infer_fn(step, axes=make_state({'scale': None}, {'mean': None}))
  assert infer_fn(dataset(2).enumerate(), state) == [(0, 10), (1, 11)]


def test_datasets_without_a_length_or_with_repeated_indices_are_errors():
  infer_fn = make_infer_fn(scaled)
  for ds in (dataset(0), dataset(3).repeat(), dataset(3).filter(lambda row: True)):
    with pytest.raises(ValueError, match='length'):
      infer_fn(ds.enumerate(), STATE)
  twice = dataset(3).enumerate().concatenate(dataset(1).enumerate())
  with pytest.raises(ValueError, match='3 of 4'):
    infer_fn(twice, STATE)
