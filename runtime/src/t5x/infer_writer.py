"""Writing predictions chunk by chunk, so that an interrupted run can go on.

A task's results grow in a folder of their own, one file a chunk. A chunk counts once
its `.COMPLETED` mark is there, which is made last; every file appears whole or not at
all. When all chunks are there they are joined, and the folder goes.
"""

import concurrent.futures
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from t5x import whole_files

gfile = tf.io.gfile

# (one prediction or score an example, auxiliary outputs with an entry an example)
Inferences = tuple[Sequence[Any], Mapping[str, Any]]
WriteFn = Callable[
  [str, Inferences, tf.data.Dataset, str, seqio.Vocabulary | None], None
]
MergeFn = Callable[[str, str, str, int | None], None]

MODES = ('predict', 'score', 'predict_with_aux')
DONE_MARK = '.COMPLETED'
# Settings named in a message before the rest is counted.
_SHOWN_CHANGES = 5


class FailFastThreadPoolExecutor(concurrent.futures.ThreadPoolExecutor):
  """A thread pool whose failures surface in the main thread at the next call.

  Only the thread that made it should use it.
  """

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self._running: list[concurrent.futures.Future] = []

  def check_for_exceptions(self, wait: bool = False) -> None:
    """Raises what a task raised.

    Args:
      wait: for all tasks; otherwise only those that have ended are looked at.
    """
    if wait:
      concurrent.futures.wait(self._running)
    ended = [future for future in self._running if future.done()]
    self._running = [future for future in self._running if not future.done()]
    for future in ended:
      future.result()

  def submit(self, *args, **kwargs) -> concurrent.futures.Future:
    """Hands a task in, after a look at those before it."""
    self.check_for_exceptions()
    future = super().submit(*args, **kwargs)
    self._running.append(future)
    return future

  def shutdown(self, *args, wait: bool = False, **kwargs) -> None:
    """Ends the pool; with `wait`, after all tasks and with their exceptions."""
    try:
      self.check_for_exceptions(wait=wait)
    finally:
      super().shutdown(*args, wait=wait, **kwargs)


def _write_whole(path: str, lines: Iterator[str]) -> None:
  """Writes a text file that is either whole or not there."""
  with whole_files.whole_file(path) as file:
    for line in lines:
      file.write(line)


def _plain(value: Any) -> Any:
  """What JSON knows of bytes, NumPy and JAX values, dictionaries and lists of them."""
  if isinstance(value, bytes):
    return value.decode('utf-8', errors='replace')
  if isinstance(value, Mapping):
    return {key: _plain(one) for key, one in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(one) for one in value]
  if isinstance(value, np.generic | np.ndarray | jax.Array):
    array = np.asarray(value)
    if array.dtype == jax.numpy.bfloat16:
      array = array.astype(np.float32)
    return _plain(array.tolist())
  return value


def _without_padding(ids: Any) -> list:
  """Token ids up to the first 0, for a sequence or a stack of them."""
  ids = _plain(ids)
  if ids and isinstance(ids[0], list):
    return [_without_padding(one) for one in ids]
  return ids[: ids.index(0)] if 0 in ids else ids


def _decoded(vocabulary: seqio.Vocabulary, ids: Any) -> Any:
  """Text of [length] token ids, or the list of texts of [n, length]."""
  ids = _plain(ids)
  if ids and isinstance(ids[0], list):
    return [_decoded(vocabulary, one) for one in ids]
  return _plain(vocabulary.decode(ids))


def _shown_inputs(
  example: Mapping[str, Any], every: bool, only: Sequence[str] | None
) -> dict[str, Any]:
  """Chooses the fields of an example that are written out."""
  suffix = '_pretokenized'
  if every:
    return dict(example)
  if only is None:
    return {name: value for name, value in example.items() if name.endswith(suffix)}
  return {
    name: value
    for name, value in example.items()
    if name in only or (name.endswith(suffix) and name.removesuffix(suffix) in only)
  }


