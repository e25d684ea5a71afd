"""Train states of a small model on a mesh, saved and resumed as in `train`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import partitioning as flax_partitioning

from t5x import checkpoints, optimizers, partitioning, restore, state_utils

SHAPES = {'x': (8, 16)}


class Net(nn.Module):
  """Two sharded kernels and a bias."""

  width: int = 32
  head: str = 'head'

  @nn.compact
  def __call__(self, x):
    param = functools.partial(flax_partitioning.param_with_axes, module=self)
    init = nn.initializers.normal(1.0)
    x = x @ param('wi', init, (16, self.width), axes=('embed', 'mlp'))
    x = x + param('bias', init, (self.width,), axes=('mlp',))
    return x @ param(self.head, init, (self.width, 16), axes=('mlp', 'embed'))


@functools.cache
def mesh_partitioner(data=4, model=2):
  return Mesh(data, model)


class Mesh(partitioning.PjitPartitioner):
  """A partitioner over a mesh of a given shape on the first devices."""

  def __init__(self, data=4, model=2):
    super().__init__(
      num_partitions=model,
      logical_axis_rules=partitioning.standard_logical_axis_rules(
        parameter_partitioning_dims=2
      ),
    )
    devices = np.array(jax.devices()[: data * model]).reshape(data, model)
    self._own_mesh = jax.sharding.Mesh(devices, ('data', 'model'))

  @property
  def mesh(self):
    return self._own_mesh


def initializer(partitioner=None, net=None, optimizer=True):
  return _initializer(partitioner or mesh_partitioner(), net or Net(), optimizer)


@functools.cache
def _initializer(partitioner, net, optimizer):
  # Cached because tracing the model is slow.
  def init(rng, input_shapes, input_types):
    assert input_types is None
    return net.init(rng, jnp.zeros(input_shapes['x']))

  return restore.TrainStateInitializer(
    optimizers.adamw(learning_rate=0.1) if optimizer else None,
    init,
    SHAPES,
    partitioner,
  )


@functools.cache
def base_state():
  start = initializer()
  state = start.from_scratch(jax.random.PRNGKey(0))
  grads = jax.tree.map(lambda p: jnp.cos(3 * p), state.params)
  return state.apply_gradient(grads, learning_rate=0.1)


def state_at(step):
  """A state without zeros, different at every step."""
  state = jax.tree.map(
    lambda x: x * (1 + step / 8) if x.dtype == np.float32 else x, base_state()
  )
  return state.replace_step(jnp.asarray(step, jnp.int32))


def flat(state):
  tree = state_utils.flatten_state_dict(state.state_dict())
  return {name: np.asarray(x) for name, x in tree.items() if x is not None}


def assert_equal(left, right):
  left, right = flat(left), flat(right)
  assert left.keys() == right.keys()
  for name in left:
    assert left[name].dtype == right[name].dtype, name
    np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def save_cfg(**changes):
  return restore.SaveCheckpointConfig(**{'period': 10, **changes})


def restore_cfg(path, **changes):
  return restore.RestoreCheckpointConfig(path=str(path), **changes)


def resume(folder, start=None, save=None, rng=None, **changes):
  """Restores and builds the manager as `train` does at its start."""
  start = start or initializer()
  cfg, paths = restore.get_first_valid_restore_config_and_paths(
    [restore_cfg(folder, **changes)]
  )
  return restore.create_checkpoint_manager_and_restore(
    start,
    start._partitioner,
    cfg,
    paths[0] if paths else None,
    rng,
    save_checkpoint_cfg=save,
    model_dir=str(folder),
  )


def manager_of(folder, start=None, **changes):
  start = start or initializer()
  return restore.create_orbax_checkpoint_manager(
    save_cfg=save_cfg(**changes),
    train_state=start.global_train_state_shape,
    partitioner=start._partitioner,
    model_dir=str(folder),
  )


def write(folder, *steps, **changes):
  """Saves states at some steps and returns them."""
  manager = manager_of(folder, **changes)
  states = {step: state_at(step) for step in steps}
  for state in states.values():
    assert manager.save(state)
  manager.close()
  return states


def write_previous_layout(folder, *steps, cls=checkpoints.Checkpointer, **settings):
  """Saves states at some steps in the layout before Orbax and returns them."""
  start = initializer()
  writer = cls(
    start.global_train_state_shape, start._partitioner, str(folder), **settings
  )
  states = {step: state_at(step) for step in steps}
  for step, state in states.items():
    assert writer.save(state, metrics={'loss': -step})
  writer.close()
  return states
