"""Trains a model on a seqio task or mixture, from scratch or from a checkpoint.

  python -m t5x.train --gin_file=MODEL.gin --gin_file=t5x/configs/runs/pretrain.gin \\
    --gin.MODEL_DIR="'runs/mine'" --gin.TRAIN_STEPS=1000 \\
    --gin.MIXTURE_OR_TASK_NAME="'my_task'" \\
    --gin.TASK_FEATURE_LENGTHS="{'inputs': 512, 'targets': 114}"

Everything lands in MODEL_DIR: checkpoint_<step>/, config.gin, model-info.txt, and for
TensorBoard train/, training_eval/<task>/, inference_eval/<task>/. The same command,
given again after an interruption, goes on from the last checkpoint. SIGTERM saves and
ends the run.
"""

if __name__ == '__main__':
  from t5x import launch

  launch.prepare(__doc__, multiprocess=True)

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence

import seqio
from absl import logging
from clu import metric_writers

from t5x import (
  checkpoints,
  data,
  data_iterators,
  launch,
  models,
  multihost,
  partitioning,
  restore,
  run_setup,
)
from t5x import eval as eval_lib
from t5x import train_state as train_state_lib
from t5x import trainer as trainer_lib
from t5x.training import loop, progress, run_schedule
from t5x.training.loop import TRAIN_METRIC_KEY, run_actions

__all__ = ['TRAIN_METRIC_KEY', 'run_actions', 'train']


def _restore_configs(
  checkpoint_cfg: restore.CheckpointConfig, model_dir: str
) -> list[restore.RestoreCheckpointConfig]:
  """Where parameters may come from; the first that exists is taken.

  1. The run's own last checkpoint: the run goes on.
  2. The checkpoint that the configuration names: fine-tuning starts.
  (3. Neither: random parameters.)

  Raises:
    ValueError: the configuration names several.
  """
  initial, save = checkpoint_cfg.restore, checkpoint_cfg.save
  transformations = initial.state_transformation_fns if initial else ()
  classes = {}
  if save:
    classes['checkpointer_cls'] = save.checkpointer_cls
    classes['checkpoint_manager_cls'] = save.checkpoint_manager_cls
  own = restore.RestoreCheckpointConfig(
    path=model_dir,
    mode='latest',
    dtype='float32',  # the run goes on in it, whatever dtype it saves in
    restore_dataset=bool(save and save.save_dataset),
    state_transformation_fns=[
      functools.partial(transform, is_resuming=True) for transform in transformations
    ],
    **classes,
  )
  if initial is None or not initial.path:
    return [own]
  if initial.mode == 'all' or not isinstance(initial.path, str):
    raise ValueError(
      'Training starts from one checkpoint. Got RestoreCheckpointConfig.path = '
      f'{initial.path!r}, mode = {initial.mode!r}.'
    )
  return [own, initial]


