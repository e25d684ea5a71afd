"""One of several processes that train together, for `test_feeding` to compare.

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


def main(port, processes, index, num_partitions, folder):
  if processes > 1:
    jax.distributed.initialize(f'localhost:{port}', processes, index)
  from flax.linen.partitioning import AxisMetadata

  from t5x import optimizers, partitioning, train_state, trainer

  partitioner = partitioning.PjitPartitioner(num_partitions=num_partitions)
  variables = {
    'params': {'w': np.ones((WIDTH, WIDTH), np.float32)},
    'params_axes': {'w_axes': AxisMetadata(names=('embed', 'mlp'))},
  }
  state = jax.device_get(
    train_state.FlaxOptimTrainState.create(optimizers.adamw(0.05), variables)
  )
  axes = partitioner.get_mesh_axes(state)
  layout = partitioner.get_data_layout(ROWS)
  share = ROWS // layout.num_shards
  own = slice(layout.shard_id * share, (layout.shard_id + 1) * share)

  def cut(tree, specs):
    """This host's part of whole arrays."""
    return partitioning.map_prefix(
      lambda spec, x: x[
        partitioner.get_local_chunk_info(
          x.shape, (*(spec or ()), *[None] * (x.ndim - len(spec or ())))
        ).slice
      ],
      specs,
      tree,
    )

  def batches(seeds):
    for seed in seeds:
      yield {name: x[own] for name, x in make_batch(seed).items()}

  with trainer.Trainer(
    model=Model(),
    train_state=partitioner.move_params_to_devices(cut(state, axes), axes),
    partitioner=partitioner,
    eval_names=['task'],
    summary_dir=folder,
    train_state_axes=axes,
    rng=jax.random.key(0),
    learning_rate_fn=lambda step: 0.05,
    num_microbatches=2 if num_partitions > 1 else None,
  ) as made:
    made.compile_train(next(batches([0])))
    losses = [
      float(made.train(batches([seed]), 1).result()['loss'].value) for seed in range(4)
    ]
    evaluated = float(made.eval({'task': batches([5, 6])})['task']['loss'].value)
    uneven = ''
    if processes > 1:
      try:
        made.eval({'task': batches([5, 6][: 1 + index])})
      except ValueError as e:
        uneven = str(e)
    bad = list(batches(range(4)))
    bad[1]['x'][0, 0] = np.nan
    try:
      made.train(iter(bad), 4).result()
      stopped = None
    except trainer.NonFiniteLossError as e:
      stopped = e.step
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
