"""The steps of a run as programs to compile: the same functions, no data, no state.

Shapes follow from the configuration: parameters from the model, batches from the task's
features and lengths by the model's own feature converter. Neither corpus nor checkpoint
need be there.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import PyTree

from t5x import (
  data,
  data_iterators,
  inference,
  models,
  partitioning,
  restore,
)
from t5x import trainer as trainer_lib

if TYPE_CHECKING:
  import seqio

BatchSpec = Mapping[str, jax.ShapeDtypeStruct]

STEPS = ('train', 'eval', 'decode')


@dataclasses.dataclass(frozen=True)
class AbstractStep:
  """A step that can be lowered.

  Attributes:
    kind: one of `STEPS`.
    function: partitioned; has `trace`.
    arguments: what to lower it for: shapes and dtypes.
    batch: the batch among the arguments.
    target_tokens: target slots of the batch, padding included.
    forward: the model's pass over a batch, without the mesh, and its arguments: what
      the step is for. None for decoding, whose length depends on the model.
    passes: forward passes that the step is worth: a backward one counts as two.
    parts: what the batch is split into.
    longest_loop: trips of loops whose length depends on data, at most.
    microbatches: parts that a batch is computed in; its rows divide by them.
    state_parts: what arrays of the state are split into, by shape.
  """

  kind: str
  function: Callable[..., Any]
  arguments: tuple[PyTree, ...]
  batch: BatchSpec
  target_tokens: int
  forward: tuple[Callable[..., Any], tuple[PyTree, ...]] | None
  passes: int
  parts: int
  longest_loop: int = 1
  microbatches: int = 1
  state_parts: Mapping[tuple[int, ...], int] = dataclasses.field(default_factory=dict)

  def trace(self) -> jax.stages.Traced:
    """The step, traced: a jaxpr over all devices, which can be lowered."""
    return self.function.trace(*self.arguments)

  def bytes_on_device(self, shape: tuple[int, ...], dtype: Any) -> float:
    """What an array takes on a device: split like the state's of its shape, or rows."""
    size = math.prod(shape) * jax.numpy.dtype(dtype).itemsize
    return size / self.state_parts.get(shape, self.parts)


def batch_spec(
  cfg: data.DatasetConfig,
  converter_cls: 'Callable[..., seqio.FeatureConverter]',
) -> BatchSpec:
  """Shapes and dtypes of a batch over all hosts; reads no data.

  Args:
    cfg: names the task, the lengths and the batch size.
    converter_cls: makes model features of task features.

  Raises:
    ValueError: see `data.check_dataset_config`.
  """
  import tensorflow as tf

  provider = data.check_dataset_config(cfg, 1, converter_cls)
  example = {
    name: tf.TensorSpec([None] * feature.rank, feature.dtype)
    for name, feature in provider.output_features.items()
  }
  # A dataset of the task's type, whose generator is never called.
  examples = tf.data.Dataset.from_generator(lambda: iter(()), output_signature=example)
  converter = converter_cls(
    pack=cfg.pack, use_custom_packing_ops=cfg.use_custom_packing_ops
  )
  rows = converter(examples, cfg.task_feature_lengths)
  zeros = data_iterators.get_zeros_batch_like_dataset(rows.batch(1), 1)
  return {
    name: jax.ShapeDtypeStruct((cfg.batch_size, *x.shape[1:]), x.dtype)
    for name, x in zeros.items()
  }


def target_tokens(batch: BatchSpec) -> int:
  """Target slots of a batch: those of the feature that the loss is taken of."""
  for name in ('decoder_target_tokens', 'targets', 'decoder_input_tokens'):
    if name in batch:
      return int(np.prod(batch[name].shape[:2]))
  raise ValueError(
    'A batch must have decoder_target_tokens, to count tokens by. Got: '
    f'{", ".join(sorted(batch))}.'
  )


