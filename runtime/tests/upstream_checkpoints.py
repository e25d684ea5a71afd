"""Writes or reads a checkpoint with the T5X on the path, upstream's or ours.

  python upstream_checkpoints.py {write,read}[_previous] MODEL_DIR OUT.npz

OUT gets the arrays of the state and the next batch.
"""

import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
from flax import traverse_util
from flax.linen import partitioning as flax_partitioning

from t5x import checkpoints, optimizers, partitioning, utils

STEP = 3


class Net(nn.Module):
  """A kernel and a scale."""

  @nn.compact
  def __call__(self, x):
    kernel = flax_partitioning.param_with_axes(
      'kernel', nn.initializers.normal(1.0), (16, 32), axes=('embed', 'mlp')
    )
    scale = flax_partitioning.param_with_axes(
      'scale', nn.initializers.normal(1.0), (16,), axes=('embed',)
    )
    return (x * scale) @ kernel


class Model:
  """Provides a bound method: upstream takes the model from it."""

  module = Net()

  def get_initial_variables(self, rng, input_shapes, input_types=None):
    del input_types
    return self.module.init(rng, jnp.zeros(input_shapes['x']))


def train_iterator(partitioner):
  ds = tf.data.Dataset.range(200).map(lambda i: {'x': tf.cast(i, tf.int32)})
  ds = ds.shuffle(50, seed=7).repeat().batch(8, drop_remainder=True)
  return utils.prepare_train_iter(
    ds,
    partitioner=partitioner,
    checkpoint_cfg=types.SimpleNamespace(
      save=types.SimpleNamespace(save_dataset=True), restore=None
    ),
    data_layout=partitioner.get_data_layout(8),
  )


def main(mode, folder, out):
  partitioner = partitioning.PjitPartitioner(num_partitions=2)
  initializer = utils.TrainStateInitializer(
    optimizer_def=optimizers.adamw(learning_rate=0.1),
    init_fn=Model().get_initial_variables,
    input_shapes={'x': (8, 16)},
    partitioner=partitioner,
  )
  batches = train_iterator(partitioner)
  shapes = initializer.global_train_state_shape
  manager = checkpoints.OrbaxCheckpointManagerInterface(
    folder, shapes, partitioner, batches, save_dtype='float32'
  )
  previous = checkpoints.Checkpointer(shapes, partitioner, folder, batches)
  if mode == 'read':
    state = manager.restore(path=f'{folder}/checkpoint_{STEP}')
  elif mode == 'read_previous':
    state = previous.restore(STEP)
    loaded = checkpoints.load_t5x_checkpoint(folder)
    jax.tree.map(
      np.testing.assert_array_equal, loaded['target'], state.state_dict()['target']
    )
  else:
    state = initializer.from_scratch(jax.random.PRNGKey(0))
    for _ in range(STEP):
      next(batches)
      grads = jax.tree.map(jnp.cos, state.params)
      state = state.apply_gradient(grads, learning_rate=0.1)
    if mode == 'write_previous':
      previous.save(state)
    else:
      manager.save(state)
    manager.close()
  flat = traverse_util.flatten_dict(state.state_dict(), sep='/')
  arrays = {name: np.asarray(x) for name, x in flat.items() if x is not None}
  np.savez(out, next_batch=np.asarray(next(batches)['x']), **arrays)


if __name__ == '__main__':
  main(*sys.argv[1:])
