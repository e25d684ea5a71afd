"""One of two processes that save and restore together.

python two_process_checkpoints.py PORT PROCESS_INDEX MODEL_DIR {write,read} OUT.npz
"""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np

STEPS = (1, 2, 3)


def iterator(layout, partitioner):
  import tensorflow as tf

  from t5x import data_iterators

  rows = layout.batch_size // layout.num_shards
  ds = tf.data.Dataset.range(1000).shard(layout.num_shards, layout.shard_id)
  ds = ds.map(lambda i: {'x': tf.cast(i, tf.int32)}).shuffle(50, seed=7).repeat()
  return data_iterators.prepare_train_iter(
    ds.batch(rows, drop_remainder=True),
    partitioner=partitioner,
    checkpoint_cfg=types.SimpleNamespace(
      save=types.SimpleNamespace(save_dataset=True), restore=None
    ),
    data_layout=layout,
  )


def local_rows(batch):
  pieces = sorted(batch['x'].addressable_shards, key=lambda s: s.index[0].start)
  return np.concatenate([np.asarray(p.data) for p in pieces])


def main(port, index, folder, mode, out):
  jax.distributed.initialize(f'127.0.0.1:{port}', 2, int(index))
  from flax import struct
  from jax.sharding import NamedSharding, PartitionSpec

  from t5x import checkpoints, partitioning

  @struct.dataclass
  class State:
    tree: dict
    step = property(lambda self: self.tree['state']['step'])
    state_dict = lambda self: self.tree  # noqa: E731 - a stand-in for a train state
    restore_state = lambda self, tree: State(tree)  # noqa: E731

  partitioner = partitioning.PjitPartitioner(num_partitions=2)
  axes = {'state': {'step': None}, 'target': {'w': PartitionSpec('data', 'model')}}
  partitioner.get_mesh_axes = lambda state: State(axes)

  def at(step):
    w = np.arange(64, dtype=np.float32).reshape(16, 4) + step
    sharding = NamedSharding(partitioner.mesh, axes['target']['w'])
    return State(
      {
        'state': {'step': jnp.asarray(step, jnp.int32)},
        'target': {
          'w': jax.make_array_from_callback(w.shape, sharding, lambda i: w[i])
        },
      }
    )

  batches = iterator(partitioner.get_data_layout(16), partitioner)
  manager = checkpoints.OrbaxCheckpointManagerInterface(
    folder, at(0), partitioner, batches, keep=2, period=1 if mode == 'write' else None
  )
  if mode == 'write':
    for step in STEPS:
      next(batches)
      batches.peek_async()  # Fetched ahead, but not consumed.
      manager.save(at(step))
  else:
    state = manager.restore()
    assert int(state.step.addressable_data(0)) == STEPS[-1]
    for piece in state.tree['target']['w'].addressable_shards:
      expected = (np.arange(64).reshape(16, 4) + STEPS[-1])[piece.index]
      np.testing.assert_array_equal(piece.data, expected)
  manager.close()
  np.savez(out, *[local_rows(next(batches)) for _ in range(3)])


if __name__ == '__main__':
  main(*sys.argv[1:])
