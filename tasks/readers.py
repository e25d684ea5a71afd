"""Records of fine-tuning data, from files in the usual formats or from the Hub.

One gin binding sets where all registered tasks read their data:

    readers.records.source = 'hub'        # Hugging Face Hub, through `datasets`
    readers.records.source = '/my/data'   # files: /my/data/norne_nb/train.conllu
    (unbound)                             # files in <data root>/finetune/norne_nb/
"""

import contextlib
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
  """A data set on the Hub; `splits` maps our names of splits to others on the Hub."""

  path: str
  config: str | None = None
  splits: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def records(self, split: str) -> Iterator[Record]:
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
def open_text(path: str) -> Iterator[TextIO]:
  """Opens a file of UTF-8 text, with or without a byte order mark."""
  try:
    with open(path, encoding='utf-8-sig') as f:
      yield f
  except UnicodeDecodeError as e:
    raise ValueError(
      f'{path} is not UTF-8: {e}. Convert it, such as by iconv -f LATIN1 -t UTF-8'
    ) from e


def read_jsonl(path: str) -> Iterator[Record]:
  """Reads one JSON object per line."""
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
  """Reads tab-separated columns, named by the first line; quotes are not special."""
  with open_text(path) as f:
    header = f.readline().rstrip('\n').split('\t')
    if header == ['']:
      raise ValueError(f'{path} is empty: its first line must name the columns')
    for number, line in enumerate(f, 2):
      row = line.rstrip('\n').split('\t')
      if row == ['']:
        continue
      if len(row) != len(header):
        raise ValueError(
          f'{path}, line {number} has {len(row)} columns, but the first line names '
          f'{len(header)}: {header}'
        )
      yield dict(zip(header, row, strict=True))


def read_conllu(path: str) -> Iterator[Record]:
  """Reads NorNE's CoNLL-U sentences: `tokens`, and IOB2 `labels` from the last column.

  Multi-word tokens (1-2) and empty nodes (1.1) are left out.
  """
  with open_text(path) as f:
    tokens, labels = [], []
    for number, line in enumerate([*f, ''], 1):
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
          f'{path}, line {number} has no entity tag (name=…) in its last column. Use '
          'the files of NorNE, not those of the underlying treebank.'
        )
      tokens.append(columns[1])
      labels.append(misc['name'])


def read_json(path: str) -> Iterator[Record]:
  """Reads the objects of a list, or the questions of a SQuAD file as on the Hub."""
  with open_text(path) as f:
    try:
      content = json.load(f)
    except json.JSONDecodeError as e:
      raise ValueError(f'{path} is not JSON: {e}') from e
  if isinstance(content, list):
    for number, record in enumerate(content, 1):
      if not isinstance(record, dict):
        raise ValueError(
          f'{path}, element {number} is not an object: {str(record)[:80]}'
        )
      yield record
    return
  try:
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
  except (KeyError, TypeError) as e:
    raise ValueError(f'{path} is neither a list nor a SQuAD file: no {e}') from e


def read_parquet(path: str) -> Iterator[Record]:
  """Reads the rows of a Parquet file."""
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
  """Reads the records of a file, in the format of its extension (`FORMATS`)."""
  ending = os.path.splitext(path)[1]
  if ending not in FORMATS:
    raise ValueError(
      f'the format of {path!r} is unknown. Known extensions: {", ".join(FORMATS)}'
    )
  if not os.path.exists(path):
    raise FileNotFoundError(
      f'{path!r}, which a task names, does not exist. The current folder is '
      f'{os.getcwd()!r}.'
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
  """Reads the records of a registered task's split.

  Args:
    folder: the task's folder in `source`.
    split: 'train', 'validation' or 'test': the file's name without its extension.
    hub: the data set on the Hub, if it is there.
    download: where to get the files, for the error message.
    source: 'hub', or a folder with the tasks' folders; None for `<data root>/finetune`.
  """
  if source == 'hub':
    if hub is None:
      raise ValueError(
        f'{folder} is not available on the Hub. Get it from {download} and leave '
        'readers.records.source unbound, or bind it to the folder of your files.'
      )
    return hub.records(split)
  root = os.path.join(data_root(), 'finetune') if source is None else source
  stem = os.path.join(root, folder, split)
  found = [stem + ending for ending in FORMATS if os.path.exists(stem + ending)]
  if len(found) > 1:
    raise ValueError(f'several files for one split. Keep one of {found}')
  if not found:
    endings = '|'.join(ending[1:] for ending in FORMATS)
    raise FileNotFoundError(
      f'no data at {stem}.({endings}). Download it from {download}'
      + ("; or read it from the Hub: readers.records.source = 'hub'" if hub else '')
    )
  return read_file(found[0])
