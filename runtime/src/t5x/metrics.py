"""Metrics that sum over microbatches, steps and hosts, on top of `clu.metrics`.

The compiled step knows neither the wall time nor the number of steps (a microbatch is
not a step). The trainer sets them afterwards, with `set_time_metrics_duration` and
`set_step_metrics_num_steps`.
"""

import numbers
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Self

import clu.values
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

MetricsMap = MutableMapping[str, clu_metrics.Metric]
Scalar = int | float | np.number | np.ndarray | jax.Array


@flax.struct.dataclass
class Sum(clu_metrics.Metric):
  """The sum of all values."""

  total: Scalar

  @classmethod
  def from_model_output(cls, values: Num[Array, '*d'] | float, **_: Any) -> Self:
    return cls(total=jnp.sum(jnp.asarray(values)))

  def merge(self, other: Self) -> Self:
    return type(self)(total=self.total + other.total)

  def compute(self) -> Num[Array, '']:
    return jnp.asarray(self.total)


@flax.struct.dataclass
class Step(clu_metrics.Metric):
  """The number of steps, and a base class of metrics that depend on it."""

  steps: int | None = 1

  def replace_steps(self, steps: int) -> Self:
    return self.replace(steps=steps)

  def compute(self) -> Shaped[Array, '']:
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
    return cls(total=jnp.sum(jnp.asarray(values)), steps=steps)

  def merge(self, other: Self) -> Self:
    return type(self)(total=self.total + other.total, steps=self.steps + other.steps)

  def compute(self) -> Float[Array, '']:
    return self.total / super().compute()


@flax.struct.dataclass
class Time(clu_metrics.Metric):
  """A wall time in seconds, set outside the compiled step."""

  duration: Scalar | None = None

  def merge(self, other: Self) -> Self:
    return self  # Both cover the same interval, whose duration is set later.

  def compute(self) -> Shaped[Array, '']:
    if self.duration is None:
      raise ValueError(
        f'{type(self).__name__}: set `duration` with replace_duration first.'
      )
    return jnp.asarray(self.duration)

  def replace_duration(self, duration: Scalar) -> Self:
    return self.replace(duration=duration)


@flax.struct.dataclass
class TimeRate(Time):
  """A total divided by the wall time: examples or tokens per second."""

  numerator: Scalar | None = None

  @classmethod
  def from_model_output(cls, numerator: Num[Array, ''] | float, **_: Any) -> Self:
    return cls(numerator=numerator)

  def merge(self, other: Self) -> Self:
    if self.duration is not None or other.duration is not None:
      raise ValueError('TimeRate: merge before replace_duration.')
    return type(self)(numerator=self.numerator + other.numerator)

  def compute(self) -> Float[Array, '']:
    return self.numerator / super().compute()


@flax.struct.dataclass
class StepsPerTime(Step, Time):
  """Steps per second."""

  @classmethod
  def from_model_output(cls, steps: int | None = 1, **_: Any) -> Self:
    return cls(steps=steps)

  def merge(self, other: Self) -> Self:
    return type(self)(steps=self.steps + other.steps)

  def compute(self) -> Float[Array, '']:
    return Step.compute(self) / Time.compute(self)


def is_metric_obj(obj: Any) -> bool:
  """Whether an object is a metric, as `is_leaf` of `jax.tree.map`."""
  return isinstance(obj, clu_metrics.Metric)


def as_number(value: Any) -> float | None:
  """Converts the value of a metric to float; None if it is not a single number."""
  if isinstance(value, clu.values.Scalar):
    value = value.value
  single = isinstance(value, np.ndarray | jax.Array) and value.ndim == 0
  return float(value) if single or isinstance(value, numbers.Real) else None


def _update_each(
  metrics: Any, kind: type, update: Callable[[Any], clu_metrics.Metric]
) -> Any:
  return jax.tree.map(
    lambda m: update(m) if isinstance(m, kind) else m, metrics, is_leaf=is_metric_obj
  )


