"""Training and evaluation of a model over a mesh.

`Trainer.train` dispatches steps ahead of the devices, and checks and reports them once
they are done. A step's random key depends only on the trainer's key and the step, so a
resumed run is identical to an uninterrupted one.

A custom trainer subclasses `BaseTrainer` and builds `_partitioned_train_step` and
`_partitioned_eval_step` from the functions below.
"""

import abc
import collections
import enum
import functools
import io
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import clu.metrics
import clu.values
import flax.core
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int, PyTree

from t5x import metrics as metrics_lib
from t5x import models, partitioning
from t5x import train_state as train_state_lib

BatchType = Mapping[str, np.ndarray | jax.Array]
Rng = jax.Array
MetricMapType = Mapping[str, clu.metrics.Metric]
MetricValueMapType = Mapping[str, clu.values.Value]
ModelWeights = PyTree
PartitionSpec = partitioning.PartitionSpec
TrainState = train_state_lib.TrainState
LearningRateCallable = Callable[[Int[Array, '']], Float[Array, '']]

# Steps dispatched to the devices but not yet checked.
_STEPS_IN_FLIGHT = 2

# A finite loss may have non-finite gradients, which the next loss would only show once
# the batch at fault is gone.
_MUST_BE_FINITE = ('loss', 'weight_gradient_norm')


class PreemptionError(Exception):
  """Asks `train` to stop between two steps, to save and resume later."""


class NonFiniteLossError(FloatingPointError):
  """The loss or gradient of the step after `step` updates is infinite or NaN."""

  def __init__(self, step: int, batch_path: str | None):
    self.step, self.batch_path = step, batch_path
    saved = f'saved in {batch_path}' if batch_path else 'not saved'
    super().__init__(
      f'The loss or the gradient of step {step} is not finite; its batch is {saved}. '
      'Resume from the last checkpoint with a lower learning rate, a longer warm-up or '
      'gradient clipping, or inspect the batch.'
    )


def set_hardware_rng_ops() -> None:
  """Makes new keys use XLA's RngBitGenerator, fast on TPU.

  Its numbers depend on the sharding and the hardware.
  """
  jax.config.update('jax_default_prng_impl', 'unsafe_rbg')


# ---- The step ----


def _merge(a: PyTree, b: PyTree) -> PyTree:
  return jax.tree.map(
    lambda left, right: left.merge(right), a, b, is_leaf=metrics_lib.is_metric_obj
  )


# Merges two trees of metrics of the same structure on the devices.
merge_metrics = jax.jit(_merge)


def _global_norm(tree: PyTree) -> Float[Array, '']:
  return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))


def _per_step(value: Float[Array, '']) -> metrics_lib.AveragePerStep:
  return metrics_lib.AveragePerStep.from_model_output(value)


class WeightMetricsComputer:
  """Metrics of every parameter; each costs a pass over the weights."""

  def compute_metrics(
    self,
    gradients: ModelWeights,
    old_train_state: TrainState,
    new_train_state: TrainState,
  ) -> dict[str, clu.metrics.Metric]:
    """Returns averages per step, named `<metric>/<parameter>`.

    `weight_rms` and `weight_max` (the largest absolute value) are of the new weights,
    `weight_update_divided_by_weight_rms` is over weights that were not 0, and
    `weight_gradient_norm` is over all parameters.
    """

    def by_name(tree):
      flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(tree), sep='/')
      return {name: jnp.asarray(x, jnp.float32) for name, x in flat.items()}

    def rms(x):
      return jnp.sqrt(jnp.mean(jnp.square(x)))

    old, new = by_name(old_train_state.params), by_name(new_train_state.params)
    values = {'weight_gradient_norm': _global_norm(gradients)}
    for name, gradient in by_name(gradients).items():
      values[f'weight_gradient_rms/{name}'] = rms(gradient)
    for name, weight in new.items():
      before, update = old[name], weight - old[name]
      values[f'weight_rms/{name}'] = rms(weight)
      values[f'weight_max/{name}'] = jnp.max(jnp.abs(weight))
      values[f'weight_update_rms/{name}'] = rms(update)
      # Biases start at 0, to which no change is relative.
      present = before != 0
      relative = jnp.where(present, update / jnp.where(present, before, 1), 0)
      count = jnp.maximum(jnp.sum(present), 1)
      values[f'weight_update_divided_by_weight_rms/{name}'] = jnp.sqrt(
        jnp.sum(jnp.square(relative)) / count
      )
    return {name: _per_step(value) for name, value in values.items()}


