"""Text-to-text tasks, to fine-tune on one's own data.

Each also has the split `input_file`: inputs without targets, for `t5x.infer`
(gin/finetune_infer.gin).
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from bart_t5x import metrics, preprocessors
from bart_t5x.data import data_root
from bart_t5x.vocabularies import load_vocabulary
from tasks import input_file, readers
from tasks.readers import Record

SPLITS = ('train', 'validation', 'test')


class TextSource(seqio.DataSource):
  """Texts tokenized in memory.

  An example has `inputs` and `targets`, int32 [n] without `<s>` and `</s>`, their texts
  as `…_pretokenized`, and all other columns.
  """

  def __init__(
    self,
    read: Callable[[str], Mapping[str, Sequence[str]]],
    splits: Sequence[str],
    features: Mapping[str, seqio.Feature],
  ):
    """`read` returns the columns of a split; `features` have `BartVocabulary`s."""
    super().__init__(splits=splits)
    self._read, self._features = read, features
    self.sizes: dict[str, list[int]] = {}  # tokens per text, of the last split read

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return False

  def list_shards(self, split: str) -> Sequence[str]:
    return [split]

  def get_dataset(
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **unused,
  ) -> tf.data.Dataset:
    """Returns all examples in order: seqio shuffles and shards them."""
    del shuffle, seed, shard_info, unused
    columns = dict(self._read(split))
    for name, feature in self._features.items():
      texts = columns[f'{name}_pretokenized'] = columns[name]
      vocabulary = feature.vocabulary
      if vocabulary.templates:
        ids = [vocabulary.encode(text) for text in texts]
      else:
        ids = vocabulary.tokenizer.encode_batch(texts)
      self.sizes[name] = [len(row) for row in ids]
      flat = np.fromiter(itertools.chain.from_iterable(ids), np.int32)
      columns[name] = tf.RaggedTensor.from_row_lengths(flat, self.sizes[name])
    return tf.data.Dataset.from_tensor_slices(columns)


class TextTask(seqio.Task):
  """A task of a `TextSource`; logs how many texts are cut."""

  headline: str | None = None  # the metric that decides on the best checkpoint

  def get_dataset(
    self,
    sequence_length: Mapping[str, int] | None = None,
    split: str = 'train',
    *args,
    **kwargs,
  ) -> tf.data.Dataset:
    dataset = super().get_dataset(sequence_length, split, *args, **kwargs)
    for name, sizes in self.source.sizes.items():
      limit = (sequence_length or {}).get(name)
      longer = [size for size in sizes if limit is not None and size > limit - 2]
      if longer:
        logging.warning(
          "%s/%s: %d of %d %s are longer than TASK_FEATURE_LENGTHS['%s'] = %d and "
          'lose their end; the longest has %d tokens.',
          self.name, split, len(longer), len(sizes), name, name, limit, max(longer) + 2,
        )  # fmt: skip
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
  """Registers a text-to-text task with features `inputs` and `targets`.

  Args:
    name: of the task.
    to_text: makes {'inputs': …, 'targets': …} of a record. Other strings are passed to
      `postprocess_fn`.
    files: the file of each split, in one of `readers.FORMATS`.
    corpus_dir: the prepared corpus of the model's vocabulary; None for `<data
      root>/no`.
    labels: all possible targets of a classification task; empty for free text.
    metric_fns: seqio's; by default `metrics.classification` if there are labels, else
      `metrics.reconstruction`.
    postprocess_fn: seqio's; by default strips white space.
    read: returns the records of a split, instead of `files`.
    splits: of `read`.
    headline: the metric that decides on the best checkpoint, higher being better; by
      default `macro_f1` if there are labels, else `chrf`.
  """
  if (files is None) == (read is None):
    raise ValueError(f'task {name!r} needs either files or read')
  if metric_fns and headline is None:
    raise ValueError(
      f'task {name!r} has its own metrics: name the one that decides on its best '
      'checkpoint as headline'
    )

  def read_columns(split: str) -> Mapping[str, Sequence[str]]:
    if split == input_file.SPLIT:
      return input_file.dataset()
    if files is None:
      return _columns(f'{name}/{split}', read(split), to_text, labels)
    records = readers.read_file(files[split])
    return _columns(f'{name}/{split} ({files[split]})', records, to_text, labels)

  if metric_fns is None:
    metric_fns = [metrics.reconstruction]
    if labels:
      metric_fns = [functools.partial(metrics.classification, labels=tuple(labels))]
  vocabulary = load_vocabulary(corpus_dir or os.path.join(data_root(), 'no'))
  text = seqio.Feature(vocabulary, add_eos=True)
  features = {'inputs': text, 'targets': text}
  splits = tuple(splits if files is None else files)
  task = seqio.TaskRegistry.add(
    name,
    task_cls=TextTask,
    source=TextSource(read_columns, (*splits, input_file.SPLIT), features),
    preprocessors=[preprocessors.add_ends],
    output_features=features,
    postprocess_fn=postprocess_fn or strip,
    metric_fns=metric_fns,
  )
  task.headline = headline or ('macro_f1' if labels else 'chrf')
  return task


def strip(text: str, **unused) -> str:
  """Strips white space; for seqio's `postprocess_fn`."""
  del unused
  return text.strip()


def _columns(
  where: str,
  records: Iterable[Record],
  to_text: Callable[[Record], Mapping[str, str]],
  labels: Sequence[str],
) -> dict[str, list[str]]:
  """Converts records to columns, without those whose inputs or targets are empty."""
  examples, empty, number = [], 0, 0
  for number, record in enumerate(records, 1):
    try:
      example = to_text(record)
      _check_example(example, labels)
      if examples and set(example) != set(examples[0]):
        raise ValueError(f'it gives {sorted(example)}, others {sorted(examples[0])}')
    except KeyError as e:
      raise ValueError(
        f'{where}: record {number} has no {e}, but {sorted(record)}'
      ) from e
    except (AttributeError, IndexError, TypeError, ValueError) as e:
      raise ValueError(f'{where}: record {number}: {e}') from e
    if example['inputs'].strip() and example['targets'].strip():
      examples.append(example)
    else:
      empty += 1
  if empty:
    logging.warning(
      '%s: %d of %d records have no inputs or no targets and are left out.',
      where, empty, number,
    )  # fmt: skip
  if not examples:
    raise ValueError(f'{where} has no record with inputs and targets')
  return {key: [example[key] for example in examples] for key in examples[0]}


def _check_example(example: Any, labels: Sequence[str]) -> None:
  if not isinstance(example, Mapping) or not {'inputs', 'targets'} <= set(example):
    raise ValueError(
      f"to_text must return a dictionary with 'inputs' and 'targets'. Got: {example!r}"
    )
  for name, value in example.items():
    if not isinstance(value, str):
      raise ValueError(f'{name!r} is not text: {value!r}')
  if labels and example['targets'].strip() and example['targets'] not in labels:
    raise ValueError(
      f'unknown label {example["targets"]!r} (known: {", ".join(labels)})'
    )
