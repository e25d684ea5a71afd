"""The part of an interactive model that trains: a state, a trainer, checkpoints."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from t5x import (
  learning_rate,
  models,
  multihost,
  partitioning,
  restore,
  run_setup,
)
from t5x import train_state as train_state_lib
from t5x import trainer as trainer_lib
from t5x.interactive_data import (
  Example,
  Preprocessors,
  get_dataset_from_natural_text_examples,
)

DEFAULT_PREPROCESSORS = (
  seqio.preprocessors.tokenize,
  seqio.preprocessors.append_eos,
)


class TrainableModel:
  """A model with its state, its trainer and its checkpoints.

  The state comes from 1. the checkpoint that is named, if one is; 2. the newest in the
  output folder; 3. a random seed.
  """

  def __init__(
    self,
    batch_size: int,
    task_feature_lengths: Mapping[str, int],
    output_dir: str,
    partitioner: partitioning.BasePartitioner,
    model: models.BaseTransformerModel,
    dtype: str | None,
    restore_mode: str,
    checkpoint_path: str,
    input_shapes: Mapping[str, tuple[int, ...]],
    input_types: Mapping[str, Any] | None = None,
    init_random_seed: int = 42,
    add_eos: bool = True,
    eval_names: Sequence[str] | None = None,
  ):
    """Makes or restores a train state.

    Args:
      batch_size: examples in a batch, over all hosts.
      task_feature_lengths: longer features are cut, shorter ones padded.
      output_dir: for checkpoints and metrics; made if missing.
      partitioner: lays parameters and batches over the devices.
      model: the model.
      dtype: of restored and saved parameters; None for as they are.
      restore_mode: 'specific', or 'latest' in the folder `checkpoint_path`.
      checkpoint_path: what `train` or anybody else wrote; empty for none.
      input_shapes: shapes of the model features of a batch.
      input_types: their types, float32 unless named.
      init_random_seed: seed of the initial parameters and of dropout.
      add_eos: whether inputs and targets end with the end token.
      eval_names: names of the datasets that the trainer's `eval` may be given.
    """
    self._batch_size = batch_size
    self._task_feature_lengths = task_feature_lengths
    self._output_dir = os.fspath(output_dir)
    self._partitioner = partitioner
    self._model = model
    self._train_summary = None
    self._features = {
      'inputs': seqio.Feature(model.input_vocabulary, add_eos=add_eos),
      'targets': seqio.Feature(model.output_vocabulary, add_eos=add_eos),
    }
    self._restore_checkpoint_cfg = _given(checkpoint_path, restore_mode, dtype)
    self._save_checkpoint_cfg = restore.SaveCheckpointConfig(
      dtype=dtype, keep=5, save_dataset=False, period=1000
    )
    run_setup.open_folder('output_dir', self._output_dir)
    initializer = restore.TrainStateInitializer(
      optimizer_def=model.optimizer_def,
      init_fn=model.get_initial_variables,
      input_shapes=input_shapes,
      input_types=input_types,
      partitioner=partitioner,
    )
    self._train_state_axes = initializer.train_state_axes
    self._trainer = self._make_trainer(
      initializer, multihost.broadcast_int(init_random_seed), list(eval_names or ())
    )
    self._checkpoint_manager = self._make_manager(initializer)

  def _make_manager(self, initializer: restore.TrainStateInitializer) -> Any:
    """Makes what writes checkpoints."""
    return restore.create_orbax_checkpoint_manager(
      save_cfg=self._save_checkpoint_cfg,
      train_state=initializer.global_train_state_shape,
      partitioner=self._partitioner,
      model_dir=self._output_dir,
    )

  def _make_trainer(
    self,
    initializer: restore.TrainStateInitializer,
    seed: int,
    eval_names: Sequence[str],
  ) -> trainer_lib.Trainer:
    """Makes or restores the state and hands it to a trainer."""
    init_rng, trainer_rng = run_setup.random_keys(seed, use_hardware_rng=False)
    own = restore.RestoreCheckpointConfig(
      path=self._output_dir, mode='latest', dtype=self._save_checkpoint_cfg.dtype
    )
    given = self._restore_checkpoint_cfg
    train_state = initializer.from_checkpoint_or_scratch(
      [own] if given is None else [given, own], init_rng=init_rng
    )
    restore.log_model_info(
      os.path.join(self._output_dir, 'model-info.txt'),
      initializer.global_train_state_shape,
      self._partitioner,
    )
    return trainer_lib.Trainer(
      model=self._model,
      train_state=train_state,
      partitioner=self._partitioner,
      eval_names=eval_names,
      summary_dir=self._output_dir,
      train_state_axes=initializer.train_state_axes,
      rng=trainer_rng,
      learning_rate_fn=learning_rate.create_learning_rate_scheduler(),
      num_microbatches=None,
    )

  def close(self) -> None:
    """Waits until checkpoints and metrics are written."""
    self._trainer.close()
    self._checkpoint_manager.close()

  # ---- what it is made of ----

  @property
  def trainer(self) -> trainer_lib.Trainer:
    """The trainer; it holds the state."""
    return self._trainer

  @property
  def partitioner(self) -> partitioning.BasePartitioner:
    """The partitioner."""
    return self._partitioner

  @property
  def model(self) -> models.BaseTransformerModel:
    """The model."""
    return self._model

  @property
  def train_state(self) -> train_state_lib.TrainState:
    """The state after the steps so far."""
    return self._trainer.train_state

  @property
  def train_state_axes(self) -> train_state_lib.TrainState:
    """Mesh axes of the state."""
    return self._train_state_axes

  @property
  def train_summary(self) -> Mapping[str, Any]:
    """Metrics of the last training step.

    Raises:
      ValueError: if there was none yet.
    """
    if self._train_summary is None:
      raise ValueError('There is no summary before the first training step.')
    return self._train_summary.result()

  @property
  def step(self) -> int:
    """Training steps so far, those before a checkpoint included."""
    return int(np.asarray(self.train_state.step.addressable_data(0)))

  @property
  def features(self) -> Mapping[str, seqio.Feature]:
    """Task features: `inputs` and `targets`."""
    return self._features

  @property
  def batch_size(self) -> int:
    """Examples in a batch, over all hosts."""
    return self._batch_size

  @property
  def task_feature_lengths(self) -> Mapping[str, int]:
    """Lengths of the task features."""
    return self._task_feature_lengths

  @property
  def output_dir(self) -> str:
    """Where checkpoints and metrics are written."""
    return self._output_dir

  @property
  def restore_checkpoint_cfg(self) -> restore.RestoreCheckpointConfig | None:
    """What `checkpoint_path` named, or None."""
    return self._restore_checkpoint_cfg

  @property
  def save_checkpoint_cfg(self) -> restore.SaveCheckpointConfig:
    """How checkpoints are saved."""
    return self._save_checkpoint_cfg

  # ---- training ----

  def train_step(self, examples: Sequence[Example]) -> None:
    """Trains one step; see `train_step_with_preprocessors`."""
    self.train_step_with_preprocessors(examples, DEFAULT_PREPROCESSORS)

  def train_step_with_preprocessors(
    self, examples: Sequence[Example], preprocessors: Preprocessors
  ) -> None:
    """Trains one step on the first batch of the examples and saves a checkpoint.

    Args:
      examples: at least a batch of texts, or of mappings with `input` and
        `target`.
      preprocessors: functions from dataset to dataset.

    Raises:
      ValueError: if there are too few examples.
    """
    if self._trainer.stop_training:
      logging.info('No step is trained: an action asked for the end.')
      return
    layout = self._partitioner.get_data_layout(self._batch_size)
    _, features = self._datasets(examples, preprocessors)
    rows = self._batch_size // layout.num_shards
    batches = (
      features.take(self._batch_size)
      .shard(layout.num_shards, layout.shard_id)
      .padded_batch(rows, drop_remainder=True)
      .as_numpy_iterator()
    )
    batch = next(batches, None)
    if batch is None:
      raise ValueError(
        'A step needs a whole batch: give more examples, or make the batch smaller.'
        f' Got: {len(examples)} examples / a batch of {self._batch_size}.'
      )
    self.train_step_from_batch_iterator(iter([batch]))
    self.save_checkpoint()

  def train_step_from_batch_iterator(
    self, iterator: Iterator[Mapping[str, Any]]
  ) -> None:
    """Trains one step on the next batch of model features; saves nothing."""
    self._train_summary = self._trainer.train(iterator, 1, start_step=self.step)
    # The caller wants to know of a bad step now.
    self._train_summary.result()

  def save_checkpoint(self) -> None:
    """Writes the state to `output_dir` and waits until it is there."""
    self._checkpoint_manager.save(
      self.train_state, self._save_checkpoint_cfg.state_transformation_fns
    )
    self._checkpoint_manager.wait_until_finished()

  # ---- data ----

  def _datasets(
    self, examples: Sequence[Example], preprocessors: Preprocessors
  ) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """Task features and model features of examples."""
    task_features = get_dataset_from_natural_text_examples(
      examples, preprocessors, self._task_feature_lengths, self._features
    )
    converter = self._model.FEATURE_CONVERTER_CLS(pack=False)
    return task_features, converter(
      task_features, task_feature_lengths=self._task_feature_lengths
    )


def _given(
  path: str, mode: str, dtype: str | None
) -> restore.RestoreCheckpointConfig | None:
  """What the caller wants to start from, or None.

  Raises:
    ValueError: if that is several checkpoints.
  """
  if not path:
    return None
  if mode == 'all':
    raise ValueError(
      "An interactive model has one state; restore_mode is 'specific' or 'latest'."
      " Got: 'all'."
    )
  return restore.RestoreCheckpointConfig(path=path, mode=mode, dtype=dtype)