def _split_microbatches(
  batch: BatchType, num_microbatches: int, data_partition_spec: PartitionSpec
) -> BatchType:
  """Puts row i into microbatch i mod n: [rows, …] → [n, rows / n, …].

  Rows stay on their devices; blocks of consecutive rows would have to move.
  """

  def deal(x):
    dealt = x.reshape(-1, num_microbatches, *x.shape[1:])
    return partitioning.with_sharding_constraint(
      dealt.swapaxes(0, 1), PartitionSpec(None, *data_partition_spec)
    )

  return jax.tree.map(deal, batch)


def accumulate_grads_microbatched(
  model: Any,
  train_state: TrainState,
  batch: BatchType,
  dropout_rng: Rng,
  num_microbatches: int | None,
  data_partition_spec: PartitionSpec = PartitionSpec('data'),
) -> tuple[ModelWeights, MetricMapType, flax.core.FrozenDict | None]:
  """Computes gradients and metrics of a batch, as a whole or summed over microbatches.

  Both are equal if the loss is a sum over examples divided by a constant.

  Args:
    model: has `loss_fn(params, batch, dropout_rng)`. Mutable collections of the state
      are its fourth argument and are returned with the metrics.
    batch: arrays of [rows, ...].
    num_microbatches: None or 1 takes the batch as a whole.

  Returns:
    (gradients, metrics, mutable collections or None). Gradients of microbatches are
    summed in float32.
  """
  gradient_of = jax.value_and_grad(model.loss_fn, has_aux=True)

  def run(rows, rng, mutables):
    if mutables is None:
      (_, metrics), gradients = gradient_of(train_state.params, rows, rng)
    else:
      (_, (metrics, mutables)), gradients = gradient_of(
        train_state.params, rows, rng, mutables
      )
    return gradients, metrics, mutables

  mutables = train_state.flax_mutables or None
  if num_microbatches is None or num_microbatches <= 1:
    return run(batch, dropout_rng, mutables)

  def add(carry, inputs):
    total, mutables = carry
    gradients, metrics, mutables = run(*inputs, mutables)
    return (jax.tree.map(jnp.add, total, gradients), mutables), metrics

  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), train_state.params)
  microbatches = _split_microbatches(batch, num_microbatches, data_partition_spec)
  rngs = jax.random.split(dropout_rng, num_microbatches)
  (gradients, mutables), stacked = jax.lax.scan(
    add, (zeros, mutables), (microbatches, rngs)
  )
  return gradients, _merge_stacked(stacked), mutables


def _merge_stacked(stacked: PyTree) -> PyTree:
  """Merges metrics whose leaves are [microbatches, ...], in order."""
  first = jax.tree.map(lambda x: x[0], stacked)
  rest = jax.tree.map(lambda x: x[1:], stacked)

  def merge(total, one):
    # A merge may promote an int count to float32; the carry must keep its types.
    merged = _merge(total, one)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), merged, total), None

  return jax.lax.scan(merge, first, rest)[0]