def write_inferences_to_file(
  path: str,
  inferences: Inferences,
  task_ds: tf.data.Dataset,
  mode: str,
  vocabulary: seqio.Vocabulary | None = None,
  json_encoder_cls: type[json.JSONEncoder] = seqio.TensorAndNumpyEncoder,
  include_all_inputs: bool = False,
  input_fields_to_include: Sequence[str] | None = None,
  output_ids: bool = False,
) -> None:
  """Writes one JSON object a line: the example's text and what the model made of it.

  The keys are `inputs` and, by mode, `prediction` (and `prediction_tokens`), `score`,
  `aux`.

  Args:
    path: file to write; it appears when it is whole.
    inferences: (predictions, aux). Predictions are [length] token ids an example, or
      [decodes, length] where the model returns several; in mode 'score', numbers. Aux
      maps names to one value an example, and is empty where the mode has none.
    task_ds: the task's examples in the same order.
    mode: 'predict', 'score' or 'predict_with_aux'.
    vocabulary: turns token ids into text; needed to predict.
    json_encoder_cls: for values that JSON does not know.
    include_all_inputs: write every field of the example, not only `*_pretokenized`.
    input_fields_to_include: write these fields and their `*_pretokenized` twins.
    output_ids: also write the predicted ids, without padding.

  Raises:
    ValueError: unknown mode, no vocabulary to predict with, or both ways of choosing
      fields at once.
  """
  if mode not in MODES:
    raise ValueError(f'mode must be one of {", ".join(MODES)}. Got: {mode!r}.')
  predicts = mode != 'score'
  if predicts and vocabulary is None:
    raise ValueError(f'mode {mode!r} needs a vocabulary to turn ids into text.')
  if include_all_inputs and input_fields_to_include is not None:
    raise ValueError(
      'include_all_inputs and input_fields_to_include exclude each other; got '
      f'True and {input_fields_to_include!r}.'
    )
  outputs, aux = inferences

  def lines() -> Iterator[str]:
    for i, example in enumerate(task_ds.as_numpy_iterator()):
      shown = _shown_inputs(example, include_all_inputs, input_fields_to_include)
      row = {'inputs': _plain(shown)}
      if predicts:
        row['prediction'] = _decoded(vocabulary, outputs[i])
        if output_ids:
          row['prediction_tokens'] = _without_padding(outputs[i])
      else:
        row['score'] = _plain(outputs[i])
      if aux or mode == 'predict_with_aux':
        row['aux'] = _plain(_one_of(aux, i))
      yield json.dumps(row, cls=json_encoder_cls, ensure_ascii=False) + '\n'

  _write_whole(path, lines())


def _one_of(aux: Mapping[str, Any], i: int) -> Any:
  """Entry `i` of every leaf, where a leaf is a list or an array over examples."""
  return jax.tree.map(
    lambda leaf: leaf[i], aux, is_leaf=lambda x: isinstance(x, list | np.ndarray)
  )


def _chunks_among(names: Iterable[str], output_fname: str) -> list[str]:
  """The names that are those of an output's chunks, by their numbers."""
  is_chunk = re.compile(re.escape(output_fname) + r'-chunk(\d{5,})').fullmatch
  found = filter(None, map(is_chunk, names))
  return [match[0] for match in sorted(found, key=lambda match: int(match[1]))]


def merge_chunks_to_file(
  output_dir: str, output_fname: str, tmp_dir: str, step: int | None
) -> None:
  """Joins the chunks of a task into one file, in order.

  Args:
    output_dir: where the joined file goes.
    output_fname: its name; the chunks are called `<name>-chunk00000` and so on.
    tmp_dir: where the chunks lie.
    step: the checkpoint's step; not used here, other merge functions may name it.

  Raises:
    FileNotFoundError: there is no chunk, or one is missing.
  """
  del step
  # Listed, as a pattern would take brackets in the folder's name for its own.
  chunks = _chunks_among(gfile.listdir(tmp_dir), output_fname)
  if not chunks:
    raise FileNotFoundError(
      f'No results in {tmp_dir}: the split has no example, or all were filtered out.'
    )
  for number, chunk in enumerate(chunks):
    if chunk != f'{output_fname}-chunk{number:05}':
      raise FileNotFoundError(
        f'Chunk {number} is missing in {tmp_dir}. Delete that folder to start anew.'
      )
  path = os.path.join(output_dir, output_fname)
  with whole_files.whole_file(path, 'wb') as joined:
    for chunk in chunks:
      with gfile.GFile(os.path.join(tmp_dir, chunk), 'rb') as file:
        shutil.copyfileobj(file, joined)
  logging.info('Results: %s', path)


