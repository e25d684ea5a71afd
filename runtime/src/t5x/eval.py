"""Evaluates checkpoints: decodes or scores a split and computes the task's metrics.

  python -m t5x.eval --gin_file=MODEL.gin --gin_file=t5x/configs/runs/eval.gin \\
    --gin.CHECKPOINT_PATH="'runs/mine/checkpoint_1000'" \\
    --gin.EVAL_OUTPUT_DIR="'runs/evaluation'" --gin.MIXTURE_OR_TASK_NAME="'my_task'"

With `--gin.utils.RestoreCheckpointConfig.mode="'all'"` and a run's folder as path, all
its checkpoints are evaluated that have not been yet. Metrics are written to
`EVAL_OUTPUT_DIR/inference_eval/`.
"""

if __name__ == '__main__':
  from t5x import launch

  launch.prepare(__doc__, multiprocess=True)

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import seqio
import tensorflow as tf
from absl import logging

from t5x import (
  checkpoints,
  data,
  gin_utils,
  inference,
  models,
  multihost,
  partitioning,
  restore,
  run_setup,
  whole_files,
)
from t5x import train_state as train_state_lib
from t5x import trainer as trainer_lib

gfile = tf.io.gfile


class SummarizeConfigFn(Protocol):
  """What writes the configuration down."""

  def __call__(self, model_dir: str, summary_writer: Any, step: int) -> None: ...


def _check_is_registered(cfg: data.DatasetConfig) -> None:
  """Checks that seqio's evaluator, which takes a name, will find what is meant.

  Raises:
    ValueError: the configuration holds a task that is not the registered one.
  """
  provider = data.find_provider(cfg)
  if data.find_task(provider.name) is not provider:
    raise ValueError(
      f"DatasetConfig.mixture_or_task_name holds a task '{provider.name}', which is "
      'not the one registered by that name. Register it; evaluation looks it up.'
    )


class InferenceEvaluator:
  """Runs a model over a task's split and has seqio compute the task's metrics."""

  def __init__(
    self,
    infer_eval_dataset_cfg: data.DatasetConfig,
    inference_evaluator_cls: data.EvaluatorConstructor,
    model: models.BaseModel,
    partitioner: partitioning.BasePartitioner,
    log_dir: str | None = None,
    verify_matching_vocabs_fn: Callable[
      [data.DatasetConfig, models.BaseTransformerModel], None
    ]
    | None = data.verify_matching_vocabs,
  ):
    """Loads the examples.

    Args:
      infer_eval_dataset_cfg: which task and split.
      inference_evaluator_cls: `seqio.Evaluator`, or what gin made of it.
      model: the model.
      partitioner: lays parameters and data over the devices.
      log_dir: metrics go to its folder `inference_eval`; None writes none.
      verify_matching_vocabs_fn: checks the task's vocabularies against the model's.

    Raises:
      ValueError: nothing of that name is registered, or the vocabularies differ.
    """
    if verify_matching_vocabs_fn and isinstance(model, models.BaseTransformerModel):
      verify_matching_vocabs_fn(infer_eval_dataset_cfg, model)
    self._model = model
    self._partitioner = partitioner
    self._batch_size = infer_eval_dataset_cfg.batch_size
    # Without a folder there is nothing to write to.
    where = (
      {'log_dir': os.path.join(log_dir, 'inference_eval')}
      if log_dir
      else {'logger_cls': ()}
    )
    _check_is_registered(infer_eval_dataset_cfg)
    if infer_eval_dataset_cfg.pack:
      logging.warning(
        'DatasetConfig.pack = True has no effect on decoding and scoring: examples are '
        'kept apart.'
      )
    self._evaluator = inference_evaluator_cls(
      mixture_or_task_name=infer_eval_dataset_cfg.task_name,
      feature_converter=model.FEATURE_CONVERTER_CLS(pack=False),
      eval_split=infer_eval_dataset_cfg.split,
      use_cached=infer_eval_dataset_cfg.use_cached,
      seed=infer_eval_dataset_cfg.seed,
      sequence_length=infer_eval_dataset_cfg.task_feature_lengths,
      use_memory_cache=infer_eval_dataset_cfg.use_memory_cache,
      **where,
    )
    self._infer_fns: dict[str, Callable[..., Any]] = {}

  @property
  def model_feature_shapes(self) -> Mapping[str, tuple[int, ...]]:
    """Shape of each model feature of one example."""
    return self._evaluator.model_feature_shapes

  @property
  def eval_tasks(self) -> Sequence[seqio.Task]:
    """The tasks that have metrics and the split."""
    return self._evaluator.eval_tasks

  def close(self) -> None:
    """Waits for metrics under way and closes the loggers."""
    self._evaluator.close()

  def _compiled_steps(self, train_state_axes: Any) -> dict[str, Callable[..., Any]]:
    """Makes the inference functions at the first call and keeps them."""
    if not self._infer_fns:
      for step in ('predict_batch', 'predict_batch_with_aux', 'score_batch'):
        self._infer_fns[step] = inference.get_infer_fn(
          infer_step=getattr(self._model, step),
          batch_size=self._batch_size,
          train_state_axes=train_state_axes,
          partitioner=self._partitioner,
        )
    return self._infer_fns

  def evaluate(
    self,
    train_state: train_state_lib.TrainState,
    train_state_axes: train_state_lib.TrainState,
  ) -> Any:
    """Evaluates the parameters of a state.

    Args:
      train_state: the state; its step labels the metrics.
      train_state_axes: how its arrays lie over the devices.

    Returns:
      A future whose `result()` is {task name: {metric: value}}, or None on processes
      other than the first.
    """
    steps = self._compiled_steps(train_state_axes)
    seeded = {'train_state': train_state, 'rng': jax.random.PRNGKey(0)}
    metrics, _ = self._evaluator.evaluate(
      compute_metrics=jax.process_index() == 0,
      step=int(checkpoints.get_local_data(train_state.step)),
      predict_fn=functools.partial(steps['predict_batch'], **seeded),
      predict_with_aux_fn=functools.partial(steps['predict_batch_with_aux'], **seeded),
      score_fn=functools.partial(steps['score_batch'], train_state=train_state),
    )
    return metrics