def apply_grads(
  train_state: TrainState,
  grad_accum: ModelWeights,
  metrics: MetricMapType,
  learning_rate: Float[Array, ''] | float,
  weight_metrics_computer: WeightMetricsComputer | None,
  other_state_variables: Mapping[str, Any] | None = None,
) -> tuple[TrainState, MetricMapType]:
  """Returns the updated state, and the metrics with learning rate and norms added.

  Args:
    learning_rate: for optimizers that do not have their own, and for the report.
    other_state_variables: more fields of the new state, such as `flax_mutables`.
  """
  updated = train_state.apply_gradient(
    grad_accum, learning_rate=learning_rate, **(other_state_variables or {})
  )
  rate = jnp.reshape(jnp.asarray(learning_rate), (1,))
  metrics = {
    **metrics,
    'learning_rate': clu.metrics.Average.from_model_output(rate),
    'learning_rate/current': clu.metrics.LastValue.from_model_output(rate),
    'weight_norm': _per_step(_global_norm(train_state.params)),
    'weight_gradient_norm': _per_step(_global_norm(grad_accum)),
  }
  if weight_metrics_computer is not None:
    metrics |= weight_metrics_computer.compute_metrics(grad_accum, train_state, updated)
  return updated, metrics


def train_with_lr(
  train_state: TrainState,
  batch: BatchType,
  learning_rate: Float[Array, ''] | float,
  dropout_rng: Rng,
  model: Any,
  num_microbatches: int | None,
  weight_metrics_computer: WeightMetricsComputer | None = None,
  data_partition_spec: PartitionSpec = PartitionSpec('data'),
) -> tuple[TrainState, MetricMapType]:
  """Runs one step: gradients, update, metrics."""
  gradients, metrics, mutables = accumulate_grads_microbatched(
    model, train_state, batch, dropout_rng, num_microbatches, data_partition_spec
  )
  return apply_grads(
    train_state,
    gradients,
    metrics,
    learning_rate,
    weight_metrics_computer,
    other_state_variables={'flax_mutables': mutables} if mutables else None,
  )


def eval_step(model: Any, train_state: TrainState, batch: BatchType) -> MetricMapType:
  """Computes metrics of a batch without dropout, by `model.eval_fn(params, batch)`.

  Mutable collections of the state are a third argument of `eval_fn`.
  """
  mutables = (train_state.flax_mutables,) if train_state.flax_mutables else ()
  _, metrics = model.eval_fn(train_state.params, batch, *mutables)
  return metrics


# ---- Metrics ----


class MetricsManager:
  """Computes metrics on all processes and writes them for TensorBoard on the first."""

  def __init__(self, name: str, summary_dir: str | None = None):
    """Opens a writer in `summary_dir/name`; None writes nothing."""
    # Not at the top: imports TensorFlow, which takes seconds.
    from clu import metric_writers

    self.summary_dir = os.path.join(summary_dir, name) if summary_dir else None
    self.summary_writer = metric_writers.MultiWriter([])
    if self.summary_dir and jax.process_index() == 0:
      self.summary_writer = metric_writers.AsyncMultiWriter(
        [metric_writers.SummaryWriter(self.summary_dir)]
      )

  def write_scalar(self, key: str, val: Any, step: Any) -> None:
    self.write_scalars(step, {key: val})

  def write_scalars(self, step: Any, scalars: Mapping[str, Any]) -> None:
    """Writes numbers by name."""
    self.summary_writer.write_scalars(int(np.asarray(step)), scalars)

  def write_metrics_summary(
    self, metrics: MetricMapType, step: Any, num_steps: int, seconds: float
  ) -> MetricValueMapType:
    """Writes and returns the values of metrics merged over `num_steps` steps.

    Args:
      seconds: the duration of these steps.
    """
    from clu import metric_writers

    metrics = metrics_lib.set_time_metrics_duration(jax.device_get(metrics), seconds)
    metrics = metrics_lib.set_step_metrics_num_steps(metrics, num_steps)
    # On an accelerator they would queue behind the steps dispatched ahead.
    try:
      host = jax.local_devices(backend='cpu')[0]
    except RuntimeError:  # JAX_PLATFORMS excludes the CPU.
      host = None
    with jax.default_device(host):
      values = {name: metric.compute_value() for name, metric in metrics.items()}
    for name, value in values.items():
      if isinstance(value, clu.values.Scalar):
        values[name] = clu.values.Scalar(np.asarray(value.value)[()])
    metric_writers.write_values(self.summary_writer, int(np.asarray(step)), values)
    return values

  def flush(self) -> None:
    self.summary_writer.flush()

  def close(self) -> None:
    self.summary_writer.close()