class TaskOutput:
  """The files of one task and shard: chunks, positions in the data, the result.

  Several may share the folder of the chunks, one a mode: the names of all files in it
  begin with that of the result.
  """

  def __init__(
    self, output_dir: str, tmp_dir: str, name: str, settings: Mapping[str, Any]
  ):
    """Names the files; writes nothing.

    Args:
      output_dir: where the result goes.
      tmp_dir: where the chunks go.
      name: of the result.
      settings: JSON values on which the result depends; two runs that share it must
        agree.
    """
    self.output_dir = output_dir
    self.tmp_dir = tmp_dir
    self.name = name
    self._settings = json.loads(json.dumps(settings))  # As they are when read back.

  def chunk_path(self, chunk: int) -> str:
    """Path of a chunk's results."""
    return os.path.join(self.tmp_dir, f'{self.name}-chunk{chunk:05}')

  def position_path(self, chunk: int) -> str:
    """Stem of the files with the position in the data behind a chunk."""
    return os.path.join(self.tmp_dir, f'{self.name}-position{chunk:05}')

  def has_position(self, chunk: int) -> bool:
    """Whether the position behind a chunk was saved."""
    return gfile.exists(self.position_path(chunk) + '.index')

  def _remove(self, stem: str) -> None:
    """Removes the files in the chunks' folder whose names begin so."""
    for name in gfile.listdir(self.tmp_dir):
      if name.startswith(stem):
        gfile.remove(os.path.join(self.tmp_dir, name))

  @property
  def _mark(self) -> str:
    return os.path.join(self.output_dir, self.name + DONE_MARK)

  def is_complete(self) -> bool:
    """Whether an earlier run has finished this task.

    Raises:
      ValueError: it has, with other settings.
    """
    if not gfile.exists(self._mark):
      return False
    with gfile.GFile(self._mark) as file:
      changed = self._changed_since(file.read())
    if changed:
      raise ValueError(
        f'{self.name} in {self.output_dir} is complete, and was made with other '
        f'settings: {changed}. Write to another folder (INFER_OUTPUT_DIR), or delete '
        f'it and {self.name}{DONE_MARK} to make it anew.'
      )
    return True

  def claim(self) -> None:
    """Notes what these chunks are made with, or checks it against an earlier run's.

    Raises:
      ValueError: chunks of a run with other settings lie there.
    """
    gfile.makedirs(self.tmp_dir)
    path = os.path.join(self.tmp_dir, f'{self.name}-settings.json')
    if not gfile.exists(path):
      _write_whole(path, iter([json.dumps(self._settings)]))
      return
    with gfile.GFile(path) as file:
      changed = self._changed_since(file.read())
    if changed:
      raise ValueError(
        f'{self.tmp_dir} holds the beginning of a run with other settings: {changed}. '
        'Restore them, or delete the folder to start anew.'
      )

  def _changed_since(self, noted: str) -> str:
    """What sets the settings of an earlier run apart, in words; '' if nothing.

    Args:
      noted: its settings in JSON; '' if it noted none, as T5X's runs.
    """
    earlier = json.loads(noted) if noted else self._settings
    changed = [
      f'{name} was {earlier.get(name, "unset")} and is {value}'
      for name, value in {**dict.fromkeys(earlier, 'unset'), **self._settings}.items()
      if earlier.get(name, 'unset') != value
    ]
    more = len(changed) - _SHOWN_CHANGES
    return '; '.join(changed[:_SHOWN_CHANGES]) + (f'; and {more} more' * (more > 0))

  def chunks_done(self) -> int:
    """How many chunks from the first on are whole."""
    done = 0
    while gfile.exists(self.chunk_path(done) + DONE_MARK):
      done += 1
    return done

  def finish_chunk(self, chunk: int) -> None:
    """Marks a chunk as whole and drops the position before it."""
    _write_whole(self.chunk_path(chunk) + DONE_MARK, iter(()))
    if chunk:
      self._remove(os.path.basename(self.position_path(chunk - 1)) + '.')

  def finish(self, merge_fn: MergeFn | None, step: int | None) -> None:
    """Joins the chunks, if wanted, marks the task as done and cleans up."""
    if merge_fn is not None:
      merge_fn(self.output_dir, self.name, self.tmp_dir, step)
    _write_whole(self._mark, iter([json.dumps(self._settings)]))
    if merge_fn is not None:
      self._remove(self.name + '-')
      if not gfile.listdir(self.tmp_dir):
        gfile.rmtree(self.tmp_dir)
