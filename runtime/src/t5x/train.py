"""Trains a model on a seqio task or mixture, from scratch or from a checkpoint.

  python -m t5x.train --gin_file=MODEL.gin --gin_file=t5x/configs/runs/pretrain.gin \\
    --gin.MODEL_DIR="'runs/mine'" --gin.TRAIN_STEPS=1000 \\
    --gin.MIXTURE_OR_TASK_NAME="'my_task'" \\
    --gin.TASK_FEATURE_LENGTHS="{'inputs': 512, 'targets': 114}"

Writes checkpoint_<step>/, config.gin, model-info.txt and metrics.jsonl to MODEL_DIR,
and TensorBoard files to train/, training_eval/<task>/ and inference_eval/<task>/ in it.
The same command resumes an interrupted run from its last checkpoint. Ctrl-C, SIGTERM
and SIGHUP save and end the run, with exit code 128 + the signal's number.
"""

if __name__ == '__main__':
  from t5x import launch

  launch.prepare(__doc__, multiprocess=True)

import contextlib
import functools
import gc
import itertools
import numbers
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio
from absl import logging
from clu import metric_writers
from etils import epath
from jax.experimental import multihost_utils

from t5x import (
  checkpoints,
  data,
  data_iterators,
  launch,
  models,
  multihost,
  partitioning,
  restore,
  trackers,
  whole_files,
)
from t5x import eval as eval_lib
from t5x import progress as progress_lib
from t5x import train_state as train_state_lib
from t5x import trainer as trainer_lib
from t5x.trainer import ActionMode

# Names of metrics in TensorBoard files and `metrics.jsonl`, by mode; {} is the task.
_SOURCES = {
  ActionMode.TRAIN: '{}',
  ActionMode.TRAIN_EVAL: 'training_eval/{:.113}',
  ActionMode.INFER_EVAL: 'inference_eval/{}/eval',
}


