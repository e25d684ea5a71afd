"""Norwegian tasks to fine-tune and evaluate on, all from text to text.

Each is registered with the vocabulary of `<data root>/no` and, as `<name>_mini`, with
that of `<data root>/mini`; importing this needs no file and no network. `readers` says
how gin chooses between files and the Hub. `add_text_to_text_task` registers one's own.

| name               | inputs, targets                         | metric        |
|--------------------|-----------------------------------------|---------------|
| norec              | review, its sentiment                   | macro F1      |
| scala_nb, scala_nn | sentence, whether it is acceptable      | MCC, macro F1 |
| norne_nb, norne_nn | sentence, its entities                  | exact span F1 |
| norquad            | question and paragraph, the answer      | EM, F1        |
| nb_nn              | sentence in Bokmål, the same in Nynorsk | BLEU, chrF    |
"""

import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf
from absl import logging

from bart_t5x import metrics, preprocessors
from bart_t5x.vocabularies import load_vocabulary
from tasks import readers
from tasks.pretrain import data_root
from tasks.readers import HubDataset, Record

SPLITS = ('train', 'validation', 'test')


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

  Returns:
    The task, with features `inputs` and `targets`: `<s>` … `</s>`.

  Raises:
    ValueError: both or neither of `files` and `read` are given.
  """
  if (files is None) == (read is None):
    raise ValueError(
      f'task {name!r} needs its data from one place: give either files or read'
    )
  if files is not None:
    paths = dict(files)
    splits = tuple(paths)

    def read(split):
      return readers.read_file(paths[split])

  vocabulary = load_vocabulary(corpus_dir or os.path.join(data_root(), 'no'))
  text = seqio.Feature(vocabulary, add_eos=True)

  def dataset(split: str, shuffle_files: bool = False, seed: int | None = None):
    del shuffle_files, seed  # One file; seqio shuffles its examples.
    return _dataset(f'{name}/{split}', read(split), to_text, labels)

  return seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(dataset_fn=dataset, splits=tuple(splits)),
    preprocessors=[preprocessors.tokenize_for_bart],
    output_features={'inputs': text, 'targets': text},
    postprocess_fn=postprocess_fn or strip,
    metric_fns=_default_metrics(labels) if metric_fns is None else metric_fns,
  )


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

  Raises:
    ValueError: a target is none of the labels, or no record is left.
  """
  examples, empty = [], 0
  for number, record in enumerate(records, 1):
    example = to_text(record)
    if not example['inputs'].strip() or not example['targets'].strip():
      empty += 1
      continue
    if labels and example['targets'] not in labels:
      raise ValueError(
        f'{where}: record {number} has the unknown label {example["targets"]!r}. '
        f'Known labels: {", ".join(labels)}'
      )
    examples.append(example)
  if empty:
    logging.warning('%s: %d records with no inputs or targets left out.', where, empty)
  if not examples:
    raise ValueError(f'{where} has no record with inputs and targets')
  columns = {key: [example[key] for example in examples] for key in examples[0]}
  return tf.data.Dataset.from_tensor_slices(columns)


def strip(text: str, **unused) -> str:
  """The text without blanks around it, under seqio's `postprocess_fn` interface."""
  del unused
  return text.strip()


# ---- From records to text ----

SENTIMENTS = ('negativ', 'nøytral', 'positiv')
_SENTIMENT_OF = dict(zip(('negative', 'neutral', 'positive'), SENTIMENTS, strict=True))
_SENTIMENT_OF['fair'] = 'nøytral'  # as NorBench calls it

ACCEPTABILITY = ('riktig', 'feil')
_ACCEPTABILITY_OF = dict(zip(('correct', 'incorrect'), ACCEPTABILITY, strict=True))

ENTITY_TYPES = ('PER', 'ORG', 'LOC', 'PROD', 'EVT', 'DRV', 'MISC')
_ENTITY_TYPE_OF = {'GPE_LOC': 'LOC', 'GPE_ORG': 'ORG'}


