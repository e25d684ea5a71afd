"""Metrics on their way from the devices to TensorBoard: timed, off the main thread."""

import concurrent.futures
import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import clu.values
import jax
import numpy as np
from jaxtyping import PyTree

from t5x import metrics as metrics_lib
from t5x.training.trainer_types import (
  MetricMapType,
  MetricValueMapFuture,
  MetricValueMapType,
)

if TYPE_CHECKING:
  from clu import metric_writers


def _host_step(step: Any) -> int:
  """A step as an int, be it a number or an array on devices."""
  return int(np.asarray(step))


def time_when_ready(tree: PyTree) -> float:
  """Waits until all arrays of a tree are computed.

  Arrays that were donated to a later computation meanwhile count as computed.

  Returns:
    The time after that, on the clock of `time.perf_counter`, in seconds.
  """
  try:
    jax.block_until_ready(tree)
  except (RuntimeError, ValueError) as error:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    # A buffer is given away a moment before its array knows: the text knows first.
    donated = 'deleted or donated' in str(error)
    if not donated and not any(leaf.is_deleted() for leaf in leaves):
      raise
  return time.perf_counter()


def _is_ready(tree: PyTree) -> bool:
  """Whether all arrays of a tree are computed, or donated, which counts as that."""
  try:
    return all(
      leaf.is_deleted() or leaf.is_ready()
      for leaf in jax.tree.leaves(tree)
      if isinstance(leaf, jax.Array)
    )
  except RuntimeError:  # Given away between the two questions.
    return True


@contextlib.contextmanager
def _computing_on_the_host() -> Iterator[None]:
  """Keeps small sums out of the accelerator's queue, behind steps already in it."""
  try:
    host = jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS without the CPU.
    yield
    return
  with jax.default_device(host):
    yield


def values_of(metrics: MetricMapType) -> dict[str, clu.values.Value]:
  """Computes metrics whose times and steps are set.

  Returns:
    Values by name; scalars hold a NumPy number.
  """
  with _computing_on_the_host():
    values = {name: metric.compute_value() for name, metric in metrics.items()}
  return {
    name: clu.values.Scalar(np.asarray(value.value)[()])
    if isinstance(value, clu.values.Scalar)
    else value
    for name, value in values.items()
  }


class MetricsManager:
  """Writes the metrics of one source, such as 'train' or one evaluation task.

  The first process writes TensorBoard files; the others compute the same and write
  nothing. Call `close` at the end, so that all of it reaches the disk.

  Attributes:
    summary_dir: where the files go; None writes none.
  """

  def __init__(self, name: str, summary_dir: str | None = None):
    """Opens the writer.

    Args:
      name: folder under `summary_dir`.
      summary_dir: folder of the run; None writes nothing.
    """
    self.summary_dir = os.path.join(summary_dir, name) if summary_dir else None
    self._writer = self._open_writer()
    self._writing = threading.Lock()
    # Two threads, so that a slow disk does not put the clock off.
    self._clock = concurrent.futures.ThreadPoolExecutor(1, f'clock of {name}')
    self._summaries = concurrent.futures.ThreadPoolExecutor(1, f'summaries of {name}')
    self._started: concurrent.futures.Future[float] | None = None
    self._last_time = -math.inf  # Of the clock's thread.
    self._unseen: list[concurrent.futures.Future] = []

  def _open_writer(self) -> 'metric_writers.MetricWriter':
    # Here and not above: clu's writers import TensorFlow, which takes seconds.
    from clu import metric_writers

    if self.summary_dir is None or jax.process_index() != 0:
      return metric_writers.MultiWriter([])
    return metric_writers.AsyncMultiWriter(
      [metric_writers.SummaryWriter(self.summary_dir)]
    )

  @property
  def summary_writer(self) -> 'metric_writers.MetricWriter':
    """The writer, for other things than metrics.

    Raises:
      ValueError: the manager is closed.
    """
    if self._writer is None:
      raise ValueError('This MetricsManager is closed: nothing more can be written.')
    return self._writer

  def write_scalar(self, key: str, val: Any, step: Any) -> None:
    """Writes one number; see `write_scalars`."""
    self.write_scalars(step, {key: val})

  def write_scalars(self, step: Any, scalars: Mapping[str, Any]) -> None:
    """Writes numbers, from any thread.

    Args:
      step: the step they belong to.
      scalars: numbers by name.
    """
    step = _host_step(step)
    with self._writing:
      self.summary_writer.write_scalars(step, scalars)

  def start_duration_timer(self, block_on: PyTree = ()) -> None:
    """Starts the clock once `block_on` is computed; does not wait for that."""
    self._started = self._clock.submit(self._start, time.perf_counter(), block_on)

  def _start(self, called: float, block_on: PyTree) -> float:
    """The time from which steps count; runs on the clock's thread.

    That thread may come to it when the first steps are done already. What is computed
    by then was so at the call, or became so at the end of the stretch before.
    """
    if _is_ready(block_on):
      return max(called, self._last_time)
    return self._take_time(block_on)

  def _take_time(self, tree: PyTree) -> float:
    self._last_time = time_when_ready(tree)
    return self._last_time

  def write_metrics_summary(
    self, metrics: MetricMapType, step: Any, num_steps: int
  ) -> MetricValueMapFuture:
    """Writes what was summed over steps, once the devices are done with it.

    The duration runs from the start of the clock until `metrics` are computed; it is
    set on the metrics that need one.

    Args:
      metrics: sums by name, on devices.
      step: the step they belong to.
      num_steps: the steps they cover.

    Returns:
      A future of the values by name.

    Raises:
      ValueError: the clock was not started.
    """
    if self._started is None:
      raise ValueError('Call start_duration_timer before write_metrics_summary.')
    step, started, self._started = _host_step(step), self._started, None
    # Handed over here: the clock's thread takes times in the order of the calls.
    ended = self._clock.submit(self._take_time, metrics)

    def summarize() -> MetricValueMapType:
      duration = ended.result() - started.result()
      summed = metrics_lib.set_time_metrics_duration(jax.device_get(metrics), duration)
      values = values_of(metrics_lib.set_step_metrics_num_steps(summed, num_steps))
      self._write_values(step, values)
      return values

    self._raise_unseen()
    summary = self._summaries.submit(summarize)
    self._unseen.append(summary)
    return summary

  def _write_values(self, step: int, values: MetricValueMapType) -> None:
    from clu import metric_writers

    with self._writing:
      metric_writers.write_values(self.summary_writer, step, values)

  def _raise_unseen(self) -> None:
    """Raises the error of a summary whose future nobody may have asked."""
    done = [summary for summary in self._unseen if summary.done()]
    self._unseen = [summary for summary in self._unseen if not summary.done()]
    for summary in done:
      summary.result()

  def flush(self) -> None:
    """Waits until all is written."""
    concurrent.futures.wait(self._unseen)
    self._raise_unseen()
    if self._writer is not None:
      self._writer.flush()

  def close(self) -> None:
    """Waits until all is written, and closes the files. More calls do nothing."""
    self._summaries.shutdown()
    self._clock.shutdown()
    if self._writer is not None:
      self._writer.close()
      self._writer = None
    self._raise_unseen()
