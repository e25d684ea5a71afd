"""The loop of a training run: from stop to stop of its schedule.

At a stop metrics are reported, and a checkpoint is saved, the state is evaluated or the
run ends. What stops it between two stops is a request from outside (`preemption`).
"""

import contextlib
import functools
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from t5x import checkpoints, data_iterators, multihost, restore
from t5x import eval as eval_lib
from t5x import train_state as train_state_lib
from t5x import trainer as trainer_lib
from t5x.checkpointing import best_metrics
from t5x.training import base_trainer, preemption, progress, run_schedule

# Under this name actions find the training metrics among those of tasks.
TRAIN_METRIC_KEY = 'train'


def run_actions(
  mode: trainer_lib.ActionMode,
  actions: Mapping[trainer_lib.ActionMode, Sequence[trainer_lib.BaseAction]],
  train_state: train_state_lib.TrainState,
  metrics_by_task: Mapping[str, Mapping[str, Any]],
) -> bool:
  """Runs the actions of a mode on process 0 and tells all processes the verdict.

  Args:
    mode: after what the actions run.
    actions: all actions by mode.
    train_state: the current state.
    metrics_by_task: {task: {metric: value}}.

  Returns:
    Whether an action asks to stop the training.

  Raises:
    ValueError: there are no metrics on process 0.
  """
  stop = False
  if jax.process_index() == 0:
    if not metrics_by_task:
      raise ValueError(f'No metrics for the {mode.name} actions to look at.')
    # A list, as every action is to run: the first verdict must not hide the others.
    verdicts = [
      action.run(train_state, metrics_by_task=metrics_by_task)
      for action in actions.get(mode, ())
    ]
    stop = any(verdicts)
  return bool(multihost.broadcast(np.asarray(stop)))


def recall_values(
  actions: Mapping[trainer_lib.ActionMode, Sequence[trainer_lib.BaseAction]],
  model_dir: str,
  step: int,
  evaluates_first: bool,
) -> None:
  """Lets the actions of a run that goes on know what they would have seen.

  Args:
    actions: all actions by mode.
    model_dir: in which the run wrote its metrics.
    step: at which it goes on; what it wrote behind that is taken back.
    evaluates_first: whether the state at `step` is evaluated again before it goes on.
  """
  folders = {
    trainer_lib.ActionMode.TRAIN: '{}',
    trainer_lib.ActionMode.TRAIN_EVAL: base_trainer.TRAINING_EVAL_FOLDER,
    trainer_lib.ActionMode.INFER_EVAL: 'inference_eval/{}/eval',
  }

  def recorded(mode, task, metric):
    found = best_metrics.recorded(model_dir, f'{folders[mode].format(task)}/{metric}')
    again = evaluates_first and mode != trainer_lib.ActionMode.TRAIN
    last = step - 1 if again else step
    return [found[at] for at in sorted(found) if at <= last]

  if jax.process_index() == 0:
    for mode, chosen in actions.items():
      for action in chosen:
        action.recall(functools.partial(recorded, mode))


def named_actions(
  actions: Mapping[str, Sequence[trainer_lib.BaseAction]] | None, concurrent: bool
) -> dict[trainer_lib.ActionMode, Sequence[trainer_lib.BaseAction]]:
  """Finds the modes behind the names that gin gives.

  Raises:
    ValueError: there is no such mode, or its metrics are not there in time.
  """
  known = trainer_lib.ActionMode.__members__
  for name in actions or {}:
    if name not in known:
      raise ValueError(
        f'train.actions knows the modes {", ".join(known)}. Got: {name!r}.'
      )
    if concurrent and name in ('TRAIN', 'INFER_EVAL'):
      raise ValueError(
        f'{name} actions need their metrics before training goes on. Set '
        'train.concurrent_metrics = False.'
      )
  return {known[name]: chosen for name, chosen in (actions or {}).items()}


class _Batches:
  """Hands batches on until the run is asked to stop.

  The question comes before a batch is taken, so that a saved position in the data is
  that of the saved step.
  """

  def __init__(
    self, iterator: Iterator[Any], watch: preemption.PreemptionWatch, step: int
  ):
    self._iterator = iterator
    self._watch = watch
    self._step = step

  def __iter__(self):
    return self

  def __next__(self):
    if self._watch.stop_before(self._step):
      raise trainer_lib.PreemptionError(f'Asked to stop before step {self._step}.')
    batch = next(self._iterator)
    self._step += 1
    return batch