def train(
  *,
  model: models.BaseModel,
  train_dataset_cfg: data.DatasetConfig,
  train_eval_dataset_cfg: data.DatasetConfig | None,
  infer_eval_dataset_cfg: data.DatasetConfig | None,
  checkpoint_cfg: restore.CheckpointConfig,
  partitioner: partitioning.BasePartitioner,
  trainer_cls: trainer_lib.BaseTrainerConstructor,
  model_dir: str,
  total_steps: int,
  eval_steps: int,
  eval_period: int | None,
  relative_steps: int | None = None,
  stats_period: int | None = None,
  random_seed: int | None,
  use_hardware_rng: bool = False,
  summarize_config_fn: Callable[[str, metric_writers.MetricWriter, int], None],
  inference_evaluator_cls: data.EvaluatorConstructor = seqio.Evaluator,
  get_dataset_fn: data.GetDatasetCallable = data.get_dataset,
  concurrent_metrics: bool = True,
  actions: Mapping[str, Sequence[trainer_lib.BaseAction]] | None = None,
  train_eval_get_dataset_fn: data.GetEvalDatasetCallable = (
    data.get_training_eval_datasets
  ),
  run_eval_before_training: bool = False,
  train_state_initializer_cls: type[
    restore.TrainStateInitializer
  ] = restore.TrainStateInitializer,
  use_orbax: bool = True,
  verify_matching_vocabs_fn: Callable[
    [data.DatasetConfig, models.BaseTransformerModel], None
  ]
  | None = data.verify_matching_vocabs,
  gc_period: int = 0,
) -> tuple[int, train_state_lib.TrainState]:
  """Trains a model.

  Every period counts absolute steps; 0 or None switches it off. What has a period also
  happens at the last step.

  Args:
    model: the model.
    train_dataset_cfg: what to train on.
    train_eval_dataset_cfg: what to evaluate on with teacher forcing; None: nothing.
    infer_eval_dataset_cfg: what to evaluate on by decoding or scoring; None: nothing.
    checkpoint_cfg: what to start from, and when and how to save.
    partitioner: lays parameters and data over the devices.
    trainer_cls: builds the Trainer.
    model_dir: where checkpoints and metrics go. A run found there goes on.
    total_steps: the step at which training ends, counted with those of the checkpoint
      it starts from.
    eval_steps: batches in a train-eval.
    eval_period: steps between evaluations.
    relative_steps: ends this many steps behind the one the run began at, in place of
      `total_steps`.
    stats_period: steps between reports of the training metrics, which are also reported
      at each evaluation and each checkpoint; None: there only.
    random_seed: of the initial parameters and of dropout; None takes the clock.
    use_hardware_rng: see `run_setup.set_hardware_rng_ops`.
    summarize_config_fn: writes the configuration down.
    inference_evaluator_cls: builds the evaluator for infer-eval.
    get_dataset_fn: reads the training data.
    concurrent_metrics: whether infer-eval's metrics are computed while training goes
      on.
    actions: {mode: what runs on the metrics after it}; modes are TRAIN, TRAIN_EVAL and
      INFER_EVAL.
    train_eval_get_dataset_fn: reads the data for train-eval.
    run_eval_before_training: whether to evaluate before the first step.
    train_state_initializer_cls: builds the state.
    use_orbax: see `restore.create_checkpoint_manager_and_restore`.
    verify_matching_vocabs_fn: checks the tasks' vocabularies against the model's.
    gc_period: steps between runs of Python's garbage collector, which then never runs
      by itself; 0 leaves it alone.

  Returns:
    The step reached and the state at that step.

  Raises:
    ValueError: an argument makes no sense.
    OSError: `model_dir` cannot be written to.
  """
  # ---- Arguments ----
  run_setup.open_folder('model_dir', model_dir)
  actions = loop.named_actions(actions, concurrent_metrics)
  save_cfg = checkpoint_cfg.save
  init_key, train_key = run_setup.random_keys(random_seed, use_hardware_rng)

  # ---- Data ----
  for cfg in (train_dataset_cfg, train_eval_dataset_cfg):
    if (
      cfg
      and verify_matching_vocabs_fn
      and isinstance(model, models.BaseTransformerModel)
    ):
      verify_matching_vocabs_fn(cfg, model)
  if train_dataset_cfg.seed is not None and not (save_cfg and save_cfg.save_dataset):
    logging.warning(
      'The data seed is fixed and the position in the data is not saved: after each '
      'restart the data begins anew with the same examples. Set '
      'SaveCheckpointConfig.save_dataset = True.'
    )
  layout = partitioner.get_data_layout(train_dataset_cfg.batch_size)
  converter_cls = model.FEATURE_CONVERTER_CLS
  train_iter = data_iterators.prepare_train_iter(
    get_dataset_fn(
      train_dataset_cfg, layout.shard_id, layout.num_shards, converter_cls
    ),
    checkpoint_cfg=checkpoint_cfg,
    partitioner=partitioner,
    data_layout=layout,
    task_name=train_dataset_cfg.task_name,
    describe_source=functools.partial(data.describe_source, train_dataset_cfg),
  )
  launch.keep_to_the_end(train_iter)
  train_eval_datasets = {}
  if train_eval_dataset_cfg:
    train_eval_datasets = train_eval_get_dataset_fn(
      train_eval_dataset_cfg,
      layout.shard_id,
      layout.num_shards,
      eval_steps,
      converter_cls,
    )

  # ---- State ----
  start = time.monotonic()
  initializer = train_state_initializer_cls(
    optimizer_def=model.optimizer_def,
    init_fn=model.get_initial_variables,
    input_shapes={
      name: (layout.batch_size, *spec.shape[1:])
      for name, spec in train_iter.element_spec.items()
    },
    input_types={name: spec.dtype for name, spec in train_iter.element_spec.items()},
    partitioner=partitioner,
  )
  restore_cfg, paths = restore.get_first_valid_restore_config_and_paths(
    _restore_configs(checkpoint_cfg, model_dir)
  )
  train_state, manager = None, None
  if restore_cfg or save_cfg:
    train_state, manager = restore.create_checkpoint_manager_and_restore(
      initializer,
      partitioner,
      restore_cfg,
      paths[0] if paths else None,
      init_key,
      save_checkpoint_cfg=save_cfg,
      model_dir=model_dir,
      ds_iter=train_iter,
      use_orbax=use_orbax,
    )
  if train_state is None:
    train_state = initializer.from_scratch(init_key)
  first_step = int(checkpoints.get_local_data(train_state.step))
  total_steps = run_setup.last_step(model_dir, first_step, total_steps, relative_steps)
  restore_seconds = time.monotonic() - start
  logging.info(
    '%s step %d of %d.',
    f'Going on from {paths[0]} at' if paths else 'Starting at',
    first_step,
    total_steps,
  )
  restore.log_model_info(
    os.path.join(model_dir, 'model-info.txt'),
    initializer.global_train_state_shape,
    partitioner,
  )
  axes = initializer.train_state_axes

  # ---- Trainer and evaluator ----
  trainer = trainer_cls(
    model=model,
    train_state=train_state,
    partitioner=partitioner,
    train_state_axes=axes,
    eval_names=train_eval_datasets.keys(),
    summary_dir=model_dir,
    rng=train_key,
  )
  del train_state  # The trainer gives its memory to the next state.
  trainer.progress = progress.Progress(
    total_steps, first_step, chosen=model.PROGRESS_METRICS
  )
  metrics = trainer.train_metrics_manager
  if first_step < total_steps or not paths:
    # A finished run keeps the configuration that it was trained with.
    summarize_config_fn(model_dir, metrics.summary_writer, first_step)
  metrics.write_scalar('timing/init_or_restore_seconds', restore_seconds, first_step)
  evaluator = None
  if infer_eval_dataset_cfg and (first_step < total_steps or run_eval_before_training):
    evaluator = eval_lib.InferenceEvaluator(
      infer_eval_dataset_cfg,
      inference_evaluator_cls,
      model,
      partitioner,
      log_dir=model_dir,
      verify_matching_vocabs_fn=verify_matching_vocabs_fn,
    )
    if not evaluator.eval_tasks:
      evaluator = None
  loop.recall_values(actions, model_dir, first_step, run_eval_before_training)
  evaluations = loop.Evaluations(
    trainer,
    train_eval_datasets,
    evaluator,
    axes,
    actions,
    concurrent_metrics,
    model.PROGRESS_METRICS,
  )
  saver = loop.Saver(manager, save_cfg, trainer)
  schedule = run_schedule.RunSchedule(
    total_steps=total_steps,
    stats_period=stats_period,
    checkpoint_period=save_cfg.period if save_cfg else None,
    checkpoint_steps=tuple(save_cfg.checkpoint_steps or ()) if save_cfg else (),
    eval_period=eval_period if train_eval_datasets or evaluator else None,
    gc_period=gc_period,
  )

  # ---- Training ----
  with (
    contextlib.closing(trainer),
    contextlib.closing(evaluations),
    # A checkpoint that was begun becomes whole, come what may.
    contextlib.closing(saver),
  ):
    if run_eval_before_training:
      evaluations.run(first_step)
    if schedule.saves_before(first_step):
      saver.save(first_step)
    step = first_step
    if first_step == total_steps:
      logging.info('Nothing to train: the run is at its last step, %d.', total_steps)
    elif trainer.stop_training:
      logging.info('Stopped by an action before the first step.')
    else:
      # The pipeline fills its buffers while XLA compiles.
      train_iter.peek_async()
      trainer.compile_train(data_iterators.get_zeros_batch_like_dataset(train_iter))
      with loop.garbage_collected_by_hand(bool(gc_period)):
        step = loop.train_until_done(
          schedule, first_step, train_iter, trainer, saver, evaluations
        )
    evaluations.wait()
  multihost.sync('training complete')
  for action in itertools.chain(*actions.values()):
    action.close()
  if step < total_steps:
    logging.info('Stopped at step %d of %d.', step, total_steps)
  else:
    logging.info('Finished at step %d.', step)
  return step, trainer.train_state


if __name__ == '__main__':
  launch.run(train)
