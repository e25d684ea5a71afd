"""Compiles a step of a run for devices that need not exist, and reports its costs.

  python -m t5x.precompile --gin_file=gin/bart_base_no.gin --topology=v3-8

takes the flags of `python -m t5x.train` and compiles the same step: memory, operations,
time per step and length of the run, all estimated. It needs neither a TPU nor the
corpus, but for TPUs the package libtpu. `--step=eval` and `--step=decode` are the other
steps; `--find_batch` finds the largest batch that fits.

As in T5X, `python -m t5x.main --run_mode=precompile` with configs/runs/precompile.gin
instead writes the program before and after XLA's optimization and the order of the
devices into MODEL_DIR.
"""

if __name__ == '__main__':
  from t5x import launch

  launch.prepare(__doc__, plan=True)

import functools
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import gin
import jax
import numpy as np
from absl import logging
from etils import epath

from t5x import data, data_iterators, models, partitioning, planning, restore
from t5x import trainer as trainer_lib
from t5x.train import train

__all__ = ['precompile', 'train']


def precompile(
  *,
  model: models.BaseTransformerModel,
  train_dataset_cfg: data.DatasetConfig,
  partitioner: partitioning.BasePartitioner,
  model_dir: str,
  random_seed: int | None,
  get_dataset_fn: data.GetDatasetCallable = data.get_dataset,
  verify_matching_vocabs_fn: Callable[
    [data.DatasetConfig, models.BaseTransformerModel], None
  ]
  | None = data.verify_matching_vocabs,
) -> None:
  """Lowers and compiles a training step and writes the program to `model_dir`.

  Files are `lowered_hlo_pre_optimization`, `lowered_hlo_post_optimization` and
  `assignment` (device ids, NumPy format). The random seed makes dropout's key, a
  constant of the program; None is 42. No example is read.
  """
  if verify_matching_vocabs_fn is not None:
    verify_matching_vocabs_fn(train_dataset_cfg, model)
  layout = partitioner.get_data_layout(train_dataset_cfg.batch_size)
  dataset = get_dataset_fn(
    train_dataset_cfg, layout.shard_id, layout.num_shards, model.FEATURE_CONVERTER_CLS
  )
  batch = {
    name: jax.ShapeDtypeStruct((layout.batch_size, *zeros.shape[1:]), zeros.dtype)
    for name, zeros in data_iterators.get_zeros_batch_like_dataset(dataset).items()
  }
  initializer = restore.TrainStateInitializer(
    optimizer_def=model.optimizer_def,
    init_fn=model.get_initial_variables,
    input_shapes={name: spec.shape for name, spec in batch.items()},
    input_types={name: spec.dtype for name, spec in batch.items()},
    partitioner=partitioner,
  )
  seed = 42 if random_seed is None else random_seed
  _, dropout_key = jax.random.split(jax.random.PRNGKey(seed))

  def step(train_state: Any, batch: Any) -> Any:
    return trainer_lib.train_with_lr(
      train_state,
      batch,
      learning_rate=1e-3,  # Any value gives the same program.
      dropout_rng=dropout_key,
      model=model,
      num_microbatches=None,
      weight_metrics_computer=None,
    )

  axes = initializer.train_state_axes
  lowered = partitioner.partition(
    step,
    in_axis_resources=(axes, partitioner.data_partition_spec),
    out_axis_resources=(axes, None),
    donate_argnums=(0,),
  ).lower(initializer.global_train_state_shape, batch)

  folder = epath.Path(model_dir)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'lowered_hlo_pre_optimization').write_text(lowered.as_text(dialect='hlo'))
  compiled = lowered.compile()
  (folder / 'lowered_hlo_post_optimization').write_text(compiled.as_text())
  with (folder / 'assignment').open('wb') as file:
    np.save(file, partitioner.mesh.device_ids)
  logging.info('Programs: %s', model_dir)


def main(argv: Sequence[str]) -> None:
  """Prints the plan of the step that the flags name, of the run that gin configures."""
  del argv
  options = launch.FLAGS
  topology = planning.find_topology(options.topology)

  # Gin binds `train` in `__main__`, so `show` takes its name and its arguments.
  @functools.wraps(train)
  def show(*args: Any, **kwargs: Any) -> None:
    bound = inspect.signature(train).bind(*args, **kwargs)
    bound.apply_defaults()
    make_plan = planning.find_batch if options.find_batch else planning.plan
    plan = make_plan(bound.arguments, topology, options.step)
    print(plan.table(), flush=True)
    if options.json:
      numbers = json.dumps(plan.as_numbers(), indent=2)
      epath.Path(options.json).write_text(numbers + '\n')

  sys.modules['__main__'].train = show
  with partitioning.meshes_of(planning.devices_of(topology)):
    planned = launch.configure(show)
    with gin.unlock_config():
      # An action may act as soon as it is constructed, and here nothing is trained.
      gin.bind_parameter('__main__.train.actions', None)
    planned()


if __name__ == '__main__':
  launch.run_main(main)