# ---- Trainers ----


class _Interval:
  """The steps of one `train` call; a future of their merged metrics."""

  def __init__(self, first_step: int, settle: Callable[[], None]):
    self.first_step, self.num_steps = first_step, 0
    self.begun = time.perf_counter()
    self.waited = 0.0
    self.metrics: MetricMapType | None = None
    self.values: MetricValueMapType | None = None
    self._settle = settle

  def result(self) -> MetricValueMapType:
    """Waits for the devices and returns the values of the metrics."""
    if self.values is None:
      self._settle()
    return self.values


class BaseTrainer(abc.ABC):
  """Trains and evaluates a state. Call `close` (or use `with`) at the end.

  Attributes:
    train_metrics_manager: the `MetricsManager` of training.
    eval_metrics_managers: one per evaluation dataset, by name.
    stop_training: set by the training script when an action asks to stop.
    halt_on_nonfinite_loss: whether `train` stops at a non-finite loss or gradient.
      Unset it for optimizers that skip such updates.
    on_step: called after each finished step.
    on_report: called with (step, values of metrics) after each interval.
  """

  def __init__(
    self,
    model: models.BaseModel,
    train_state: TrainState,
    partitioner: partitioning.BasePartitioner,
    eval_names: Iterable[str],
    summary_dir: str | None,
    train_state_axes: Any,
    rng: Rng,
  ):
    """Creates a trainer.

    Args:
      train_state: on the devices; the first step donates its buffers.
      eval_names: names of the datasets for `eval`.
      summary_dir: folder for TensorBoard files and for the batch of a non-finite loss;
        None writes nothing.
      train_state_axes: mesh axes of the state.
      rng: key from which the keys of all steps are derived.
    """
    self._model = model
    self._partitioner = partitioner
    self._train_state_axes = train_state_axes
    self._key = rng
    self._summary_dir = summary_dir
    self._state = train_state
    self._train_program: Callable[..., Any] | None = None
    self._eval_programs: dict[str, Callable[..., Any]] = {}
    self._programs_by_spec: dict[Any, Callable[..., Any]] = {}
    # Checks and reports of steps that the devices may not have finished.
    self._pending: collections.deque[Callable[[], None]] = collections.deque()
    self._failure: NonFiniteLossError | None = None
    self._created = time.monotonic()
    self._step_ended = self._interval_ended = 0.0
    self.halt_on_nonfinite_loss = True
    self.stop_training = False
    self.on_step: Callable[[], None] = lambda: None
    self.on_report: Callable[[int, MetricValueMapType], None] = lambda *_: None
    self.train_metrics_manager = MetricsManager('train', summary_dir)
    self.eval_metrics_managers = {
      # File names have at most 255 bytes, with the suffix that the writer adds.
      name: MetricsManager(f'training_eval/{name:.113}', summary_dir)
      for name in eval_names
    }

  def __enter__(self):
    return self

  def __exit__(self, exc_type, exc_value, traceback):
    self.close()

  def close(self) -> None:
    """Waits for the devices and until all metrics are written."""
    try:
      if self._failure is None:
        self._settle()
    finally:
      for manager in (self.train_metrics_manager, *self.eval_metrics_managers.values()):
        manager.close()

  def _get_step_rng(self, step: Any) -> Rng:
    return jax.random.fold_in(self._key, step)

  @property
  def train_state(self) -> TrainState:
    """The state after all steps; NonFiniteLossError if one of them was non-finite."""
    self._settle()
    return self._state

  @train_state.setter
  def train_state(self, train_state: TrainState):
    self._state = train_state
    self._pending.clear()
    self._failure = None

  def _on_devices(self, batch: BatchType) -> BatchType:
    """Shards this host's rows over the devices; arrays already there are kept."""
    mesh = self._partitioner.mesh
    by_rows = jax.sharding.NamedSharding(mesh, self._partitioner.data_partition_spec)
    replicated = jax.sharding.NamedSharding(mesh, PartitionSpec())

    def place(x):
      sharding = by_rows if np.ndim(x) else replicated
      if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim):
        return x
      return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(place, batch)

  # ---- Training ----

  def train(
    self,
    batch_iter: Iterator[BatchType],
    num_steps: int,
    start_step: int | None = None,
  ) -> _Interval:
    """Runs steps.

    Args:
      batch_iter: yields batches: this host's rows, or arrays over all hosts. If it
        raises (PreemptionError, say), the state is that of the steps done.
      start_step: the state's step, if known, which saves a wait for the devices.

    Returns:
      A future of the merged metrics of these steps. Its `result` raises
      NonFiniteLossError if one of the last steps was non-finite.

    Raises:
      NonFiniteLossError: the loss or gradient of a step was non-finite.
      ValueError: the batches ended.
    """
    if num_steps < 1:
      raise ValueError(f'num_steps must be at least 1. Got: {num_steps}.')
    if start_step is None:
      start_step = int(np.asarray(self._state.step))
    interval = _Interval(start_step, self._settle)
    try:
      for step in range(start_step, start_step + num_steps):
        with jax.profiler.StepTraceAnnotation('train', step_num=step):
          self._run_step(step, batch_iter, interval)
    except StopIteration as e:
      raise ValueError(
        f'The training data ended before step {step}. Training data must repeat.'
      ) from e
    finally:
      if interval.num_steps:
        self._pending.append(functools.partial(self._report, interval))
    return interval

  def _run_step(
    self, step: int, batch_iter: Iterator[BatchType], interval: _Interval
  ) -> None:
    """Dispatches a step, then waits for an earlier one and checks it."""
    self._settle(_STEPS_IN_FLIGHT)
    run = self._train_program or self._partitioned_train_step
    asked = time.perf_counter()
    batch = next(batch_iter)
    # A ready state: the devices ran out of work and waited for this batch.
    is_ready = getattr(self._state.step, 'is_ready', lambda: True)
    if is_ready():
      interval.waited += time.perf_counter() - asked
    batch = self._on_devices(batch)
    self._state, metrics = run(self._state, batch)
    if interval.metrics is None:
      interval.metrics = metrics
    else:
      interval.metrics = merge_metrics(interval.metrics, metrics)
    interval.num_steps += 1
    self._pending.append(functools.partial(self._check, step, batch, metrics))

  def _settle(self, in_flight: int = 0) -> None:
    """Checks and reports what was dispatched, except for the last `in_flight`."""
    if self._failure is not None:
      raise self._failure
    while len(self._pending) > in_flight:
      self._pending.popleft()()

  def _check(self, step: int, batch: BatchType, metrics: MetricMapType) -> None:
    """Waits for a step; raises if its loss or gradient is not finite."""
    jax.block_until_ready(metrics)
    self._step_ended = time.perf_counter()
    self.on_step()
    if not self.halt_on_nonfinite_loss:
      return
    watched = [metrics[name] for name in _MUST_BE_FINITE if name in metrics]
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(watched))):
      # Later steps are non-finite as a consequence.
      self._pending.clear()
      path = _save_batch(batch, step, self._summary_dir) if self._summary_dir else None
      self._failure = NonFiniteLossError(step, path)
      raise self._failure

  def _report(self, interval: _Interval) -> None:
    """Writes the metrics of an interval whose steps are finished."""
    step = interval.first_step + interval.num_steps
    # It may have begun before the devices finished the previous interval.
    seconds = self._step_ended - max(interval.begun, self._interval_ended)
    self._interval_ended = self._step_ended
    metrics = {
      'timing/seconds': metrics_lib.Time(),
      'timing/steps_per_second': metrics_lib.StepsPerTime.from_model_output(),
      **interval.metrics,
    }
    manager = self.train_metrics_manager
    values = manager.write_metrics_summary(metrics, step, interval.num_steps, seconds)
    timing = {
      'timing/uptime': time.monotonic() - self._created,
      'timing/data_wait_share': min(interval.waited / max(seconds, 1e-9), 1.0),
    }
    manager.write_scalars(step, timing)
    interval.values = {
      **values,
      **{name: clu.values.Scalar(value) for name, value in timing.items()},
    }
    self.on_report(step, interval.values)

  def compile_train(self, batch: BatchType) -> None:
    """Compiles the training step for the shapes and types of a batch."""
    begun = time.perf_counter()
    self._train_program = self._partitioner.compile(
      self._partitioned_train_step, self._state, self._on_devices(batch)
    )
    self.train_metrics_manager.write_scalar(
      'timing/compilation_seconds', time.perf_counter() - begun, self._state.step
    )

  # ---- Evaluation ----

  def eval(
    self, batch_iters: Mapping[str, Iterable[BatchType]]
  ) -> Mapping[str, MetricValueMapType]:
    """Evaluates the state on finite datasets.

    Args:
      batch_iters: batches by dataset: this host's rows, or arrays over all hosts.

    Returns:
      {dataset: {metric: value}}.

    Raises:
      ValueError: a dataset is empty, or hosts have different numbers of batches.
    """
    state = self.train_state
    found = {}
    for name, batches in batch_iters.items():
      run = self._eval_programs.get(name, self._partitioned_eval_step)
      begun = time.perf_counter()
      merged, previous, count = None, None, 0
      for batch in _in_step_with_other_hosts(name, batches):
        metrics = run(state, self._on_devices(batch))
        merged = metrics if merged is None else merge_metrics(merged, metrics)
        count += 1
        # Keeps the loop from filling the devices' memory with batches.
        jax.block_until_ready(previous)
        previous = metrics
      if merged is None:
        raise ValueError(
          f'The evaluation dataset {name!r} has no batch: it is empty or smaller than '
          'one batch.'
        )
      jax.block_until_ready(merged)
      found[name] = self.eval_metrics_managers[name].write_metrics_summary(
        merged, state.step, count, time.perf_counter() - begun
      )
    return found

  def compile_eval(self, batches: Mapping[str, BatchType]) -> None:
    """Compiles the evaluation step for a batch of each dataset, once per shape."""
    state = self.train_state
    for name, batch in batches.items():
      begun = time.perf_counter()
      leaves, structure = jax.tree.flatten(batch)
      spec = structure, tuple((np.shape(x), jnp.result_type(x)) for x in leaves)
      if spec not in self._programs_by_spec:
        self._programs_by_spec[spec] = self._partitioner.compile(
          self._partitioned_eval_step, state, self._on_devices(batch)
        )
        self.eval_metrics_managers[name].write_scalar(
          'timing/compilation_seconds', time.perf_counter() - begun, state.step
        )
      self._eval_programs[name] = self._programs_by_spec[spec]

  @property
  @abc.abstractmethod
  def _partitioned_train_step(self) -> Callable[..., Any]:
    """(state, batch) → (next state, metrics); donates the state."""

  @property
  @abc.abstractmethod
  def _partitioned_eval_step(self) -> Callable[..., Any]:
    """(state, batch) → metrics."""


