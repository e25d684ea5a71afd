"""Byte-level BPE as TensorFlow operations, with exactly the ids of `tokenizers`.

A Python function inside `tf.data` uses at most one core and prevents saving the
iterator. This runs in the graph, on many texts at once:

    text    -> words   GPT-2's pattern, from the kinds of adjacent characters
    words   -> ids     most words are a token and are looked up
    others  -> ids     merged pair by pair, all words in parallel (arXiv 1508.07909)

All tables are constants, built by querying `tokenizers`.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from bart_t5x import tensors
from bart_t5x.tensors import do_not_convert, select

# Kinds of characters; `_EDGE` precedes and follows a text.
_EDGE, _LETTER, _NUMBER, _OTHER, _BLANK, _SPACE = range(6)
_PROBES = {_LETTER: 'a', _NUMBER: '1', _OTHER: '-'}
# Unicode has neither letters, numbers nor white space from here on.
_KNOWN_CODE_POINTS = 0x40000
_PAGE = 256
_SURROGATES = range(0xD800, 0xE000)

# Contractions of the pattern, after the apostrophe.
_SHORT_CONTRACTIONS = 'stmd'
_LONG_CONTRACTIONS = ('re', 've', 'll')

_NO_RANK = np.iinfo(np.int32).max
_NO_PAIR = np.iinfo(np.int64).max
_HASHES = 2**62


class Tables(NamedTuple):
  """A tokenizer as tensors; the last row of sorted ones is for "not found"."""

  kinds: tf.Tensor  # uint8 [code points], the kind of each character
  byte_ids: tf.Tensor  # int32 [256], the token of each byte
  pairs: tf.Tensor  # int64 [merges + 1], sorted: left id x `base` + right id
  ranks: tf.Tensor  # int32 [merges + 1], of each pair; the lowest is merged first
  products: tf.Tensor  # int32 [merges + 1], by rank: the id a pair becomes
  hashes: tf.Tensor  # int64 [words + 1], sorted, of the words that are one token
  words: tf.Tensor  # string [words + 1]
  word_ids: tf.Tensor  # int32 [words + 1]
  base: int  # more than any id


# ---- tables ------------------------------------------------------------------


def build_tables(tokenizer) -> Tables | None:
  """Builds the tables of a `tokenizers.Tokenizer` with `encode_special_tokens`.

  Takes about a second for 50,000 tokens. Returns None if `encode` cannot reproduce the
  tokenizer: it has a normalizer, a pre-tokenizer other than GPT-2's, added tokens that
  are not special, a BPE with dropout, affixes or missing bytes, or merges in an order
  that no training gives.
  """
  settings = json.loads(tokenizer.to_str())
  model, splitter = settings['model'], settings['pre_tokenizer'] or {}
  if not (
    settings['normalizer'] is None
    and splitter.get('type') == 'ByteLevel'
    and splitter['use_regex']
    and not splitter['add_prefix_space']
    and all(token['special'] for token in settings['added_tokens'])
    and model['type'] == 'BPE'
    and not model['dropout']
    and not model['continuing_subword_prefix']
    and not model['end_of_word_suffix']
    and all(character in model['vocab'] for character in _byte_characters())
  ):
    return None
  words, word_ids = _whole_words(tokenizer.model, model['vocab'])
  with tf.init_scope(), tf.device('CPU'):
    merges = _merges(model['vocab'], model['merges'])
    hashes = tf.strings.to_hash_bucket_fast(words, _HASHES).numpy()
    order = np.argsort(hashes)
    if merges is None or (np.diff(hashes[order]) == 0).any():
      return None  # of words with equal hashes, only one is found
    return Tables(
      kinds=tf.constant(character_kinds()),
      byte_ids=tf.constant(
        [model['vocab'][c] for c in _byte_characters()], dtype=tf.int32
      ),
      hashes=_constant(hashes[order], _HASHES, tf.int64),
      words=_constant(words[order], b'', tf.string),
      word_ids=_constant(word_ids[order], 0, tf.int32),
      **merges,
    )


def _constant(rows, not_found, dtype: tf.DType) -> tf.Tensor:
  return tf.constant([*rows, not_found], dtype)


@functools.cache
def _byte_characters() -> tuple[str, ...]:
  """Characters of GPT-2's alphabet by byte."""
  printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printed]
  codes = dict(zip(printed, printed, strict=True))
  codes |= {byte: 256 + i for i, byte in enumerate(others)}
  return tuple(chr(codes[byte]) for byte in range(256))


@functools.cache
def character_kinds() -> np.ndarray:
  """Returns the pre-tokenizer's kind of each code point: uint8 [n]."""
  from tokenizers import pre_tokenizers

  split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str

  def kind_of(character: str) -> int:
    # Two characters of a kind stay together; blanks match no probe.
    found = [k for k, probe in _PROBES.items() if len(split(probe + character)) == 1]
    return found[0] if found else _BLANK

  kinds = np.zeros(_KNOWN_CODE_POINTS, np.uint8)
  for code in range(_PAGE):
    kinds[code] = kind_of(chr(code))
  kinds[ord(' ')] = _SPACE
  for first in range(_PAGE, _KNOWN_CODE_POINTS, _PAGE):
    if first not in _SURROGATES:
      # Without spaces and apostrophes, each piece is of one kind.
      page = ''.join(map(chr, range(first, first + _PAGE)))
      for _, (begin, end) in split(page):
        kinds[first + begin : first + end] = kind_of(page[begin])
  return kinds


