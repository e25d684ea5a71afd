"""The passes of `prepare`: read the text, train the tokenizer, write the shards."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tqdm

from bart_t5x import (
  corpora,
  documents,
  output_folder,
  shards,
  spool,
  tokenization,
  tokenizer_training,
)

# Text that a worker is given at a time: enough to pay for the way there and back.
_BATCH_BYTES = 1 << 19
_MEGABYTE = 1 << 20
_SENTENCEPIECE_BYTES = 100 * 10**6
# A training document's digest, turned around, decides whether the tokenizer sees it:
# the digest itself decides on the split.
_DIGEST_BITS = 63


class CorpusTooSmall(ValueError):
  """There are too few documents to hold some out."""


def build(
  source: corpora.Source,
  folder: str,
  settings: Mapping[str, Any],
  num_workers: int | None = None,
  tokenizer: bytes | None = None,
) -> dict[str, Any]:
  """Makes a corpus, all but its corpus.json.

  Args:
    source: the text.
    folder: an empty one, for the files.
    settings: the arguments of `prepare` that decide on the content.
    num_workers: processes that tokenize; None for one a core.
    tokenizer: the content of a tokenizer's file; None to train one.

  Returns:
    The content of corpus.json.

  Raises:
    corpora.SourceError: the text cannot be read.
    CorpusTooSmall: there are too few documents.
    tokenizer_training.VocabularyTooLarge: there is too little text.
    RuntimeError: a worker died.
  """
  path = os.path.join(folder, 'documents.zst')
  with _step('Reading the source'):
    kept = spool.collect(
      _progress(source.documents(), 'documents'),
      path,
      settings['validation_share'],
      settings['min_validation_documents'],
    )
  _check_size(kept, settings)
  content = tokenizer
  if content is None:
    with _step('Training the tokenizer'):
      content = _train_tokenizer(kept, settings)
  name = _write_tokenizer(content, folder)
  num_shards = settings['num_shards'] or default_num_shards(kept.counts.bytes)
  with _step('Tokenizing'):
    totals = _write_shards(kept, content, name, folder, num_shards, num_workers)
  os.remove(path)
  vocabulary = tokenization.read_tokenizer(name, content)
  return {
    'format_version': output_folder.FORMAT_VERSION,
    'source': settings['source'],
    'license': settings['license'] or source.license or 'unknown',
    'settings': dict(settings),
    'source_files': {p: os.path.getsize(p) for p in source.files},
    'vocab_size': vocabulary.vocab_size,
    'tokenizer': vocabulary.kind,
    'vocabulary_sha256': hashlib.sha256(content).hexdigest(),
    'text_sha256': kept.text_sha256,
    'splits': {name: total.summary() for name, total in totals.items()},
    'dropped': {'empty': kept.counts.empty, 'duplicates': kept.counts.duplicates},
    'baselines': baselines(totals[spool.TRAIN], totals[spool.VALIDATION], vocabulary),
  }


def _check_size(kept: spool.Spool, settings: Mapping[str, Any]) -> None:
  found = kept.counts.documents
  held_out = settings['min_validation_documents']
  if not found:
    raise CorpusTooSmall(
      f'The source holds no text: {kept.counts.empty} documents, all of them empty. '
      'Check --input, --field and --unit.'
    )
  if found < 2 * held_out:
    raise CorpusTooSmall(
      f'The source holds {found} different documents, and {held_out} are to be '
      f'held out for validation and at least as many to be trained on. Use more text, '
      'cut it into more documents (--unit=line), or hold out fewer with '
      '--min_validation_documents.'
    )


def default_num_shards(num_bytes: int) -> int:
  """Training files for so much text: a power of two, so that hosts get equal shares.

  One for each 2 MiB up to 64 files; beyond 16 GiB, one for each 256 MiB.
  """
  wanted = max(min(num_bytes / (2 * _MEGABYTE), 64), num_bytes / (256 * _MEGABYTE), 1)
  return 2 ** math.ceil(math.log2(wanted))


def _write_tokenizer(content: bytes, folder: str) -> str:
  """Writes a tokenizer's file under the name of its kind, which is returned."""
  kind = tokenization.read_tokenizer('the tokenizer', content).kind
  name = tokenizer_training.file_name(kind)
  with open(os.path.join(folder, name), 'xb') as f:
    f.write(content)
    f.flush()
    os.fsync(f.fileno())
  return name


