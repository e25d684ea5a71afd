"""Passes of `prepare`: read the text, train the tokenizer, write the shards.

Nothing depends on the order of the source. A document's digest identifies duplicates
and determines its split, its shard and its id, and documents are in the order of their
digests in the tokenizer's training text and in each shard. So `corpus_beam`, which runs
the same passes on many machines, writes the same bytes.

The source, which may be a download, is read once into compressed files in the corpus
folder; the other passes read those.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import heapq
import itertools
import json
import math
import multiprocessing
import operator
import os
import shutil
import signal
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm

from bart_t5x import corpus_format, text_sources, tokenization, tokenizer_training
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
) -> None:
  """Writes a corpus into an empty folder, corpus.json last.

  Args:
    source: the text.
    folder: to write to.
    settings: arguments of `prepare` that affect the content.
    num_workers: processes that tokenize; None for one per core.
    tokenizer: None to train one.
  """
  documents = os.path.join(folder, 'documents')
  os.mkdir(documents)
  spool = Spool(documents)
  empty = 0
  with _step('Reading the source'):
    for document in keyed(_progress(source.documents())):
      if document:
        spool.add(*document)
      else:
        empty += 1
  with _step('Sorting'):
    sizes = ((digest, len(text)) for digest, text in spool.read())
    plan = count(sizes, spool.documents, empty, settings)
  if tokenizer is None:
    with _step('Training the tokenizer'):
      sample = (t for digest, t in spool.read() if plan.in_sample(digest))
      tokenizer = train_tokenizer(sample, plan, settings)
  with _step('Tokenizing'):
    totals = _write_shards(spool, plan, tokenizer, folder, num_workers)
  shutil.rmtree(documents)
  shard_bytes = {
    split: [os.path.getsize(p) for p in corpus_format.shard_paths(folder, split, n)]
    for split, n in plan.shards.items()
  }
  last = last_files(source, settings, plan, tokenizer, totals, shard_bytes)
  for name, content in last.items():
    with open(os.path.join(folder, name), 'wb') as f:
      f.write(content)


# ---- reading the source -------------------------------------------------------


def keyed(documents: Iterable[str]) -> Iterator[tuple[int, bytes] | None]:
  """Yields digest and text (UTF-8) of each document, None if it is only white space."""
  for document in documents:
    if not document or document.isspace():
      yield None
    else:
      text = document.encode('utf-8')
      yield corpus_format.digest(text), text


class Spool:
  """Texts in compressed files, each sorted by digest, so that reading can merge them.

  Memory does not grow with the number of texts.

  Attributes:
    documents: number of texts added.
  """

  # Bytes of a file's texts, before compression, and files that are merged into one.
  FILE_BYTES = 64 * _MEGABYTE
  MOST_FILES = 256

  _HEADER = struct.Struct('<QQ')  # digest and size of a text
  _OBJECT_BYTES = 150  # of Python's objects for one text

  def __init__(self, folder: str):
    self.documents = 0
    self._folder = folder
    self._files: list[str] = []
    self._merged_files: list[str] = []
    self._recent: list[tuple[int, bytes]] = []
    self._recent_bytes = 0

  def add(self, digest: int, text: bytes) -> None:
    """Adds a text."""
    self.documents += 1
    self._recent.append((digest, text))
    self._recent_bytes += len(text) + self._OBJECT_BYTES
    if self._recent_bytes >= self.FILE_BYTES:
      self._write_recent()

  def read(self) -> Iterator[tuple[int, bytes]]:
    """Yields digest and text (UTF-8) of each distinct text, in order of digest."""
    self._write_recent()
    last = None
    for digest, text in self._merge([*self._merged_files, *self._files]):
      if digest != last:
        yield digest, text
      last = digest

  def _write_recent(self) -> None:
    if self._recent:
      self._recent.sort(key=_first)
      self._files.append(self._write(f'{self.documents}.zst', self._recent))
      self._recent, self._recent_bytes = [], 0
    if len(self._files) >= self.MOST_FILES:
      name = f'merged-{self.documents}.zst'
      self._merged_files.append(self._write(name, self._merge(self._files)))
      for path in self._files:
        os.remove(path)
      self._files = []

  def _merge(self, files: list[str]) -> Iterator[tuple[int, bytes]]:
    return heapq.merge(*map(self._read, files), key=_first)

  def _write(self, name: str, documents: Iterable[tuple[int, bytes]]) -> str:
    import zstandard

    path = os.path.join(self._folder, name)
    with open(path, 'wb') as f, zstandard.ZstdCompressor(1).stream_writer(f) as out:
      for digest, text in documents:
        out.write(self._HEADER.pack(digest, len(text)) + text)
    return path

  def _read(self, path: str) -> Iterator[tuple[int, bytes]]:
    import zstandard

    with zstandard.open(path, 'rb') as f:
      while header := f.read(self._HEADER.size):
        digest, size = self._HEADER.unpack(header)
        yield digest, f.read(size)


_first = operator.itemgetter(0)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Counts of the source once it is read, and where each document goes."""

  documents: int  # distinct ones with text
  bytes: int  # of text in UTF-8
  empty: int  # dropped: nothing but white space
  duplicates: int  # dropped
  limit: int  # documents with a smaller digest are for validation
  sample_share: float  # of the training documents, for training the tokenizer
  shards: Mapping[str, int]  # number of files of each split
  text_sha256: str  # of the digests in order

  def shard_of(self, digest: int) -> tuple[str, int]:
    """Returns a document's split and the number of its file, ascending with digests."""
    split, begin, end = TRAIN, self.limit, 2**_DIGEST_BITS
    if digest < self.limit:
      split, begin, end = VALIDATION, 0, self.limit
    return split, (digest - begin) * self.shards[split] // (end - begin)

  def in_sample(self, digest: int) -> bool:
    """Whether the tokenizer is trained on a document."""
    # Reversed bits for an independent draw: the first ones determine split and shard.
    draw = int(f'{digest:0{_DIGEST_BITS}b}'[::-1], 2)
    return digest >= self.limit and draw < self.sample_share * 2**_DIGEST_BITS


