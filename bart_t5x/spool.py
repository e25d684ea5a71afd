"""What goes into a corpus: documents read once, without duplicates, split by hash.

The source is read a single time (it may be a download) into a compressed file beside
the output, from which the tokenizer is trained and the shards are made. A document's
digest decides on everything: whether it was seen before, which split it belongs to,
and which id its examples bear. So nothing depends on where in the source it stood.
"""

import dataclasses
import hashlib
import heapq
import struct
from collections.abc import Iterable, Iterator

import numpy as np

from bart_t5x import documents

TRAIN = 'train'
VALIDATION = 'validation'

_HEADER = struct.Struct('<QI')
_READ_SIZE = 1 << 20


class DigestSet:
  """A set of digests at 8 bytes each, where Python's own takes about 100."""

  def __init__(self, buffer_size: int = 1 << 20):
    """Starts empty.

    Args:
      buffer_size: digests kept in a Python set before they are sorted in.
    """
    self._buffer_size = buffer_size
    self._recent: set[int] = set()
    self._sorted = np.empty(0, np.uint64)

  def add(self, value: int) -> bool:
    """Adds a digest; says whether it is new."""
    if value in self._recent:
      return False
    place = np.searchsorted(self._sorted, np.uint64(value))
    if place < len(self._sorted) and self._sorted[place] == value:
      return False
    self._recent.add(value)
    # Growing by an eighth at least keeps the cost of sorting in linear.
    if len(self._recent) >= max(self._buffer_size, len(self._sorted) // 8):
      recent = np.fromiter(self._recent, np.uint64, len(self._recent))
      self._sorted = np.sort(np.concatenate([self._sorted, recent]))
      self._recent.clear()
    return True


@dataclasses.dataclass
class Counts:
  """What was found in the source."""

  documents: int = 0  # kept
  bytes: int = 0  # of kept documents, in UTF-8
  empty: int = 0  # dropped: white space at most
  duplicates: int = 0  # dropped: the same text as one before


@dataclasses.dataclass(frozen=True)
class Spool:
  """The documents of a corpus, on disk.

  Attributes:
    path: of the compressed file.
    counts: of documents.
    limit: documents whose digest is below it are for validation.
    text_sha256: hash over the documents in their order.
  """

  path: str
  counts: Counts
  limit: int
  text_sha256: str

  def split_of(self, document_digest: int) -> str:
    return VALIDATION if document_digest < self.limit else TRAIN

  def documents(self) -> Iterator[tuple[int, bytes]]:
    """Digest and text (UTF-8) of each document, in the source's order."""
    import zstandard

    with open(self.path, 'rb') as f:
      stream = zstandard.ZstdDecompressor().stream_reader(f, read_size=_READ_SIZE)
      for _ in range(self.counts.documents):
        value, size = _HEADER.unpack(_exactly(stream, _HEADER.size))
        yield value, _exactly(stream, size)


def _exactly(stream, size: int) -> bytes:
  content = stream.read(size)
  while len(content) < size:
    more = stream.read(size - len(content))
    if not more:
      raise OSError(f'The working file ends early: {len(content)} of {size} bytes.')
    content += more
  return content


def collect(texts: Iterable[str], path: str, share: float, at_least: int) -> Spool:
  """Reads a source to its end.

  Args:
    texts: the source's documents.
    path: of the file to write.
    share: of the documents that goes to validation.
    at_least: documents that go there, should the share be fewer: those with the
      smallest digests.

  Returns:
    The documents that were kept. A corpus of fewer than `at_least` has a limit above
    all digests; the caller judges.
  """
  import zstandard

  counts = Counts()
  seen = DigestSet()
  smallest: list[int] = []  # a heap of the negated `at_least` smallest digests
  total = hashlib.sha256()
  with open(path, 'xb') as f, zstandard.ZstdCompressor(1).stream_writer(f) as out:
    for text in texts:
      if not text or text.isspace():
        counts.empty += 1
        continue
      text = text.encode('utf-8')
      value = documents.digest(text)
      if not seen.add(value):
        counts.duplicates += 1
        continue
      counts.documents += 1
      counts.bytes += len(text)
      if len(smallest) < at_least:
        heapq.heappush(smallest, -value)
      elif at_least:
        heapq.heappushpop(smallest, -value)
      header = _HEADER.pack(value, len(text))
      total.update(header + text)
      out.write(header + text)
  limit = max(int(share * 2**63), 1 - smallest[0] if smallest else 0)
  return Spool(path, counts, limit, total.hexdigest())
