"""Metrics that are summed over microbatches, steps and hosts (T5X's `metrics`).

Built on `clu.metrics`. Two quantities are not known where the metric is made, inside a
compiled step: the wall time, and the number of steps (a microbatch is not a step). They
are set from outside, by `set_time_metrics_duration` and `set_step_metrics_num_steps`.
"""

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from jaxtyping import Array, Float, Num, Shaped

MetricsMap = MutableMapping[str, clu_metrics.Metric]
Scalar = int | float | np.number | np.ndarray | jax.Array


def _same_type(left: clu_metrics.Metric, right: clu_metrics.Metric) -> None:
  if type(left) is not type(right):
    raise TypeError(
      'Only metrics of one type merge. Got: '
      f'{type(left).__name__} and {type(right).__name__}.'
    )


@flax.struct.dataclass
class Sum(clu_metrics.Metric):
  """The sum of all values."""

  total: Scalar

  @classmethod
  def from_model_output(cls, values: Num[Array, '*d'] | float, **_: Any) -> Self:
    """Sums a scalar or an array of any shape."""
    return cls(total=jnp.sum(jnp.asarray(values)))

  def merge(self, other: Self) -> Self:
    """Adds the totals."""
    return type(self)(total=self.total + other.total)

  def compute(self) -> Num[Array, '']:
    """The total."""
    return jnp.asarray(self.total)


@flax.struct.dataclass
class Step(clu_metrics.Metric):
  """A metric that knows how many steps it covers."""

  steps: int | None = 1

  def replace_steps(self, steps: int) -> Self:
    """A copy that covers `steps` steps."""
    return self.replace(steps=steps)

  def compute(self) -> Shaped[Array, '']:
    """The number of steps; ValueError if it was never set."""
    if self.steps is None:
      raise ValueError(f'{type(self).__name__}: set `steps` with replace_steps first.')
    return jnp.asarray(self.steps)


@flax.struct.dataclass
class AveragePerStep(Step):
  """A total divided by the number of steps."""

  total: Scalar | None = None

  @classmethod
  def from_model_output(
    cls, values: Num[Array, '*d'] | float, steps: int | None = 1, **_: Any
  ) -> Self:
    """Sums a scalar or an array, over `steps` steps."""
    return cls(total=jnp.sum(jnp.asarray(values)), steps=steps)

  def merge(self, other: Self) -> Self:
    """Adds totals and steps."""
    _same_type(self, other)
    return type(self)(total=self.total + other.total, steps=self.steps + other.steps)

  def compute(self) -> Float[Array, '']:
    """Total / steps; ValueError if either was never set."""
    if self.total is None:
      raise ValueError('AveragePerStep: `total` was never set.')
    return self.total / super().compute()


@flax.struct.dataclass
class Time(clu_metrics.Metric):
  """A wall time in seconds, which only the code around the compiled step can know."""

  duration: Scalar | None = None

  def merge(self, other: Self) -> Self:
    """Either: both cover the same stretch of time, whose length is set later."""
    return self

  def compute(self) -> Shaped[Array, '']:
    """The duration in seconds; ValueError if it was never set."""
    if self.duration is None:
      raise ValueError(
        f'{type(self).__name__}: set `duration` with replace_duration first.'
      )
    return jnp.asarray(self.duration)

  def replace_duration(self, duration: Scalar) -> Self:
    """A copy that covers `duration` seconds."""
    return self.replace(duration=duration)


@flax.struct.dataclass
class TimeRate(Time):
  """A total divided by the wall time: examples or tokens per second."""

  numerator: Scalar | None = None

  @classmethod
  def from_model_output(cls, numerator: Num[Array, ''] | float, **_: Any) -> Self:
    """Starts from what is counted."""
    return cls(numerator=numerator)

  def merge(self, other: Self) -> Self:
    """Adds the counts; ValueError once a duration is set, which it would outdate."""
    if self.duration is not None or other.duration is not None:
      raise ValueError(
        'TimeRate: merge before replace_duration. Got durations '
        f'{self.duration} and {other.duration}.'
      )
    return type(self)(numerator=self.numerator + other.numerator)

  def compute(self) -> Float[Array, '']:
    """Count / seconds."""
    return self.numerator / super().compute()


@flax.struct.dataclass
class StepsPerTime(Step, Time):
  """Steps per second."""

  @classmethod
  def from_model_output(cls, steps: int | None = 1, **_: Any) -> Self:
    """Starts from a number of steps."""
    return cls(steps=steps)

  def merge(self, other: Self) -> Self:
    """Adds the steps."""
    _same_type(self, other)
    return type(self)(steps=self.steps + other.steps)

  def compute(self) -> Float[Array, '']:
    """Steps / seconds."""
    return Step.compute(self) / Time.compute(self)


def is_metric_obj(obj: Any) -> bool:
  """Whether `obj` is a metric (a leaf, where trees of metrics are mapped)."""
  return isinstance(obj, clu_metrics.Metric)


def is_time_metric(obj: Any) -> bool:
  """Whether `obj` has a duration to set."""
  return isinstance(obj, Time)


def create_metrics_dict(float_metrics_dict: Mapping[str, Scalar]) -> dict[str, Sum]:
  """Makes a `Sum` of each number."""
  return {name: Sum(total=value) for name, value in float_metrics_dict.items()}


def shape_obj_to_defined_obj(obj: clu_metrics.Metric) -> clu_metrics.Metric:
  """Makes zeros of the shapes in a metric that came out of `jax.eval_shape`.

  Args:
    obj: a metric whose fields are `jax.ShapeDtypeStruct`s, metrics of such, or plain
      values (kept).

  Returns:
    A metric of the same type to accumulate into.
  """

  def zeros(value):
    if is_metric_obj(value):
      return shape_obj_to_defined_obj(value)
    if hasattr(value, 'shape'):
      return jnp.zeros(value.shape, value.dtype)
    return value

  return dataclasses.replace(
    obj, **{f.name: zeros(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
  )


def _update_each(
  metrics: Any, kind: type, update: Callable[[Any], clu_metrics.Metric]
) -> Any:
  """Applies `update` to the metrics of a kind, in any tree."""
  return jax.tree.map(
    lambda m: update(m) if isinstance(m, kind) else m, metrics, is_leaf=is_metric_obj
  )


def set_time_metrics_duration(metrics: Any, duration: Scalar) -> Any:
  """Sets the duration, in seconds, of every metric that has one."""
  return _update_each(metrics, Time, lambda m: m.replace_duration(duration))


def set_step_metrics_num_steps(metrics: Any, num_steps: int) -> Any:
  """Sets the number of steps of every metric that has one."""
  return _update_each(metrics, Step, lambda m: m.replace_steps(num_steps))