def _train_tokenizer(kept: spool.Spool, settings: Mapping[str, Any]) -> bytes:
  kind = settings['tokenizer']
  most = settings['tokenizer_bytes']
  if most is None and kind != tokenizer_training.BYTE_LEVEL:
    most = _SENTENCEPIECE_BYTES
  share = 1.0 if most is None else min(1.0, most / kept.counts.bytes)

  def texts() -> Iterator[str]:
    for digest, text in kept.documents():
      if kept.split_of(digest) != spool.TRAIN:
        continue
      if share == 1.0 or _reversed_bits(digest) < share * 2**_DIGEST_BITS:
        yield text.decode('utf-8')

  return tokenizer_training.train(
    kind,
    texts(),
    kept.counts.documents,
    settings['vocab_size'],
    settings['min_frequency'],
  )


def _reversed_bits(digest: int) -> int:
  return int(f'{digest:0{_DIGEST_BITS}b}'[::-1], 2)


# Shards.


@dataclasses.dataclass
class Totals:
  """Of one split."""

  vocab_size: int
  shards: int
  documents: int = 0
  tokens: int = 0
  bytes: int = 0
  sentences: int = 0
  shard_bytes: list[int] = dataclasses.field(default_factory=list)
  histogram: np.ndarray = dataclasses.field(init=False)

  def __post_init__(self):
    self.histogram = np.zeros(self.vocab_size, np.int64)

  def add(self, part: 'Part') -> None:
    self.documents += len(part.records)
    self.tokens += int(part.counts.sum())
    self.bytes += part.bytes
    self.sentences += part.sentences
    self.histogram[part.ids] += part.counts

  def summary(self) -> dict[str, Any]:
    names = ('documents', 'tokens', 'bytes', 'sentences', 'shards', 'shard_bytes')
    return {name: getattr(self, name) for name in names}


@dataclasses.dataclass
class Part:
  """What a worker makes of a batch, of one split."""

  records: list[bytes]
  bytes: int
  sentences: int
  ids: np.ndarray  # the different tokens
  counts: np.ndarray  # how often each occurs


Batch = list[tuple[int, bytes]]


def _write_shards(
  kept: spool.Spool,
  content: bytes,
  name: str,
  folder: str,
  num_shards: int,
  num_workers: int | None,
) -> dict[str, Totals]:
  """Tokenizes all documents and writes both splits' shards."""
  vocab_size = tokenization.read_tokenizer(name, content).vocab_size
  totals = {
    spool.TRAIN: Totals(vocab_size, num_shards),
    spool.VALIDATION: Totals(vocab_size, 1),
  }
  with contextlib.ExitStack() as stack:
    writers = {
      split: stack.enter_context(shards.ShardWriter(folder, split, total.shards))
      for split, total in totals.items()
    }
    bar = stack.enter_context(_bar(kept.counts.documents, 'documents'))
    batches = _batches(kept.documents())
    workers = num_workers or _cores()
    # A pool costs more than it saves where there is little to do.
    workers = min(workers, math.ceil(kept.counts.bytes / _BATCH_BYTES))
    for parts in _tokenized(batches, content, name, kept.limit, workers):
      for split, part in parts.items():
        totals[split].add(part)
        bar.update(len(part.records))
        for framed in part.records:
          writers[split].write(framed)
  for split, total in totals.items():
    paths = [os.path.join(folder, n) for n in shards.shard_names(split, total.shards)]
    total.shard_bytes = [os.path.getsize(path) for path in paths]
  return totals


def _cores() -> int:
  """Cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _batches(texts: Iterable[tuple[int, bytes]]) -> Iterator[Batch]:
  batch: Batch = []
  size = 0
  for digest, text in texts:
    batch.append((digest, text))
    size += len(text)
    if size >= _BATCH_BYTES:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _tokenized(
  batches: Iterator[Batch], content: bytes, name: str, limit: int, workers: int
) -> Iterator[dict[str, Part]]:
  """What workers make of the batches, in the batches' order."""
  if workers <= 1:
    worker = Worker(content, name, limit)
    yield from map(worker.tokenize, batches)
    return
  pool = concurrent.futures.ProcessPoolExecutor(
    workers,
    # Forking a process that has threads, as this one may, can hang.
    multiprocessing.get_context('spawn'),
    _start_worker,
    (content, name, limit),
  )
  try:
    pending: collections.deque = collections.deque()
    for batch in batches:
      pending.append(pool.submit(_tokenize, batch))
      # So many batches under way that no worker waits, and no more in memory.
      if len(pending) >= 3 * workers:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  except concurrent.futures.process.BrokenProcessPool as e:
    raise RuntimeError(
      'A worker process ended while tokenizing. Mostly that is for want of memory: '
      f'there were {workers}, try fewer with --num_workers.'
    ) from e
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


