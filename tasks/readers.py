"""Records of fine-tuning data, from files of its usual formats or from the Hub.

One gin binding decides for all tasks where the data comes from:

    readers.records.source = 'hub'        # Hugging Face Hub, through `datasets`
    readers.records.source = '/my/data'   # files: /my/data/norne_nb/train.conllu
    (unbound)                             # files in <data root>/finetune/norne_nb/

Nothing is read and nothing is imported for it before a task's data is asked for.
"""

import contextlib
import csv
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import gin

from bart_t5x.data import data_root

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class HubDataset:
  """A data set on the Hugging Face Hub.

  Attributes:
    path: owner/name.
    config: which of its configurations; None where there is one.
    splits: the Hub's names of splits that are called otherwise here.
  """

  path: str
  config: str | None = None
  splits: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def records(self, split: str) -> Iterator[Record]:
    """Rows of a split, as dictionaries.

    Raises:
      ImportError: the package `datasets` is not installed.
    """
    try:
      import datasets
    except ImportError as e:
      raise ImportError(
        f'reading {self.path} from the Hub needs the package datasets: '
        "pip install -e '.[hf]'"
      ) from e
    name = self.splits.get(split, split)
    yield from datasets.load_dataset(self.path, self.config, split=name)


@contextlib.contextmanager
def open_text(path: str, newline: str | None = None) -> Iterator[TextIO]:
  """Opens a file of UTF-8 text, with or without a byte order mark.

  Args:
    path: of the file.
    newline: as for `open`.

  Yields:
    The file.

  Raises:
    ValueError: it is not UTF-8.
  """
  try:
    with open(path, encoding='utf-8-sig', newline=newline) as f:
      yield f
  except UnicodeDecodeError as e:
    raise ValueError(
      f'{path} is not UTF-8: {e}. Convert it first, for example with: '
      'iconv -f LATIN1 -t UTF-8'
    ) from e


def read_jsonl(path: str) -> Iterator[Record]:
  """One JSON object a line."""
  with open_text(path) as f:
    for number, line in enumerate(f, 1):
      if not line.strip():
        continue
      try:
        record = json.loads(line)
      except json.JSONDecodeError as e:
        raise ValueError(f'{path}, line {number} is not JSON: {e}') from e
      if not isinstance(record, dict):
        raise ValueError(
          f'{path}, line {number} must be a JSON object such as {{"text": "…"}}. '
          f'Got: {line.strip()[:80]}'
        )
      yield record


def read_tsv(path: str) -> Iterator[Record]:
  """Columns between tabs; the first line names them. Quotes are plain characters."""
  with open_text(path, newline='') as f:
    rows = csv.reader(f, delimiter='\t', quoting=csv.QUOTE_NONE)
    header = next(rows, None)
    if not header:
      raise ValueError(f'{path} is empty: its first line must name the columns')
    for number, row in enumerate(_within_limits(path, rows), 2):
      if not row:
        continue
      if len(row) != len(header):
        raise ValueError(
          f'{path}, line {number} has {len(row)} columns, but the first line names '
          f'{len(header)}: {header}'
        )
      yield dict(zip(header, row, strict=True))


def _within_limits(path: str, rows: Iterator[list[str]]) -> Iterator[list[str]]:
  """Passes rows on; a field that `csv` finds too long is told with its file."""
  try:
    yield from rows
  except csv.Error as e:
    raise ValueError(
      f'{path}: {e}. Longer texts have their place in a .jsonl file.'
    ) from e


def read_conllu(path: str) -> Iterator[Record]:
  """Sentences of NorNE's CoNLL-U: `tokens` and `labels`.

  Labels are the IOB2 tags in the last column (`name=B-PER`). Lines of multi-word
  tokens (1-2) and empty nodes (1.1) are left out.
  """
  tokens, labels = [], []
  with open_text(path) as f:
    for number, line in enumerate(f, 1):
      line = line.rstrip('\n')
      if line.startswith('#'):
        continue
      if not line.strip():
        if tokens:
          yield {'tokens': tokens, 'labels': labels}
        tokens, labels = [], []
        continue
      columns = line.split('\t')
      if len(columns) != 10:
        raise ValueError(
          f'{path}, line {number} has {len(columns)} columns; CoNLL-U has 10'
        )
      if not columns[0].isdigit():
        continue
      misc = dict(p.split('=', 1) for p in columns[9].split('|') if '=' in p)
      if 'name' not in misc:
        raise ValueError(
          f'{path}, line {number} has no entity tag (name=…) in its last column. Take '
          'the files of NorNE, not those of the treebank under it.'
        )
      tokens.append(columns[1])
      labels.append(misc['name'])
  if tokens:
    yield {'tokens': tokens, 'labels': labels}