def _whole_words(model, vocab: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
  """Returns words that become one token, as bytes [n], and their ids [n]."""
  byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
  words, ids = [], []
  for token in vocab:
    if token and all(character in byte_of for character in token):
      found = model.tokenize(token)
      if len(found) == 1:
        words.append(bytes(byte_of[character] for character in token))
        ids.append(found[0].id)
  return np.array(words, object), np.array(ids)


def _merges(
  vocab: Mapping[str, int], merges: list[tuple[str, str]]
) -> dict[str, Any] | None:
  """Returns fields of `Tables`; None if a product occurs in a pair of lower rank, so
  that only one merge may be done at a time."""
  base = max(vocab.values()) + 1
  left = np.array([vocab[a] for a, _ in merges], np.int64)
  right = np.array([vocab[b] for _, b in merges], np.int64)
  products = np.array([vocab[a + b] for a, b in merges], np.int64)
  ranks = np.arange(len(merges))
  first_use = np.full(base, _NO_RANK)
  for part in (left, right):
    np.minimum.at(first_use, part, ranks)
  if (first_use[products] < ranks).any():
    return None
  pairs = left * base + right
  order = np.argsort(pairs)
  return {
    'base': base,
    'pairs': _constant(pairs[order], _NO_PAIR, tf.int64),
    'ranks': _constant(order, _NO_RANK, tf.int32),
    'products': _constant(products, 0, tf.int32),
  }


# ---- text to ids -------------------------------------------------------------


@do_not_convert
def encode(texts: tf.Tensor, tables: Tables) -> tf.RaggedTensor:
  """Tokenizes string [n] to int32 [n, (tokens)]; special tokens in texts are text.

  Raises:
    tf.errors.InvalidArgumentError: a text is not UTF-8.
  """
  decoded = tf.strings.unicode_decode(texts, 'UTF-8', errors='strict')
  codes, splits = decoded.values, decoded.row_splits
  # Byte offset of each character of the concatenated texts, and of their end.
  longer = [tf.cast(codes >= bound, tf.int64) for bound in (0x80, 0x800, 0x10000)]
  edges = _with_zero(tf.cumsum(1 + tf.add_n(longer)))

  starts = word_starts(codes, _marks(splits, tf.size(codes)), tables.kinds)
  firsts = tensors.places(starts[: tf.size(codes)])
  words = tf.RaggedTensor.from_row_starts(codes, firsts, validate=False)
  words = tf.strings.unicode_encode(words, 'UTF-8', errors='strict')
  row = tf.searchsorted(tables.hashes, tf.strings.to_hash_bucket_fast(words, _HASHES))
  known = tf.gather(tables.words, row) == words

  places = tf.gather(edges, firsts)
  ids = select(tf.gather(tables.word_ids, row), known)
  other_places, other_ids = _merged(
    select(words, ~known), select(places, ~known), tables
  )
  places = tf.concat([select(places, known), other_places], 0)
  ids = tf.concat([ids, other_ids], 0)

  # Scatter tokens to the places of their first bytes, then drop the empty places.
  tokens = tf.tensor_scatter_nd_update(
    tf.fill([edges[-1]], -1), places[:, tf.newaxis], ids
  )
  is_token = tokens >= 0
  before = _with_zero(tf.cumsum(tf.cast(is_token, tf.int64)))
  return tf.RaggedTensor.from_row_splits(
    select(tokens, is_token),
    tf.gather(before, tf.gather(edges, splits)),
    validate=False,
  )


def _with_zero(sums: tf.Tensor) -> tf.Tensor:
  return tf.concat([tf.zeros([1], sums.dtype), sums], 0)


def _marks(places: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
  """Returns bool [size + 3], true at places [n]."""
  ones = tf.ones_like(places, tf.int32)
  return tf.scatter_nd(places[:, tf.newaxis], ones, [size + 3]) > 0


def word_starts(codes: tf.Tensor, edges: tf.Tensor, kinds: tf.Tensor) -> tf.Tensor:
  r"""Finds where the words of GPT-2's pattern begin.

      's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

  A word begins where the kind changes, and includes a space before it. The last
  character of a run of white space stands alone if text follows. Contractions count
  where an apostrophe begins a word.

  Args:
    codes: int32 [n], code points of concatenated texts.
    edges: bool [n + 3], beginnings of texts and the end of the last.
    kinds: of `Tables`.

  Returns:
    bool [n + 3]; the last three are padding.
  """
  n = tf.size(codes)
  kind = tf.gather(kinds, tf.minimum(codes, _KNOWN_CODE_POINTS - 1))
  edge = tf.constant([_EDGE], tf.uint8)
  before = tf.where(edges[:n], edge, tf.concat([edge, kind[:-1]], 0))
  after = tf.where(edges[1 : n + 1], edge, tf.concat([kind[1:], edge], 0))
  starts = tf.where(
    kind >= _BLANK,
    (before < _BLANK) | ((after < _BLANK) & (after != _EDGE)),
    (before != kind) & (before != _SPACE),
  )

  # The two characters after each apostrophe, 0 if they are in the next text.
  at = tensors.places((codes == ord("'")) & starts)
  padded = tf.concat([codes, [0, 0]], 0)
  one = tf.where(tf.gather(edges, at + 1), 0, tf.gather(padded, at + 1))
  two = tf.where(tf.gather(edges, at + 2), 0, tf.gather(padded, at + 2))
  short = functools.reduce(
    tf.logical_or, [one == ord(letter) for letter in _SHORT_CONTRACTIONS]
  )
  long = functools.reduce(
    tf.logical_or, [(one == ord(a)) & (two == ord(b)) for a, b in _LONG_CONTRACTIONS]
  )
  inside = select(at, short | long) + 1
  ends = tf.concat([select(at, short) + 2, select(at, long) + 3], 0)
  return tf.tensor_scatter_nd_update(
    tf.concat([starts, tf.zeros([3], tf.bool)], 0),
    tf.concat([inside, ends], 0)[:, tf.newaxis],
    tf.concat([tf.zeros_like(inside, tf.bool), tf.ones_like(ends, tf.bool)], 0),
  )


def _merged(
  words: tf.Tensor, places: tf.Tensor, tables: Tables
) -> tuple[tf.Tensor, tf.Tensor]:
  """Merges the bytes of words [n] at byte offsets `places` until no pair has a rank.

  Returns:
    Each token's byte offset, int64 [m], and id, int32 [m].
  """
  data = tf.io.decode_raw(tf.strings.reduce_join(words), tf.uint8)
  lengths = tf.strings.length(words)
  word = tf.repeat(tf.range(tf.size(words)), lengths)
  offsets = places - tf.cumsum(tf.cast(lengths, tf.int64), exclusive=True)
  places = tf.range(tf.size(data, tf.int64)) + tf.repeat(offsets, lengths)
  ids = tf.gather(tables.byte_ids, tf.cast(data, tf.int32))
  every = tf.range(tf.size(ids))
  state = (places, word, ids, _ranks(every, word, ids, tables))
  places, _, ids, _ = tf.while_loop(
    lambda places, word, ids, ranks: tf.reduce_min(ranks) < _NO_RANK,
    lambda *state: _merge_once(*state, tables),
    state,
    shape_invariants=(tf.TensorShape([None]),) * 4,
  )
  return places, ids


def _ranks(at: tf.Tensor, word: tf.Tensor, ids: tf.Tensor, tables: Tables) -> tf.Tensor:
  """Returns the ranks of the pairs that begin at indices `at`, or `_NO_RANK`."""
  second = tf.minimum(at + 1, tf.size(ids, at.dtype) - 1)
  left, right = (tf.cast(tf.gather(ids, i), tf.int64) for i in (at, second))
  pair = left * tables.base + right
  row = tf.searchsorted(tables.pairs, pair)
  found = (
    (tf.gather(tables.pairs, row) == pair)
    & (tf.gather(word, at) == tf.gather(word, second))
    & (at < second)
  )
  return tf.where(found, tf.gather(tables.ranks, row), _NO_RANK)


def _merge_once(places, word, ids, ranks, tables: Tables):
  """Merges all occurrences of the lowest-ranked pair of each word."""
  lowest = tf.math.segment_min(ranks, word)
  lowest = tf.where(lowest < _NO_RANK, lowest, -1)  # finished words
  at = tensors.places(ranks == tf.gather(lowest, word))
  # Of overlapping pairs (adjacent indices), merge every other one from the left.
  begins = tf.concat([[True], at[1:] - at[:-1] > 1], 0)
  run = tf.cumsum(tf.cast(begins, tf.int32)) - 1
  at = select(at, (at - tf.gather(select(at, begins), run)) % 2 == 0)

  product = tf.gather(tables.products, tf.gather(ranks, at))
  ids = tf.tensor_scatter_nd_update(ids, at[:, tf.newaxis], product)
  stays = tf.tensor_scatter_nd_update(
    tf.ones_like(ids, tf.bool), at[:, tf.newaxis] + 1, tf.zeros_like(at, tf.bool)
  )
  kept = tensors.places(stays)
  places, word, ids, ranks = (tf.gather(x, kept) for x in (places, word, ids, ranks))
  # Each merge shifts what follows. Only pairs that contain a product are new.
  at -= tf.range(tf.size(at, tf.int64))
  changed = tf.concat([tf.maximum(at - 1, 0), at], 0)
  ranks = tf.tensor_scatter_nd_update(
    ranks, changed[:, tf.newaxis], _ranks(changed, word, ids, tables)
  )
  return places, word, ids, ranks
