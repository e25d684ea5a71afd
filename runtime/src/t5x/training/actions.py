"""What may end a training run early: actions on the metrics after each stage.

Reached as names of `trainer`.
"""

import abc
import enum
import math
import numbers
from collections.abc import Callable, Mapping, Sequence

import clu.values
import numpy as np
from absl import logging

from t5x import train_state as train_state_lib
from t5x.training.trainer_types import MetricValueMapType

MetricsByTask = Mapping[str, MetricValueMapType]


@enum.unique
class ActionMode(enum.Enum):
  """After what an action runs: a stretch of training, or one of the evaluations."""

  TRAIN = 1
  TRAIN_EVAL = 2
  INFER_EVAL = 3


class BaseAction(abc.ABC):
  """Looks at metrics and says whether training should end."""

  @abc.abstractmethod
  def run(
    self, train_state: train_state_lib.TrainState, metrics_by_task: MetricsByTask
  ) -> bool:
    """Runs the action.

    Args:
      train_state: the current state.
      metrics_by_task: {task: {metric: value}}; training metrics are under 'train'.

    Returns:
      Whether training should end.
    """

  def recall(self, recorded: Callable[[str, str], Sequence[float]]) -> None:
    """Called when training begins, so that a run that goes on decides as if in one go.

    On process 0 only, as `run`. T5X has no such call.

    Args:
      recorded: from task and metric to the values, in single precision, that the run
        has seen up to now, in their order.
    """

  def close(self) -> None:
    """Called on every process when training has ended. T5X has no such call."""


ActionMapType = Mapping[ActionMode, Sequence[BaseAction]]


def _number(
  action: BaseAction, metrics_by_task: MetricsByTask, task: str, metric: str
) -> float | None:
  """The value that an action follows, or None with a warning that says why not."""
  kind = type(action).__name__
  for what, name, known in (
    ('task', task, metrics_by_task),
    ('metric', metric, metrics_by_task.get(task, {})),
  ):
    if name not in known:
      logging.warning(
          '%s does nothing: there is no %s %r. There are: %s.',
          kind, what, name, ', '.join(sorted(known)),
      )  # fmt: skip
      return None
  value = metrics_by_task[task][metric]
  if isinstance(value, clu.values.Scalar):
    return float(value.value)
  if isinstance(value, numbers.Real):  # NumPy's numbers are, too.
    return float(value)
  logging.warning(
      '%s does nothing: %r of %r is no scalar but %s.',
      kind, metric, task, type(value).__name__,
  )  # fmt: skip
  return None


class EarlyStoppingAction(BaseAction):
  """Ends training when a metric has stopped getting better.

  The last `patience` values are looked at: if none of them is better than the one just
  before it, training ends.
  """

  def __init__(
    self,
    metric: tuple[str, str],
    mode: str,
    patience: int = 3,
    atol: float = 0.0,
    rtol: float = 0.0,
  ):
    """Says what to follow.

    Args:
      metric: (task, metric).
      mode: 'min' where lower is better, 'max' where higher is.
      patience: how many values to look at, two or more.
      atol: a value must be better than the one before by more than
        `atol + rtol * |the one before|`.
      rtol: see `atol`.

    Raises:
      ValueError: an argument makes no sense.
    """
    if mode not in ('min', 'max'):
      raise ValueError(f"mode must be 'min' or 'max'. Got: {mode!r}.")
    if patience < 2:
      raise ValueError(
        f'patience must be at least 2, as values are compared. Got: {patience}.'
      )
    if atol < 0 or rtol < 0:
      raise ValueError(f'atol and rtol must not be negative. Got: {atol} and {rtol}.')
    self._task, self._metric = metric
    self._sign = 1 if mode == 'min' else -1
    self._patience = patience
    self._atol, self._rtol = atol, rtol
    self._recent: list[float] = []

  def _better(self, before: float, after: float) -> bool:
    # Written so that NaN is never better.
    return self._sign * (before - after) > self._atol + self._rtol * abs(before)

  def recall(self, recorded: Callable[[str, str], Sequence[float]]) -> None:
    """See `BaseAction.recall`."""
    # As NumPy's numbers: what is compared with them is then rounded as they were.
    values = recorded(self._task, self._metric)
    self._recent = [np.float32(value) for value in values][-self._patience :]

  def run(
    self, train_state: train_state_lib.TrainState, metrics_by_task: MetricsByTask
  ) -> bool:
    """See `BaseAction.run`."""
    value = _number(self, metrics_by_task, self._task, self._metric)
    if value is None:
      return False
    self._recent = [*self._recent, value][-self._patience :]
    if len(self._recent) < self._patience:
      return False
    if any(map(self._better, self._recent, self._recent[1:])):
      return False
    logging.warning(
        '%s of %s has not got better: %s. Training ends.',
        self._metric, self._task, ', '.join(f'{v:g}' for v in self._recent),
    )  # fmt: skip
    return True


class TerminateOnNanAction(BaseAction):
  """Ends training when a metric is not a finite number.

  The trainer itself stops on a training loss that is not finite, at the very step; this
  action is for other metrics, those of evaluations above all.
  """

  def __init__(self, task: str, metric: str = 'loss'):
    """Says what to follow.

    Args:
      task: the task, or 'train'.
      metric: one of its metrics.
    """
    self._task, self._metric = task, metric

  def run(
    self, train_state: train_state_lib.TrainState, metrics_by_task: MetricsByTask
  ) -> bool:
    """See `BaseAction.run`."""
    value = _number(self, metrics_by_task, self._task, self._metric)
    if value is None or math.isfinite(value):
      return False
    logging.warning('%s of %s is %g. Training ends.', self._metric, self._task, value)
    return True
