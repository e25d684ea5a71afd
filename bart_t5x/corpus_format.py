"""Format of corpora, which `prepare` writes and tasks read.

A corpus folder holds a tokenizer (see `tokenization`), corpus.json (sources, settings,
sizes) and shards train-*.tfrecord and validation-*.tfrecord. Each record is a document:
a `tf.train.Example` of its token ids (`tokens`), the indices of the tokens that begin a
sentence (`sentence_starts`) and an id (`example_id`). All three depend on the
document's text alone.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from bart_t5x import sentences, tokenization

CORPUS_FILE = 'corpus.json'
FORMAT_VERSION = 1

TRAIN = 'train'
VALIDATION = 'validation'


def parse(text: str, path: str) -> dict[str, Any]:
  """Parses corpus.json.

  Raises:
    ValueError: the file is damaged.
  """
  try:
    return json.loads(text)
  except ValueError as e:
    raise ValueError(
      f'{path!r} is damaged ({e}). Copy it again, or rerun prepare with --overwrite.'
    ) from e


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


def serialize(
  ids: Int32[np.ndarray, ' tokens'],
  sentence_starts: Int32[np.ndarray, ' sentences'],
  example_id: int,
) -> bytes:
  """Returns a document as a serialized `tf.train.Example`."""
  import tensorflow as tf  # not needed by the workers

  example = tf.train.Example()
  feature = example.features.feature
  feature['tokens'].int64_list.value.extend(ids.tolist())
  feature['sentence_starts'].int64_list.value.extend(sentence_starts.tolist())
  feature['example_id'].int64_list.value.append(example_id)
  return example.SerializeToString(deterministic=True)  # features sorted by name
