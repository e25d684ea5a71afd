"""Tokenizers and their training: lossless, and special tokens in text stay text."""

import json
import os
import re

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies

from bart_t5x import corpus_format, sentences, tokenization, tokenizer_training

SENTENCE = 'Setning {}: «Å, så fælt!», sa bjørnen på Ås. Ærlig talt, 3 <s> er pi.'
TEXTS = [SENTENCE.format(i) + '\n\tNy linje.' * (i % 3) for i in range(400)]
SIZES = {'bytelevel': 345, 'unigram': 340, 'bpe': 340}


def trained(kind):
  content = tokenizer_training.train(kind, TEXTS, len(TEXTS), SIZES[kind], 2)
  return tokenization.read_tokenizer(kind, content)


@pytest.fixture(scope='module', params=tokenizer_training.KINDS)
def tokenizer(request):
  return trained(request.param)


@pytest.fixture(scope='module')
def byte_level():
  """Our tokenizer, and `tokenizers`' own reading of its file."""
  ours = trained('bytelevel')
  return ours, tokenizers.Tokenizer.from_str(ours.content.decode())


def test_ids_of_the_specials(tokenizer):
  assert tokenizer.special_ids == (0, 1, 2, 3, 4)
  assert tokenizer.mask_id == 4
  pieces = [tokenizer.piece(i) for i in range(5)]
  assert pieces == ['<pad>', '<s>', '</s>', '<unk>', '<mask>']


@hypothesis.given(text=strategies.text(max_size=60))
@hypothesis.example(text='▁ ▁▁ \u2581x')
@hypothesis.example(text=' to  mellomrom \n\n\tog tab ')
@hypothesis.example(text='日本 😀 \x00 \r\n')
@hypothesis.example(text='<s></s><pad><unk><mask> < mask >')
@hypothesis.settings(
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_text_round_trips_without_special_ids(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert not set(ids) & set(tokenizer.special_ids)
  assert tokenizer.byte_lengths[ids].sum() == len(text.encode('utf-8'))


def test_batches_encode_as_single_texts(tokenizer):
  texts = TEXTS[:5] + ['', ' ', '<s>']
  assert tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]


def test_template_holds_masks_and_no_other_special(tokenizer):
  ids = tokenizer.encode_template('Ås  <mask><mask> <mask> på </s>')
  assert ids.count(tokenizer.mask_id) == 3
  assert set(ids) & set(tokenizer.special_ids) == {tokenizer.mask_id}
  # White space before a mask is dropped, white space after it stays.
  assert tokenizer.decode(ids) == 'Ås<mask><mask><mask> på </s>'
  assert tokenizer.encode_template('uten') == tokenizer.encode('uten')


def test_ids_equal_those_of_the_library(byte_level):
  ours, library = byte_level
  for text in ('Setning på Ås', ' to  ord\n\n'):
    assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids
  for text in ('Ås <mask> på', '<mask>', ' <mask> <mask>Å<mask>.', 'på\n<mask>'):
    encoded = library.encode(text, add_special_tokens=False).ids
    assert list(tokenization.from_hf_ids(encoded)) == ours.encode_template(text)


def test_post_processor_adds_bos_and_eos(byte_level):
  ours, library = byte_level
  ids = library.encode('på Ås').ids
  assert (ids[0], ids[-1]) == (0, 2)
  assert library.decode(ids, skip_special_tokens=True) == 'på Ås'
  pair = library.encode('på', 'Ås').ids
  assert pair.count(2) == 3  # <s> A </s> </s> B </s>
  added = json.loads(ours.content)['added_tokens']
  (mask,) = [token for token in added if token['content'] == '<mask>']
  assert mask['lstrip'] and mask['special'] and mask['id'] == 4


def test_decoding_drops_specials_except_masks(tokenizer):
  ids = tokenizer.encode('på Ås')
  assert tokenizer.decode([1, *ids, 3, 2, 0, 0]) == 'på Ås'
  assert tokenizer.decode([4, *ids, 4]) == '<mask>på Ås<mask>'
  assert tokenizer.decode([]) == ''


def test_word_starts(tokenizer):
  table = tokenizer.word_start_table
  assert table.dtype == np.bool_ and table.shape == (tokenizer.vocab_size,)
  assert table[list(tokenizer.special_ids)].all()
  for token_id in tokenizer.encode('Setning på Ås, sa bjørnen\n'):
    text = tokenizer.decode([token_id])
    assert table[token_id] == text[:1].isspace()


def test_hf_ids_exchange_0_and_1():
  ids = np.array([[0, 1, 2], [3, 4, 50264]], np.int32)
  outside = tokenization.to_hf_ids(ids)
  assert outside.tolist() == [[1, 0, 2], [3, 4, 50264]] and outside.dtype == np.int32
  assert (tokenization.from_hf_ids(outside) == ids).all()


@pytest.mark.parametrize('content', [b'', b'{}', b'{"a": ', b'\x0a\x0b\x0c'])
def test_damaged_files(content):
  with pytest.raises(ValueError, match='some.file'):
    tokenization.read_tokenizer('some.file', content)


def added(tokenizer, word, **kwargs):
  tokenizer.add_tokens([tokenizers.AddedToken(word, normalized=False, **kwargs)])


def without_a_byte(tokenizer):
  tree = json.loads(tokenizer.to_str())
  tree['model']['merges'] = []
  vocabulary = tree['model']['vocab']
  vocabulary['a whole word'] = vocabulary.pop('Ħ')
  tokenizer.model = tokenizers.models.BPE(vocabulary, [])


def split_at_spaces(tokenizer):
  parts = [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizer.pre_tokenizer]
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)