class Run:
  """What `train` makes of its arguments before the first step, without arrays."""

  def __init__(
    self,
    *,
    model: models.BaseModel,
    train_dataset_cfg: data.DatasetConfig,
    partitioner: partitioning.BasePartitioner,
    trainer_cls: trainer_lib.BaseTrainerConstructor,
    random_seed: int | None = 0,
    use_hardware_rng: bool = False,
    train_state_initializer_cls: type[
      restore.TrainStateInitializer
    ] = restore.TrainStateInitializer,
  ):
    """See `train.train`, whose arguments these are."""
    self._model = model
    self._cfg = train_dataset_cfg
    self._partitioner = partitioner
    self._trainer_cls = trainer_cls
    self._initializer_cls = train_state_initializer_cls
    if use_hardware_rng:
      trainer_lib.set_hardware_rng_ops()
    _, self._key = jax.random.split(jax.random.PRNGKey(random_seed or 0))

  def step(self, kind: str, cfg: data.DatasetConfig | None = None) -> AbstractStep:
    """One of the run's steps.

    Args:
      kind: one of `STEPS`.
      cfg: the batches; those of training by default.

    Raises:
      ValueError: the batch does not divide among the devices.
    """
    cfg = cfg or self._cfg
    if kind == 'decode':
      cfg = dataclasses.replace(cfg, pack=False)
    self._partitioner.get_data_layout(cfg.batch_size)
    batch = batch_spec(cfg, self._model.FEATURE_CONVERTER_CLS)
    initializer = self._initializer_cls(
      optimizer_def=self._model.optimizer_def,
      init_fn=self._model.get_initial_variables,
      input_shapes={name: spec.shape for name, spec in batch.items()},
      input_types={name: spec.dtype for name, spec in batch.items()},
      partitioner=self._partitioner,
    )
    state = initializer.global_train_state_shape
    axes = initializer.train_state_axes
    make = self._decode_step if kind == 'decode' else self._trainer_step
    step = make(kind, state, axes, batch)
    return dataclasses.replace(step, state_parts=self._state_parts(state, axes))

  def _state_parts(self, state, axes) -> dict[tuple[int, ...], int]:
    """The optimizer's arrays have the shapes of the parameters that they belong to."""
    sizes, found = self._partitioner.mesh.shape, {}

    def add(spec, leaf):
      names = jax.tree.leaves(tuple(spec or ()))
      found[leaf.shape] = math.prod(sizes[name] for name in names)

    jax.tree.map(add, axes.params, state.params, is_leaf=partitioning.is_spec)
    return found

  def _trainer_step(self, kind, state, axes, batch) -> AbstractStep:
    trainer = self._trainer_cls(
      model=self._model,
      train_state=state,
      partitioner=self._partitioner,
      train_state_axes=axes,
      eval_names=(),
      summary_dir=None,
      rng=self._key,
    )
    training = kind == 'train'
    function = (
      trainer._partitioned_train_step if training else trainer._partitioned_eval_step
    )
    trainer.close()
    forward = functools.partial(
      self._model.loss_fn, dropout_rng=self._key if training else None
    )
    microbatches = getattr(trainer, '_num_microbatches', None) if training else None
    return AbstractStep(
      kind,
      function,
      (state, batch),
      batch,
      target_tokens(batch),
      (forward, (state.params, batch)),
      3 if training else 1,
      self._partitioner.data_mesh_size,
      microbatches=microbatches or 1,
    )

  def _decode_step(self, kind, state, axes, batch) -> AbstractStep:
    rows = next(iter(batch.values())).shape[0]
    function = inference.partition_step(
      self._model.predict_batch_with_aux, self._partitioner, axes
    )
    indices = jax.ShapeDtypeStruct((rows,), np.int32)
    key = jax.ShapeDtypeStruct(self._key.shape, self._key.dtype)
    arguments = (state.params, batch, key, indices, state.flax_mutables)
    tokens = target_tokens(batch)
    # Decoding stops when all rows have ended, and at the last target slot.
    return AbstractStep(
      kind,
      function,
      arguments,
      batch,
      tokens,
      None,
      1,
      self._partitioner.data_mesh_size,
      tokens // rows,
    )