BaseTrainerConstructor = Callable[..., BaseTrainer]


def _in_step_with_other_hosts(
  name: str, batches: Iterable[BatchType]
) -> Iterator[BatchType]:
  """Yields batches; ValueError if hosts have different numbers of them.

  A host with one more would wait forever for the others.
  """
  batches = iter(batches)
  while True:
    batch = next(batches, None)
    if jax.process_count() > 1:
      have = multihost_utils.process_allgather(np.array(batch is not None))
      if have.any() and not have.all():
        raise ValueError(
          f'The hosts have different numbers of batches of {name!r}: {have.sum()} of '
          f'{have.size} have another one. Check for an empty or uneven shard.'
        )
    if batch is None:
      return
    yield batch


def _save_batch(batch: PyTree, step: int, folder: str) -> str | None:
  """Writes this process's rows of a batch to an .npz file, by feature name."""
  suffix = f'_process_{jax.process_index()}' if jax.process_count() > 1 else ''
  path = epath.Path(folder) / f'nonfinite_step_{step}{suffix}.npz'

  def own_rows(array):
    if array.is_fully_addressable or array.is_fully_replicated:
      return np.asarray(array)
    shards = {s.index[0].start or 0: s.data for s in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

  flat, _ = jax.tree_util.tree_flatten_with_path(batch)
  named = {
    jax.tree_util.keystr(where, simple=True, separator='/') or 'batch': own_rows(x)
    for where, x in flat
  }
  content = io.BytesIO()
  np.savez(content, **named)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.getvalue())
  except OSError as e:  # A failed dump must not hide the non-finite loss.
    logging.error('The batch of step %d could not be saved in %s: %s', step, path, e)
    return None
  return str(path)