def batches_of(dataset: Any) -> Iterator[Mapping[str, Any]]:
  """NumPy batches of a tf.data.Dataset, or of anything that can be iterated."""
  if isinstance(dataset, tf.data.Dataset):
    return dataset.as_numpy_iterator()
  return iter(dataset)


def _by_step(path: str) -> tuple[int, str]:
  """Sorts checkpoints: checkpoint_7, model.ckpt-7, 7; first those without a step."""
  number = re.search(r'(\d+)/*$', path)
  return int(number[1]) if number else -1, path


class _EvaluatedList:
  """The file that remembers which checkpoints of a run were evaluated."""

  def __init__(self, output_dir: str, task_name: str):
    self._path = os.path.join(output_dir, f'eval.{task_name}.ckpt')

  def read(self) -> set[str]:
    if not gfile.exists(self._path):
      return set()
    with gfile.GFile(self._path) as file:
      return set(file.read().splitlines())

  def add(self, checkpoint: str) -> None:
    """Adds one; the whole file is written, as some file systems cannot append."""
    paths = sorted(self.read() | {checkpoint}, key=_by_step)
    with whole_files.whole_file(self._path) as file:
      file.write('\n'.join(paths))


def _still_to_do(paths: Collection[str], done: set[str]) -> list[str]:
  """Checkpoints not evaluated yet, in the order of their steps."""
  skipped = sorted(set(paths) & done, key=_by_step)
  if skipped:
    logging.info('Already evaluated: %s', ', '.join(map(os.path.basename, skipped)))
  return sorted(set(paths) - done, key=_by_step)


def _training_evaluator(
  evaluator_cls: Callable[..., Any] | None,
  get_datasets: data.GetEvalDatasetCallable,
  dataset_cfg: data.DatasetConfig,
  model: models.BaseModel,
  partitioner: partitioning.BasePartitioner,
  train_state_axes: Any,
  output_dir: str,
) -> tuple[trainer_lib.BaseTrainer | None, Mapping[str, Any]]:
  """Builds the Trainer that evaluates with teacher forcing, and its datasets."""
  if evaluator_cls is None:
    return None, {}
  layout = partitioner.get_data_layout(dataset_cfg.batch_size)
  # How many batches is for gin to say: get_training_eval_datasets.eval_steps.
  datasets = get_datasets(
    dataset_cfg,
    layout.shard_id,
    layout.num_shards,
    feature_converter_cls=model.FEATURE_CONVERTER_CLS,
  )
  trainer = evaluator_cls(
    model=model,
    train_state=None,  # Set for each checkpoint.
    partitioner=partitioner,
    train_state_axes=train_state_axes,
    eval_names=datasets.keys(),
    summary_dir=output_dir,
    rng=jax.random.PRNGKey(0),
    learning_rate_fn=None,
    num_microbatches=None,
  )
  return trainer, datasets


