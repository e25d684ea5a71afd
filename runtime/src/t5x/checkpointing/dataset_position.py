"""The position in the training data, as an item of an Orbax checkpoint.

The files are those of `tf.train.Checkpoint`, named as upstream names them:
`dataset/train_ds-<shard>-of-<shards>.*`, or, where several processes write,
`dataset/process_<i>-of-<n>/train_ds-…`. Beside them, `train_ds-….source.json` says in
which data the position is; upstream writes none and does not look for it.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import clu.data.dataset_iterator as clu_iterators
import jax
import orbax.checkpoint as ocp
from etils import epath

from t5x import data_source

BEGIN_ANEW = (
  'To restart the data, set utils.SaveCheckpointConfig.save_dataset = False (and, '
  'if it is True, utils.RestoreCheckpointConfig.restore_dataset = False).'
)

# Behind the stem of a position's files.
_SOURCE = '.source.json'


class DataPositionError(ValueError):
  """The position in the data cannot be saved, or does not fit the pipeline."""


@dataclasses.dataclass
class _TfIterator:
  """A bare `tf.data.Iterator` with the two methods of clu's iterators."""

  iterator: Any

  def save(self, filename: str):
    import tensorflow as tf

    tf.train.Checkpoint(ds=self.iterator).write(filename)

  def restore(self, filename: str):
    import tensorflow as tf

    tf.train.Checkpoint(ds=self.iterator).read(filename).assert_consumed()


def _as_saveable(iterator: Any) -> Any:
  if isinstance(iterator, clu_iterators.DatasetIterator):
    return iterator
  return _TfIterator(iterator)


def _find(folder: epath.Path, filename: str) -> epath.Path:
  """The stem of this shard's files, whichever process wrote them.

  Raises:
    DataPositionError: there are none.
  """
  places = (folder, *sorted(folder.glob('process_*')))
  for place in places:
    if any(place.glob(filename + '*')):
      return place / filename
  prefix = filename.split('-')[0]
  others = {f.name.split('.')[0] for p in places for f in p.glob(prefix + '-*')}
  if others:
    raise DataPositionError(
      f"'{folder}' holds the positions {', '.join(sorted(others))}, not {filename}: "
      'the run was started with another number of data shards. Resume it with as '
      f'many hosts as before. {BEGIN_ANEW}'
    )
  raise DataPositionError(
    f"'{folder}' holds no position in the data: the checkpoint was saved without "
    f'save_dataset. {BEGIN_ANEW}'
  )


def _refuse_other_data(stem: epath.Path, source: Mapping[str, str] | None) -> None:
  """Compares the data of a saved position with those of the run.

  Raises:
    DataPositionError: they are others.
  """
  note = stem.parent / (stem.name + _SOURCE)
  if source is None or not note.exists():
    return
  apart = data_source.differences(json.loads(note.read_text()), source)
  if apart:
    raise DataPositionError(
      f"The position in '{stem}' is one in other data: {', '.join(apart)}. Go on with "
      f'the data of then, or in another MODEL_DIR. {BEGIN_ANEW}'
    )


class DatasetCheckpointHandler(ocp.CheckpointHandler):
  """Writes and reads the position of this host's training iterator."""

  def __init__(self, checkpoint_filename: str, should_write_dataset_ckpt: bool):
    """Names the file of this host.

    Args:
      checkpoint_filename: stem of the shard's files.
      should_write_dataset_ckpt: whether this host writes; of several hosts that
        read the same shard, one does.
    """
    self._filename = checkpoint_filename
    self._writes = should_write_dataset_ckpt

  def save(self, directory: epath.Path, args: 'DatasetArgs'):
    """Writes the position.

    Args:
      directory: the item's folder.
      args: holds the iterator.

    Raises:
      DataPositionError: there is no iterator, or its pipeline keeps state that
        TensorFlow cannot save.
    """
    if not self._writes:
      return
    if args.item is None:
      raise DataPositionError('A data position is to be saved, but no iterator given.')
    if jax.process_count() > 1:
      directory = directory / f'process_{jax.process_index()}-of-{jax.process_count()}'
      directory.mkdir()
    try:
      _as_saveable(args.item).save(os.fspath(directory / self._filename))
    except Exception as error:
      if 'is stateful' not in str(error):
        raise
      raise DataPositionError(
        f'The position in the data cannot be saved: {error}. Cache or prepare the '
        'task so that nothing in Python runs while training, or set '
        'utils.SaveCheckpointConfig.save_dataset = False.'
      ) from error
    if source := getattr(args.item, 'source', None):
      (directory / (self._filename + _SOURCE)).write_text(json.dumps(source))

  def restore(self, directory: epath.Path, args: 'DatasetArgs | None' = None) -> Any:
    """Moves an iterator to the saved position.

    All hosts that read a shard read the one file that was written for it.

    Args:
      directory: the item's folder.
      args: holds the iterator.

    Returns:
      The iterator.

    Raises:
      DataPositionError: no iterator, no file for this shard, or the file is of
        another pipeline or of other data.
    """
    if args is None or args.item is None:
      raise DataPositionError('A data position is to be restored to no iterator.')
    stem = _find(epath.Path(directory), self._filename)
    _refuse_other_data(stem, getattr(args.item, 'source', None))
    try:
      _as_saveable(args.item).restore(os.fspath(stem))
    except Exception as error:
      # TensorFlow tells damage (a checksum) from a position of another pipeline.
      if type(error).__name__ == 'DataLossError':
        raise
      raise DataPositionError(
        f"The position in '{stem}' does not fit the data pipeline: {error}. Task, "
        'batch size, lengths, packing and preprocessors must be those it was saved '
        f'with. {BEGIN_ANEW}'
      ) from error
    return args.item


@ocp.args.register_with_handler(
  DatasetCheckpointHandler, for_save=True, for_restore=True
)
@dataclasses.dataclass
class DatasetArgs(ocp.args.CheckpointArgs):
  """The iterator to save or to restore."""

  item: Any = None
