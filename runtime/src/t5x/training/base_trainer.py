"""What all trainers do: run steps, see their metrics off, evaluate.

`BaseTrainer.train` returns at once with a future of the metrics; nothing waits for a
single step.
"""

import abc
import collections
import concurrent.futures
import contextlib
import functools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import clu.values
import jax
import numpy as np

from t5x import metrics as metrics_lib
from t5x import partitioning
from t5x import train_state as train_state_lib
from t5x.training import progress as progress_lib
from t5x.training.feeding import in_step_with_other_hosts, put_on_devices
from t5x.training.health import HealthGuard, NonFiniteLossError
from t5x.training.summaries import MetricsManager
from t5x.training.train_step import merge_metrics
from t5x.training.trainer_types import (
  ArrayMapFuture,
  BatchType,
  MetricMapType,
  MetricValueMapType,
  PartitionedEvalCallable,
  PartitionedTrainCallable,
  Rng,
)

if TYPE_CHECKING:
  from t5x import models

# Where a task's metrics are written; of long names the beginning, as file systems allow
# 255 bytes, the writer's ending included.
TRAINING_EVAL_FOLDER = 'training_eval/{:.113}'


class PreemptionError(Exception):
  """The run was asked to stop between two steps, to be saved and resumed."""


class BaseTrainer(abc.ABC):
  """Holds a state, trains it and evaluates it. Call `close` (or use `with`) at the end.

  Attributes:
    train_metrics_manager: writes the metrics of training.
    eval_metrics_managers: writes those of each evaluation dataset, by its name.
    stop_training: set by the training script when an action asks for the end.
    progress: shows how far the run is; give it one with `total_steps` for a bar.
    halt_on_nonfinite_loss: whether `train` stops, with the step and its batch kept, at
      a loss or gradient that is not finite. Unset it for optimizers that skip such
      updates.
  """

  # How many parts the step makes of a batch; the batch has to divide by it.
  _num_microbatches: int | None = None

  def __init__(
    self,
    model: 'models.BaseModel',
    train_state: train_state_lib.TrainState,
    partitioner: partitioning.BasePartitioner,
    eval_names: Sequence[str],
    summary_dir: str | None,
    train_state_axes: Any,
    rng: Rng,
  ):
    """Takes over a state.

    Args:
      model: the model.
      train_state: parameters and optimizer state, on the devices. The first step takes
        its memory.
      partitioner: lays batches over the devices.
      eval_names: names of the evaluation datasets that `eval` will be given.
      summary_dir: folder for TensorBoard files and for the batch of a loss that is not
        finite; None writes nothing.
      train_state_axes: mesh axes of the state.
      rng: key from which those of all steps follow.
    """
    self._model = model
    self._partitioner = partitioner
    self._train_state_axes = train_state_axes
    self._key = rng
    self._summary_dir = summary_dir
    self._state = train_state
    self._state_lock = threading.RLock()
    self._train_program: PartitionedTrainCallable | None = None
    self._eval_programs: dict[str, PartitionedEvalCallable] = {}
    self._programs_by_spec: dict[Any, PartitionedEvalCallable] = {}
    self._begun = time.monotonic()
    self._last_stretch: concurrent.futures.Future | None = None
    self._spoilt: NonFiniteLossError | None = None
    self._guard = HealthGuard(summary_dir)
    self._epilogue = concurrent.futures.ThreadPoolExecutor(1, 'end of stretch')
    self._follower = progress_lib.StepFollower(lambda: self.progress.advance())
    self.progress = progress_lib.Progress()
    self.halt_on_nonfinite_loss = True
    self.stop_training = False
    self.train_metrics_manager = MetricsManager('train', summary_dir)
    self.eval_metrics_managers = {
      name: MetricsManager(TRAINING_EVAL_FOLDER.format(name), summary_dir)
      for name in eval_names
    }

  def __enter__(self):
    return self

  def __exit__(self, exc_type, exc_value, traceback):
    self.close()

  def close(self) -> None:
    """Waits until all metrics are written, and ends the threads."""
    self._epilogue.shutdown()
    self._follower.close()
    self.progress.close()
    with contextlib.ExitStack() as closing:
      for manager in self.eval_metrics_managers.values():
        closing.callback(manager.close)
      closing.callback(self.train_metrics_manager.close)

  def _get_step_rng(self, step: Any) -> Rng:
    return jax.random.fold_in(self._key, step)

  @property
  def train_state(self) -> train_state_lib.TrainState:
    """The state after the steps so far.

    Raises:
      NonFiniteLossError: the loss of one was not finite; nobody shall save this state.
    """
    self._raise_if_spoilt()
    with self._state_lock:
      return self._state

  @train_state.setter
  def train_state(self, train_state: train_state_lib.TrainState):
    with self._state_lock:
      self._state = train_state
      self._last_stretch, self._spoilt = None, None
      self._guard = HealthGuard(self._summary_dir)

  def _raise_if_spoilt(self) -> None:
    """Waits for the last stretch; raises if its state is no good."""
    if self._last_stretch is not None:
      error = self._last_stretch.exception()
      if isinstance(error, NonFiniteLossError):
        self._spoilt = self._spoilt or error
    if self._spoilt is not None:
      raise self._spoilt

  # ---- Training ----

  def train(
    self,
    batch_iter: Iterator[BatchType],
    num_steps: int,
    start_step: int | None = None,
  ) -> ArrayMapFuture:
    """Runs steps.

    Args:
      batch_iter: yields batches: this host's rows, or arrays over all hosts.
      num_steps: how many steps to run.
      start_step: the state's step, if known, to save asking the devices.

    Returns:
      A future of the metrics of these steps, merged. Its `result` raises
      NonFiniteLossError if one of the last two steps was bad.

    Raises:
      NonFiniteLossError: the loss or gradient of a step was not finite.
      ValueError: a batch does not divide; `num_steps` is not positive; the batches have
        come to an end.
      PreemptionError: what `batch_iter` raises to stop early. As after any exception
        from there, the state is that of the steps done.
    """
    if num_steps < 1:
      raise ValueError(f'num_steps must be at least 1. Got: {num_steps}.')
    if self._last_stretch is not None and self._last_stretch.done():
      self._raise_if_spoilt()
    with self._state_lock:
      if start_step is None:
        start_step = int(np.asarray(self._state.step))
      self.train_metrics_manager.start_duration_timer(block_on=self._state)
      metrics, step = None, start_step
      try:
        for step in range(start_step, start_step + num_steps):
          with jax.profiler.StepTraceAnnotation('train', step_num=step):
            update = self._run_step(step, batch_iter)
          metrics = update if metrics is None else merge_metrics(metrics, update)
      except StopIteration as e:
        raise ValueError(
          f'The training data ended before step {step}, {step - start_step} steps '
          f'into {num_steps}. Training data must repeat.'
        ) from e
      except (PreemptionError, NonFiniteLossError) as e:
        if metrics is not None:
          ended = self._finish(metrics, step, step - start_step)
          concurrent.futures.wait([ended])
          if isinstance(e, PreemptionError):
            ended.result()  # A bad state is not to be saved, which comes next.
        raise
      return self._finish(metrics, start_step + num_steps, num_steps)

  def _run_step(self, step: int, batch_iter: Iterator[BatchType]) -> MetricMapType:
    """Launches a step, and waits for the one but last."""
    run = self._train_program or self._partitioned_train_step
    asked = time.perf_counter()
    batch = next(batch_iter)
    arrived = time.perf_counter()
    batch = put_on_devices(batch, self._partitioner, self._num_microbatches or 1)
    self._state, metrics = run(self._state, batch)
    check = None
    if self.halt_on_nonfinite_loss:
      check = functools.partial(self._guard.check, step, batch, metrics)
    try:
      self._follower.launched(metrics, asked, arrived, check)
    except NonFiniteLossError as e:
      self._spoilt = e
      raise
    return metrics

  def _finish(
    self, metrics: MetricMapType, step: int, num_steps: int
  ) -> concurrent.futures.Future:
    """Starts what comes after a stretch: metrics, the line in the log, the verdict."""
    manager, progress = self.train_metrics_manager, self.progress
    metrics = {
      'timing/seconds': metrics_lib.Time(),
      'timing/steps_per_second': metrics_lib.StepsPerTime.from_model_output(),
      **metrics,
    }
    summary = manager.write_metrics_summary(metrics, step, num_steps)
    pending = self._follower.take_pending()
    idle = self._follower.take_idle_seconds()

    def conclude() -> MetricValueMapType:
      values = summary.result()
      seconds = max(float(values['timing/seconds'].value), 1e-9)
      timing = {
        'timing/uptime': time.monotonic() - self._begun,
        'timing/data_wait_share': min(idle.result() / seconds, 1.0),
      }
      manager.write_scalars(step, timing)
      values = {**values, **{k: clu.values.Scalar(v) for k, v in timing.items()}}
      progress.report(step, values)
      for last_step in pending:
        last_step.result()
      return values

    self._last_stretch = self._epilogue.submit(conclude)
    return self._last_stretch

  def compile_train(self, batch: BatchType) -> None:
    """Compiles the step of training, which otherwise the first step would do.

    Args:
      batch: a batch of the shapes and types to come; its values do not matter.
    """
    begun = time.perf_counter()
    with self._state_lock:
      state = self._state
      self._train_program = self._partitioner.compile(
        self._partitioned_train_step,
        state,
        put_on_devices(batch, self._partitioner, self._num_microbatches or 1),
      )
      self.train_metrics_manager.write_scalar(
        'timing/compilation_seconds', time.perf_counter() - begun, state.step
      )

  # ---- Evaluation ----

  def eval(
    self, batch_iters: Mapping[str, Iterator[BatchType]]
  ) -> Mapping[str, MetricValueMapType]:
    """Evaluates the state on datasets.

    Args:
      batch_iters: batches by dataset name, this host's rows or arrays over all hosts.
        They must end.

    Returns:
      Values of the merged metrics, by dataset and metric.

    Raises:
      ValueError: a dataset has no batch, a name is unknown, or hosts have different
        numbers of batches.
    """
    state = self.train_state
    summaries = {}
    for name, batches in batch_iters.items():
      manager = self._eval_manager(name)
      run = self._eval_programs.get(name, self._partitioned_eval_step)
      manager.start_duration_timer(block_on=state)
      merged, count = None, 0
      in_flight = collections.deque()
      for batch in in_step_with_other_hosts(name, batches):
        metrics = run(state, put_on_devices(batch, self._partitioner))
        merged = metrics if merged is None else merge_metrics(merged, metrics)
        count += 1
        # Evaluation steps do not depend on each other: nothing else holds them back.
        in_flight.append(metrics)
        if len(in_flight) > 2:
          jax.block_until_ready(in_flight.popleft())
      if merged is None:
        raise ValueError(
          f'The evaluation dataset {name!r} gave no batch: it is empty, or smaller '
          'than one batch.'
        )
      summaries[name] = manager.write_metrics_summary(merged, state.step, count)
    return {name: summary.result() for name, summary in summaries.items()}

  def _eval_manager(self, name: str) -> MetricsManager:
    if name not in self.eval_metrics_managers:
      known = sorted(self.eval_metrics_managers)
      raise ValueError(f'The trainer evaluates the datasets {known}. Got: {name!r}.')
    return self.eval_metrics_managers[name]

  def compile_eval(self, batches: Mapping[str, BatchType]) -> None:
    """Compiles the step of evaluation, once for all datasets of the same shapes.

    Args:
      batches: for each dataset a batch of its shapes and types.
    """
    state = self.train_state
    for name, batch in batches.items():
      begun = time.perf_counter()
      leaves, structure = jax.tree.flatten(batch)
      spec = structure, tuple((np.shape(x), jax.numpy.result_type(x)) for x in leaves)
      if spec not in self._programs_by_spec:
        self._programs_by_spec[spec] = self._partitioner.compile(
          self._partitioned_eval_step, state, put_on_devices(batch, self._partitioner)
        )
      self._eval_programs[name] = self._programs_by_spec[spec]
      self._eval_manager(name).write_scalar(
        'timing/compilation_seconds', time.perf_counter() - begun, state.step
      )

  @property
  @abc.abstractmethod
  def _partitioned_train_step(self) -> PartitionedTrainCallable:
    """(state, batch) → (next state, metrics) over the mesh; takes the state's place."""

  @property
  @abc.abstractmethod
  def _partitioned_eval_step(self) -> PartitionedEvalCallable:
    """(state, batch) → metrics over the mesh."""
