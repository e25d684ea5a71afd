"""A train state of one sharded array, with its checkpoint manager."""

import types

import clu.data.dataset_iterator as clu_iterators
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from t5x import checkpoints

MESH = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ('data', 'model'))
AXES = {'state': {'step': None}, 'target': {'w': PartitionSpec('data', 'model')}}


@flax.struct.dataclass
class State:
  """The part of a train state that checkpoints touch."""

  tree: dict

  @property
  def step(self):
    return self.tree['state']['step']

  def state_dict(self):
    return self.tree

  def restore_state(self, tree):
    return State(tree)


def state_at(step, size=8):
  w = np.arange(size * 4, dtype=np.float32).reshape(size, 4) + step / 3
  return State(
    {
      'state': {'step': jnp.asarray(step, jnp.int32)},
      'target': {'w': jax.device_put(w, NamedSharding(MESH, AXES['target']['w']))},
    }
  )


def partitioner(shard_id=0, num_shards=1, first=True):
  return types.SimpleNamespace(
    mesh=MESH,
    get_mesh_axes=lambda state: State(AXES),
    get_data_layout=lambda: types.SimpleNamespace(
      shard_id=shard_id,
      num_shards=num_shards,
      is_first_host_in_replica_set=first,
    ),
  )


def manager(folder, part=None, size=8, **settings):
  return checkpoints.OrbaxCheckpointManagerInterface(
    str(folder), state_at(0, size), part or partitioner(), **settings
  )


def save_all(folder, steps, **settings):
  made = manager(folder, **settings)
  for step in steps:
    assert made.save(state_at(step))
    made.wait_until_finished()
  made.close()
  return list(checkpoints.all_steps(folder))


def assert_restores(folder, step):
  state = manager(folder, period=None).restore()
  assert int(state.step) == step
  expected = state_at(step).tree['target']['w']
  np.testing.assert_array_equal(state.tree['target']['w'], expected)


class Counter:
  """A training iterator that counts."""

  def __init__(self, position=0):
    self.position = position

  def as_clu(self):
    counter = self

    class Iterator(clu_iterators.DatasetIterator):
      element_spec = None

      def __next__(self):
        counter.position += 1
        return counter.position

      def save(self, filename):
        epath.Path(filename).write_text(str(counter.position))

      def restore(self, filename):
        counter.position = int(epath.Path(filename).read_text())

    return Iterator()
