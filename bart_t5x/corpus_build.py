"""Passes of `prepare`: read the text, train the tokenizer, write the shards.

The source, which may be a download, is read once into a compressed file in the corpus
folder; the other passes read that file. A document's digest identifies duplicates and
determines its split and id, so the split does not depend on the order of the source.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import heapq
import itertools
import math
import multiprocessing
import os
import signal
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tqdm

from bart_t5x import cli, corpus_format, text_sources, tokenization, tokenizer_training
from bart_t5x.corpus_format import TRAIN, VALIDATION

# Bytes of text sent to a worker at a time, enough to amortize the transfer.
_BATCH_BYTES = 1 << 19
_MEGABYTE = 1 << 20
_SENTENCEPIECE_BYTES = 100 * 10**6
_DIGEST_BITS = 63


def build(
  source: text_sources.Source,
  folder: str,
  settings: Mapping[str, Any],
  num_workers: int | None = None,
  tokenizer: tokenization.Tokenizer | None = None,
) -> dict[str, Any]:
  """Writes a corpus into an empty folder and returns the content of its corpus.json.

  Args:
    source: the text.
    folder: to write to.
    settings: arguments of `prepare` that affect the content.
    num_workers: processes that tokenize; None for one per core.
    tokenizer: None to train one.
  """
  path = os.path.join(folder, 'documents.zst')
  with _step('Reading the source'):
    kept = spool(
      _progress(source.documents()),
      path,
      settings['validation_share'],
      settings['min_validation_documents'],
    )
  held_out = settings['min_validation_documents']
  if kept.documents < 2 * held_out:
    raise ValueError(
      f'The source holds {kept.documents} different documents with text, but '
      f'{2 * held_out} are needed: {held_out} for validation and as many for training. '
      'Check --input, --field and --unit, or reduce --min_validation_documents.'
    )
  if tokenizer is None:
    with _step('Training the tokenizer'):
      content = _train_tokenizer(kept, settings)
    tokenizer = tokenization.read_tokenizer('the trained tokenizer', content)
  with open(os.path.join(folder, tokenizer.file_name), 'wb') as f:
    f.write(tokenizer.content)
  num_shards = settings['num_shards'] or default_num_shards(kept.bytes)
  with _step('Tokenizing'):
    totals = _write_shards(kept, tokenizer, folder, num_shards, num_workers)
  os.remove(path)
  return {
    'format_version': corpus_format.FORMAT_VERSION,
    'source': settings['source'],
    'license': settings['license'] or source.license or 'unknown',
    'settings': dict(settings),
    'source_files': {p: os.path.getsize(p) for p in source.files},
    'vocab_size': tokenizer.vocab_size,
    'tokenizer': tokenizer.kind,
    'vocabulary_sha256': hashlib.sha256(tokenizer.content).hexdigest(),
    'text_sha256': kept.text_sha256,
    'splits': {
      split: {
        'documents': total.documents,
        'tokens': total.tokens,
        'bytes': total.bytes,
        'sentences': total.sentences,
        'shards': len(total.paths),
        'shard_bytes': [os.path.getsize(path) for path in total.paths],
      }
      for split, total in totals.items()
    },
    'dropped': {'empty': kept.empty, 'duplicates': kept.duplicates},
    'baselines': baselines(totals[TRAIN], totals[VALIDATION], tokenizer),
  }


def default_num_shards(num_bytes: int) -> int:
  """Returns the number of training files, a power of two so that hosts share evenly.

  One file per 2 MiB of text up to 64 files; beyond 16 GiB, one per 256 MiB.
  """
  wanted = max(min(num_bytes / (2 * _MEGABYTE), 64), num_bytes / (256 * _MEGABYTE), 1)
  return 2 ** math.ceil(math.log2(wanted))


# ---- reading the source -------------------------------------------------------

_HEADER = struct.Struct('<QI')  # digest and size of a document


class DigestSet:
  """A set of digests at some 20 bytes each; Python's `set` takes about 100."""

  def __init__(self, buffer_size: int = 1 << 20):
    self._buffer_size = buffer_size
    self._recent: set[int] = set()
    self._sorted = np.empty(0, np.uint64)

  def add(self, value: int) -> bool:
    """Adds a digest; returns whether it is new."""
    if value in self._recent:
      return False
    place = np.searchsorted(self._sorted, np.uint64(value))
    if place < len(self._sorted) and self._sorted[place] == value:
      return False
    self._recent.add(value)
    # Growing by at least an eighth keeps the total cost of sorting linear.
    if len(self._recent) >= max(self._buffer_size, len(self._sorted) // 8):
      recent = np.fromiter(self._recent, np.uint64, len(self._recent))
      self._sorted = np.concatenate([self._sorted, recent])
      self._sorted.sort()
      self._recent.clear()
    return True


@dataclasses.dataclass
class Spool:
  """A compressed file of documents, and their counts."""

  path: str
  documents: int = 0
  bytes: int = 0  # of text in UTF-8
  empty: int = 0  # dropped: at most white space
  duplicates: int = 0  # dropped
  limit: int = 0  # documents with a smaller digest are for validation
  text_sha256: str = ''  # of the documents in order

  def split_of(self, digest: int) -> str:
    return VALIDATION if digest < self.limit else TRAIN

  def read(self) -> Iterator[tuple[int, bytes]]:
    """Yields digest and text (UTF-8) of each document, in the order of the source."""
    import zstandard

    with zstandard.open(self.path, 'rb') as f:
      for _ in range(self.documents):
        digest, size = _HEADER.unpack(f.read(_HEADER.size))
        yield digest, f.read(size)


def spool(documents: Iterable[str], path: str, share: float, at_least: int) -> Spool:
  """Writes the distinct documents of a source to a file.

  The documents with the smallest digests are held out for validation: a `share` of all,
  but at least `at_least` (or all, if there are fewer).
  """
  import zstandard

  kept = Spool(path)
  seen = DigestSet()
  smallest: list[int] = []  # a heap of the negated `at_least` smallest digests
  total = hashlib.sha256()
  with open(path, 'wb') as f, zstandard.ZstdCompressor(1).stream_writer(f) as out:
    for document in documents:
      if not document or document.isspace():
        kept.empty += 1
        continue
      text = document.encode('utf-8')
      digest = corpus_format.digest(text)
      if not seen.add(digest):
        kept.duplicates += 1
        continue
      kept.documents += 1
      kept.bytes += len(text)
      heapq.heappush(smallest, -digest)
      if len(smallest) > at_least:
        heapq.heappop(smallest)
      record = _HEADER.pack(digest, len(text)) + text
      total.update(record)
      out.write(record)
  kept.limit = max(int(share * 2**_DIGEST_BITS), 1 - smallest[0] if smallest else 0)
  kept.text_sha256 = total.hexdigest()
  return kept


# ---- the tokenizer ------------------------------------------------------------


def _train_tokenizer(kept: Spool, settings: Mapping[str, Any]) -> bytes:
  kind = settings['tokenizer']
  most = settings['tokenizer_bytes']
  if most is None and kind != tokenizer_training.BYTE_LEVEL:
    most = _SENTENCEPIECE_BYTES
  share = 1.0 if most is None else min(1.0, most / kept.bytes)

  def training_texts() -> Iterator[str]:
    for digest, text in kept.read():
      # Reversed bits for an independent draw: small digests are held out.
      draw = int(f'{digest:0{_DIGEST_BITS}b}'[::-1], 2)
      if kept.split_of(digest) == TRAIN and draw < share * 2**_DIGEST_BITS:
        yield text.decode('utf-8')

  return tokenizer_training.train(
    kind,
    training_texts(),
    kept.documents,
    settings['vocab_size'],
    settings['min_frequency'],
  )


# ---- the shards ---------------------------------------------------------------


class Totals:
  """Counts over the documents of a split."""

  def __init__(self, vocab_size: int, paths: list[str]):
    self.paths = paths
    self.documents = self.tokens = self.bytes = self.sentences = 0
    self.histogram = np.zeros(vocab_size, np.int64)


def _write_shards(
  kept: Spool,
  tokenizer: tokenization.Tokenizer,
  folder: str,
  num_shards: int,
  num_workers: int | None,
) -> dict[str, Totals]:
  cli.import_tensorflow()
  import tensorflow as tf

  totals = {
    split: Totals(tokenizer.vocab_size, corpus_format.shard_paths(folder, split, count))
    for split, count in ((TRAIN, num_shards), (VALIDATION, 1))
  }
  # For little text, a pool costs more than it saves.
  cores = len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count()
  workers = min(num_workers or cores or 1, math.ceil(kept.bytes / _BATCH_BYTES))
  try:
    with contextlib.ExitStack() as stack:
      # Documents are dealt to the files of their split in turn.
      writers = {
        split: itertools.cycle(
          [stack.enter_context(tf.io.TFRecordWriter(path)) for path in total.paths]
        )
        for split, total in totals.items()
      }
      documents = _progress(_tokenized(kept, tokenizer, workers), kept.documents)
      for digest, num_bytes, ids, sentence_starts in documents:
        split = kept.split_of(digest)
        total = totals[split]
        total.documents += 1
        total.tokens += ids.size
        total.bytes += num_bytes
        total.sentences += sentence_starts.size
        np.add.at(total.histogram, ids, 1)
        record = corpus_format.serialize(ids, sentence_starts, digest)
        next(writers[split]).write(record)
  except tf.errors.OpError as e:
    raise OSError(errno.EIO, e.message) from e
  return totals


# Digest, bytes of text, token ids and sentence starts.
_Document = tuple[int, int, np.ndarray, np.ndarray]


def _tokenized(
  kept: Spool, tokenizer: tokenization.Tokenizer, workers: int
) -> Iterator[_Document]:
  batches = _batches(kept.read())
  if workers <= 1:
    for batch in batches:
      yield from _encode(tokenizer, batch)
    return
  pool = concurrent.futures.ProcessPoolExecutor(
    workers,
    # Forking a process with threads can hang.
    multiprocessing.get_context('spawn'),
    _start_worker,
    (tokenizer.file_name, tokenizer.content),
  )
  try:
    pending: collections.deque = collections.deque()
    for batch in batches:
      pending.append(pool.submit(_encode_in_worker, batch))
      # Bounds memory while every worker has work queued.
      if len(pending) >= 3 * workers:
        yield from pending.popleft().result()
    while pending:
      yield from pending.popleft().result()
  except concurrent.futures.process.BrokenProcessPool as e:
    raise RuntimeError(
      f'One of {workers} worker processes died while tokenizing, probably out of '
      'memory. Use fewer with --num_workers.'
    ) from e
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


def _batches(
  documents: Iterable[tuple[int, bytes]],
) -> Iterator[list[tuple[int, bytes]]]:
  batch, size = [], 0
  for digest, text in documents:
    batch.append((digest, text))
    size += len(text)
    if size >= _BATCH_BYTES:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _encode(
  tokenizer: tokenization.Tokenizer, batch: list[tuple[int, bytes]]
) -> list[_Document]:
  encoded = corpus_format.encode(tokenizer, [text.decode('utf-8') for _, text in batch])
  return [
    (digest, len(text), ids, sentence_starts)
    for (digest, text), (ids, sentence_starts) in zip(batch, encoded, strict=True)
  ]


_worker_tokenizer: tokenization.Tokenizer | None = None


def _start_worker(name: str, content: bytes) -> None:
  global _worker_tokenizer
  # The parent handles Ctrl-C and ends its workers.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  # With a process per core, threads would compete.
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'
  _worker_tokenizer = tokenization.read_tokenizer(name, content)


def _encode_in_worker(batch: list[tuple[int, bytes]]) -> list[_Document]:
  return _encode(_worker_tokenizer, batch)


# ---- baselines ----------------------------------------------------------------


def baselines(
  train: Totals, validation: Totals, tokenizer: tokenization.Tokenizer
) -> dict[str, Any]:
  """Returns validation loss and accuracy that a model has to beat.

  Targets are documents between `<s>` and `</s>`. (Training cuts long documents, which
  lowers the loss slightly: from 6.98 to 6.95 for the dictionary at 126 tokens.)

  Returns:
    `unigram_loss`: nats per target token, with training counts plus one.
    `commonest_token`, `commonest_token_id` and `commonest_token_share`: the most common
      ordinary token in training, and its share of those in validation.
  """
  counts = {}
  for name, split in ((TRAIN, train), (VALIDATION, validation)):
    counts[name] = split.histogram.copy()
    counts[name][[tokenization.BOS_ID, tokenization.EOS_ID]] += split.documents
  smoothed = counts[TRAIN] + 1.0
  log_probabilities = np.log(smoothed / smoothed.sum())
  held_out = counts[VALIDATION]
  commonest = int(train.histogram.argmax())
  return {
    'unigram_loss': float(-(held_out @ log_probabilities) / held_out.sum()),
    'commonest_token': tokenizer.decode([commonest]),
    'commonest_token_id': commonest,
    'commonest_token_share': float(
      validation.histogram[commonest] / max(validation.tokens, 1)
    ),
  }


# ---- progress -----------------------------------------------------------------


@contextlib.contextmanager
def _step(name: str) -> Iterator[None]:
  begin = time.monotonic()
  print(f'{name} …', file=sys.stderr, flush=True)
  yield
  print(f'{name}: {time.monotonic() - begin:.1f} s', file=sys.stderr, flush=True)


def _progress(documents: Iterable, total: int | None = None) -> tqdm.tqdm:
  # disable=None: shown on a terminal only.
  return tqdm.tqdm(documents, total=total, unit=' documents', disable=None, leave=False)