def _restore_configs(
  checkpoint_cfg: restore.CheckpointConfig, model_dir: str
) -> list[restore.RestoreCheckpointConfig]:
  """Lists the sources of the state, of which the first that exists is restored.

  1. The run's own last checkpoint, to resume it.
  2. The checkpoint in the configuration, to fine-tune it.
  (3. Neither exists: random parameters.)
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
    dtype='float32',  # Training uses it, whatever dtype is saved.
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


def _whole_steps(name: str, steps: float | None) -> int:
  """Converts a number of steps to int: gin files may have 1e5, and None for 0."""
  steps = 0 if steps is None else steps
  if not isinstance(steps, numbers.Real) or steps < 0 or steps != int(steps):
    raise ValueError(f'{name} must be a whole number of steps. Got: {steps!r}.')
  return int(steps)


def _first_step_of_run(model_dir: str, step: int) -> int:
  """Returns the step the run began at before any restart; process 0 records it."""
  note = epath.Path(model_dir) / 'first_step.txt'
  began = int(note.read_text()) if note.exists() else step
  multihost.sync('first_step_read')
  if jax.process_index() == 0 and not note.exists():
    with whole_files.whole_file(note) as file:
      file.write(str(began))
  return began


def _next_stop(
  step: int, total_steps: int, periods: Sequence[int], further: Sequence[int] = ()
) -> int:
  """The first step after `step` at which something happens; period 0 is off."""
  coming = [(step // period + 1) * period for period in periods if period]
  return min([total_steps, *coming, *(stop for stop in further if stop > step)])


def run_actions(
  mode: ActionMode,
  actions: Mapping[ActionMode, Sequence[trainer_lib.BaseAction]],
  train_state: train_state_lib.TrainState,
  metrics_by_task: Mapping[str, Mapping[str, Any]],
) -> bool:
  """Runs the actions of a mode on process 0; True, everywhere, if one asks to stop."""
  stop = False
  if jax.process_index() == 0:
    for action in actions.get(mode, ()):  # Runs all, even after one asks to stop.
      stop |= bool(action.run(train_state, metrics_by_task=metrics_by_task))
  return bool(multihost.broadcast(np.asarray(stop)))


@contextlib.contextmanager
def _stop_signals(model_dir: str) -> Iterator[tuple[Callable[[int], bool], list[int]]]:
  """Lets signals stop the run between steps, and a second Ctrl-C at once.

  Yields a function of a step, whether to stop before it, and the signals received.
  """
  received = []
  alone = jax.process_count() == 1

  def note(number: int, frame: Any) -> None:
    del frame
    if number == signal.SIGINT and number in received:
      latest = checkpoints.latest_step(model_dir)
      launch.write_to_stderr(
        'Nothing was saved; the same command starts again.'
        if latest is None
        else f'Steps after {latest} are lost. The same command resumes the run.'
      )
      os._exit(128 + number)
    received.append(number)
    launch.write_to_stderr(
      f'{signal.Signals(number).name}: saving after the current step, then stopping.'
      + (' Ctrl-C again: stop at once.' if number == signal.SIGINT else '')
    )
    if not alone:  # JAX's coordination service lets processes agree on a step.
      os.kill(os.getpid(), signal.SIGTERM)

  # In several processes, that service handles SIGTERM.
  handled = (signal.SIGINT, signal.SIGHUP, *([signal.SIGTERM] if alone else []))
  before = {}
  # Only the main thread can set handlers. nohup and `&` have some signals ignored.
  if threading.current_thread() is threading.main_thread():
    for number in handled:
      if signal.getsignal(number) != signal.SIG_IGN:
        before[number] = signal.signal(number, note)
  try:
    if alone:
      yield lambda step: bool(received), received
    else:
      yield multihost_utils.reached_preemption_sync_point, received
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _until_stopped(
  batches: Iterator[Any], step: int, stops_before: Callable[[int], bool]
) -> Iterator[Any]:
  """Yields batches; raises PreemptionError if the run has to stop."""
  end = object()
  for number in itertools.count(step):
    # Before taking a batch, so that the dataset state matches the step.
    if stops_before(number):
      raise trainer_lib.PreemptionError(f'Asked to stop before step {number}.')
    if (batch := next(batches, end)) is end:
      return
    yield batch


@whole_files.only_writer('model_dir')
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
  interrupted_exit_code: int | None = None,
  tracker: trackers.Tracker | None = None,
) -> tuple[int, train_state_lib.TrainState]:
  """Trains a model; `configs/runs/pretrain.gin` comments most parameters.

  Periods count absolute steps, and everything periodic also happens at the last step.
  0 or None switches a period off.

  Args:
    total_steps: the last step, including those of an initial checkpoint.
    eval_steps: batches per evaluation with teacher forcing.
    relative_steps: replaces `total_steps` by this many steps from the run's first one.
    stats_period: steps between reports of the training metrics, which are also reported
      at evaluations and checkpoints.
    concurrent_metrics: whether training continues while the CPU computes infer-eval
      metrics, until the next checkpoint or evaluation.
    actions: {name of a `trainer.ActionMode`: actions on its metrics}.
    gc_period: steps between runs of Python's garbage collector, whose automatic runs
      are then disabled; 0 leaves them enabled.
    interrupted_exit_code: of the script if a signal stopped the run before its last
      step; None for 128 + the signal's number (SIGTERM: 143, Ctrl-C: 130).
    tracker: also gets the reports of metrics.jsonl.

  Returns:
    The last step and the state after it.

  Raises:
    ValueError: an argument is out of range or does not fit another.
    OSError: `model_dir` cannot be written to, or another run writes to it.
  """
  # ---- Arguments ----
  save_cfg = checkpoint_cfg.save
  by_mode = {}
  for name, chosen in (actions or {}).items():
    if name not in ActionMode.__members__:
      raise ValueError(
        f'The modes of train.actions are {", ".join(ActionMode.__members__)}. '
        f'Got: {name!r}.'
      )
    if concurrent_metrics and name in ('TRAIN', 'INFER_EVAL'):
      raise ValueError(
        f'{name} actions need their metrics before training continues. Set '
        'train.concurrent_metrics = False.'
      )
    by_mode[ActionMode[name]] = chosen
  eval_period = _whole_steps('eval_period', eval_period)
  stats_period = _whole_steps('stats_period', stats_period)
  gc_period = _whole_steps('gc_period', gc_period)
  save_period = _whole_steps('period', save_cfg.period) if save_cfg else 0
  save_steps = [
    _whole_steps('checkpoint_steps', step)
    for step in (save_cfg.checkpoint_steps or () if save_cfg else ())
  ]
  if use_hardware_rng or random_seed is None:
    trainer_lib.set_hardware_rng_ops()
  if random_seed is None:
    random_seed = multihost.broadcast_int(int(time.time()))
    logging.info('random_seed is None; this run uses %d.', random_seed)
  init_key, train_key = jax.random.split(jax.random.PRNGKey(random_seed))

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
      'The data seed is fixed but the dataset state is not saved, so each restart '
      'repeats the same examples. Set SaveCheckpointConfig.save_dataset = True.'
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
  first_step = int(train_state.step)
  if relative_steps:
    relative_steps = _whole_steps('relative_steps', relative_steps)
    total_steps = _first_step_of_run(model_dir, first_step) + relative_steps
  total_steps = _whole_steps('total_steps', total_steps)
  if first_step > total_steps:
    raise ValueError(
      f'The run ends at step {total_steps}, but its checkpoint is already at step '
      f'{first_step}. Raise TRAIN_STEPS, or set TRAIN_STEPS_RELATIVE.'
    )
  restore_seconds = time.monotonic() - start
  origin = paths[0] if paths else ''
  if origin and restore_cfg.mode == 'latest':  # An earlier one if that is damaged.
    origin = checkpoints.get_checkpoint_dir(os.path.dirname(origin), first_step)
  logging.info(
    '%s step %d of %d.',
    f'Resuming from {origin} at' if origin else 'Starting at',
    first_step,
    total_steps,
  )
  restore.log_model_info(
    os.path.join(model_dir, 'model-info.txt'),
    initializer.global_train_state_shape,
    partitioner,
  )
  axes = initializer.train_state_axes

  # ---- Trainer, evaluator, reports ----
  trainer = trainer_cls(
    model=model,
    train_state=train_state,
    partitioner=partitioner,
    train_state_axes=axes,
    eval_names=train_eval_datasets.keys(),
    summary_dir=model_dir,
    rng=train_key,
  )
  del train_state  # The first step donates its buffers.
  train_metrics = trainer.train_metrics_manager
  if first_step < total_steps or not paths:
    # A finished run keeps its configuration.
    summarize_config_fn(model_dir, train_metrics.summary_writer, first_step)
  train_metrics.write_scalar(
    'timing/init_or_restore_seconds', restore_seconds, first_step
  )
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
  progress = progress_lib.Progress(total_steps, first_step, model.PROGRESS_METRICS)
  metrics_log = progress_lib.MetricsLog(
    model_dir, first_step, run_eval_before_training, tracker
  )

  def report(step, values):
    progress.report(step, values)
    metrics_log.add(step, 'train', values)

  trainer.on_step, trainer.on_report = progress.advance, report
  inferred = []  # [(step, future of metrics)], at most one.

  def take_inferred():
    """Waits for pending infer-eval metrics and logs them."""
    found = {}
    while inferred:
      step, future = inferred.pop()
      found = future.result() or {}  # None on all processes but the first.
      for task, values in found.items():
        source = _SOURCES[ActionMode.INFER_EVAL].format(task)
        metrics_log.add(step, source, values)
    return found

  def act(mode, metrics):
    if by_mode.get(mode):
      stop = run_actions(mode, by_mode, trainer.train_state, metrics)
      trainer.stop_training |= stop

  def evaluate(step):
    if train_eval_datasets:
      zeros = data_iterators.get_zeros_batch_like_dataset
      trainer.compile_eval({n: zeros(ds) for n, ds in train_eval_datasets.items()})
      evaluated = trainer.eval(train_eval_datasets)
      for task, values in evaluated.items():
        progress.report_evaluation(task, step, values)
        source = _SOURCES[ActionMode.TRAIN_EVAL].format(task)
        metrics_log.add(step, source, values)
      act(ActionMode.TRAIN_EVAL, evaluated)
    if evaluator is not None:
      take_inferred()
      begun = time.monotonic()
      inferred.append((step, evaluator.evaluate(trainer.train_state, axes)))
      if not concurrent_metrics:
        act(ActionMode.INFER_EVAL, take_inferred())
      seconds = time.monotonic() - begun
      train_metrics.write_scalar('timing/evaluate_seconds', seconds, step)

  def save(step):
    if not save_cfg:
      return
    begun = time.monotonic()
    train_state = trainer.train_state
    if (getattr(manager, 'metric_name_to_monitor', None) or '').startswith('inference'):
      take_inferred()
    if manager.save(
      train_state, save_cfg.state_transformation_fns, metrics=metrics_log.at(step)
    ):
      seconds = time.monotonic() - begun
      train_metrics.write_scalar('timing/checkpoint_seconds', seconds, step)

  # ---- Training ----
  saves = bool(save_period or save_steps)
  evaluates = bool(train_eval_datasets or evaluator)
  periods = (stats_period, save_period, evaluates and eval_period, gc_period)
  step = first_step
  with contextlib.ExitStack() as stack:
    # Left last: a second SIGTERM must not interrupt a save.
    stops_before, signals = stack.enter_context(_stop_signals(model_dir))
    # Pending checkpoints and metrics are completed even after an error.
    stack.push(lambda kind, *_: metrics_log.close(failed=kind is not None))
    if manager is not None:
      stack.callback(manager.close)
    if evaluator is not None:
      stack.callback(evaluator.close)
    stack.callback(progress.close)
    stack.callback(trainer.close)
    if jax.process_index() == 0:
      for mode, chosen in by_mode.items():
        for action in chosen:
          action.recall(
            lambda task, metric, source=_SOURCES[mode]: metrics_log.recall(
              source.format(task), metric
            )
          )
    if run_eval_before_training:
      evaluate(step)
    if save_period or step in save_steps:
      save(step)
    if step == total_steps:
      logging.info(
        'Nothing to train: the run has reached its last step, %d.', total_steps
      )
    elif trainer.stop_training:
      logging.info('Stopped by an action before the first step.')
    else:
      # Fills the pipeline's buffers while XLA compiles.
      train_iter.peek_async()
      trainer.compile_train(data_iterators.get_zeros_batch_like_dataset(train_iter))
      if gc_period and gc.isenabled():
        gc.disable()
        stack.callback(gc.enable)
      batches = _until_stopped(train_iter, step, stops_before)
    while step < total_steps and not trainer.stop_training:
      stop = _next_stop(step, total_steps, periods, save_steps)
      try:
        summary = trainer.train(batches, stop - step, start_step=step)
        step, preempted = stop, stops_before(stop)
      except trainer_lib.PreemptionError:
        step, preempted = int(trainer.train_state.step), True
      if preempted:
        logging.info('Asked to stop: saving at step %d.', step)
        save(step)
        if step < total_steps:
          number = signals[0] if signals else signal.SIGTERM
          code = interrupted_exit_code
          launch.exit_with(128 + number if code is None else code)
          break
      if by_mode.get(ActionMode.TRAIN):
        act(ActionMode.TRAIN, {'train': summary.result()})
      last = step == total_steps
      if gc_period and (step % gc_period == 0 or last):
        gc.collect()
      if evaluates and eval_period and (step % eval_period == 0 or last):
        evaluate(step)
      if trainer.stop_training:
        logging.info('Stopped by an action at step %d.', step)
      on_schedule = save_period and step % save_period == 0 or step in save_steps
      if on_schedule or trainer.stop_training or (last and saves):
        try:  # A run that resumes from the checkpoint cannot report them.
          take_inferred()
        finally:
          save(step)
    take_inferred()
  multihost.sync('training complete')
  for action in itertools.chain(*by_mode.values()):
    action.close()
  if step < total_steps:
    logging.info('Stopped at step %d of %d.', step, total_steps)
  else:
    logging.info('Finished at step %d.', step)
  return step, trainer.train_state


if __name__ == '__main__':
  launch.run(train)