class Evaluations:
  """Train-eval with teacher forcing and infer-eval with decoding, after each other."""

  def __init__(
    self,
    trainer: trainer_lib.BaseTrainer,
    train_eval_datasets: Mapping[str, Any],
    evaluator: eval_lib.InferenceEvaluator | None,
    train_state_axes: Any,
    actions: Mapping[trainer_lib.ActionMode, Sequence[trainer_lib.BaseAction]],
    concurrent: bool,
    shown: Mapping[str, str] | None = None,
  ):
    self._trainer = trainer
    self._shown = shown
    self._datasets = train_eval_datasets
    self._evaluator = evaluator
    self._axes = train_state_axes
    self._actions = actions
    self._concurrent = concurrent
    self._compiled = False
    self._metrics: Any = None

  def run(self, step: int) -> None:
    """Evaluates the trainer's state and runs the actions on what comes out."""
    if self._datasets:
      self._train_eval(step)
    if self._evaluator is not None:
      self._infer_eval(step)

  def _train_eval(self, step: int) -> None:
    trainer = self._trainer
    if not self._compiled:
      trainer.compile_eval(
        {
          name: data_iterators.get_zeros_batch_like_dataset(dataset)
          for name, dataset in self._datasets.items()
        }
      )
      self._compiled = True
    summaries = trainer.eval(
      {name: eval_lib.batches_of(dataset) for name, dataset in self._datasets.items()}
    )
    for name, values in summaries.items() if multihost.is_host_0() else ():
      trainer.progress.log(progress.evaluation_report(name, step, values, self._shown))
    self._act(trainer_lib.ActionMode.TRAIN_EVAL, summaries)

  def _infer_eval(self, step: int) -> None:
    start = time.monotonic()
    metrics = self._evaluator.evaluate(self._trainer.train_state, self._axes)
    if self._concurrent:
      self._metrics = metrics  # The evaluator waits for those before them itself.
    else:
      self._act(trainer_lib.ActionMode.INFER_EVAL, metrics.result() or {})
    self._trainer.train_metrics_manager.write_scalar(
      'timing/evaluate_seconds', time.monotonic() - start, step
    )

  def after_training(self, summary: Any) -> None:
    """Runs the actions on training metrics, if there are any: they wait for these."""
    if self._actions.get(trainer_lib.ActionMode.TRAIN):
      self._act(trainer_lib.ActionMode.TRAIN, {TRAIN_METRIC_KEY: summary.result()})

  def _act(self, mode: trainer_lib.ActionMode, metrics: Mapping[str, Any]) -> None:
    if self._actions.get(mode):
      verdict = run_actions(mode, self._actions, self._trainer.train_state, metrics)
      self._trainer.stop_training |= verdict

  def wait(self) -> None:
    """Waits for metrics under way; raises what the computation of one raised."""
    if self._metrics is not None:
      self._metrics.result()

  def close(self) -> None:
    """Waits for metrics under way, whatever becomes of them."""
    if self._evaluator is not None:
      self._evaluator.close()


class Saver:
  """Saves the trainer's state, once a step."""

  def __init__(
    self,
    manager: Any,
    save_cfg: restore.SaveCheckpointConfig | None,
    trainer: trainer_lib.BaseTrainer,
  ):
    self._manager = manager if save_cfg else None
    self._save_cfg = save_cfg
    self._trainer = trainer

  def save(self, step: int) -> None:
    """Starts writing a checkpoint, unless there is one of this step."""
    if self._manager is None or step in self._manager.all_steps():
      return
    start = time.monotonic()
    self._manager.save(
      self._trainer.train_state, self._save_cfg.state_transformation_fns
    )
    self._trainer.train_metrics_manager.write_scalar(
      'timing/checkpoint_seconds', time.monotonic() - start, step
    )

  def close(self) -> None:
    """Waits until the last checkpoint is whole."""
    if self._manager is not None:
      with contextlib.closing(self._manager):
        self._manager.wait_until_finished()


@contextlib.contextmanager
def garbage_collected_by_hand(wanted: bool) -> Iterator[None]:
  """Keeps Python's garbage collector from running by itself."""
  if not wanted or not gc.isenabled():
    yield
    return
  gc.disable()
  try:
    yield
  finally:
    gc.enable()


def train_until_done(
  schedule: run_schedule.RunSchedule,
  first_step: int,
  train_iter: Iterator[Any],
  trainer: trainer_lib.BaseTrainer,
  saver: Saver,
  evaluations: Evaluations,
) -> int:
  """Trains from stop to stop of the schedule.

  Returns:
    The step reached: the schedule's last, or earlier if an action or SIGTERM ended it.
  """
  step = first_step
  with preemption.watch_for_preemption() as watch:
    batches = _Batches(train_iter, watch, first_step)
    for stop in schedule.stops_after(first_step):
      try:
        summary = trainer.train(batches, stop.step - step, start_step=step)
      except trainer_lib.PreemptionError:
        step = int(checkpoints.get_local_data(trainer.train_state.step))
        logging.info('Asked to stop: saving at step %d.', step)
        saver.save(step)
        break
      step = stop.step
      evaluations.after_training(summary)
      if stop.collect:
        gc.collect()
      if stop.save:
        saver.save(step)
      if stop.evaluate:
        evaluations.run(step)
      if trainer.stop_training:
        logging.info('Stopped by an action at step %d.', step)
        saver.save(step)
        break
  return step
