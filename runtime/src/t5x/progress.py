"""Progress of a run: a bar, lines in the log, and MODEL_DIR/metrics.jsonl."""

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

import jax
import tqdm
from absl import logging
from etils import epath

from t5x import metrics as metrics_lib
from t5x import trackers, whole_files


def _rate(number: float) -> str:
  """Formats with three significant digits and no exponent: 0.0123, 78.9, 54,160."""
  return f'{number:,.0f}' if number >= 99.95 else f'{number:.3g}'


# (label, names of metrics of which the first that exists is shown, format)
_QUALITY = (
  ('loss', ('loss_per_nonpadding_target_token', 'loss'), '{:.4f}'.format),
  ('accuracy', ('accuracy',), '{:.4f}'.format),
)
_TOKENS = ('tokens/s', ('timing/target_tokens_per_second',), '{:,.0f}'.format)
_STEPS = ('steps/s', ('timing/steps_per_second',), _rate)
_DATA_WAIT = ('data wait', ('timing/data_wait_share',), '{:.0%}'.format)


def _shown(items: Iterable[tuple], metrics: Mapping[str, Any]) -> list[str]:
  parts = []
  for name, sources, form in items:
    found = [metrics_lib.as_number(metrics[s]) for s in sources if s in metrics]
    if found and found[0] is not None:
      parts.append(f'{name} {form(found[0])}')
  return parts


def _quality(metrics: Mapping[str, Any], chosen: Mapping[str, str]) -> list[str]:
  further = [(name, (metric,), '{:.4f}'.format) for name, metric in chosen.items()]
  return _shown([*_QUALITY, *further], metrics)


def interval_line(
  step: int, total_steps: int, metrics: Mapping[str, Any], chosen: Mapping[str, str]
) -> str:
  """Describes an interval that ends at `step`; see `Progress` for `chosen`."""
  speed = _shown([_TOKENS], metrics) or _shown([_STEPS], metrics)
  steps_per_second = metrics_lib.as_number(metrics.get(_STEPS[1][0]))
  left = []
  if steps_per_second and step < total_steps:
    minutes, seconds = divmod(round((total_steps - step) / steps_per_second), 60)
    left = [f'{minutes // 60}:{minutes % 60:02}:{seconds:02} left']
  place = f'step {step:,} of {total_steps:,}'
  waiting = _shown([_DATA_WAIT], metrics)
  return ' | '.join([place, *_quality(metrics, chosen), *speed, *left, *waiting])


class Progress:
  """Shows a line per interval and, on a terminal, a progress bar below them."""

  def __init__(
    self,
    total_steps: int,
    first_step: int = 0,
    chosen: Mapping[str, str] | None = None,
    stream: TextIO | None = None,
  ):
    """Prepares the display, which appears at the first step.

    Args:
      chosen: {label: metric} to show in the bar, at evaluations and at the last step.
      stream: where to show the bar, if it is a terminal; stderr by default.
    """
    self._total, self._first = total_steps, first_step
    self._chosen = chosen or {}
    self._stream = stream or sys.stderr
    self._bar: tqdm.tqdm | None = None

  def advance(self) -> None:
    """Counts a step."""
    if self._bar is None and jax.process_index() == 0 and self._stream.isatty():
      self._bar = tqdm.tqdm(
        initial=self._first,
        total=self._total,
        unit='step',
        file=self._stream,
        dynamic_ncols=True,
        leave=False,
      )
    if self._bar is not None:
      self._bar.update()

  def report(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Logs the line of an interval."""
    chosen = self._chosen if step == self._total else {}
    self._log(interval_line(step, self._total, metrics, chosen))
    if self._bar is not None:
      shown = [*_quality(metrics, self._chosen), *_shown([_TOKENS], metrics)]
      self._bar.set_postfix_str(' | '.join(shown))

  def report_evaluation(self, name: str, step: int, metrics: Mapping[str, Any]) -> None:
    """Logs the line of an evaluation."""
    parts = [f'{name}: step {step:,}', *_quality(metrics, self._chosen)]
    self._log(' | '.join(parts))

  def _log(self, line: str) -> None:
    if jax.process_index() != 0:
      return
    if self._bar is None:
      logging.info('%s', line)
      return
    with tqdm.tqdm.external_write_mode(file=self._stream):
      logging.info('%s', line)

  def close(self) -> None:
    """Removes the bar."""
    if self._bar is not None:
      self._bar.close()


class MetricsLog:
  """Writes every report of a run as a line of MODEL_DIR/metrics.jsonl, on process 0.

  A line is `{"step": 20, "source": "train", "values": {"loss": 2.5, ...}}`. Sources are
  'train', 'training_eval/<task>' and 'inference_eval/<task>/eval';
  `metric_name_to_monitor` takes `<source>/<metric>`.
  """

  def __init__(
    self,
    model_dir: str,
    step: int = 0,
    evaluates_first: bool = False,
    tracker: trackers.Tracker | None = None,
  ):
    """Reads the lines of a resumed run and drops those it will write again.

    Args:
      step: the step at which the run resumes.
      evaluates_first: whether it evaluates before its first step.
      tracker: also gets the reports, on process 0.
    """
    self._tracker = tracker if jax.process_index() == 0 else None
    self._path = epath.Path(model_dir) / 'metrics.jsonl'
    self._latest: tuple[int, dict[str, float]] = (step, {})
    self._before = []
    if jax.process_index() == 0 and self._path.exists():
      self._drop_reports(step, evaluates_first)
    if self._tracker:
      self._tracker.open(model_dir)

  def _drop_reports(self, step: int, evaluates_first: bool) -> None:
    for line in self._path.read_text().splitlines():
      try:
        report = json.loads(line)
        again = evaluates_first and report['source'] != 'train'
        if report['step'] < step + (not again):
          self._before.append(report)
      # A killed run was writing this line.
      except (ValueError, LookupError, TypeError):
        continue
    with whole_files.whole_file(self._path) as file:
      file.writelines(json.dumps(report) + '\n' for report in self._before)

  def add(self, step: int, source: str, values: Mapping[str, Any]) -> None:
    """Appends a line with the values that are numbers."""
    found = {name: metrics_lib.as_number(value) for name, value in values.items()}
    found = {name: number for name, number in found.items() if number is not None}
    latest = self.at(step) | {f'{source}/{name}': x for name, x in found.items()}
    self._latest = step, latest
    if jax.process_index() == 0:
      with self._path.open('a') as file:
        file.write(json.dumps({'step': step, 'source': source, 'values': found}) + '\n')
    if self._tracker:
      self._tracker.log(step, source, found)

  def close(self, failed: bool = False) -> None:
    if self._tracker:
      self._tracker.close(failed)

  def at(self, step: int) -> dict[str, float]:
    """Returns {`<source>/<metric>`: value} if `step` is the latest step, else {}."""
    return self._latest[1] if self._latest[0] == step else {}

  def recall(self, source: str, metric: str) -> list[float]:
    """Returns the values reported before the run was resumed, in order."""
    reports = [r['values'] for r in self._before if r['source'] == source]
    return [values[metric] for values in reports if metric in values]
