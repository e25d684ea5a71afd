"""One of two processes that save a model's parameters together.

Run by test_hf_export.py:

  python two_process_save.py PORT PROCESS_INDEX PARAMS.npz MODEL_DIR

writes MODEL_DIR/checkpoint_3. Parameters lie split over all devices of both, where an
axis divides.
"""

import sys

import jax
import numpy as np


def main(port, index, params_file, model_dir):
  jax.distributed.initialize(f'127.0.0.1:{port}', 2, int(index))
  from flax import struct, traverse_util
  from jax.sharding import NamedSharding, PartitionSpec

  from t5x import checkpoints, partitioning

  @struct.dataclass
  class State:
    tree: dict
    step = property(lambda self: self.tree['state']['step'])
    state_dict = lambda self: self.tree  # noqa: E731 - a stand-in for a train state

  partitioner = partitioning.PjitPartitioner(num_partitions=4)
  given = dict(np.load(params_file))
  axes, arrays = {}, {}
  for path, leaf in given.items():
    split = [size % 4 == 0 for size in leaf.shape]
    first = split.index(True) if any(split) else None
    axes[path] = PartitionSpec(
      *('model' if i == first else None for i in range(leaf.ndim))
    )
    arrays[path] = jax.make_array_from_callback(
      leaf.shape, NamedSharding(partitioner.mesh, axes[path]), leaf.__getitem__
    )

  def state(step, tree):
    nested = traverse_util.unflatten_dict(tree, sep='/')
    return State({'state': {'step': step}, 'target': nested})

  partitioner.get_mesh_axes = lambda _: state(None, axes)
  saved = state(jax.numpy.asarray(3, jax.numpy.int32), arrays)
  manager = checkpoints.OrbaxCheckpointManagerInterface(
    model_dir, saved, partitioner, keep=2, period=1
  )
  manager.save(saved)
  manager.close()


if __name__ == '__main__':
  main(*sys.argv[1:])