class Trainer(BaseTrainer):
  """T5X's trainer: one model, one loss, optionally in microbatches."""

  def __init__(
    self,
    model: models.BaseModel,
    train_state: TrainState,
    partitioner: partitioning.BasePartitioner,
    eval_names: Iterable[str],
    summary_dir: str | None,
    train_state_axes: Any,
    rng: Rng,
    learning_rate_fn: LearningRateCallable,
    num_microbatches: int | None,
    weight_metrics_computer: WeightMetricsComputer | None = None,
  ):
    """Creates a trainer; see `BaseTrainer` for the other arguments.

    Args:
      learning_rate_fn: the schedule, a function of the step. Adafactor follows it;
        optax optimizers have their own, to which bind the same: here it is reported.
      num_microbatches: how many parts to compute a batch in; None: as a whole.
      weight_metrics_computer: adds metrics of every parameter.
    """
    super().__init__(
      model, train_state, partitioner, eval_names, summary_dir, train_state_axes, rng
    )
    self._learning_rate_fn = learning_rate_fn
    self._num_microbatches = num_microbatches
    self._weight_metrics_computer = weight_metrics_computer

  @functools.cached_property
  def _partitioned_train_step(self) -> Callable[..., Any]:
    partitioner, axes = self._partitioner, self._train_state_axes
    num_microbatches, devices = self._num_microbatches or 1, partitioner.data_mesh_size

    def step(train_state, batch):
      for name, x in batch.items():
        if x.ndim and x.shape[0] % (num_microbatches * devices):
          raise ValueError(
            'The batch size must be a multiple of microbatches times data partitions. '
            f'Got: {x.shape[0]} rows of {name!r}, {num_microbatches} microbatches, '
            f'{devices} data partitions.'
          )
      return train_with_lr(
        train_state,
        batch,
        learning_rate=self._learning_rate_fn(train_state.step),
        dropout_rng=self._get_step_rng(train_state.step),
        model=self._model,
        num_microbatches=self._num_microbatches,
        weight_metrics_computer=self._weight_metrics_computer,
        data_partition_spec=partitioner.data_partition_spec,
      )

    return partitioner.partition(
      step,
      in_axis_resources=(axes, partitioner.data_partition_spec),
      out_axis_resources=(axes, None),
      donate_argnums=(0,),
    )

  @functools.cached_property
  def _partitioned_eval_step(self) -> Callable[..., Any]:
    return self._partitioner.partition(
      functools.partial(eval_step, self._model),
      in_axis_resources=(self._train_state_axes, self._partitioner.data_partition_spec),
      out_axis_resources=None,
    )


