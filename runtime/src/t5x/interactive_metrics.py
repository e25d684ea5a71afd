"""Metric functions that a caller hands over, sorted by what they take."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MetricFn = Callable[..., Mapping[str, Any]]

# What a metric function may take, by the names of its parameters.
_KNOWN_ARGUMENTS = (
  ('targets', 'scores'),
  ('targets', 'predictions'),
  ('targets', 'predictions', 'aux_values'),
)


def arguments_of(metric_fn: MetricFn) -> tuple[str, ...]:
  """Names of what a metric function wants to be told.

  Raises:
    ValueError: if its required parameters have other names.
  """
  required = tuple(
    name
    for name, parameter in inspect.signature(metric_fn).parameters.items()
    if parameter.default is inspect.Parameter.empty
  )
  if required not in _KNOWN_ARGUMENTS:
    raise ValueError(
      f'A metric function takes one of {_KNOWN_ARGUMENTS}. Got: {required}.'
    )
  return required


def compute(metric_fns: Sequence[MetricFn], known: Mapping[str, Any]) -> dict[str, Any]:
  """Metrics of all functions in one mapping.

  Args:
    metric_fns: functions that `arguments_of` knows.
    known: their arguments by name.

  Raises:
    ValueError: if a metric's name comes twice.
  """
  metrics = {}
  for metric_fn in metric_fns:
    found = metric_fn(**{name: known[name] for name in arguments_of(metric_fn)})
    twice = sorted(metrics.keys() & found.keys())
    if twice:
      raise ValueError(f'Two metric functions give the same names: {twice}.')
    metrics.update(found)
  return metrics
