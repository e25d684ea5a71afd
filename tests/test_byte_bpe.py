"""Byte-level BPE in the graph has the ids of `tokenizers` for any text."""

import itertools
import json
import pathlib
import random

import numpy as np
import pytest
import tensorflow as tf
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from bart_t5x import byte_bpe, tokenizer_training, vocabularies

NORWEGIAN = pathlib.Path(__file__).parent / 'data' / 'sentences_no.tsv'
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
EDGES = [
  '', ' ', '  ', '\n', "'", "' ", " '", "''", 'a', ' a', '  a', 'a ', 'a  ', 'a \n b',
  '\n\na', '\n a', ' \na', '\xa0a', ' \xa0 a\xa0', 'a\u3000 b', 'a\u2028\x85b', '\x1ca',
  "it's", "it 's", "it  's", "it\n's", "'s", "'sa", "s'sa", "''s", "'s's", "'s''s",
  "x're're'", "x'r", "x'r e", "x'l", "x'll", "x'lle", "x'ld", "x'ld'll've'm't",
  "1's", "!'s", " 's", "'S", "'RE", "x’s", "'\u017f", "x's ", "x's\n", "x's1", "x's!",
  '12½ⅷ٣३', '3,14', 'a1b2', 'e\u0301a', '\u0301', 'a\u200db', 'a\u200bb', '\ufeffa',
  '日本 語', '👩\u200d👧 😀', '\x00', 'a\x00b', '\ufffe\uffff', '\U0010ffff', '<s>',
  'a<mask>b', '</s> <mask>', 'Ġ', 'ĠÅ', '\u2581', '\r\n\t\v\f', 'aaaaaaaaa',
  '=' * 99, ' ' * 99,
]  # fmt: skip


def read(content):
  tokenizer = tokenizers.Tokenizer.from_str(content.decode('utf-8'))
  tokenizer.encode_special_tokens = True
  return tokenizer


def in_graph(tokenizer):
  tables = byte_bpe.build_tables(tokenizer)
  return tf.function(
    lambda texts: byte_bpe.encode(texts, tables),
    input_signature=[tf.TensorSpec([None], tf.string)],
  )


def assert_same(tokenizer, encode, texts):
  encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
  found = encode(tf.constant(texts, tf.string)).to_list()
  for text, ids, want in zip(texts, found, encoded, strict=True):
    assert ids == want.ids, (text, want.tokens)


@pytest.fixture(scope='module')
def trained():
  """A vocabulary trained on Norwegian sentences and edge cases."""
  lines = NORWEGIAN.read_text(encoding='utf-8').splitlines()
  texts = [*lines, *EDGES] * 2
  return read(tokenizer_training.train('bytelevel', texts, len(texts), 1500, 2))


@pytest.fixture(scope='module')
def encode(trained):
  return in_graph(trained)


def bpe(merges=(), words=(), **kwargs):
  """A tokenizer of all bytes, and the given merges and words."""
  tokens = [*BYTES, *(a + b for a, b in merges), *words]
  vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab, list(merges), **kwargs))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.encode_special_tokens = True
  return tokenizer


def test_edge_cases(trained, encode):
  assert_same(trained, encode, EDGES)
  for text in EDGES:
    assert_same(trained, encode, [text])
  assert_same(trained, encode, NORWEGIAN.read_text(encoding='utf-8').splitlines())


ALPHABETS = [
  st.characters(exclude_categories=['Cs']),
  st.sampled_from("'stmdrevlS\u017f \n1."),
  st.sampled_from(' \t\n\v\f\r\x1c\x1f\x85\xa0\u1680\u2003\u2028\u202f\u3000a1.\u200b'),
  st.sampled_from('aå日ٱ٣½ⅷ\u0301\u200d\u200b😀\ufeff\x00 '),
  st.sampled_from('en te'),
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(*map(st.text, ALPHABETS)), min_size=1, max_size=6))
def test_any_text(trained, encode, texts):
  assert_same(trained, encode, texts)


def characters(first, last):
  return [chr(i) for i in range(first, last) if not 0xD800 <= i < 0xE000]


def assert_same_words(tables, codes):
  """Compares words with each character next to all kinds of characters."""
  text = ''.join(f'a{c}1{c}-{c} {c}  {c}{c}\n{c}a' for c in codes)
  points = tf.strings.unicode_decode(text, 'UTF-8')
  edges = [True, *[False] * (len(text) - 1), True, False, False]
  found = byte_bpe.word_starts(points, tf.constant(edges), tables.kinds)
  words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
  want = [begin for _, (begin, _) in words]
  got = np.flatnonzero(found.numpy()[: len(text)]).tolist()
  assert got == want, f'{codes[0]!r} … {codes[-1]!r}'