def prefixed(tokenizer):
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)


def normalized(tokenizer):
  tokenizer.normalizer = tokenizers.normalizers.NFC()


@pytest.mark.parametrize(
  ('change', 'lossless'),
  [
    (lambda t: None, True),
    (lambda t: added(t, 'Aker'), True),
    (lambda t: added(t, 'Aker', single_word=True), True),
    (lambda t: added(t, 'bjørn'), False),
    (lambda t: added(t, 'bjørn', single_word=True), False),
    (lambda t: added(t, 'Aker', lstrip=True), False),
    (lambda t: added(t, 'Aker', rstrip=True), False),
    (without_a_byte, False),
    (split_at_spaces, False),
    (prefixed, False),
    (normalized, False),
  ],
)
def test_lossless(byte_level, change, lossless):
  backend = tokenizers.Tokenizer.from_str(byte_level[0].content.decode())
  change(backend)
  tokenizer = tokenization.read_tokenizer('t.json', backend.to_str().encode())
  assert tokenizer.lossless == lossless
  # In either case, sentences begin at their tokens.
  text = 'En bjørn. To Aker bjørn  Aker. Tre \x8e på Ås.'
  ((ids, starts),) = corpus_format.encode(tokenizer, [text])
  pieces = [p for s in sentences.split_sentences(text) if (p := tokenizer.encode(s))]
  assert starts.tolist() == np.cumsum([0, *map(len, pieces[:-1])]).tolist()
  assert ids.tolist() == [i for piece in pieces for i in piece]


def test_other_special_ids_are_an_error(byte_level):
  tree = json.loads(byte_level[0].content)
  vocabulary = tree['model']['vocab']
  vocabulary['</s>'], vocabulary['<unk>'] = 3, 2
  for token in tree['added_tokens']:
    token['id'] = vocabulary[token['content']]
  with pytest.raises(ValueError, match='</s>.*2.*3'):
    tokenization.read_tokenizer('t.json', json.dumps(tree).encode())


def train(kind, vocab_size, min_frequency=2, texts=TEXTS):
  return tokenizer_training.train(
    kind, iter(texts), len(texts), vocab_size, min_frequency
  )


@pytest.mark.parametrize('kind', tokenizer_training.KINDS)
def test_training_is_deterministic_and_of_the_requested_size(kind):
  content = train(kind, SIZES[kind])
  assert train(kind, SIZES[kind]) == content
  tokenizer = tokenization.read_tokenizer('t', content)
  assert (tokenizer.vocab_size, tokenizer.kind) == (SIZES[kind], kind)
  assert tokenizer.content == content


@pytest.mark.parametrize('kind', tokenizer_training.KINDS)
def test_too_little_text_reports_the_largest_vocabulary(kind):
  with pytest.raises(ValueError, match='--vocab_size=30000') as error:
    train(kind, 30_000)
  possible = int(re.findall(r'\d+', str(error.value))[-1])
  assert tokenization.read_tokenizer('t', train(kind, possible)).vocab_size == possible


def test_min_frequency_acts():
  # Pairs that occur once are merged only if the minimum is 1.
  texts = ['entydig forskjellige strenger']
  size = tokenizer_training.SMALLEST_VOCABULARY + 5
  train('bytelevel', size, 1, texts)
  with pytest.raises(ValueError, match=str(size)):
    train('bytelevel', size, 3, texts)


def test_endless_words_do_not_count():
  plain = train('bytelevel', 345)
  endless = 'ab' * 5000 + 'a'
  texts = [
    *TEXTS,
    endless,
    f'{endless}!',
    '«' * 10_001,
    ' ' * 10_001,
    ('x' * 9999 + ',') * 9,
  ]
  assert train('bytelevel', 345, texts=texts[:-1]) == plain
  assert train('bytelevel', 345, texts=texts) != plain


def test_a_pipe_is_not_a_tokenizer(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  with pytest.raises(ValueError, match=str(tmp_path / 'pipe')):
    tokenization.read_tokenizer(str(tmp_path / 'pipe'))
