"""Evaluates checkpoints by the metrics of a seqio task or mixture.

  python -m t5x.eval --gin_file=MODEL.gin --gin_file=t5x/configs/runs/eval.gin \\
    --gin.CHECKPOINT_PATH="'runs/mine/checkpoint_1000'" \\
    --gin.EVAL_OUTPUT_DIR="'runs/evaluation'" --gin.MIXTURE_OR_TASK_NAME="'my_task'"

`--gin.utils.RestoreCheckpointConfig.mode="'all'"`, with a run's folder as path,
evaluates all its checkpoints not yet evaluated. Metrics are written to
EVAL_OUTPUT_DIR/inference_eval/.
"""

if __name__ == '__main__':
  from t5x import launch

  launch.prepare(__doc__, multiprocess=True)

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import seqio
from absl import logging
from etils import epath

from t5x import (
  data,
  gin_utils,
  inference,
  models,
  multihost,
  partitioning,
  restore,
  whole_files,
)
from t5x import train_state as train_state_lib
from t5x import trainer as trainer_lib


class InferenceEvaluator:
  """Runs inference on a task's split; seqio computes the task's metrics."""

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
      infer_eval_dataset_cfg: `pack` has no effect.
      inference_evaluator_cls: `seqio.Evaluator`, or a partial of it.
      log_dir: metrics are written to its folder `inference_eval`; None writes none.

    Raises:
      ValueError: the task does not exist, or its vocabularies are not the model's.
    """
    if verify_matching_vocabs_fn and isinstance(model, models.BaseTransformerModel):
      verify_matching_vocabs_fn(infer_eval_dataset_cfg, model)
    data.find_provider(infer_eval_dataset_cfg)  # Its error suggests a name.
    logs = {'logger_cls': ()}
    if log_dir:
      logs = {'log_dir': os.path.join(log_dir, 'inference_eval')}
    self._evaluator = inference_evaluator_cls(
      mixture_or_task_name=infer_eval_dataset_cfg.task_name,
      feature_converter=model.FEATURE_CONVERTER_CLS(pack=False),
      eval_split=infer_eval_dataset_cfg.split,
      use_cached=infer_eval_dataset_cfg.use_cached,
      seed=infer_eval_dataset_cfg.seed,
      sequence_length=infer_eval_dataset_cfg.task_feature_lengths,
      use_memory_cache=infer_eval_dataset_cfg.use_memory_cache,
      **logs,
    )
    self._model = model
    self._partitioner = partitioner
    self._batch_size = infer_eval_dataset_cfg.batch_size
    self._infer_fns: dict[str, Callable[..., Any]] = {}

  @property
  def model_feature_shapes(self) -> Mapping[str, tuple[int, ...]]:
    """Shape of each model feature of one example."""
    return self._evaluator.model_feature_shapes

  @property
  def eval_tasks(self) -> Sequence[seqio.Task]:
    """The tasks with metrics and this split."""
    return self._evaluator.eval_tasks

  def close(self) -> None:
    """Waits for pending metrics and closes the loggers."""
    self._evaluator.close()

  def evaluate(
    self,
    train_state: train_state_lib.TrainState,
    train_state_axes: train_state_lib.TrainState,
  ) -> Any:
    """Returns a future of {task: {metric: value}}, of None on all but process 0."""
    if not self._infer_fns:
      for step in ('predict_batch', 'predict_batch_with_aux', 'score_batch'):
        self._infer_fns[step] = inference.get_infer_fn(
          infer_step=getattr(self._model, step),
          batch_size=self._batch_size,
          train_state_axes=train_state_axes,
          partitioner=self._partitioner,
        )
    run = functools.partial
    seeded = {'train_state': train_state, 'rng': jax.random.PRNGKey(0)}
    metrics, _ = self._evaluator.evaluate(
      compute_metrics=jax.process_index() == 0,
      step=int(train_state.step),
      predict_fn=run(self._infer_fns['predict_batch'], **seeded),
      predict_with_aux_fn=run(self._infer_fns['predict_batch_with_aux'], **seeded),
      score_fn=run(self._infer_fns['score_batch'], train_state=train_state),
    )
    return metrics


def _by_step(path: str) -> tuple[int, str]:
  """Sorting key of checkpoints by the number their path ends in, if any."""
  number = re.search(r'(\d+)/*$', path)
  return int(number[1]) if number else -1, path


def evaluate(
  *,
  model: models.BaseTransformerModel,
  dataset_cfg: data.DatasetConfig,
  restore_checkpoint_cfg: restore.RestoreCheckpointConfig,
  partitioner: partitioning.BasePartitioner,
  output_dir: str,
  inference_evaluator_cls: data.EvaluatorConstructor | None = seqio.Evaluator,
  training_evaluator_cls: type[trainer_lib.Trainer] | None = None,
  summarize_config_fn: Callable[..., None] = gin_utils.summarize_gin_config,
  train_state_initializer_cls: type[
    restore.TrainStateInitializer
  ] = restore.TrainStateInitializer,
  train_eval_get_dataset_fn: data.GetEvalDatasetCallable = (
    data.get_training_eval_datasets
  ),
  fallback_init_rng: int | None = None,
  use_orbax: bool = True,
) -> None:
  """Evaluates checkpoints; `configs/runs/eval.gin` comments the parameters.

  Args:
    restore_checkpoint_cfg: mode 'all' skips the evaluated checkpoints, listed in
      `output_dir/eval.<task>.ckpt`.
    training_evaluator_cls: a Trainer that also computes the training metrics, on
      batches of `train_eval_get_dataset_fn`.
    fallback_init_rng: seed of parameters missing in a checkpoint, with
      `RestoreCheckpointConfig.fallback_to_scratch`.

  Raises:
    ValueError: the task lacks metrics or this split, or no checkpoint was found.
  """
  # ---- Data ----
  data.find_provider(dataset_cfg)
  whole_files.open_folder('output_dir', output_dir)
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
    optimizer_def=None,  # No optimizer state is needed.
    init_fn=model.get_initial_variables,
    input_shapes={
      name: (dataset_cfg.batch_size, *shape)
      for name, shape in evaluator.model_feature_shapes.items()
    },
    partitioner=partitioner,
  )
  axes = initializer.train_state_axes
  restore.log_model_info(
    os.path.join(output_dir, 'model-info.txt'),
    initializer.global_train_state_shape,
    partitioner,
  )
  restore_cfg, paths = restore.get_first_valid_restore_config_and_paths(
    # Not strict: the checkpoint also has optimizer state.
    [dataclasses.replace(restore_checkpoint_cfg, strict=False)]
  )
  if not paths:
    raise ValueError(f'No checkpoint found at {restore_checkpoint_cfg.path}.')
  record = epath.Path(output_dir) / f'eval.{dataset_cfg.task_name}.ckpt'
  done = set(record.read_text().splitlines()) if record.exists() else set()
  if restore_cfg.mode == 'all':
    skipped = sorted(set(paths) & done, key=_by_step)
    if skipped:
      logging.info('Already evaluated: %s', ', '.join(map(os.path.basename, skipped)))
    paths = sorted(set(paths) - done, key=_by_step)
    restore_cfg = dataclasses.replace(restore_cfg, mode='specific')

  # ---- Evaluation ----
  trainer, train_eval_datasets = None, {}
  if training_evaluator_cls is not None:
    layout = partitioner.get_data_layout(dataset_cfg.batch_size)
    # Gin binds get_training_eval_datasets.eval_steps.
    train_eval_datasets = train_eval_get_dataset_fn(
      dataset_cfg,
      layout.shard_id,
      layout.num_shards,
      feature_converter_cls=model.FEATURE_CONVERTER_CLS,
    )
    trainer = training_evaluator_cls(
      model=model,
      train_state=None,  # Set for each checkpoint.
      partitioner=partitioner,
      train_state_axes=axes,
      eval_names=train_eval_datasets.keys(),
      summary_dir=output_dir,
      rng=jax.random.PRNGKey(0),
      learning_rate_fn=None,
      num_microbatches=None,
    )
  init_rng = None
  if fallback_init_rng is not None:
    init_rng = jax.random.PRNGKey(fallback_init_rng)
  for path in paths:
    train_state, _ = restore.create_checkpoint_manager_and_restore(
      initializer, partitioner, restore_cfg, path, init_rng, use_orbax=use_orbax
    )
    if train_state is None:
      raise ValueError(f'No checkpoint found at {path}.')
    if trainer is not None:
      trainer.train_state = train_state
      trainer.eval(train_eval_datasets)
    evaluator.evaluate(train_state, axes).result()
    multihost.sync(f'evaluated:{int(train_state.step)}')
    if jax.process_index() == 0:
      done.add(path)
      with whole_files.whole_file(record) as file:
        file.write('\n'.join(sorted(done, key=_by_step)))
  evaluator.close()
  if trainer is not None:
    trainer.close()
  logging.info('Done.')


if __name__ == '__main__':
  launch.run(evaluate)
