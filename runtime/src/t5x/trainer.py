"""Training and evaluation of a model over a mesh: T5X's names for them.

`Trainer.train` runs steps and returns at once with a future of their metrics. The
step's random key follows from the trainer's key and the number of the step, so a
resumed run goes on exactly as it would have. A trainer of another kind subclasses
`BaseTrainer` and defines `_partitioned_train_step` and `_partitioned_eval_step`, with
the functions of `train_step`.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from t5x import partitioning
from t5x import train_state as train_state_lib
from t5x.training.actions import (
  ActionMapType,
  ActionMode,
  BaseAction,
  EarlyStoppingAction,
  TerminateOnNanAction,
)
from t5x.training.base_trainer import BaseTrainer, PreemptionError
from t5x.training.health import NonFiniteLossError
from t5x.training.summaries import MetricsManager
from t5x.training.train_step import (
  WeightMetricsComputer,
  accumulate_grads_microbatched,
  apply_grads,
  eval_step,
  merge_metrics,
  train_with_lr,
)
from t5x.training.trainer_types import (
  ArrayMapFuture,
  BaseTrainerConstructor,
  BatchSpec,
  BatchType,
  FlaxMutables,
  LearningRateCallable,
  MetricMapSpec,
  MetricMapType,
  MetricValueMapFuture,
  MetricValueMapType,
  ModelWeights,
  MutableMetricMapType,
  PartitionedEvalCallable,
  PartitionedTrainCallable,
  PartitionSpec,
  Rng,
  SummarizeMetricsCallable,
  TimeFuture,
)

if TYPE_CHECKING:
  from t5x import models

__all__ = [
  'ActionMapType',
  'ActionMode',
  'ArrayMapFuture',
  'BaseAction',
  'BaseTrainer',
  'BaseTrainerConstructor',
  'BatchSpec',
  'BatchType',
  'EarlyStoppingAction',
  'FlaxMutables',
  'LearningRateCallable',
  'MetricMapSpec',
  'MetricMapType',
  'MetricValueMapFuture',
  'MetricValueMapType',
  'MetricsManager',
  'ModelWeights',
  'MutableMetricMapType',
  'NonFiniteLossError',
  'PartitionSpec',
  'PartitionedEvalCallable',
  'PartitionedTrainCallable',
  'PreemptionError',
  'Rng',
  'SummarizeMetricsCallable',
  'TerminateOnNanAction',
  'TimeFuture',
  'Trainer',
  'WeightMetricsComputer',
  'accumulate_grads_microbatched',
  'apply_grads',
  'eval_step',
  'merge_metrics',
  'train_with_lr',
]


class Trainer(BaseTrainer):
  """The trainer of T5X: one model, one loss, optionally in microbatches."""

  def __init__(
    self,
    model: 'models.BaseModel',
    train_state: train_state_lib.TrainState,
    partitioner: partitioning.BasePartitioner,
    eval_names: Sequence[str],
    summary_dir: str | None,
    train_state_axes: Any,
    rng: Rng,
    learning_rate_fn: LearningRateCallable,
    num_microbatches: int | None,
    weight_metrics_computer: WeightMetricsComputer | None = None,
  ):
    """Takes over a state.

    Args:
      model: see `BaseTrainer`, as for all but the last three.
      train_state: see there.
      partitioner: see there.
      eval_names: see there.
      summary_dir: see there.
      train_state_axes: see there.
      rng: see there.
      learning_rate_fn: the schedule, a function of the step. Adafactor follows it;
        optax optimizers have their own, and this one is only reported: bind the same to
        both.
      num_microbatches: how many parts to compute a batch in, one after another; None
        takes it as a whole.
      weight_metrics_computer: adds metrics of every parameter; None adds none.
    """
    super().__init__(
      model=model,
      train_state=train_state,
      partitioner=partitioner,
      eval_names=eval_names,
      summary_dir=summary_dir,
      train_state_axes=train_state_axes,
      rng=rng,
    )
    self._learning_rate_fn = learning_rate_fn
    self._num_microbatches = num_microbatches
    self._weight_metrics_computer = weight_metrics_computer

  @functools.cached_property
  def _partitioned_train_step(self) -> PartitionedTrainCallable:
    partitioner, axes = self._partitioner, self._train_state_axes

    def step(train_state, batch):
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
  def _partitioned_eval_step(self) -> PartitionedEvalCallable:
    partitioner = self._partitioner
    return partitioner.partition(
      functools.partial(eval_step, self._model),
      in_axis_resources=(self._train_state_axes, partitioner.data_partition_spec),
      out_axis_resources=None,
    )