def evaluate(
  *,
  model: models.BaseTransformerModel,
  dataset_cfg: data.DatasetConfig,
  restore_checkpoint_cfg: restore.RestoreCheckpointConfig,
  partitioner: partitioning.BasePartitioner,
  output_dir: str,
  inference_evaluator_cls: data.EvaluatorConstructor | None = seqio.Evaluator,
  training_evaluator_cls: type[trainer_lib.Trainer] | None = None,
  summarize_config_fn: SummarizeConfigFn = gin_utils.summarize_gin_config,
  train_state_initializer_cls: type[
    restore.TrainStateInitializer
  ] = restore.TrainStateInitializer,
  train_eval_get_dataset_fn: data.GetEvalDatasetCallable = (
    data.get_training_eval_datasets
  ),
  fallback_init_rng: int | None = None,
  use_orbax: bool = True,
) -> None:
  """Evaluates one checkpoint or several.

  Args:
    model: the model.
    dataset_cfg: which task and split.
    restore_checkpoint_cfg: which checkpoints; mode 'all' leaves out those evaluated.
    partitioner: lays parameters and data over the devices.
    output_dir: where metrics and predictions are written.
    inference_evaluator_cls: builds the evaluator that decodes or scores.
    training_evaluator_cls: a Trainer that also computes the training metrics.
    summarize_config_fn: writes the configuration down.
    train_state_initializer_cls: builds the state that is restored.
    train_eval_get_dataset_fn: reads the data for `training_evaluator_cls`.
    fallback_init_rng: seed of parameters that a checkpoint lacks, where
      `RestoreCheckpointConfig.fallback_to_scratch` allows that.
    use_orbax: see `restore.create_checkpoint_manager_and_restore`.

  Raises:
    ValueError: the task has no metrics or not that split, or there is no checkpoint.
  """
  # ---- Data ----
  data.find_provider(dataset_cfg)
  run_setup.open_folder('output_dir', output_dir)
  summarize_config_fn(model_dir=output_dir, summary_writer=None, step=0)
  evaluator = InferenceEvaluator(
    dataset_cfg, inference_evaluator_cls, model, partitioner, log_dir=output_dir
  )
  if not evaluator.eval_tasks:
    raise ValueError(
      f"Nothing to evaluate: '{dataset_cfg.task_name}' has no metric, or no "
      f"split '{dataset_cfg.split}'."
    )

  # ---- Checkpoints ----
  initializer = train_state_initializer_cls(
    optimizer_def=None,  # Its state is not needed.
    init_fn=model.get_initial_variables,
    input_shapes={
      name: (dataset_cfg.batch_size, *shape)
      for name, shape in evaluator.model_feature_shapes.items()
    },
    partitioner=partitioner,
  )
  restore.log_model_info(
    os.path.join(output_dir, 'model-info.txt'),
    initializer.global_train_state_shape,
    partitioner,
  )
  restore_cfg, paths = restore.get_first_valid_restore_config_and_paths(
    # The optimizer's state in the checkpoint has no counterpart here.
    [dataclasses.replace(restore_checkpoint_cfg, strict=False)]
  )
  if not paths:
    raise ValueError(f'There is no checkpoint at {restore_checkpoint_cfg.path}.')
  evaluated = _EvaluatedList(output_dir, dataset_cfg.task_name)
  if restore_cfg.mode == 'all':
    paths = _still_to_do(paths, evaluated.read())
    restore_cfg = dataclasses.replace(restore_cfg, mode='specific')

  # ---- Evaluation ----
  trainer, train_eval_datasets = _training_evaluator(
    training_evaluator_cls,
    train_eval_get_dataset_fn,
    dataset_cfg,
    model,
    partitioner,
    initializer.train_state_axes,
    output_dir,
  )
  init_rng = None
  if fallback_init_rng is not None:
    init_rng = jax.random.PRNGKey(fallback_init_rng)
  for path in paths:
    train_state, _ = restore.create_checkpoint_manager_and_restore(
      initializer, partitioner, restore_cfg, path, init_rng, use_orbax=use_orbax
    )
    if train_state is None:
      raise ValueError(f'There is no checkpoint at {path}.')
    if trainer is not None:
      trainer.train_state = train_state
      trainer.eval({n: batches_of(ds) for n, ds in train_eval_datasets.items()})
    evaluator.evaluate(train_state, initializer.train_state_axes).result()
    step = int(checkpoints.get_local_data(train_state.step))
    multihost.sync(f'evaluated:{step}')
    if jax.process_index() == 0:
      evaluated.add(path)
  evaluator.close()
  if trainer is not None:
    trainer.close()
  logging.info('Done.')


if __name__ == '__main__':
  launch.run(evaluate)
