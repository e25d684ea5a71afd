"""One of several processes that train together, for `test_trainer` to compare.

Usage: two_process_training.py PORT PROCESSES INDEX NUM_PARTITIONS FOLDER
"""

import json
import sys

import clu.metrics
import jax
import numpy as np

ROWS, WIDTH = 16, 8


class Model:
  """A squared error, summed and divided by a constant."""

  def loss_fn(self, params, batch, dropout_rng):
    error = batch['x'] @ params['w'] - batch['y']
    loss = (error**2).sum() / ROWS
    average = clu.metrics.Average.from_model_output(error**2)
    return loss, {'loss': average}

  def eval_fn(self, params, batch):
    return self.loss_fn(params, batch, None)


def make_batch(seed):
  random = np.random.default_rng(seed)
  return {
    'x': random.normal(size=(ROWS, WIDTH)).astype(np.float32),
    'y': random.normal(size=(ROWS, WIDTH)).astype(np.float32),
  }


def make_trainer(partitioner, num_partitions, folder):
  """A trainer of a matrix of ones, of which every host hands over its own part."""
  from flax.linen.partitioning import AxisMetadata
  from jax.sharding import PartitionSpec

  from t5x import optimizers, partitioning, train_state, trainer

  variables = {
    'params': {'w': np.ones((WIDTH, WIDTH), np.float32)},
    'params_axes': {'w_axes': AxisMetadata(names=('embed', 'mlp'))},
  }
  state = jax.device_get(
    train_state.FlaxOptimTrainState.create(optimizers.adamw(0.05), variables)
  )
  axes = partitioner.get_mesh_axes(state)

  def own_part(spec, x):
    sharding = jax.sharding.NamedSharding(partitioner.mesh, spec or PartitionSpec())
    indices = sharding.addressable_devices_indices_map(np.shape(x)).values()
    bounds = [
      [part.indices(n)[:2] for part in parts]
      for n, parts in zip(np.shape(x), zip(*indices))
    ]
    return x[tuple(slice(min(b)[0], max(b)[1]) for b in bounds)]

  own = partitioning.map_prefix(own_part, axes, state)
  return trainer.Trainer(
    model=Model(),
    train_state=partitioner.move_params_to_devices(own, axes),
    partitioner=partitioner,
    eval_names=['task'],
    summary_dir=folder,
    train_state_axes=axes,
    rng=jax.random.key(0),
    learning_rate_fn=lambda step: 0.05,
    num_microbatches=2 if num_partitions > 1 else None,
  )


def message_of_uneven_evaluation(made, batches):
  """What `eval` says where one host has a batch more than another."""
  try:
    made.eval({'task': batches})
  except ValueError as e:
    return str(e)
  return ''


def step_of_bad_batch(made, batches):
  """The step at which training stops for a loss that is not finite."""
  from t5x import trainer

  try:
    made.train(batches, 4).result()
  except trainer.NonFiniteLossError as e:
    return e.step
  return None


def main(port, processes, index, num_partitions, folder):
  if processes > 1:
    jax.distributed.initialize(f'localhost:{port}', processes, index)
  from t5x import partitioning

  partitioner = partitioning.PjitPartitioner(num_partitions=num_partitions)
  layout = partitioner.get_data_layout(ROWS)
  share = ROWS // layout.num_shards
  own = slice(layout.shard_id * share, (layout.shard_id + 1) * share)

  def batches(seeds):
    for seed in seeds:
      yield {name: x[own] for name, x in make_batch(seed).items()}

  with make_trainer(partitioner, num_partitions, folder) as made:
    made.compile_train(next(batches([0])))
    losses = [
      float(made.train(batches([seed]), 1).result()['loss'].value) for seed in range(4)
    ]
    evaluated = float(made.eval({'task': batches([5, 6])})['task']['loss'].value)
    uneven = ''
    if processes > 1:
      uneven = message_of_uneven_evaluation(made, batches([5, 6][: 1 + index]))
    bad = list(batches(range(4)))
    bad[1]['x'][0, 0] = np.nan
    stopped = step_of_bad_batch(made, iter(bad))
  print(
    json.dumps(
      {
        'losses': losses,
        'evaluated': evaluated,
        'uneven': uneven,
        'stopped': stopped,
        'shards': layout.num_shards,
      }
    )
  )


if __name__ == '__main__':
  main(*map(int, sys.argv[1:5]), sys.argv[5])
