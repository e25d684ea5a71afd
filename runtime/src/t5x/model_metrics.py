"""What models report of a batch. Reached as functions of `models`."""

from collections.abc import Mapping
from typing import Any

import clu.metrics as clu_metrics
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from t5x import metrics as metrics_lib
from t5x.metrics import MetricsMap


def compute_weighted_accuracy(
  logits: Float[Array, 'batch length vocabulary'],
  targets: Int[Array, 'batch length'],
  weights: Num[Array, 'batch length'] | None = None,
) -> Num[Array, '']:
  """Weight of the positions at which the most probable token is the target.

  Raises:
    ValueError: if the ranks of logits and targets do not match.
  """
  if logits.ndim != targets.ndim + 1:
    raise ValueError(
      'Logits need one axis more than targets, the vocabulary. Got shapes:'
      f' {logits.shape} / {targets.shape}.'
    )
  correct = jnp.argmax(logits, axis=-1) == targets
  return jnp.sum(correct if weights is None else correct * weights)


def compute_metrics(
  logits: Float[Array, 'batch length vocabulary'],
  targets: Int[Array, 'batch length'],
  weights: Num[Array, 'batch length'] | None,
  loss: Float[Array, ''],
  weight_sum: Num[Array, ''],
  additional_metrics: MetricsMap,
) -> MetricsMap:
  """Sums of a batch, with more metrics put over them by name.

  `compute_base_metrics` says more; this one is kept for models that use it.
  """
  sums = {
    'num_examples': len(targets),
    'num_tokens': targets.size,
    'weight_sum': weight_sum,
    'loss': loss,
    'accuracy': compute_weighted_accuracy(logits, targets, weights),
  }
  return {**metrics_lib.create_metrics_dict(sums), **additional_metrics}


def count_packed_examples(
  segment_ids: Num[Array, 'batch length'] | Bool[Array, 'batch length'],
) -> Int[Array, '']:
  """Counts examples: runs of one id other than 0.

  [[1, 1, 3, 3, 0, 0], [2, 7, 7, 7, 7, 0]] holds 4.
  """
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
  """Metrics of one step, to be merged over microbatches and steps.

  Args:
    logits: what the model says.
    targets: what is right.
    mask: which positions count; all if None.
    loss: the loss, z-loss included.
    z_loss: the z-loss in it; its metrics are left out if None.
    segment_ids: by feature, which example each position belongs to.

  Returns:
    Metrics by name. Loss and z-loss are given by step and by target token,
    times and rates under `timing/` (their durations are set by the trainer),
    `non_padding_fraction/` and `effective_batch_size/` by feature.
  """
  slots = jnp.asarray(targets.size)
  examples = jnp.asarray(targets.shape[0])
  counted = slots if mask is None else jnp.sum(mask)
  metrics = {
    'accuracy': clu_metrics.Accuracy.from_model_output(
      logits=logits, labels=targets.astype(jnp.int32), mask=mask
    ),
    'loss_per_nonpadding_target_token': _ratio(loss, counted),
    'non_padding_fraction/loss_weights': _ratio(counted, slots),
    **_loss_metrics('loss', loss, slots),
    **_timing_metrics(examples, slots),
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
  """A loss by step and by target position."""
  return {
    name: metrics_lib.AveragePerStep(total=loss),
    f'{name}_per_all_target_tokens': _ratio(loss, slots),
  }


def _timing_metrics(examples: jax.Array, slots: jax.Array) -> MetricsMap:
  """Durations and rates; the durations are filled in outside of jit."""
  devices = jax.device_count()
  rate = metrics_lib.TimeRate.from_model_output
  return {
    'timing/seconds': metrics_lib.Time(),
    'timing/steps_per_second': metrics_lib.StepsPerTime.from_model_output(),
    'timing/seqs': metrics_lib.Sum(examples),
    'timing/seqs_per_second': rate(numerator=examples),
    'timing/seqs_per_second_per_core': rate(numerator=examples / devices),
    'timing/target_tokens_per_second': rate(numerator=slots),
    'timing/target_tokens_per_second_per_core': rate(numerator=slots / devices),
  }


def _packing_metrics(segment_ids: Mapping[str, jax.Array]) -> MetricsMap:
  """Examples and padding by feature, and padding of all features together."""
  metrics = {}
  filled_total = size_total = jnp.asarray(0)
  for feature, ids in segment_ids.items():
    if ids is None or ids.shape[1] == 0:
      continue
    filled = jnp.sum(ids != 0)
    size = jnp.asarray(ids.size)
    metrics[f'effective_batch_size/{feature}'] = metrics_lib.AveragePerStep(
      total=count_packed_examples(ids)
    )
    metrics[f'non_padding_fraction/{feature}'] = _ratio(filled, size)
    filled_total += filled
    size_total += size
  metrics['non_padding_fraction/overall'] = _ratio(filled_total, size_total)
  return metrics
