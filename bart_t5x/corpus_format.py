"""Format of corpora, which `prepare` writes and tasks read.

A corpus folder holds a tokenizer (see `tokenization`), corpus.json (sources, settings,
sizes) and shards train-*.tfrecord and validation-*.tfrecord. Each record is a document:
a `tf.train.Example` of its token ids (`tokens`), the indices of the tokens that begin a
sentence (`sentence_starts`) and an id (`example_id`, its digest). They depend only on
the document's text and the tokenizer. Documents are in the order of their digests.
"""

import concurrent.futures
import functools
import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
from jaxtyping import Int32

from bart_t5x import sentences, tokenization

CORPUS_FILE = 'corpus.json'
ERROR_FILE = 'error.txt'  # message of a worker of `corpus_beam`
# In version 1, documents were in the order of the source.
FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, 2)

TRAIN = 'train'
VALIDATION = 'validation'

_REMEDY = 'Copy the corpus again, or rerun prepare with --overwrite.'


def read(
  folder: str | os.PathLike[str],
  exists: Callable[[str], bool] = os.path.exists,
  opened: Callable[[str, str], Any] = open,
) -> dict[str, Any]:
  """Returns the content of a folder's corpus.json, empty if there is none.

  `exists` and `opened` find and open files, which may be in a bucket.

  Raises:
    ValueError: the file is damaged, or of a later version of this package.
  """
  path = os.path.join(folder, CORPUS_FILE)
  if not exists(path):
    return {}
  with opened(path, 'rb') as f:
    try:
      corpus = json.loads(f.read())
    except ValueError:
      corpus = None
  if not isinstance(corpus, dict) or not isinstance(corpus.get('splits'), dict):
    raise ValueError(f'{path!r} is damaged. {_REMEDY}')
  version = corpus.get('format_version', FORMAT_VERSION)
  if version not in _READABLE_VERSIONS:
    raise ValueError(
      f'{path!r} has format_version {version}, but this package reads only '
      f'{", ".join(map(str, _READABLE_VERSIONS))}. {_REMEDY}'
    )
  return corpus


def read_existing(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns a local folder's corpus.json; FileNotFoundError if there is none."""
  if corpus := read(folder):
    return corpus
  raise FileNotFoundError(f'{folder} has no {CORPUS_FILE}')


def check_shards(
  corpus: Mapping[str, Any],
  folder: str,
  split: str,
  size_of: Callable[[str], int | None],
) -> list[str]:
  """Returns the paths of a split's files in order, after checking their sizes.

  Args:
    corpus: the content of corpus.json.
    folder: of the corpus.
    split: name of the split.
    size_of: returns a file's size in bytes, None if it does not exist.

  Raises:
    ValueError: a file is missing, or has another size than it was written with.
  """
  paths = shard_paths(folder, split, corpus['splits'][split]['shards'])
  sizes = corpus['splits'][split].get('shard_bytes', [None] * len(paths))
  with concurrent.futures.ThreadPoolExecutor(16) as pool:  # files may be in a bucket
    found = list(pool.map(size_of, paths))
  for path, size, wanted in zip(paths, found, sizes, strict=True):
    if size is None:
      raise ValueError(f'{path!r} does not exist. {_REMEDY}')
    if wanted not in (None, size):
      raise ValueError(
        f'{path!r} has {size:,} bytes, but was written with {wanted:,}. {_REMEDY}'
      )
  return paths


def check_tokenizer(corpus: Mapping[str, Any], content: bytes, path: str) -> None:
  """Raises a ValueError if a tokenizer's file is not the one of its corpus."""
  wanted = corpus.get('vocabulary_sha256')
  if wanted and hashlib.sha256(content).hexdigest() != wanted:
    raise ValueError(f'{path!r} is not the tokenizer that made its corpus. {_REMEDY}')


def shard_paths(folder: str, split: str, num_shards: int) -> list[str]:
  """Returns the paths of a split's files in order."""
  return [
    os.path.join(folder, f'{split}-{i:05d}-of-{num_shards:05d}.tfrecord')
    for i in range(num_shards)
  ]


def digest(text: bytes) -> int:
  """Returns 63 bits of a document's BLAKE2b hash, a non-negative int64.

  Among 100 million documents there is a collision with a probability of 0.05 %.
  """
  return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), 'big') >> 1


