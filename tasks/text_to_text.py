"""Tasks from text to text: what a user registers to fine-tune on data of their own.

Every such task also has the split `input_file`: a file of inputs without targets,
which `t5x.infer` lets a fine-tuned model answer (gin/finetune_infer.gin).
"""

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import seqio
import tensorflow as tf
from absl import logging

from bart_t5x import metrics, preprocessors
from bart_t5x.data import data_root
from bart_t5x.vocabularies import load_vocabulary
from tasks import input_file, readers
from tasks.readers import Record

SPLITS = ('train', 'validation', 'test')

# Shown of what is wrong with a file; the rest is counted.
_SHOWN_FAULTS = 3

# By name of the task: the metric by which its best checkpoint is told.
_HEADLINES: dict[str, str] = {}


class TextTask(seqio.Task):
  """A task that says how much of its texts does not fit into the lengths asked for."""

  def get_dataset(
    self,
    sequence_length: Mapping[str, int] | None = None,
    split: str = 'train',
    *args,
    **kwargs,
  ) -> tf.data.Dataset:
    """See `seqio.Task.get_dataset`; logs a warning where texts will be cut."""
    dataset = super().get_dataset(sequence_length, split, *args, **kwargs)
    if sequence_length:
      texts = self.source.get_dataset(split=split, shuffle=False)
      report_lengths(
        f'{self.name}/{split}', texts, self.output_features, sequence_length
      )
    return dataset


def add_text_to_text_task(
  name: str,
  to_text: Callable[[Record], Mapping[str, str]],
  files: Mapping[str, str] | None = None,
  corpus_dir: str | None = None,
  labels: Sequence[str] = (),
  metric_fns: Sequence[Callable] | None = None,
  postprocess_fn: Callable[..., Any] | None = None,
  read: Callable[[str], Iterable[Record]] | None = None,
  splits: Sequence[str] = SPLITS,
  headline: str | None = None,
) -> seqio.Task:
  """Registers a task from text to text; its files are read when data is asked for.

  Args:
    name: of the task.
    to_text: makes of a record {'inputs': …, 'targets': …}. Further strings pass
      through to `postprocess_fn`.
    files: the file of each split; `readers.FORMATS` tells the formats.
    corpus_dir: the prepared corpus whose vocabulary the model has; None for
      `<data root>/no`.
    labels: all targets there may be, for a task of classes; empty for free text.
    metric_fns: seqio's; None for `metrics.classification` of the labels, or for
      `metrics.reconstruction` where there are none.
    postprocess_fn: seqio's; None to strip blanks.
    read: from a split's name to its records, in place of `files`.
    splits: that `read` has.
    headline: the metric by which the best checkpoint is told, higher being better;
      None for `macro_f1` where there are labels and `chrf` where there are none.

  Returns:
    The task, with features `inputs` and `targets`: `<s>` … `</s>`.

  Raises:
    ValueError: both or neither of `files` and `read` are given, or metrics are given
      without the name of their headline.
  """
  _check_arguments(name, files, read, metric_fns, headline)
  paths = dict(files or {})
  if files is not None:
    splits = tuple(paths)

    def read(split):
      return readers.read_file(paths[split])

  vocabulary = load_vocabulary(corpus_dir or os.path.join(data_root(), 'no'))
  text = seqio.Feature(vocabulary, add_eos=True)

  task = seqio.TaskRegistry.add(
    name,
    task_cls=TextTask,
    source=_source(name, read, splits, paths, to_text, labels),
    preprocessors=[preprocessors.tokenize_for_bart],
    output_features={'inputs': text, 'targets': text},
    postprocess_fn=postprocess_fn or strip,
    metric_fns=_default_metrics(labels) if metric_fns is None else metric_fns,
  )
  _HEADLINES[name] = headline or ('macro_f1' if labels else 'chrf')
  return task


def _check_arguments(name, files, read, metric_fns, headline) -> None:
  """Raises a ValueError where arguments of `add_text_to_text_task` contradict."""
  if (files is None) == (read is None):
    raise ValueError(
      f'task {name!r} needs its data from one place: give either files or read'
    )
  if metric_fns and headline is None:
    raise ValueError(
      f'task {name!r} has metrics of its own: name with headline the one by which its '
      'best checkpoint is told'
    )


def _source(name, read, splits, paths, to_text, labels) -> seqio.FunctionDataSource:
  """The splits of `read`, named in messages by `paths` too, and the file of inputs."""

  def dataset(split: str, shuffle_files: bool = False, seed: int | None = None):
    del shuffle_files, seed  # One file; seqio shuffles its examples.
    if split == input_file.SPLIT:
      return input_file.dataset()
    where = f'{name}/{split}' + (f' ({paths[split]})' if split in paths else '')
    return _dataset(where, read(split), to_text, labels)

  return seqio.FunctionDataSource(
    dataset_fn=dataset, splits=(*splits, input_file.SPLIT)
  )


