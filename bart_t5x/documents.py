"""What a document is to the model: token ids, where its sentences begin, and an id.

All three depend on its text alone, so that whoever tokenizes it, and wherever, the same
example results.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from bart_t5x import sentences, tokenization


def digest(text: bytes) -> int:
  """63 bits of a document's BLAKE2b hash: its id, a non-negative int64.

  Two of 100 million documents collide with a probability of 0.05 %.

  Args:
    text: in UTF-8.
  """
  return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), 'big') >> 1


def encode(
  tokenizer: tokenization.Tokenizer, texts: Sequence[str]
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Token ids of documents, and at which tokens their sentences begin.

  Documents are encoded whole; the tokens' lengths in bytes then say where each begins.
  A sentence whose beginning lies inside a token begins with the next one (the
  tokenizers trained here have no such token: theirs never reach from a character over
  the white space behind it). A tokenizer that does not keep the text, as imported ones
  may be, gets sentence by sentence instead.

  Args:
    tokenizer: of either kind.
    texts: documents.

  Returns:
    For each document int32 ids [n] and int32 offsets [s] into them, strictly
    increasing, the first 0; both empty for an empty text.

  Raises:
    ValueError: the tokens do not add up to the text.
  """
  if not tokenizer.lossless:
    return [_by_sentence(tokenizer, text) for text in texts]
  lengths = tokenizer.byte_lengths
  documents = []
  for text, ids in zip(texts, tokenizer.encode_batch(texts)):
    ids = np.array(ids, np.int32)
    ends = np.cumsum(lengths[ids], dtype=np.int64)
    pieces = [len(piece.encode('utf-8')) for piece in sentences.split_sentences(text)]
    if sum(pieces) != (ends[-1] if ids.size else 0):
      raise ValueError(
        f'The tokenizer does not keep the text: {ends[-1] if ids.size else 0} of its '
        f'{sum(pieces)} bytes are in the tokens of {text[:60]!r}…'
      )
    begins = np.cumsum([0, *pieces[:-1]])
    starts = np.unique(np.searchsorted(ends - lengths[ids], begins))
    documents.append((ids, starts[starts < ids.size].astype(np.int32)))
  return documents


def _by_sentence(
  tokenizer: tokenization.Tokenizer, text: str
) -> tuple[np.ndarray, np.ndarray]:
  """Ids and sentence starts of one document, its sentences encoded one by one."""
  parts = [ids for s in sentences.split_sentences(text) if (ids := tokenizer.encode(s))]
  lengths = [0, *(len(ids) for ids in parts)][:-1] if parts else []
  starts = np.cumsum(lengths, dtype=np.int32)
  return np.array([i for ids in parts for i in ids], np.int32), starts