class Worker:
  """Turns batches of documents into framed records."""

  def __init__(self, content: bytes, name: str, limit: int):
    self._tokenizer = tokenization.read_tokenizer(name, content)
    self._limit = limit

  def tokenize(self, batch: Batch) -> dict[str, Part]:
    """Records of a batch by split; a split without a document has no entry."""
    texts = [text.decode('utf-8') for _, text in batch]
    encoded = documents.encode(self._tokenizer, texts)
    rows: dict[str, list] = {spool.TRAIN: [], spool.VALIDATION: []}
    for (digest, text), (ids, starts) in zip(batch, encoded):
      content = shards.example(
        {'tokens': ids, 'sentence_starts': starts, 'example_id': [digest]}
      )
      split = spool.VALIDATION if digest < self._limit else spool.TRAIN
      rows[split].append((shards.record(content), len(text), ids, starts.size))
    return {split: _part(group) for split, group in rows.items() if group}


def _part(rows: list[tuple[bytes, int, np.ndarray, int]]) -> Part:
  records, sizes, ids, num_sentences = zip(*rows)
  different, counts = np.unique(np.concatenate(ids), return_counts=True)
  return Part(list(records), sum(sizes), sum(num_sentences), different, counts)


_worker: Worker | None = None


def _start_worker(content: bytes, name: str, limit: int) -> None:
  global _worker
  # The parent hears Ctrl-C too, and ends its workers.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  # One process a core: threads inside them would only get in each other's way.
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'
  _worker = Worker(content, name, limit)


def _tokenize(batch: Batch) -> dict[str, Part]:
  return _worker.tokenize(batch)


# What a model must beat.


def baselines(
  train: Totals, validation: Totals, tokenizer: tokenization.Tokenizer
) -> dict[str, Any]:
  """Losses and accuracies that need no model.

  Targets are the documents' tokens, each document between `<s>` and `</s>`, as in
  training. (There a document longer than the model is several such targets, with more
  of both: of the dictionary's, cut at 126 tokens, the loss is 6.95 rather than 6.98.)

  Args:
    train: what the unigram model learns from.
    validation: what it is judged on.
    tokenizer: for the commonest token's text.

  Returns:
    unigram_loss: nats a target token in validation,
      -sum_v n_val(v) log p(v) / sum_v n_val(v), where
      p(v) = (n_train(v) + 1) / (sum_v n_train(v) + vocabulary size).
    commonest_token: text of the ordinary token that is commonest in training.
    commonest_token_id: its id inside.
    commonest_token_share: its share of the ordinary tokens in validation, the accuracy
      of always guessing it.
  """
  counts = {}
  for name, split in ((spool.TRAIN, train), (spool.VALIDATION, validation)):
    counts[name] = split.histogram.copy()
    counts[name][[tokenization.BOS_ID, tokenization.EOS_ID]] += split.documents
  smoothed = counts[spool.TRAIN] + 1.0
  log_probabilities = np.log(smoothed / smoothed.sum())
  held_out = counts[spool.VALIDATION]
  commonest = int(train.histogram.argmax())
  return {
    'unigram_loss': float(-(held_out @ log_probabilities) / held_out.sum()),
    'commonest_token': tokenizer.decode([commonest]),
    'commonest_token_id': commonest,
    'commonest_token_share': float(
      validation.histogram[commonest] / max(validation.tokens, 1)
    ),
  }


# Progress.


@contextlib.contextmanager
def _step(name: str) -> Iterator[None]:
  begin = time.monotonic()
  print(f'{name} …', file=sys.stderr, flush=True)
  yield
  print(f'{name}: {time.monotonic() - begin:.1f} s', file=sys.stderr, flush=True)


def _bar(total: int | None, unit: str) -> tqdm.tqdm:
  # A terminal gets a bar, a log file none.
  return tqdm.tqdm(total=total, unit=f' {unit}', disable=None, leave=False)


def _progress(items: Iterable, unit: str) -> Iterator:
  with _bar(None, unit) as bar:
    for item in items:
      bar.update()
      yield item
