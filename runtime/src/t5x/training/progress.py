"""How far a run is and how fast: a bar on a terminal, and a line every period.

The training loop runs ahead of the devices; `StepFollower` sees the steps really end,
and so knows how long the devices stood idle for want of data.
"""

import collections
import concurrent.futures
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

import clu.values
import jax
import tqdm
from absl import logging
from jaxtyping import PyTree

from t5x.training.summaries import time_when_ready

# Steps handed to the devices and not done. One runs while the next waits its turn: more
# would only hold more batches in memory.
_STEPS_IN_FLIGHT = 2


def _rate(number: float) -> str:
  """Three figures, or all before the point; no exponent: 0.0123, 78.9, 54,160."""
  return f'{number:,.0f}' if number >= 99.95 else f'{number:.3g}'


# (name in the line, metrics to take it from, format); the first metric there counts.
# Behind the quality come the metrics that the model names.
_QUALITY = (
  ('loss', ('loss_per_nonpadding_target_token', 'loss'), '{:.4f}'.format),
  ('accuracy', ('accuracy',), '{:.4f}'.format),
)
_TOKENS = ('tokens/s', ('timing/target_tokens_per_second',), '{:,.0f}'.format)
_STEPS = ('steps/s', ('timing/steps_per_second',), _rate)
_DATA_WAIT = ('data wait', ('timing/data_wait_share',), '{:.0%}'.format)
_FURTHER = (
  ('learning rate', ('learning_rate/current', 'learning_rate'), '{:.3g}'.format),
  _STEPS,
  ('examples/s', ('timing/seqs_per_second',), _rate),
)
_SPEED = 'timing/steps_per_second'
# What an ordinary terminal leaves behind the time of day.
_INDENT = len('00:00:00 ')
_WIDTH = 120 - _INDENT


def _plain(value: Any) -> float | None:
  """A scalar metric as a float; None for anything else."""
  number = value.value if isinstance(value, clu.values.Scalar) else value
  try:
    return float(number)
  except (TypeError, ValueError):
    return None


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'


def _shown(items: Iterable[tuple], metrics: Mapping[str, Any]) -> list[str]:
  """`name value` for each of the items that is there."""
  parts = []
  for name, sources, form in items:
    values = [_plain(metrics[source]) for source in sources if source in metrics]
    if values and values[0] is not None:
      parts.append(f'{name} {form(values[0])}')
  return parts


def _quality(metrics: Mapping[str, Any], chosen: Mapping[str, str] | None) -> list[str]:
  further = (
    (name, (metric,), '{:.4f}'.format) for name, metric in (chosen or {}).items()
  )
  return _shown((*_QUALITY, *further), metrics)


def _position(step: int, total_steps: int | None) -> str:
  return f'step {step:,}' + ('' if total_steps is None else f' of {total_steps:,}')


def _time_left(
  step: int, metrics: Mapping[str, Any], total_steps: int | None
) -> list[str]:
  speed = _plain(metrics.get(_SPEED))
  if not speed or total_steps is None or total_steps <= step:
    return []
  return [f'{_clock((total_steps - step) / speed)} left']


def _wrapped(parts: Sequence[str]) -> str:
  """Parts in a line, or in as many as an ordinary terminal needs."""
  lines = [parts[0]]
  for part in parts[1:]:
    longer = f'{lines[-1]} | {part}'
    if len(longer) <= _WIDTH:
      lines[-1] = longer
    else:
      lines.append(part)
  return ('\n' + ' ' * _INDENT).join(lines)


def period_line(
  step: int, metrics: Mapping[str, Any], total_steps: int | None = None
) -> str:
  """A period in one line: how well, how fast, how long still.

  Args:
    step: the step at the period's end.
    metrics: values by name, as the trainer reports them. Those not there are left out.
    total_steps: the run's last step, if known: then the time left is given too.
  """
  speed = _shown([_TOKENS], metrics) or _shown([_STEPS], metrics)
  left = _time_left(step, metrics, total_steps)
  waiting = _shown([_DATA_WAIT], metrics)
  at = _position(step, total_steps)
  return ' | '.join([at, *_quality(metrics, None), *speed, *left, *waiting])


def last_report(
  step: int, metrics: Mapping[str, Any], chosen: Mapping[str, str] | None = None
) -> str:
  """All that is shown of a run's last period, in as many lines as it takes.

  Args:
    step: the last step.
    metrics: values by name, as the trainer reports them. Those not there are left out.
    chosen: {name in the line: metric}, what is shown behind the accuracy.
  """
  speed = _shown([*_FURTHER, _TOKENS, _DATA_WAIT], metrics)
  return _wrapped([_position(step, step), *_quality(metrics, chosen), *speed])


