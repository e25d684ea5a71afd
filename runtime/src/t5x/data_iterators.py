"""Iterator from tf.data to the training step."""

import concurrent.futures
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import clu.data.dataset_iterator as clu_iterators
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

DatasetIterator = clu_iterators.DatasetIterator


class ShardedDatasetIterator(DatasetIterator):
  """Yields global arrays made of this host's batches; can be saved and restored.

  The saved state is that after the batches taken: a batch fetched ahead is not lost.
  `source` (see `data.describe_source`) is saved with the state; None if none is saved.
  """

  def __init__(
    self,
    iterator: DatasetIterator,
    partitioner: Any,
    global_shapes: Any,
    saves_state: bool = False,
  ):
    """Wraps an iterator over trees of this host's rows.

    Args:
      partitioner: has `mesh` and `data_partition_spec`.
      global_shapes: tree of the shapes of a batch over all hosts.
      saves_state: whether `save` will be called.
    """
    self._iterator = iterator
    self._sharding = jax.sharding.NamedSharding(
      partitioner.mesh, partitioner.data_partition_spec
    )
    self._global_shapes = global_shapes
    self._saves_state = saves_state
    self.source: Mapping[str, str] | None = None
    self._ahead: concurrent.futures.Future | None = None
    self._state_before: tempfile.TemporaryDirectory | None = None
    self._restored_from: str | None = None

  def _fetch(self) -> Any:
    import tensorflow as tf

    try:
      batch = next(self._iterator)
    except tf.errors.InvalidArgumentError as error:
      if self._restored_from is None:
        raise
      # TensorFlow restores any state; a mismatch fails at the first batch.
      raise ValueError(
        f"The dataset state '{self._restored_from}' does not fit the data. Use the "
        'batch size, lengths and packing it was saved with, or set '
        'utils.SaveCheckpointConfig.save_dataset = False to restart the data. '
        f'TensorFlow: {error}'
      ) from error
    self._restored_from = None
    return jax.tree.map(
      lambda rows, shape: jax.make_array_from_process_local_data(
        self._sharding, np.asarray(rows), tuple(shape)
      ),
      batch,
      self._global_shapes,
    )

  def _forget(self) -> None:
    """Drops the batch fetched ahead, after waiting for its thread."""
    if self._ahead is not None:
      concurrent.futures.wait([self._ahead])
      self._ahead = None
    if self._state_before is not None:
      self._state_before.cleanup()
      self._state_before = None

  def __next__(self):
    if self._ahead is None:
      return self._fetch()
    done, _ = concurrent.futures.wait([self._ahead], timeout=60)
    if not done:
      logging.warning(
        'Still waiting for the first batch. Filling buffers may take long. If the task '
        'filters out all of its examples, no batch will ever arrive.'
      )
    batch = self._ahead.result()
    self._forget()
    return batch

  def peek_async(self) -> None:
    """Starts fetching the next batch in a thread, to fill the pipeline's buffers."""

    def fetch():
      if self._saves_state:
        self._state_before = tempfile.TemporaryDirectory(prefix='t5x_dataset_')
        self._iterator.save(os.path.join(self._state_before.name, 'state'))
      return self._fetch()

    thread = concurrent.futures.ThreadPoolExecutor(1)
    self._ahead = thread.submit(fetch)
    thread.shutdown(wait=False)

  def reset(self):
    self._forget()
    self._iterator.reset()

  @property
  def element_spec(self):
    """Specs of this host's rows."""
    return self._iterator.element_spec

  def save(self, filename):
    """Saves the state after the batches taken, in files with this prefix."""
    if self._ahead is None:
      self._iterator.save(filename)
      return
    concurrent.futures.wait([self._ahead])
    target = epath.Path(filename)
    for part in epath.Path(self._state_before.name).iterdir():
      name = target.name + part.name.removeprefix('state')
      part.copy(target.parent / name, overwrite=True)

  def restore(self, filename):
    """Restores what `save` wrote."""
    self._forget()
    self._iterator.restore(filename)
    self._restored_from = os.fspath(filename)