def count(
  sizes: Iterable[tuple[int, int]], read: int, empty: int, settings: Mapping[str, Any]
) -> Plan:
  """Counts documents and decides which are held out for validation.

  Those are the documents with the smallest digests: a `validation_share` of all, but at
  least `min_validation_documents`.

  Args:
    sizes: digest and bytes of each distinct document, in order of digest.
    read: number of documents with text, duplicates included.
    empty: number of documents without text.
    settings: arguments of `prepare`.

  Raises:
    ValueError: there are too few documents.
  """
  held_out = settings['min_validation_documents']
  limit = int(settings['validation_share'] * 2**_DIGEST_BITS)
  documents = num_bytes = digest = 0
  sha256 = hashlib.sha256()
  for digest, size in sizes:
    documents += 1
    num_bytes += size
    sha256.update(digest.to_bytes(8, 'little'))
    if documents == held_out:
      limit = max(limit, digest + 1)
  if documents < 2 * held_out or digest < limit:  # none is left for training
    raise ValueError(
      f'The source holds {documents} distinct documents with text, too few for '
      f'validation ({held_out}) and training (as many). Check --input, --field and '
      '--unit, or reduce --min_validation_documents or --validation_share.'
    )
  sample = settings.get('tokenizer_bytes')
  if sample is None:
    byte_level = settings.get('tokenizer') == tokenizer_training.BYTE_LEVEL
    sample = num_bytes if byte_level else _SENTENCEPIECE_BYTES
  return Plan(
    documents=documents,
    bytes=num_bytes,
    empty=empty,
    duplicates=read - documents,
    limit=limit,
    sample_share=min(1.0, sample / num_bytes),
    shards={
      TRAIN: settings['num_shards'] or default_num_shards(num_bytes),
      VALIDATION: 1,
    },
    text_sha256=sha256.hexdigest(),
  )


def default_num_shards(num_bytes: int) -> int:
  """Returns the number of training files, a power of two so that hosts share evenly.

  One file per 2 MiB of text up to 64 files; beyond 16 GiB, one per 256 MiB.
  """
  wanted = max(min(num_bytes / (2 * _MEGABYTE), 64), num_bytes / (256 * _MEGABYTE), 1)
  return 2 ** math.ceil(math.log2(wanted))


def train_tokenizer(
  sample: Iterable[bytes], plan: Plan, settings: Mapping[str, Any]
) -> tokenization.Tokenizer:
  """Trains a tokenizer on the documents of the sample, in order of digest."""
  content = tokenizer_training.train(
    settings['tokenizer'],
    (text.decode('utf-8') for text in sample),
    round(plan.documents * plan.sample_share),
    settings['vocab_size'],
    settings['min_frequency'],
  )
  return tokenization.read_tokenizer('the trained tokenizer', content)


# ---- the shards ---------------------------------------------------------------


class Totals:
  """Counts over the documents of a split."""

  def __init__(self, vocab_size: int):
    self.documents = self.tokens = self.bytes = self.words = self.sentences = 0
    self.lengths: collections.Counter[int] = collections.Counter()  # in tokens
    self.histogram = np.zeros(vocab_size, np.int64)  # of token ids

  def add(self, document: 'Document') -> None:
    """Counts a document."""
    self.documents += 1
    self.tokens += document.ids.size
    self.bytes += document.bytes
    self.words += document.words
    self.sentences += document.sentences
    self.lengths[document.ids.size] += 1
    np.add.at(self.histogram, document.ids, 1)

  def merge(self, other: 'Totals') -> None:
    """Adds the counts of other documents."""
    for name, value in vars(other).items():
      setattr(self, name, getattr(self, name) + value)