def _prompt(task: str, text: str) -> str:
  """The text behind the task's name; an empty text stays one, so that it is counted."""
  return f'{task}: {text}' if text.strip() else ''


def sentiment_to_text(record: Record) -> dict[str, str]:
  """`text`, and `label` (negative, neutral, positive) or `rating` (a die, 1 to 6)."""
  if 'label' in record:
    label = _named(record['label'], _SENTIMENT_OF, SENTIMENTS)
  else:
    rating = int(record['rating'])
    if not 1 <= rating <= 6:
      raise ValueError(f'a rating is the throw of a die, 1 to 6. Got: {rating}')
    label = SENTIMENTS[(rating - 1) // 2]
  return {'inputs': _prompt('stemning', record['text']), 'targets': label}


def acceptability_to_text(record: Record) -> dict[str, str]:
  """`text`, and `label`: correct or incorrect."""
  label = _named(record['label'], _ACCEPTABILITY_OF, ACCEPTABILITY)
  return {'inputs': _prompt('språk', record['text']), 'targets': label}


def entities_to_text(record: Record) -> dict[str, str]:
  """`tokens`, and `labels`: their IOB2 tags."""
  tokens, labels = record['tokens'], record['labels']
  if len(tokens) != len(labels):
    raise ValueError(f'{len(tokens)} tokens, but {len(labels)} tags: {tokens}')
  spans = []
  for token, tag in zip(tokens, labels, strict=True):
    position, _, entity = tag.partition('-')
    entity = _ENTITY_TYPE_OF.get(entity, entity)
    if tag == 'O':
      spans.append(None)
    elif position not in ('B', 'I') or entity not in ENTITY_TYPES:
      raise ValueError(
        f'unknown entity tag {tag!r}. Known: O, and B- or I- before one of '
        f'{", ".join((*ENTITY_TYPES, *_ENTITY_TYPE_OF))}'
      )
    elif position == 'I' and spans and spans[-1] and spans[-1][0] == entity:
      spans[-1][1].append(token)
    else:
      spans.append((entity, [token]))
  named = [f'{entity}: {" ".join(words)}' for entity, words in filter(None, spans)]
  return {
    'inputs': _prompt('navn', ' '.join(tokens)),
    'targets': metrics.SPAN_SEPARATOR.join(named) or metrics.NO_SPAN,
  }


def question_to_text(record: Record) -> dict[str, str]:
  """`question`, `context`, `answers`; trained on the first answer, scored on all."""
  answers = list(record['answers']['text'])
  return {
    'inputs': f'spørsmål: {record["question"]} tekst: {record["context"]}',
    'targets': answers[0] if answers else '',
    'answers': json.dumps(answers),
  }


def answers_of(text: str, example: Mapping, is_target: bool = False, **unused):
  """A generated answer stripped; for a target, the list of all right answers."""
  del unused
  return json.loads(example['answers']) if is_target else text.strip()


def translation_to_text(record: Record) -> dict[str, str]:
  """`nb` and `nn`, the same sentence in both."""
  return {'inputs': _prompt('til nynorsk', record['nb']), 'targets': record['nn']}


def _named(label: Any, names: Mapping[str, str], known: Sequence[str]) -> str:
  """Our name of a label, by its English or its own name."""
  name = names.get(str(label), str(label))
  if name not in known:
    raise ValueError(
      f'unknown label {label!r}. Known labels: {", ".join((*names, *known))}'
    )
  return name


# ---- The registered tasks ----


def _add(name: str, download: str, hub: HubDataset | None = None, **task):
  """Registers a task of `readers.records` for both vocabularies."""

  def read(split):
    return readers.records(name, split, hub, download)

  for corpus, suffix in (('no', ''), ('mini', '_mini')):
    corpus_dir = os.path.join(data_root(), corpus)
    add_text_to_text_task(name + suffix, corpus_dir=corpus_dir, read=read, **task)


def add_norec() -> None:
  """NoReC: the sentiment of a whole review (Velldal et al. 2018, arXiv 1710.05370).

  Source: https://github.com/ltgoslo/norec, on the Hub ltg/norec. Licence: CC BY-NC 4.0.
  Splits: train, validation, test, the publishers' own. Records: `text`, and `rating`
  from 1 to 6 or `label`; jsonl, tsv or parquet. Ratings 1 and 2 are negative, 3 and 4
  neutral, 5 and 6 positive. Metric: macro F1 over the three classes.
  """
  _add(
    'norec',
    'https://huggingface.co/datasets/ltg/norec',
    HubDataset('ltg/norec'),
    to_text=sentiment_to_text,
    labels=SENTIMENTS,
  )


def add_scala() -> None:
  """ScaLA: is a sentence acceptable (Nielsen 2023, arXiv 2304.00906)?

  Sentences of the Universal Dependencies treebanks, half of them with two neighbours
  swapped or a word left out. Source: on the Hub EuroEval/scala-nb and scala-nn.
  Licence: see the data set's page. Splits: train, val (here validation), test.
  Records: `text` and `label`, correct or incorrect; jsonl, tsv or parquet. Metric:
  MCC, as in EuroEval, and macro F1.
  """
  for language in ('nb', 'nn'):
    _add(
      f'scala_{language}',
      f'https://huggingface.co/datasets/EuroEval/scala-{language}',
      HubDataset(f'EuroEval/scala-{language}', splits={'validation': 'val'}),
      to_text=acceptability_to_text,
      labels=ACCEPTABILITY,
    )


def add_norne() -> None:
  """NorNE: names in running text (Jørgensen et al. 2020, arXiv 1911.12146).

  Source: https://github.com/ltgoslo/norne, files `ud/nob/no_bokmaal-ud-train.conllu`,
  -dev (here validation) and -test, and `ud/nno/no_nynorsk-ud-…`. On the Hub a sample
  only: EuroEval/norne-nb-mini and norne-nn-mini. Licence: see the data set's page.
  Records: `tokens` and their IOB2 `labels`; conllu, jsonl or parquet.

  Seven types, GPE_LOC being LOC and GPE_ORG being ORG. Inputs are the tokens with
  blanks between them, targets `PER: Kari Dahl | LOC: Oslo` in the order of the text,
  or `ingen`. Metric: exact span F1, see `metrics.entity_spans`.
  """
  for language in ('nb', 'nn'):
    _add(
      f'norne_{language}',
      'https://github.com/ltgoslo/norne (ud/nob or ud/nno; -dev is validation)',
      HubDataset(f'EuroEval/norne-{language}-mini', splits={'validation': 'val'}),
      to_text=entities_to_text,
      metric_fns=[metrics.entity_spans],
    )


def add_norquad() -> None:
  """NorQuAD: questions about a paragraph (Ivanova et al. 2023, arXiv 2305.01957).

  Source: https://github.com/ltgoslo/NorQuAD, on the Hub ltg/norquad. Licence: see the
  data set's page. Splits: train, validation, test, the publishers' own. Records: a
  SQuAD file (json), or its questions with `context`, `question` and `answers` as jsonl
  or parquet. Metric: exact match and F1 as of SQuAD 1.1, the best of all answers.
  """
  _add(
    'norquad',
    'https://huggingface.co/datasets/ltg/norquad',
    HubDataset('ltg/norquad'),
    to_text=question_to_text,
    postprocess_fn=answers_of,
    metric_fns=[metrics.question_answering],
  )


def add_nb_nn() -> None:
  """Translation from Bokmål to Nynorsk.

  Source: any parallel text, such as the translation memory of Nynorsk pressekontor in
  Språkbanken's catalogue, https://www.nb.no/sprakbanken/. Licence: see the data set's
  page. Splits: your own. Records: `nb` and `nn`, the same sentence; tsv, jsonl or
  parquet. Metric: BLEU and chrF with sacrebleu's default settings.
  """
  _add(
    'nb_nn',
    'https://www.nb.no/sprakbanken/ (a parallel text, as columns nb and nn)',
    to_text=translation_to_text,
    metric_fns=[metrics.translation],
  )


add_norec()
add_scala()
add_norne()
add_norquad()
add_nb_nn()