def encode(
  tokenizer: tokenization.Tokenizer, texts: Sequence[str]
) -> list[tuple[Int32[np.ndarray, ' tokens'], Int32[np.ndarray, ' sentences']]]:
  """Returns token ids and sentence starts (indices of tokens) of each document.

  Documents are encoded whole, and sentence starts found from the tokens' lengths in
  bytes. A sentence that begins inside a token (tokenizers trained by `prepare` have no
  such token) starts at the next one. With a tokenizer that is not lossless, as imported
  ones may be, sentences are encoded one by one.

  Raises:
    ValueError: the tokens of a lossless tokenizer do not add up to the text.
  """
  if not tokenizer.lossless:
    return [_encode_by_sentence(tokenizer, text) for text in texts]
  documents = []
  for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
    ids = np.array(ids, np.int32)
    lengths = tokenizer.byte_lengths[ids]
    pieces = [len(piece.encode('utf-8')) for piece in sentences.split_sentences(text)]
    if lengths.sum() != sum(pieces):
      raise ValueError(
        f'The tokenizer is not lossless: its tokens have {lengths.sum()} bytes and the '
        f'text has {sum(pieces)}: {text[:60]!r}…'
      )
    token_begins = np.cumsum(lengths, dtype=np.int64) - lengths
    starts = np.searchsorted(token_begins, np.cumsum([0, *pieces[:-1]]))
    starts = np.unique(starts)
    documents.append((ids, starts[starts < ids.size].astype(np.int32)))
  return documents


def _encode_by_sentence(tokenizer: tokenization.Tokenizer, text: str):
  parts = [tokenizer.encode(sentence) for sentence in sentences.split_sentences(text)]
  parts = [ids for ids in parts if ids]
  starts = np.cumsum([0, *map(len, parts)], dtype=np.int32)[:-1]
  return np.array([i for ids in parts for i in ids], np.int32), starts


# `tf.train.Example` for integers, so that making a corpus need not import TensorFlow,
# which takes longer than tokenizing 10 MB. (Its map of features is a list of pairs.)
_EXAMPLE_PROTO = """
  name: "example.proto"
  message_type {
    name: "Example"
    field { name: "features" number: 1 type_name: "Features" }
  }
  message_type {
    name: "Features"
    field { name: "feature" number: 1 type_name: "Pair" label: LABEL_REPEATED }
  }
  message_type {
    name: "Pair"
    field { name: "key" number: 1 type: TYPE_STRING }
    field { name: "value" number: 2 type_name: "Feature" }
  }
  message_type {
    name: "Feature"
    field { name: "int64_list" number: 3 type_name: "Int64List" }
  }
  message_type {
    name: "Int64List"
    field {
      name: "value" number: 1 type: TYPE_INT64 label: LABEL_REPEATED
      options { packed: true }
    }
  }
"""


@functools.cache
def _example_class() -> type:
  from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    text_format,
  )

  pool = descriptor_pool.DescriptorPool()
  pool.Add(text_format.Parse(_EXAMPLE_PROTO, descriptor_pb2.FileDescriptorProto()))
  return message_factory.GetMessageClass(pool.FindMessageTypeByName('Example'))


def serialize(
  ids: Int32[np.ndarray, ' tokens'],
  sentence_starts: Int32[np.ndarray, ' sentences'],
  example_id: int,
) -> bytes:
  """Returns a document as a serialized `tf.train.Example`, features sorted by name."""
  features = {
    'example_id': [example_id],
    'sentence_starts': sentence_starts.tolist(),
    'tokens': ids.tolist(),
  }
  pairs = [
    {'key': name, 'value': {'int64_list': {'value': values}}}
    for name, values in features.items()
  ]
  return _example_class()(features={'feature': pairs}).SerializeToString()


def tfrecord(record: bytes) -> bytes:
  """Returns a record as TFRecord files have it: with its length and checksums."""
  length = struct.pack('<Q', len(record))
  return length + _masked_crc(length) + record + _masked_crc(record)


def _masked_crc(content: bytes) -> bytes:
  crc = google_crc32c.value(content)
  return struct.pack('<I', (crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF)