class Document(NamedTuple):
  """An encoded document."""

  digest: int
  bytes: int
  words: int  # separated by white space
  sentences: int
  ids: np.ndarray
  record: bytes  # as written to a shard


def encode(
  tokenizer: tokenization.Tokenizer, batch: Sequence[tuple[int, bytes]]
) -> list[Document]:
  """Encodes documents, given as digest and text."""
  texts = [text.decode('utf-8') for _, text in batch]
  documents = []
  for (digest, content), text, (ids, starts) in zip(
    batch, texts, corpus_format.encode(tokenizer, texts), strict=True
  ):
    record = corpus_format.tfrecord(corpus_format.serialize(ids, starts, digest))
    words = len(text.split())
    documents.append(Document(digest, len(content), words, starts.size, ids, record))
  return documents


def _write_shards(
  spool: Spool,
  plan: Plan,
  tokenizer: tokenization.Tokenizer,
  folder: str,
  num_workers: int | None,
) -> dict[str, Totals]:
  totals = {split: Totals(tokenizer.vocab_size) for split in plan.shards}
  # For little text, a pool costs more than it saves.
  cores = len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count()
  workers = min(num_workers or cores or 1, math.ceil(plan.bytes / _BATCH_BYTES))
  paths = {
    split: corpus_format.shard_paths(folder, split, shards)
    for split, shards in plan.shards.items()
  }
  for path in itertools.chain(*paths.values()):
    open(path, 'wb').close()  # a file may get no document
  encoded = _progress(_encoded(spool.read(), tokenizer, workers), plan.documents)
  # In order of digest, so one file after another.
  for (split, shard), documents in itertools.groupby(
    encoded, lambda document: plan.shard_of(document.digest)
  ):
    with open(paths[split][shard], 'wb') as f:
      for document in documents:
        totals[split].add(document)
        f.write(document.record)
  return totals


def _encoded(
  documents: Iterable[tuple[int, bytes]],
  tokenizer: tokenization.Tokenizer,
  workers: int,
) -> Iterator[Document]:
  batches = _batches(documents)
  if workers <= 1:
    for batch in batches:
      yield from encode(tokenizer, batch)
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


_worker_tokenizer: tokenization.Tokenizer | None = None


def _start_worker(name: str, content: bytes) -> None:
  global _worker_tokenizer
  # The parent handles Ctrl-C and ends its workers.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  # With a process per core, threads would compete.
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'
  _worker_tokenizer = tokenization.read_tokenizer(name, content)


def _encode_in_worker(batch: list[tuple[int, bytes]]) -> list[Document]:
  return encode(_worker_tokenizer, batch)


# ---- corpus.json --------------------------------------------------------------


def last_files(
  source: text_sources.Source,
  settings: Mapping[str, Any],
  plan: Plan,
  tokenizer: tokenization.Tokenizer,
  totals: Mapping[str, Totals],
  shard_bytes: Mapping[str, Sequence[int]],
) -> dict[str, bytes]:
  """Returns the tokenizer's file and corpus.json, in the order to write them.

  `shard_bytes` has the sizes of a split's files.
  """
  corpus = {
    'format_version': corpus_format.FORMAT_VERSION,
    'source': settings['source'],
    'license': settings['license'] or source.license or 'unknown',
    'settings': dict(settings),
    'source_files': dict(source.files),
    'vocab_size': tokenizer.vocab_size,
    'tokenizer': tokenizer.kind,
    'vocabulary_sha256': hashlib.sha256(tokenizer.content).hexdigest(),
    'text_sha256': plan.text_sha256,
    'splits': {
      split: {
        'documents': totals[split].documents,
        'tokens': totals[split].tokens,
        'words': totals[split].words,
        'bytes': totals[split].bytes,
        'sentences': totals[split].sentences,
        'length_quantiles': _quantiles(totals[split].lengths),
        'shards': shards,
        'shard_bytes': list(shard_bytes[split]),
      }
      for split, shards in plan.shards.items()
    },
    'dropped': {'empty': plan.empty, 'duplicates': plan.duplicates},
    'baselines': baselines(totals[TRAIN], totals[VALIDATION], tokenizer),
  }
  text = json.dumps(corpus, ensure_ascii=False, indent=2) + '\n'
  return {
    tokenizer.file_name: tokenizer.content,
    corpus_format.CORPUS_FILE: text.encode('utf-8'),
  }


def _quantiles(lengths: Mapping[int, int]) -> dict[str, int]:
  """Returns quantiles of the documents' lengths in tokens."""
  values = np.array(sorted(lengths))
  shares = np.cumsum([lengths[value] for value in values]) / sum(lengths.values())
  return {
    f'{share:.0%}': int(values[np.searchsorted(shares, share)])
    for share in (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
  }


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