def set_time_metrics_duration(metrics: Any, duration: Scalar) -> Any:
  """Sets the duration in seconds of every `Time` in a tree of metrics."""
  return _update_each(metrics, Time, lambda m: m.replace_duration(duration))


def set_step_metrics_num_steps(metrics: Any, num_steps: int) -> Any:
  """Sets the number of steps of every `Step` in a tree of metrics."""
  return _update_each(metrics, Step, lambda m: m.replace_steps(num_steps))


# ---- Metrics of a batch ----


def count_packed_examples(
  segment_ids: Num[Array, 'batch length'] | Bool[Array, 'batch length'],
) -> Int[Array, '']:
  """Counts runs of one nonzero id: [[1, 1, 3, 3, 0, 0], [2, 7, 7, 7, 7, 0]] has 4."""
  before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
  return jnp.sum((segment_ids != before) & (segment_ids != 0))


def compute_base_metrics(
  logits: Float[Array, 'batch length vocabulary'],
  targets: Int[Array, 'batch length'],
  mask: Num[Array, 'batch length'] | None,
  loss: Float[Array, ''],
  z_loss: Float[Array, ''] | None = None,
  segment_ids: Mapping[str, Num[Array, 'batch _'] | Bool[Array, 'batch _']]
  | None = None,
) -> MetricsMap:
  """Computes the metrics of one step, to be merged over microbatches and steps.

  Args:
    mask: the positions that count; None counts all.
    loss: the loss, including the z-loss.
    z_loss: None leaves out its metrics.
    segment_ids: by feature, the example of each position; 0 is padding.

  Returns:
    Metrics by name. Losses are per step and per target token, rates under `timing/`,
    `non_padding_fraction/` and `effective_batch_size/` per feature.
  """
  slots = jnp.asarray(targets.size)
  examples = jnp.asarray(targets.shape[0])
  counted = slots if mask is None else jnp.sum(mask)
  devices = jax.device_count()
  rate = TimeRate.from_model_output
  metrics = {
    'accuracy': clu_metrics.Accuracy.from_model_output(
      logits=logits, labels=targets.astype(jnp.int32), mask=mask
    ),
    'loss_per_nonpadding_target_token': _ratio(loss, counted),
    'non_padding_fraction/loss_weights': _ratio(counted, slots),
    **_loss_metrics('loss', loss, slots),
    'timing/seconds': Time(),
    'timing/steps_per_second': StepsPerTime.from_model_output(),
    'timing/seqs': Sum(examples),
    'timing/seqs_per_second': rate(numerator=examples),
    'timing/seqs_per_second_per_core': rate(numerator=examples / devices),
    'timing/target_tokens_per_second': rate(numerator=slots),
    'timing/target_tokens_per_second_per_core': rate(numerator=slots / devices),
  }
  if z_loss is not None:
    metrics |= _loss_metrics('z_loss', z_loss, slots)
    metrics |= _loss_metrics('cross_ent_loss', loss - z_loss, slots)
  if segment_ids is not None:
    metrics |= _packing_metrics(segment_ids)
  return metrics


def _ratio(total: Any, count: Any) -> clu_metrics.Average:
  return clu_metrics.Average(total=total, count=count)


def _loss_metrics(name: str, loss: jax.Array, slots: jax.Array) -> MetricsMap:
  return {
    name: AveragePerStep(total=loss),
    f'{name}_per_all_target_tokens': _ratio(loss, slots),
  }


def _packing_metrics(segment_ids: Mapping[str, jax.Array]) -> MetricsMap:
  metrics = {}
  filled_total = size_total = jnp.asarray(0)
  for feature, ids in segment_ids.items():
    if ids is None or ids.shape[1] == 0:
      continue
    filled, size = jnp.sum(ids != 0), jnp.asarray(ids.size)
    examples = count_packed_examples(ids)
    metrics[f'effective_batch_size/{feature}'] = AveragePerStep(total=examples)
    metrics[f'non_padding_fraction/{feature}'] = _ratio(filled, size)
    filled_total += filled
    size_total += size
  metrics['non_padding_fraction/overall'] = _ratio(filled_total, size_total)
  return metrics
