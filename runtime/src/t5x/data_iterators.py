"""The iterator between tf.data and the training step."""

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

  `save` writes the state after the batches that were taken: one that was fetched ahead
  is not lost when training resumes. `source` describes the data
  (`data.describe_source`) and is kept with saved states, None if they are not saved.
  """

  def __init__(
    self,
    iterator: DatasetIterator,
    partitioner: Any,
    global_shapes: Any,
    saves_state: bool = False,
  ):
    """Wraps an iterator.

    Args:
      iterator: yields trees of this host's rows.
      partitioner: has `mesh` and `data_partition_spec`.
      global_shapes: tree of shapes of the batch over all hosts.
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
      # TensorFlow restores any state, and fails at its first batch if it does not fit.
      raise ValueError(
        f"No batch could be read from the dataset state '{self._restored_from}'. Batch "
        'size, lengths and packing must be those it was saved with; or set '
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
    """Drops the batch fetched ahead, once its thread has ended."""
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
        'Still waiting for the first batch. Filling buffers may take long; but if the '
        'task filters out all of its examples, no batch will ever come.'
      )
    batch = self._ahead.result()
    self._forget()
    return batch

  def peek_async(self) -> None:
    """Starts to fetch the next batch in a thread, to fill the pipeline's buffers."""

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
    """Saves the state after the batches that were taken, in files of this stem."""
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
  """Checks that nothing in a pipeline keeps state outside of tf.data.

  A trial save would not do: inner pipelines are built with the first batch, so
  that a fresh iterator saves well and the first real save fails.
  """
  import tensorflow as tf

  fail = tf.data.experimental.ExternalStatePolicy.FAIL
  if dataset.options().experimental_external_state_policy not in (None, fail):
    return  # Whoever built the pipeline decided that the state does not matter.
  try:
    tf.raw_ops.DatasetToGraphV2(
      input_dataset=tf.data.experimental.to_variant(dataset),
      external_state_policy=fail.value,
    )
  except tf.errors.FailedPreconditionError as error:
    raise ValueError(
      f'save_dataset=True, but the dataset state of {task_name or "the training task"} '
      f'cannot be saved: {error.message}. A Python function (a tokenizer, say) or an '
      'unseeded random operation does this. Prepare or cache the task without it, or '
      'set utils.SaveCheckpointConfig.save_dataset = False: a resumed run then '
      'restarts its data.'
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
  """Makes the training iterator of what `get_dataset_fn` returned.

  If its state is saved, nothing is prefetched outside the task's own pipeline, so that
  the state also fits the pipeline that upstream builds. Otherwise batches are
  prefetched in the background.

  Args:
    train_iter: this host's `tf.data.Dataset`, or a clu `DatasetIterator`.
    partitioner: lays the batches over the mesh.
    checkpoint_cfg: a `CheckpointConfig`; says whether the state is saved or restored.
    data_layout: the partitioner's, for the global batch size.
    task_name: for messages.
    describe_source: describes the data, to be kept with saved states.

  Raises:
    ValueError: of another type, of another batch size than the layout, or its state is
      to be saved and cannot be.
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
      f'get_dataset_fn returned a {type(train_iter).__name__}; it must return a '
      'tf.data.Dataset or a clu.data.DatasetIterator.'
    )
  rows = data_layout.batch_size
  for name, spec in train_iter.element_spec.items():
    if spec.shape and spec.shape[0] not in (None, rows // data_layout.num_shards):
      raise ValueError(
        f"Feature '{name}' has {spec.shape[0]} rows on this host; a batch of {rows} in "
        f'{data_layout.num_shards} shards of data needs '
        f'{rows // data_layout.num_shards}.'
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
    dataset: a `tf.data.Dataset`, or anything else with a flat `element_spec`.
    batch_size: replaces the first dimension, if given.
  """
  zeros = {}
  for name, spec in dataset.element_spec.items():
    # TensorFlow's dtypes carry their NumPy counterpart in an attribute.
    dtype = getattr(spec.dtype, 'as_numpy_dtype', spec.dtype)
    shape = tuple(spec.shape)
    if batch_size:
      shape = (batch_size, *shape[1:])
    zeros[name] = jnp.zeros(shape, dtype)
  return zeros
