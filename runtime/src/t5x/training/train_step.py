"""One step of training, and one of evaluation, as pure functions.

A step is: gradients (of one batch, or summed over microbatches), update, metrics. All
of it is reached as functions of `trainer`.
"""

from collections.abc import Mapping
from typing import Any

import clu.metrics
import flax.core
import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from t5x import metrics as metrics_lib
from t5x import partitioning
from t5x import train_state as train_state_lib
from t5x.training.trainer_types import (
  BatchType,
  FlaxMutables,
  MetricMapType,
  ModelWeights,
  MutableMetricMapType,
  PartitionSpec,
  Rng,
)

TrainState = train_state_lib.TrainState


def merge_metrics(a: PyTree, b: PyTree) -> PyTree:
  """Merges two trees of metrics of one structure, on the device, without waiting."""
  return _merge_on_device(a, b)


@jax.jit
def _merge_on_device(a: PyTree, b: PyTree) -> PyTree:
  return jax.tree.map(
    lambda left, right: left.merge(right), a, b, is_leaf=metrics_lib.is_metric_obj
  )


def _by_name(tree: PyTree) -> dict[str, jax.Array]:
  """A nested dict of parameters as {'decoder/layer/kernel': array}, in float32."""
  flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(tree), sep='/')
  return {name: jnp.asarray(x, jnp.float32) for name, x in flat.items()}


def _global_norm(tree: PyTree) -> Float[Array, '']:
  squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
  return jnp.sqrt(sum(squares, start=jnp.float32(0)))


def _root_mean_square(x: Float[Array, '*d']) -> Float[Array, '']:
  return jnp.sqrt(jnp.mean(jnp.square(x)))


class WeightMetricsComputer:
  """Metrics of every parameter, for TensorBoard; each costs a pass over the weights."""

  def compute_metrics(
    self,
    gradients: ModelWeights,
    old_train_state: TrainState,
    new_train_state: TrainState,
  ) -> MutableMetricMapType:
    """Compares the weights before and after an update.

    Args:
      gradients: what the optimizer was given, in the structure of the parameters.
      old_train_state: the state before the update.
      new_train_state: the state after it.

    Returns:
      Averages per step, under `<metric>/<parameter>`: `weight_rms`, `weight_max` (the
      largest absolute value) and `weight_update_rms` of the new weights and the change,
      `weight_gradient_rms`, and `weight_update_divided_by_weight_rms` over the weights
      that were not 0; and `weight_gradient_norm` over all parameters.
    """
    old, new = _by_name(old_train_state.params), _by_name(new_train_state.params)
    values = {'weight_gradient_norm': _global_norm(gradients)}
    for name, gradient in _by_name(gradients).items():
      values[f'weight_gradient_rms/{name}'] = _root_mean_square(gradient)
    for name, weight in new.items():
      before, update = old[name], weight - old[name]
      values[f'weight_rms/{name}'] = _root_mean_square(weight)
      values[f'weight_max/{name}'] = jnp.max(jnp.abs(weight))
      values[f'weight_update_rms/{name}'] = _root_mean_square(update)
      # Biases start at 0: a change has no size relative to that.
      present = before != 0
      relative = jnp.where(present, update / jnp.where(present, before, 1), 0)
      count = jnp.maximum(jnp.sum(present), 1)
      values[f'weight_update_divided_by_weight_rms/{name}'] = jnp.sqrt(
        jnp.sum(jnp.square(relative)) / count
      )
    return {name: _per_step(value) for name, value in values.items()}


def _per_step(value: Float[Array, '']) -> metrics_lib.AveragePerStep:
  return metrics_lib.AveragePerStep.from_model_output(value)


