"""Compiles a step of a run for devices that need not be there, and plans it.

  python -m t5x.precompile --gin_file=gin/bart_base_no.gin --topology=v3-8

takes what `python -m t5x.train` takes and compiles the same step: memory, operations,
time per step and length of the run, all estimated. Neither a TPU nor the corpus is
needed; for TPUs the package libtpu is. `--step=eval` and `--step=decode` are the other
steps; `--find_batch` finds the largest batch that fits.

As in T5X, `python -m t5x.main --run_mode=precompile` with configs/runs/precompile.gin
writes the program's text before and after XLA's optimisation and the devices' order
into MODEL_DIR instead, and logs the memory that it needs per device.
"""

if __name__ == '__main__':
  from t5x import launch

  launch.prepare(__doc__, plan=True)

import functools
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
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
  """Lowers and compiles one training step and writes the program to `model_dir`.

  Args:
    model: the model.
    train_dataset_cfg: gives the shapes of a batch; no example is read.
    partitioner: the mesh, of devices that JAX can compile for.
    model_dir: gets `lowered_hlo_pre_optimization`, `lowered_hlo_post_optimization` and
      `assignment` (device ids, NumPy format).
    random_seed: of dropout's key, a constant of the program; None takes 42.
    get_dataset_fn: makes the dataset.
    verify_matching_vocabs_fn: checks the task's vocabularies against the model's.
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
      # Its value does not change the program.
      learning_rate=1e-3,
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
  memory = compiled.memory_analysis()
  if memory is not None:
    logging.info(
      'Memory per device: %.3f GiB for arguments, %.3f GiB for temporaries.',
      memory.argument_size_in_bytes / 2**30,
      memory.temp_size_in_bytes / 2**30,
    )
  logging.info('Programs: %s', model_dir)


def show(
  arguments: Mapping[str, Any],
  topology: planning.Topology,
  kind: str = 'train',
  find_batch: bool = False,
  json_path: str | None = None,
) -> None:
  """Prints the plan of a step and writes its figures.

  Args:
    arguments: those of `train.train`, by name.
    topology: what to compile for.
    kind: train, eval or decode.
    find_batch: whether to look for the largest batch that fits.
    json_path: file for the figures.

  Raises:
    ValueError: the step does not fit; the message says by how much and what to change.
  """
  text = None
  try:
    if find_batch:
      plan, text = planning.find_batch(arguments, topology, kind)
    else:
      plan = planning.plan(arguments, topology, kind)
  except planning.DoesNotFitError as error:
    raise ValueError(planning.advice(error, kind)) from error
  print(plan.table(), *filter(None, [text]), sep='\n', flush=True)
  if json_path:
    epath.Path(json_path).write_text(json.dumps(plan.as_numbers(), indent=2) + '\n')


def main(argv: Sequence[str]) -> None:
  """Plans the step that the flags name, of the run that gin configures."""
  del argv
  options = launch.FLAGS
  topology = planning.find_topology(options.topology)

  # Gin binds `train` in `__main__`, so `plan` takes its name and its arguments.
  @functools.wraps(train)
  def plan(*args: Any, **kwargs: Any) -> None:
    bound = inspect.signature(train).bind(*args, **kwargs)
    bound.apply_defaults()
    show(bound.arguments, topology, options.step, options.find_batch, options.json)

  sys.modules['__main__'].train = plan
  with partitioning.meshes_of(planning.devices_of(topology)):
    planned = launch.configure(plan)
    with gin.unlock_config():
      # An action may act as soon as it is made, and here nothing is trained.
      gin.bind_parameter('__main__.train.actions', None)
    planned()


if __name__ == '__main__':
  launch.run_main(main)
