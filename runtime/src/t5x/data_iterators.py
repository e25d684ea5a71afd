"""Iterators over training batches: sharded over the mesh, and resumable.

What `save` writes is the position after the batches that the caller *took*: a
batch looked at with `peek`, or fetched ahead in the background, is not lost when
training resumes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import clu.data.dataset_iterator as clu_iterators
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from t5x import data_damage

if TYPE_CHECKING:
  import tensorflow as tf

DatasetIterator = clu_iterators.DatasetIterator

# The way out where a position does not fit. A run that goes on in its own
# folder restores what it saves; the second setting is for other runs' checkpoints.
BEGIN_ANEW = (
  'To begin the data anew, set utils.SaveCheckpointConfig.save_dataset = False (and, '
  'where it is True, utils.RestoreCheckpointConfig.restore_dataset = False).'
)

# Two files of this stem make a tf.data snapshot: an index and the data.
_SNAPSHOT_STEM = 'position'


def shard_batch(batch: Any, partitioner: Any, global_shapes: Any) -> Any:
  """Puts this host's rows of a batch on its devices.

  Args:
    batch: tree of [rows of this host, ...] NumPy arrays.
    partitioner: has `mesh` and `data_partition_spec`.
    global_shapes: the tree with the shapes of the arrays over all hosts.

  Returns:
    The tree of global `jax.Array`s.

  Raises:
    ValueError: the rows do not spread evenly over the devices.
  """
  sharding = jax.sharding.NamedSharding(
    partitioner.mesh, partitioner.data_partition_spec
  )

  def place(rows, shape):
    shape = tuple(shape)
    try:
      return jax.make_array_from_process_local_data(sharding, np.asarray(rows), shape)
    except ValueError as error:
      raise ValueError(
        f'A batch of shape {shape} cannot be laid over the mesh '
        f'{dict(partitioner.mesh.shape)} by {partitioner.data_partition_spec}; this '
        f'host has {len(rows)} rows. Take a batch size that is a multiple of the '
        'data shards.'
      ) from error

  return jax.tree.map(place, batch, global_shapes)


class ShardedDatasetIterator(DatasetIterator):
  """Turns the local batches of an iterator into global arrays."""

  def __init__(self, iterator: DatasetIterator, partitioner: Any, global_shapes: Any):
    """Wraps an iterator.

    Args:
      iterator: yields trees of this host's rows.
      partitioner: has `mesh` and `data_partition_spec`.
      global_shapes: tree of shapes of the batch over all hosts.
    """
    self._iterator = iterator
    self._partitioner = partitioner
    self._global_shapes = global_shapes
    # What the iterator goes through, where that is known; to name a damaged file.
    self.dataset: tf.data.Dataset | None = None
    self._restored_from: str | None = None

  def __next__(self):
    try:
      batch = next(self._iterator)
    except Exception as error:
      self._refuse_misfit(error)
      if type(error).__name__ != 'DataLossError':  # naming it would import TensorFlow
        raise
      path = None
      if self.dataset is not None:
        with contextlib.suppress(Exception):  # the damage is told in any case
          path = data_damage.damaged_file(self.dataset, error)
      place = path or 'one of its files'
      raise OSError(
        f'The training data is damaged: {data_damage.said(error)}, in {place}. It was '
        'changed or cut off since it was written: copy it again, or make it again.'
      ) from error
    return shard_batch(batch, self._partitioner, self._global_shapes)

  def _refuse_misfit(self, error: Exception):
    """Explains TensorFlow's error if a position holds batches of another pipeline.

    It reads such a position without a word, and stumbles over the batches that were
    under way when it was saved.
    """
    if self._restored_from is None or 'Incompatible shapes' not in str(error):
      return
    shapes = re.search(r'expected (\S+) but got (\S+\])', str(error))
    what = f'batches of {shapes[2]}, not {shapes[1]}' if shapes else 'other batches'
    raise ValueError(
      f"The position in '{self._restored_from}' does not fit the data pipeline: it "
      f'holds {what}. Batch size, lengths and packing must be those it was saved with. '
      f'{BEGIN_ANEW}'
    ) from error

  def reset(self):
    self._iterator.reset()

  @property
  def element_spec(self):
    """Specs of this host's rows."""
    return self._iterator.element_spec

  def save(self, filename):
    self._iterator.save(filename)

  def restore(self, filename):
    self._iterator.restore(filename)
    self._restored_from = os.fspath(filename)

  @property
  def iterator(self) -> Any:
    """The innermost iterator: TensorFlow's, where there is one."""
    if isinstance(self._iterator, clu_iterators.TfDatasetIterator):
      return self._iterator.iterator
    return self._iterator