def split_microbatches(
  batch: BatchType, num_microbatches: int, data_partition_spec: PartitionSpec
) -> BatchType:
  """Deals a batch out, like cards: row i goes to microbatch i mod `num_microbatches`.

  So every device's rows stay where they are, whereas consecutive rows would lie on few
  devices and have to travel for each microbatch.

  Args:
    batch: arrays of [rows, ...].
    num_microbatches: how many to make.
    data_partition_spec: how rows are split over the mesh.

  Returns:
    Arrays of [num_microbatches, rows / num_microbatches, ...].

  Raises:
    ValueError: the rows do not divide.
  """

  def deal(x):
    rows = x.shape[0]
    if rows % num_microbatches:
      raise ValueError(
        'The batch size must divide by the number of microbatches. Got: a batch of '
        f'{rows} in {num_microbatches} microbatches.'
      )
    dealt = x.reshape(rows // num_microbatches, num_microbatches, *x.shape[1:])
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
) -> tuple[ModelWeights, MutableMetricMapType, FlaxMutables | None]:
  """Gradients and metrics of a batch, as a whole or summed over microbatches.

  Where the loss is a sum over examples divided by a constant, both give the same.

  Args:
    model: has `loss_fn(params, batch, dropout_rng)`; where the state has mutable
      collections, these are its fourth argument and come back beside the metrics.
    train_state: has the parameters and the mutable collections.
    batch: arrays of [rows, ...].
    dropout_rng: the step's key; each microbatch gets its own.
    num_microbatches: how many; None or 1 takes the batch as a whole.
    data_partition_spec: how rows are split over the mesh.

  Returns:
    (gradients, metrics, mutable collections or None). Sums over microbatches are kept
    in float32.

  Raises:
    ValueError: the rows do not divide by the number of microbatches.
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

  nothing = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), train_state.params)
  microbatches = split_microbatches(batch, num_microbatches, data_partition_spec)
  rngs = jax.random.split(dropout_rng, num_microbatches)
  (gradients, mutables), stacked = jax.lax.scan(
    add, (nothing, mutables), (microbatches, rngs)
  )
  return gradients, _merge_stacked(stacked), mutables


def _merge_stacked(stacked: PyTree) -> PyTree:
  """Merges metrics whose leaves are [microbatches, ...], in their order."""
  first = jax.tree.map(lambda x: x[0], stacked)
  rest = jax.tree.map(lambda x: x[1:], stacked)

  def merge(total, one):
    merged = jax.tree.map(
      lambda a, b: a.merge(b), total, one, is_leaf=metrics_lib.is_metric_obj
    )
    # A merge may promote (an int count to float32); the carry keeps its types.
    return jax.tree.map(lambda new, old: new.astype(old.dtype), merged, total), None

  return jax.lax.scan(merge, first, rest)[0]


def apply_grads(
  train_state: TrainState,
  grad_accum: ModelWeights,
  metrics: MutableMetricMapType,
  learning_rate: Float[Array, ''] | float,
  weight_metrics_computer: WeightMetricsComputer | None,
  other_state_variables: Mapping[str, Any] | None = None,
) -> tuple[TrainState, MetricMapType]:
  """Updates the state, and reports on it.

  Args:
    train_state: the state.
    grad_accum: gradients of the step.
    metrics: metrics of the step so far; not changed.
    learning_rate: for optimizers that take it from outside, and for the report.
    weight_metrics_computer: adds metrics of every parameter; None adds none.
    other_state_variables: more for the new state, such as `flax_mutables`.

  Returns:
    The new state; the metrics with `learning_rate` (averaged over steps and
    `learning_rate/current`), `weight_norm` (before the update) and
    `weight_gradient_norm`.
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
  """One step: gradients, update, metrics.

  Args:
    train_state: the state before the step.
    batch: arrays of [rows, ...].
    learning_rate: of this step.
    dropout_rng: of this step.
    model: see `accumulate_grads_microbatched`.
    num_microbatches: see there.
    weight_metrics_computer: see `apply_grads`.
    data_partition_spec: how rows are split over the mesh.

  Returns:
    The state after the step, and its metrics.
  """
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
  """Metrics of a batch, without dropout.

  Args:
    model: has `eval_fn(params, batch)`; where the state has mutable collections, these
      are its third argument.
    train_state: has the parameters and the mutable collections.
    batch: arrays of [rows, ...].
  """
  mutables = (train_state.flax_mutables,) if train_state.flax_mutables else ()
  _, metrics = model.eval_fn(train_state.params, batch, *mutables)
  return metrics