def _check_state_can_be_saved(dataset: Any, task_name: str | None) -> None:
  """Checks that a pipeline keeps no state outside of tf.data.

  A trial save does not show it: inner pipelines are only built at the first batch.
  """
  import tensorflow as tf

  fail = tf.data.experimental.ExternalStatePolicy.FAIL
  if dataset.options().experimental_external_state_policy not in (None, fail):
    return  # The pipeline's author chose to ignore such state.
  try:
    tf.raw_ops.DatasetToGraphV2(
      input_dataset=tf.data.experimental.to_variant(dataset),
      external_state_policy=fail.value,
    )
  except tf.errors.FailedPreconditionError as error:
    raise ValueError(
      f'save_dataset=True, but the dataset state of {task_name or "the training task"} '
      f'cannot be saved: {error.message}. The cause is a Python function (such as a '
      'tokenizer) or an unseeded random operation. Cache the task, or set '
      'utils.SaveCheckpointConfig.save_dataset = False: a resumed run then starts '
      'its data again.'
    ) from error


def prepare_train_iter(
  train_iter: Any,
  *,
  partitioner: Any,
  checkpoint_cfg: Any,
  data_layout: Any,
  task_name: str | None = None,
  describe_source: Callable[[], Mapping[str, str]] | None = None,
) -> ShardedDatasetIterator:
  """Makes the training iterator from the result of `get_dataset_fn`.

  Prefetches batches, unless the state is saved: prefetching would change the pipeline,
  and upstream T5X could not read the state.

  Args:
    train_iter: this host's `tf.data.Dataset`, or a clu `DatasetIterator`.
    checkpoint_cfg: a `CheckpointConfig`; whether the state is saved or restored.
    data_layout: the partitioner's, for the global batch size.
    task_name: for error messages.
    describe_source: returns a description of the data, to save with the state.

  Raises:
    ValueError: the type or the batch size is wrong, or the state is to be saved and
      cannot be.
  """
  import tensorflow as tf

  save_cfg = checkpoint_cfg.save if checkpoint_cfg else None
  restore_cfg = checkpoint_cfg.restore if checkpoint_cfg else None
  saves = bool(save_cfg and save_cfg.save_dataset)
  restores = bool(restore_cfg and restore_cfg.restore_dataset)
  if isinstance(train_iter, tf.data.Dataset):
    if saves:
      _check_state_can_be_saved(train_iter, task_name)
    if not (saves or restores):
      train_iter = train_iter.prefetch(tf.data.AUTOTUNE)
    train_iter = clu_iterators.TfDatasetIterator(train_iter, checkpoint=True)
  elif not isinstance(train_iter, DatasetIterator):
    raise ValueError(
      f'get_dataset_fn returned a {type(train_iter).__name__}. It must return a '
      'tf.data.Dataset or a clu.data.DatasetIterator.'
    )
  rows = data_layout.batch_size
  for name, spec in train_iter.element_spec.items():
    if spec.shape and spec.shape[0] not in (None, rows // data_layout.num_shards):
      raise ValueError(
        f"Feature '{name}' has {spec.shape[0]} rows on this host. A batch of {rows} in "
        f'{data_layout.num_shards} data shards needs {rows // data_layout.num_shards}.'
      )
  specs = train_iter.element_spec.items()
  global_shapes = {name: (rows, *spec.shape[1:]) for name, spec in specs}
  sharded = ShardedDatasetIterator(train_iter, partitioner, global_shapes, saves)
  if describe_source is not None and (saves or restores):
    sharded.source = describe_source()
  return sharded


def get_zeros_batch_like_dataset(
  dataset: Any, batch_size: int | None = None
) -> Mapping[str, jnp.ndarray]:
  """Returns a batch of zeros shaped like a dataset's elements.

  Args:
    dataset: has a flat `element_spec`.
    batch_size: replaces the first dimension.
  """
  zeros = {}
  for name, spec in dataset.element_spec.items():
    dtype = getattr(spec.dtype, 'as_numpy_dtype', spec.dtype)
    shape = tuple(spec.shape)
    if batch_size:
      shape = (batch_size, *shape[1:])
    zeros[name] = jnp.zeros(shape, dtype)
  return zeros