def read_json(path: str) -> Iterator[Record]:
  """Questions of a SQuAD file, or the objects of a list.

  Yields:
    Of a list, its objects. Of a SQuAD file, its questions as the Hub has them: `id`,
    `context`, `question`, and `answers` with the lists `text` and `answer_start`.
  """
  with open_text(path) as f:
    try:
      content = json.load(f)
    except json.JSONDecodeError as e:
      raise ValueError(f'{path} is not JSON: {e}') from e
  if isinstance(content, list):
    for number, record in enumerate(content, 1):
      if not isinstance(record, dict):
        raise ValueError(f'{path}, element {number} is no object: {str(record)[:80]}')
      yield record
    return
  if not isinstance(content, dict) or 'data' not in content:
    raise ValueError(
      f'{path} is neither a list nor a SQuAD file: it has no list named "data"'
    )
  for article in content['data']:
    for paragraph in article['paragraphs']:
      for question in paragraph['qas']:
        answers = question.get('answers', [])
        yield {
          'id': str(question.get('id', '')),
          'context': paragraph['context'],
          'question': question['question'],
          'answers': {
            'text': [a['text'] for a in answers],
            'answer_start': [a['answer_start'] for a in answers],
          },
        }


def read_parquet(path: str) -> Iterator[Record]:
  """Rows of a table.

  Raises:
    ImportError: the package pyarrow is not installed.
  """
  try:
    from pyarrow import parquet
  except ImportError as e:
    raise ImportError(
      f"reading {path} needs the package pyarrow: pip install -e '.[hf]'"
    ) from e

  yield from parquet.read_table(path).to_pylist()


FORMATS: Mapping[str, Callable[[str], Iterator[Record]]] = {
  '.jsonl': read_jsonl,
  '.tsv': read_tsv,
  '.conllu': read_conllu,
  '.json': read_json,
  '.parquet': read_parquet,
}


def read_file(path: str) -> Iterator[Record]:
  """Records of a file, by the ending of its name.

  Args:
    path: of a file in one of `FORMATS`.

  Returns:
    Its records; nothing is read before the first one is asked for.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the ending is of no known format.
  """
  ending = os.path.splitext(path)[1]
  if ending not in FORMATS:
    raise ValueError(
      f'{path!r} is in no known format. Known endings: {", ".join(FORMATS)}'
    )
  if not os.path.exists(path):
    raise FileNotFoundError(
      f'there is no file {path!r}, which a task names. Such paths start from the '
      f'folder that the command runs in, {os.getcwd()!r}, unless they begin with /.'
    )
  return FORMATS[ending](path)


@gin.configurable(module='tasks.readers', allowlist=['source'])
def records(
  folder: str,
  split: str,
  hub: HubDataset | None,
  download: str,
  source: str | None = None,
) -> Iterator[Record]:
  """The records of a registered task's split.

  Args:
    folder: the task's folder below `source`.
    split: 'train', 'validation' or 'test': the file's name without its ending.
    hub: where the Hub has it; None where it does not.
    download: where people get the files from, for the message if they are missing.
    source: 'hub', or a folder with the tasks' folders; None for
      `<data root>/finetune`.

  Returns:
    The records, in order.

  Raises:
    FileNotFoundError: there is no such file. The message says where to get it.
    ValueError: the Hub is to be read and does not have it, or two files fit.
  """
  if source == 'hub':
    if hub is None:
      raise ValueError(
        f'{folder} is on no Hub that we know. Get it from {download} and leave '
        'readers.records.source unbound, or bind it to the folder of your files.'
      )
    return hub.records(split)
  root = os.path.join(data_root(), 'finetune') if source is None else source
  stem = os.path.join(root, folder, split)
  found = [stem + ending for ending in FORMATS if os.path.exists(stem + ending)]
  if len(found) > 1:
    raise ValueError(f'which of these files is to be read? Keep one: {found}')
  if not found:
    endings = '|'.join(ending[1:] for ending in FORMATS)
    raise FileNotFoundError(
      f'no data at {stem}.({endings}). Download it from {download}'
      + ("; or read it from the Hub: readers.records.source = 'hub'" if hub else '')
    )
  return read_file(found[0])
