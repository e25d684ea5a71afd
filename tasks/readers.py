"""Records of fine-tuning data, from files in the usual formats or from the Hub.

One gin binding sets where all registered tasks read their data:

    readers.records.source = 'hub'        # Hugging Face Hub, through `datasets`
    readers.records.source = '/my/data'   # files: /my/data/norne_nb/train.conllu
    (unbound)                             # files in <data root>/finetune/norne_nb/
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gin

from bart_t5x import text_sources
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


def read_jsonl(path: str) -> Iterator[Record]:
  """Reads one JSON object per line."""
  for _, record in text_sources.read_json_lines(path):
    yield record


def read_tsv(path: str) -> Iterator[Record]:
  """Reads tab-separated columns, named by the first line; quotes are not special."""
  lines = text_sources.read_lines(path)
  header = next(lines, '').split('\t')
  if header == ['']:
    raise ValueError(f'{path} is empty: its first line must name the columns')
  for number, line in enumerate(lines, 2):
    if not line:
      continue
    row = line.split('\t')
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
  tokens, labels = [], []
  for number, line in enumerate([*text_sources.read_lines(path), ''], 1):
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
  """Reads the objects of a list, or the questions of a SQuAD file with their texts."""
  try:
    content = json.loads(text_sources.read_text(path))
  except json.JSONDecodeError as e:
    raise ValueError(f'{path} is not JSON: {e}') from e
  if isinstance(content, dict):
    content = content.get('data')
  if not isinstance(content, list):
    raise ValueError(f'{path} is neither a list nor a SQuAD file, an object with data')
  for number, record in enumerate(content, 1):
    if not isinstance(record, dict):
      raise ValueError(f'{path}, element {number} is not an object: {str(record)[:80]}')
    yield from _questions(record)


def _questions(record: Record) -> Iterator[Record]:
  """Yields the questions of a SQuAD article or paragraph, or any other record."""
  parts = record.get('paragraphs', record.get('qas'))
  if isinstance(parts, list) and all(isinstance(part, dict) for part in parts):
    for part in parts:
      yield from ({**record, **question} for question in _questions(part))
  else:
    yield record


FORMATS: Mapping[str, Callable[[str], Iterator[Record]]] = {
  '.jsonl': read_jsonl,
  '.tsv': read_tsv,
  '.conllu': read_conllu,
  '.json': read_json,
  '.parquet': text_sources.read_parquet,
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
