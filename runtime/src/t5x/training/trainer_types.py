"""What the parts of training hand to each other. Reached as names of `trainer`."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import clu.metrics
import clu.values
import flax.core
import jax
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from t5x import partitioning
from t5x import train_state as train_state_lib

if TYPE_CHECKING:
  from t5x import models
  from t5x.training.base_trainer import BaseTrainer

BatchSpec = Mapping[str, jax.ShapeDtypeStruct]
BatchType = Mapping[str, np.ndarray | jax.Array]
FlaxMutables = flax.core.FrozenDict
Rng = jax.Array
MetricMapType = MutableMapping[str, clu.metrics.Metric]
MetricMapSpec = Mapping[str, jax.ShapeDtypeStruct]
MetricValueMapType = Mapping[str, clu.values.Value]
ModelWeights = PyTree
MutableMetricMapType = dict[str, clu.metrics.Metric]
PartitionSpec = partitioning.PartitionSpec


class ArrayMapFuture(Protocol):
  """Arrays by name, once they are there."""

  def result(self) -> Mapping[str, Array]:
    """Waits for them."""


class MetricValueMapFuture(Protocol):
  """Values of metrics by name, once they are there."""

  def result(self) -> MetricValueMapType:
    """Waits for them."""


class TimeFuture(Protocol):
  """A time in seconds, once it is known."""

  def result(self) -> float:
    """Waits for it."""


class LearningRateCallable(Protocol):
  """A schedule."""

  def __call__(self, step: Int[Array, '']) -> Float[Array, '']:
    """The learning rate of a step."""


class SummarizeMetricsCallable(Protocol):
  """Makes values of what was summed over several steps."""

  def __call__(
    self, metrics: MetricMapType, duration: float, num_steps: int
  ) -> Mapping[str, Array]:
    """Values by name, of `num_steps` steps that took `duration` seconds."""


class PartitionedTrainCallable(Protocol):
  """A step of training over the mesh; it takes the state's memory."""

  def __call__(
    self, train_state: train_state_lib.TrainState, batch: BatchType
  ) -> tuple[train_state_lib.TrainState, MetricMapType]:
    """The next state, and the metrics of the step."""


class PartitionedEvalCallable(Protocol):
  """A step of evaluation over the mesh."""

  def __call__(
    self, train_state: train_state_lib.TrainState, batch: BatchType
  ) -> MetricMapType:
    """The metrics of the batch."""


class BaseTrainerConstructor(Protocol):
  """What the training script calls: a trainer class with the rest bound by gin."""

  def __call__(
    self,
    model: 'models.BaseModel',
    train_state: train_state_lib.TrainState,
    partitioner: partitioning.BasePartitioner,
    eval_names: Sequence[str],
    summary_dir: str | None,
    train_state_axes: Any,
    rng: Rng,
  ) -> 'BaseTrainer':
    """Makes the trainer."""
