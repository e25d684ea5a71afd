"""Which data a position in the data is one of.

TensorFlow restores a position into any pipeline of the same shape. A description beside
it tells whether the files behind the pipeline are still those that it was saved over.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from t5x import data, task_lookup

if TYPE_CHECKING:
  import seqio

# Questions to a remote file system that are under way at once.
_ASKED_AT_ONCE = 32


def describe(cfg: data.DatasetConfig) -> dict[str, str]:
  """Describes the data that a configuration names.

  Files count by name and size, not by folder: a corpus may be moved.

  Args:
    cfg: of a task or mixture; or of something else that `get_dataset_fn` reads.

  Returns:
    `task`, `split`, and `files`: a digest of the names and sizes of all files that
    seqio knows.
  """
  import seqio

  tasks = []
  if task_lookup.is_known(cfg.mixture_or_task_name):
    tasks = seqio.get_subtasks(data.find_provider(cfg))
  lines = [
    f'{task.name} {line}' for task in tasks for line in _names_and_sizes(task, cfg)
  ]
  digest = hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16]
  return {'task': cfg.task_name, 'split': cfg.split, 'files': digest}


def _names_and_sizes(task: seqio.Task, cfg: data.DatasetConfig) -> Iterator[str]:
  """A line a file of the task's split; for what is no file, its name alone."""
  import seqio
  import tensorflow as tf

  def size(path: str) -> str:
    try:
      return str(tf.io.gfile.stat(path).length)
    except tf.errors.OpError:  # No file: a function, or a data set that has a reader.
      return ''

  if cfg.use_cached and task.cache_dir:
    # Written last, with the counts of all that was cached.
    paths: Sequence[str] = [seqio.utils.get_cached_info_path(task.cache_dir, cfg.split)]
  else:
    paths = task.source.list_shards(cfg.split)
  with concurrent.futures.ThreadPoolExecutor(_ASKED_AT_ONCE) as threads:
    for path, length in zip(paths, threads.map(size, paths), strict=True):
      yield f'{os.path.basename(path)} {length}'


def differences(saved: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
  """What sets two descriptions apart, in words; nothing if they are equal."""
  told = [
    f"the {field} was '{saved.get(field)}' and is '{present[field]}'"
    for field in ('task', 'split')
    if saved.get(field) != present[field]
  ]
  if not told and saved.get('files') != present['files']:
    told.append('its files have other names or sizes than then')
  return told