def headline_of(name: str) -> str | None:
  """The metric by which a task's best checkpoint is told; None for other tasks."""
  return _HEADLINES.get(name)


def strip(text: str, **unused) -> str:
  """The text without blanks around it, under seqio's `postprocess_fn` interface."""
  del unused
  return text.strip()


def _default_metrics(labels: Sequence[str]) -> list[Callable]:
  if labels:
    return [functools.partial(metrics.classification, labels=tuple(labels))]
  return [metrics.reconstruction]


def _dataset(
  where: str,
  records: Iterable[Record],
  to_text: Callable[[Record], Mapping[str, str]],
  labels: Sequence[str],
) -> tf.data.Dataset:
  """A split as scalar strings; fine-tuning data fits into memory.

  Records without inputs or targets are left out, counted and logged.

  Raises:
    ValueError: records cannot be used, or have targets that are none of the labels
      (all are counted, the first ones shown); or no record is left.
  """
  examples, faults, empty, number = [], [], 0, 0
  for number, record in enumerate(records, 1):
    try:
      example = to_text(record)
    except KeyError as e:
      faults.append(f'record {number} has no {e}, but {sorted(record)}')
      continue
    except (AttributeError, IndexError, TypeError, ValueError) as e:
      # A text that is null or a number, say.
      faults.append(f'record {number}: {e}')
      continue
    _check_returned(where, number, example)
    wrong = {k: type(v).__name__ for k, v in example.items() if not isinstance(v, str)}
    if wrong:
      faults.append(f'record {number} has what is no text: {wrong}')
    elif not example['inputs'].strip() or not example['targets'].strip():
      empty += 1
    elif labels and example['targets'] not in labels:
      faults.append(
        f'record {number} has the unknown label {example["targets"]!r} '
        f'(known: {", ".join(labels)})'
      )
    elif examples and set(example) != set(examples[0]):
      faults.append(
        f'record {number} gives {sorted(example)}, those before {sorted(examples[0])}'
      )
    else:
      examples.append(example)
  if faults:
    _refuse(where, faults, number)
  if empty:
    logging.warning(
      '%s: %d of %d records have no inputs or no targets and are left out.',
      where, empty, number,
    )  # fmt: skip
  if not examples:
    raise ValueError(f'{where} has no record with inputs and targets')
  columns = {key: [example[key] for example in examples] for key in examples[0]}
  return tf.data.Dataset.from_tensor_slices(columns)


def _check_returned(where: str, number: int, example: Any) -> None:
  """Raises a ValueError if what `to_text` made of a record are no texts at all."""
  if not isinstance(example, Mapping) or not {'inputs', 'targets'} <= set(example):
    got = sorted(example) if isinstance(example, Mapping) else repr(example)
    raise ValueError(
      f'{where}: its function from a record to texts must return a dictionary with '
      f"'inputs' and 'targets'. Got, of record {number}: {got}"
    )


def _refuse(where: str, faults: Sequence[str], records: int) -> NoReturn:
  """Raises a ValueError with the number of faults and the first of them."""
  more = len(faults) - _SHOWN_FAULTS
  raise ValueError(
    f'{where}: {len(faults)} of {records} records cannot be used: '
    + '; '.join(faults[:_SHOWN_FAULTS])
    + (f'; and {more} more.' if more > 0 else '.')
  )


def report_lengths(
  where: str,
  texts: tf.data.Dataset,
  features: Mapping[str, seqio.Feature],
  sequence_length: Mapping[str, int],
) -> dict[str, int]:
  """Counts, and logs, texts that do not fit with their `<s>` and `</s>`.

  Args:
    where: of the message: task and split.
    texts: of examples with scalar strings named like the features.
    features: with a `BartVocabulary` each.
    sequence_length: of the features.

  Returns:
    How many texts of each feature are too long; features without any are left out.
  """
  longer: dict[str, list[str]] = {name: [] for name in features}
  total = 0
  for example in texts.as_numpy_iterator():
    total += 1
    for name in features.keys() & example.keys() & sequence_length.keys():
      # A token holds a byte or more, so a text of few bytes fits for certain.
      if len(example[name]) > sequence_length[name] - 2:
        longer[name].append(example[name].decode('utf-8'))
  counts = {}
  for name, candidates in longer.items():
    if not candidates:
      continue
    room = sequence_length[name] - 2
    encoded = features[name].vocabulary.tokenizer.encode_batch(candidates)
    sizes = [len(ids) for ids in encoded if len(ids) > room]
    if sizes:
      counts[name] = len(sizes)
      logging.warning(
        "%s: %d of %d %s are longer than TASK_FEATURE_LENGTHS['%s'] = %d and lose "
        'their end; the longest has %d tokens.',
        where, len(sizes), total, name, name, room + 2, max(sizes) + 2,
      )  # fmt: skip
  return counts