# ---- Actions ----


@enum.unique
class ActionMode(enum.Enum):
  """When an action runs: after an interval of training or an evaluation."""

  TRAIN = 1
  TRAIN_EVAL = 2
  INFER_EVAL = 3


class BaseAction(abc.ABC):
  """Decides from metrics whether training should stop."""

  @abc.abstractmethod
  def run(
    self,
    train_state: TrainState,
    metrics_by_task: Mapping[str, MetricValueMapType],
  ) -> bool:
    """Returns whether training should stop; called on process 0.

    Args:
      metrics_by_task: {task: {metric: value}}; the task of training is 'train'.
    """

  def recall(self, recorded: Callable[[str, str], Sequence[float]]) -> None:
    """Restores what a resumed run knew; called on process 0 before training.

    T5X lacks this method.

    Args:
      recorded: (task, metric) → all values reported before, in order.
    """

  def close(self) -> None:
    """Called on every process after training. T5X lacks this method."""


ActionMapType = Mapping[ActionMode, Sequence[BaseAction]]


def _find_number(
  action: BaseAction,
  metrics_by_task: Mapping[str, MetricValueMapType],
  task: str,
  metric: str,
) -> float | None:
  """Returns the value an action monitors; None, with a warning, if not a number."""
  value = metrics_by_task.get(task, {}).get(metric)
  number = None if value is None else metrics_lib.as_number(value)
  if number is None:
    known = {name: sorted(metrics) for name, metrics in metrics_by_task.items()}
    logging.warning(
      '%s has no effect: no number %r of %r found. Metrics by task: %s.',
      type(action).__name__,
      metric,
      task,
      known,
    )
  return number