class ResumableIterator(DatasetIterator):
  """Allows a look at the next batch, and saves as if nobody had looked.

  clu's `PeekableDatasetIterator` saves the position behind a batch that was
  only looked at: resuming from such a checkpoint skips the batch.
  """

  def __init__(self, iterator: DatasetIterator, *, saves_position: bool):
    """Wraps an iterator.

    Args:
      iterator: where batches come from.
      saves_position: whether `save` will be called. If so, the position is noted
        down before each look, which costs as much as one save.
    """
    self._iterator = iterator
    self._saves_position = saves_position
    self._lock = threading.RLock()
    self._looked_at: list[Any] = []  # At most one batch.
    # Of the data, as `data_source.describe` gives it, where positions are saved.
    self.source: Mapping[str, str] | None = None
    self._position_before: tempfile.TemporaryDirectory | None = None

  def _forget_look(self):
    self._looked_at.clear()
    if self._position_before is not None:
      self._position_before.cleanup()
      self._position_before = None

  def __next__(self):
    with self._lock:
      if not self._looked_at:
        return next(self._iterator)
      batch = self._looked_at[0]
      self._forget_look()
      return batch

  def peek(self) -> Any:
    """The next batch, which `next` will give once more.

    Returns:
      The batch.

    Raises:
      StopIteration: there is none.
    """
    with self._lock:
      if not self._looked_at:
        if self._saves_position:
          self._position_before = tempfile.TemporaryDirectory(prefix='t5x_position_')
          self._iterator.save(os.path.join(self._position_before.name, _SNAPSHOT_STEM))
        try:
          self._looked_at.append(next(self._iterator))
        except BaseException:
          self._forget_look()
          raise
      return self._looked_at[0]

  def peek_async(self) -> concurrent.futures.Future:
    """Looks at the next batch in a thread, to warm the pipeline up.

    Returns:
      The future of the batch.
    """
    looker = concurrent.futures.ThreadPoolExecutor(1, 't5x_peek')
    future = looker.submit(self.peek)
    looker.shutdown(wait=False)
    return future

  def reset(self):
    with self._lock:
      self._forget_look()
      self._iterator.reset()

  @property
  def element_spec(self):
    """Specs of this host's rows."""
    return self._iterator.element_spec

  def save(self, filename):
    """Saves the position after the batches that were taken.

    Args:
      filename: stem of the files to write.
    """
    with self._lock:
      if not self._looked_at:
        self._iterator.save(filename)
        return
      if self._position_before is None:
        raise ValueError(
          'A batch was looked at and the position before it was not kept, so the '
          'position cannot be saved. Set CheckpointConfig.save.save_dataset = True '
          'before the run, or take the batch first.'
        )
      target = epath.Path(filename)
      for part in epath.Path(self._position_before.name).iterdir():
        suffix = part.name.removeprefix(_SNAPSHOT_STEM)
        part.copy(target.parent / (target.name + suffix), overwrite=True)

  def restore(self, filename):
    """Goes to a saved position.

    Args:
      filename: what was given to `save`.
    """
    with self._lock:
      self._forget_look()
      self._iterator.restore(filename)