@pytest.mark.parametrize(
  # Beyond 0x30000 are private characters and tags.
  'last',
  [0x3400, pytest.param(0x30000, marks=pytest.mark.slow)],
)
def test_words_around_every_character(last):
  tables = byte_bpe.build_tables(bpe())
  for first in range(0, last, 0x3400):
    if codes := characters(first, min(first + 0x3400, last)):
      assert_same_words(tables, codes)


def test_overlapping_pairs_merge_from_the_left():
  merges = 'a a, aa a, b a, aa aa, Ġ b'
  tokenizer = bpe([tuple(pair.split()) for pair in merges.split(', ')])
  assert tokenizer.encode('aaaaa').tokens == ['aa', 'aaa']
  texts = [''.join(t) for n in range(9) for t in itertools.product('ab', repeat=n)]
  assert_same(tokenizer, in_graph(tokenizer), [*texts, *(f' {t}' for t in texts)])


@pytest.mark.parametrize('seed', range(12))
def test_random_merges(seed):
  draw = random.Random(seed)
  tokens, merges = ['a', 'b', 'c', 'Ġ'], {}
  for _ in range(draw.randrange(60)):
    a, b = draw.choice(tokens), draw.choice(tokens)
    if len(a + b) < 10 and a + b not in tokens:
      merges[a, b] = None
      tokens.append(a + b)
  tokenizer = bpe(list(merges), ignore_merges=seed % 3 == 0)
  texts = [''.join(draw.choices('abc ', k=draw.randrange(30))) for _ in range(300)]
  assert_same(tokenizer, in_graph(tokenizer), texts)


def test_words_that_no_merge_makes():
  # Only `ignore_merges` finds them, and only as whole words.
  texts = ['abc', ' abc', 'abcd', 'abc abc']
  for ignore in (False, True):
    tokenizer = bpe([('b', 'c')], ['abc'], ignore_merges=ignore)
    assert_same(tokenizer, in_graph(tokenizer), texts)
    assert (len(tokenizer.encode('abc').ids) == 1) == ignore


def test_long_words(trained, encode):
  draw = random.Random(0)
  words = ['a' * 5000, ' ' * 4999 + 'x', 'en' * 2000]
  words.append(''.join(draw.choices('abcdefghijklmnopqrstuvwxyz', k=3000)))
  assert_same(trained, encode, words)


def unsupported():
  byte_level, digits = pre_tokenizers.ByteLevel(), pre_tokenizers.Digits()
  for attribute, value in (
    ('normalizer', normalizers.NFKC()),
    ('pre_tokenizer', pre_tokenizers.Sequence([digits, byte_level])),
    ('pre_tokenizer', pre_tokenizers.ByteLevel(add_prefix_space=True)),
    ('pre_tokenizer', pre_tokenizers.ByteLevel(use_regex=False)),
    ('pre_tokenizer', None),
  ):
    tokenizer = bpe()
    setattr(tokenizer, attribute, value)
    yield tokenizer
  tokenizer = bpe()
  tokenizer.add_tokens(['fjord'])
  yield tokenizer
  yield bpe([('ab', 'a'), ('a', 'b')])
  yield bpe(dropout=0.1)
  yield bpe(continuing_subword_prefix='#')
  yield bpe(end_of_word_suffix='#')
  for model in (models.BPE({'a': 0}, []), models.WordLevel({'a': 0}, 'a')):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = byte_level
    yield tokenizer


@pytest.mark.parametrize('tokenizer', unsupported())
def test_unsupported_tokenizers(tokenizer):
  assert byte_bpe.build_tables(tokenizer) is None


def test_equal_hashes_are_unsupported(monkeypatch):
  monkeypatch.setattr(byte_bpe, '_HASHES', 100)
  assert byte_bpe.build_tables(bpe()) is None


def test_unsupported_tokenizers_run_in_python(tmp_path):
  texts = ['Ｆull <mask> på', '', 'ﬁ <s>']
  content = tokenizer_training.train('bytelevel', ['en fjord'] * 9, 9, 264, 2)
  settings = json.loads(content) | {'normalizer': {'type': 'NFKC'}}
  path = tmp_path / 'tokenizer.json'
  path.write_text(json.dumps(settings))
  for templates in (False, True):
    vocabulary = vocabularies.BartVocabulary(path, templates)
    want = [vocabulary.encode(text) for text in texts]
    assert vocabulary.encode_tf(tf.constant(texts)).to_list() == want
    ds = tf.data.Dataset.from_tensor_slices(texts).map(vocabulary.encode_tf)
    assert [ids.tolist() for ids in ds.as_numpy_iterator()] == want
  assert vocabulary.encode('ﬁ') == vocabulary.encode('fi')


def test_invalid_utf8_is_an_error(encode):
  for wrong in (b'\xff', b'a\xe2\x82', b'\xed\xa0\x80', b'\xc0\x80'):
    with pytest.raises(tf.errors.InvalidArgumentError):
      encode(tf.constant([wrong, b'\x80']))