class EarlyStoppingAction(BaseAction):
  """Stops training if none of the last `patience` values improved on the previous."""

  def __init__(
    self,
    metric: tuple[str, str],
    mode: str,
    patience: int = 3,
    atol: float = 0.0,
    rtol: float = 0.0,
  ):
    """Sets the metric to monitor.

    Args:
      metric: (task, metric).
      mode: 'min' if lower is better, 'max' if higher is.
      patience: how many values to compare, at least 2.
      atol: an improvement is more than `atol + rtol * |previous value|`.
      rtol: see `atol`.
    """
    if mode not in ('min', 'max'):
      raise ValueError(f"mode must be 'min' or 'max'. Got: {mode!r}.")
    if patience < 2 or atol < 0 or rtol < 0:
      raise ValueError(
        'patience must be at least 2, and atol and rtol at least 0. '
        f'Got: {patience}, {atol} and {rtol}.'
      )
    self._task, self._metric = metric
    self._sign = 1 if mode == 'min' else -1
    self._patience = patience
    self._atol, self._rtol = atol, rtol
    self._recent: list[float] = []

  def recall(self, recorded: Callable[[str, str], Sequence[float]]) -> None:
    self._recent = list(recorded(self._task, self._metric))[-self._patience :]

  def run(
    self,
    train_state: TrainState,
    metrics_by_task: Mapping[str, MetricValueMapType],
  ) -> bool:
    value = _find_number(self, metrics_by_task, self._task, self._metric)
    if value is None:
      return False
    self._recent = [*self._recent, value][-self._patience :]
    improved = any(  # Never true for NaN.
      self._sign * (before - after) > self._atol + self._rtol * abs(before)
      for before, after in zip(self._recent, self._recent[1:])
    )
    if improved or len(self._recent) < self._patience:
      return False
    logging.warning(
      'Stopping: %s of %s has not improved: %s.',
      self._metric,
      self._task,
      ', '.join(f'{v:g}' for v in self._recent),
    )
    return True


class TerminateOnNanAction(BaseAction):
  """Stops training if a metric is not finite, mostly one of an evaluation.

  At a non-finite training loss the trainer stops by itself.
  """

  def __init__(self, task: str, metric: str = 'loss'):
    """Sets the metric to monitor."""
    self._task, self._metric = task, metric

  def run(
    self,
    train_state: TrainState,
    metrics_by_task: Mapping[str, MetricValueMapType],
  ) -> bool:
    value = _find_number(self, metrics_by_task, self._task, self._metric)
    if value is None or math.isfinite(value):
      return False
    logging.warning('Stopping: %s of %s is %g.', self._metric, self._task, value)
    return True