def check_position_can_be_saved(dataset: tf.data.Dataset, task_name: str | None = None):
  """Checks that nothing in a pipeline keeps state outside of tf.data.

  A trial save would not do: inner pipelines are built with the first batch, so
  that a fresh iterator saves well and the first real save fails.

  Args:
    dataset: the pipeline.
    task_name: for the message.

  Raises:
    ValueError: a step keeps state that TensorFlow cannot save.
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
    culprit = re.search(r'(\w+) is stateful', error.message)
    which = f"task '{task_name}'" if task_name else 'the training task'
    raise ValueError(
      f'save_dataset=True, but the position in the data of {which} cannot be saved: '
      f'{culprit.group(0) if culprit else error.message}. A Python function (a '
      'tokenizer, say) or an unseeded random operation in the pipeline does this. '
      'Prepare or cache the task so that no such step is left, or set '
      'utils.SaveCheckpointConfig.save_dataset = False: a resumed run then starts '
      'its data anew.'
    ) from error


def first_batch(
  looking: concurrent.futures.Future, task_name: str, patience_s: float = 60.0
) -> Any:
  """Waits for the first batch; says so where it does not come.

  A pipeline that repeats what its filters then leave out runs for ever, silently.

  Args:
    looking: of `ResumableIterator.peek_async`.
    task_name: for the message.
    patience_s: seconds before the message.

  Returns:
    The batch.
  """
  done, _ = concurrent.futures.wait([looking], patience_s)
  if not done:
    logging.warning(
      "Still waiting for the first batch of '%s', after %.0f s. Filling buffers may "
      'take that long; but if the task leaves out all of its examples, no batch will '
      'ever come. Then stop the run and see what its preprocessors keep.',
      task_name,
      patience_s,
    )
  return looking.result()


def _check_rows(element_spec: Mapping[str, Any], data_layout: Any) -> None:
  """Checks that this host's batches have the rows that the layout gives it.

  Raises:
    ValueError: they have not.
  """
  for name, spec in element_spec.items():
    rows = spec.shape[0] if spec.shape else None
    if rows is not None and rows * data_layout.num_shards != data_layout.batch_size:
      raise ValueError(
        f"Feature '{name}' has {rows} rows on this host; {data_layout.num_shards} "
        f'shards of data and a batch size of {data_layout.batch_size} ask for '
        f'{data_layout.batch_size // data_layout.num_shards}.'
      )


def prepare_train_iter(
  train_iter: tf.data.Dataset | DatasetIterator,
  *,
  partitioner: Any,
  checkpoint_cfg: Any,
  data_layout: Any,
  task_name: str | None = None,
  describe_source: Callable[[], Mapping[str, str]] | None = None,
) -> ResumableIterator:
  """Makes the training iterator of what `get_dataset_fn` returned.

  Where the position is saved, nothing is fetched ahead outside the pipeline
  that the task defines, so that the saved position also fits the pipeline
  upstream builds. Elsewhere a batch or more are assembled in the background.

  Args:
    train_iter: this host's dataset, or an iterator over its batches.
    partitioner: lays the batches over the mesh.
    checkpoint_cfg: a `CheckpointConfig`; says whether positions are saved.
    data_layout: the partitioner's, for the global batch size.
    task_name: for messages.
    describe_source: says which data this is, to be kept with saved positions and
      compared with that of a restored one.

  Returns:
    The iterator over global batches.

  Raises:
    ValueError: of another type, of another batch size than the layout, or a
      position has to be saved and cannot be.
  """
  import tensorflow as tf

  save_cfg = checkpoint_cfg.save if checkpoint_cfg else None
  restore_cfg = checkpoint_cfg.restore if checkpoint_cfg else None
  saves = bool(save_cfg and save_cfg.save_dataset)
  restores = bool(restore_cfg and restore_cfg.restore_dataset)
  dataset = train_iter if isinstance(train_iter, tf.data.Dataset) else None
  if dataset is not None:
    if saves:
      check_position_can_be_saved(train_iter, task_name)
    if not (saves or restores):
      train_iter = train_iter.prefetch(tf.data.AUTOTUNE)
    train_iter = clu_iterators.TfDatasetIterator(train_iter, checkpoint=True)
  elif not isinstance(train_iter, DatasetIterator):
    raise ValueError(
      f'get_dataset_fn returned a {type(train_iter).__name__}; it must return a '
      'tf.data.Dataset or a clu.data.DatasetIterator.'
    )
  _check_rows(train_iter.element_spec, data_layout)
  rows = data_layout.batch_size
  specs = train_iter.element_spec.items()
  global_shapes = {name: (rows, *spec.shape[1:]) for name, spec in specs}
  sharded = ShardedDatasetIterator(train_iter, partitioner, global_shapes)
  sharded.dataset = dataset
  resumable = ResumableIterator(sharded, saves_position=saves)
  if describe_source is not None and (saves or restores):
    resumable.source = describe_source()
  return resumable


def get_zeros_batch_like_spec(
  batch_spec: Mapping[str, jax.ShapeDtypeStruct],
) -> Mapping[str, jnp.ndarray]:
  """A batch of zeros, to compile with.

  Args:
    batch_spec: feature name -> shape and dtype.

  Returns:
    feature name -> zeros of that shape and dtype.
  """
  return {name: jnp.zeros(spec.shape, spec.dtype) for name, spec in batch_spec.items()}


def get_zeros_batch_like_dataset(
  dataset: Any, batch_size: int | None = None
) -> Mapping[str, jnp.ndarray]:
  """A batch of zeros shaped like a dataset's elements.

  Args:
    dataset: a `tf.data.Dataset`, or anything else with a flat `element_spec`.
    batch_size: replaces the first dimension, if given.

  Returns:
    feature name -> zeros.
  """
  zeros = {}
  for name, spec in dataset.element_spec.items():
    # TensorFlow's dtypes carry their NumPy counterpart in an attribute.
    dtype = getattr(spec.dtype, 'as_numpy_dtype', spec.dtype)
    shape = tuple(spec.shape)
    if batch_size:
      shape = (batch_size, *shape[1:])
    zeros[name] = jax.ShapeDtypeStruct(shape, dtype)
  return get_zeros_batch_like_spec(zeros)
