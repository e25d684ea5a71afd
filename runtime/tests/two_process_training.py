"""Training in one process of several, which `test_trainer` compares with one alone.

Usage: two_process_training.py PORT INDEX NUM_PARTITIONS FOLDER
"""

import json
import sys

import clu.metrics
import jax
import numpy as np

ROWS, WIDTH = 16, 8


class Model:
  """A sum of squared errors divided by a constant."""

  def loss_fn(self, params, batch, dropout_rng):
    error = batch['x'] @ params['w'] - batch['y']
    loss = (error**2).sum() / ROWS
    return loss, {'loss': clu.metrics.Average.from_model_output(error**2)}

  def eval_fn(self, params, batch):
    return self.loss_fn(params, batch, None)


def make_batch(seed):
  random = np.random.default_rng(seed)
  return {
    'x': random.normal(size=(ROWS, WIDTH)).astype(np.float32),
    'y': random.normal(size=(ROWS, WIDTH)).astype(np.float32),
  }


def make_trainer(partitioner, num_partitions, folder):
  from flax.linen.partitioning import AxisMetadata

  from t5x import optimizers, train_state, trainer

  optimizer = optimizers.adamw(0.05)

  def create():
    variables = {
      'params': {'w': np.ones((WIDTH, WIDTH), np.float32)},
      'params_axes': {'w_axes': AxisMetadata(names=('embed', 'mlp'))},
    }
    return train_state.FlaxOptimTrainState.create(optimizer, variables)

  axes = partitioner.get_mesh_axes(create())
  state = partitioner.partition(create, in_axis_resources=(), out_axis_resources=axes)
  return trainer.Trainer(
    model=Model(),
    train_state=state(),
    partitioner=partitioner,
    eval_names=['task'],
    summary_dir=folder,
    train_state_axes=axes,
    rng=jax.random.key(0),
    learning_rate_fn=lambda step: 0.05,
    num_microbatches=2 if num_partitions > 1 else None,
  )


def train(num_partitions, folder):
  """Trains, evaluates, and goes through two failures; returns what happened."""
  from t5x import partitioning, trainer

  partitioner = partitioning.PjitPartitioner(num_partitions=num_partitions)
  layout = partitioner.get_data_layout(ROWS)
  share = ROWS // layout.num_shards
  own = slice(layout.shard_id * share, (layout.shard_id + 1) * share)

  def batches(seeds):
    for seed in seeds:
      yield {name: x[own] for name, x in make_batch(seed).items()}

  found = {'shards': layout.num_shards}
  with make_trainer(partitioner, num_partitions, folder) as made:
    made.compile_train(next(batches([0])))
    found['losses'] = [
      float(made.train(batches([seed]), 1).result()['loss'].value) for seed in range(4)
    ]
    evaluated = made.eval({'task': batches([5, 6])})
    found['evaluated'] = float(evaluated['task']['loss'].value)
    try:  # Of two processes, the second has one batch more.
      made.eval({'task': batches([5, 6][: 1 + jax.process_index()])})
    except ValueError as e:
      found['uneven'] = str(e)
    bad = list(batches(range(4)))
    bad[1]['x'][0, 0] = np.nan
    try:
      made.train(iter(bad), 4).result()
    except trainer.NonFiniteLossError as e:
      found['stopped'] = e.step
  return found


if __name__ == '__main__':
  port, index, partitions, path = sys.argv[1:]
  jax.distributed.initialize(f'localhost:{port}', 2, int(index))
  print(json.dumps(train(int(partitions), path)))