def evaluation_report(
  name: str,
  step: int,
  metrics: Mapping[str, Any],
  chosen: Mapping[str, str] | None = None,
) -> str:
  """How well a model does on an evaluation dataset.

  Args:
    name: the dataset.
    step: the model's step.
    metrics: values by name. Those not there are left out.
    chosen: {name in the line: metric}, what is shown behind the accuracy.
  """
  return _wrapped([f'{name}: step {step:,}', *_quality(metrics, chosen)])


class Progress:
  """Shows a run: a line every period, and between them a bar on a terminal."""

  def __init__(
    self,
    total_steps: int | None = None,
    first_step: int = 0,
    stream: TextIO | None = None,
    chosen: Mapping[str, str] | None = None,
  ):
    """Prepares the display; nothing appears before the first step.

    Args:
      total_steps: the run's last step. Without it there is no bar.
      first_step: the step the run starts or resumes at.
      stream: where the bar goes, if it is a terminal; stderr by default.
      chosen: {name: metric}, what the bar and the last line show behind the accuracy.
    """
    self._chosen = chosen
    self._total, self._first = total_steps, first_step
    self._stream = stream or sys.stderr
    self._bar: tqdm.tqdm | None = None
    self._closed = False
    # Steps end on one thread and periods on another.
    self._lock = threading.Lock()

  @property
  def _wants_bar(self) -> bool:
    return (
      self._total is not None
      and jax.process_index() == 0
      and not self._closed
      and self._stream.isatty()
    )

  def advance(self, steps: int = 1) -> None:
    """Moves the bar on."""
    with self._lock:
      if self._bar is None and self._wants_bar:
        self._bar = tqdm.tqdm(
          initial=self._first,
          total=self._total,
          unit='step',
          file=self._stream,
          dynamic_ncols=True,
          leave=False,
        )
      if self._bar is not None:
        self._bar.update(steps)

  def report(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Logs the line of a period above the bar, which then shows the quality in full.

    The run's last step is reported in full.

    Args:
      step: the step at the period's end.
      metrics: values by name, as the trainer reports them.
    """
    if jax.process_index() != 0:
      return
    if step == self._total:
      self.log(last_report(step, metrics, self._chosen))
    else:
      self.log(period_line(step, metrics, self._total))
    with self._lock:
      if self._bar is not None:
        shown = _quality(metrics, self._chosen)
        self._bar.set_postfix_str(' | '.join(shown), refresh=True)

  def log(self, line: str) -> None:
    """Logs a line above the bar, if there is one."""
    with self._lock:
      if self._bar is None:
        logging.info('%s', line)
        return
      with tqdm.tqdm.external_write_mode(file=self._stream):
        logging.info('%s', line)

  def close(self) -> None:
    """Takes the bar away."""
    with self._lock:
      self._closed = True
      if self._bar is not None:
        self._bar.close()
        self._bar = None


class StepFollower:
  """Sees steps end on the devices, without holding up the loop that launches them."""

  def __init__(self, on_step_end: Callable[[], None]):
    """Starts the thread that waits for steps.

    Args:
      on_step_end: called on that thread after each step.
    """
    self._on_step_end = on_step_end
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'step follower')
    self._in_flight: collections.deque[concurrent.futures.Future] = collections.deque()
    self._last_end = time.perf_counter()
    self._idle = 0.0

  def launched(
    self,
    result: PyTree,
    asked: float,
    arrived: float,
    check: Callable[[], None] | None = None,
  ) -> None:
    """Takes note of a step; waits if too many are under way.

    Args:
      result: arrays that the step computes and nothing donates.
      asked: when its batch was asked for (`time.perf_counter`).
      arrived: when the batch was there.
      check: called when the step has ended, on the thread that waits for it. What it
        raises is raised here two steps later (on all hosts at the same step), or comes
        out of `take_pending`.
    """
    following = self._thread.submit(self._follow, result, asked, arrived, check)
    self._in_flight.append(following)
    while len(self._in_flight) > _STEPS_IN_FLIGHT:
      self._in_flight.popleft().result()

  def _follow(
    self,
    result: PyTree,
    asked: float,
    arrived: float,
    check: Callable[[], None] | None,
  ) -> None:
    # The devices stood idle from the end of the step before, if the loop was asking for
    # data by then.
    self._idle += max(0.0, arrived - max(asked, self._last_end))
    self._last_end = time_when_ready(result)
    self._on_step_end()
    if check is not None:
      check()

  def take_pending(self) -> list[concurrent.futures.Future]:
    """Futures of the steps under way, which raise what their checks raise."""
    pending = list(self._in_flight)
    self._in_flight.clear()
    return pending

  def take_idle_seconds(self) -> concurrent.futures.Future[float]:
    """The devices' idle time over the steps launched since the last call.

    Returns:
      A future; it is there when those steps are done.
    """

    def take() -> float:
      idle, self._idle = self._idle, 0.0
      return idle

    return self._thread.submit(take)

  def close(self) -> None:
    """Waits for the steps under way and ends the thread."""
    self._thread.shutdown()
