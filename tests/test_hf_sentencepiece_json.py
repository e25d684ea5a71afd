"""SentencePiece models as a tokenizer.json: the same ids of any text."""

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from bart_t5x import tokenization, tokenizer_training
from bart_t5x.hf import sentencepiece_json

TEXTS = [
  f'Ås har {i} bjørner  ({i * 3} % av dem går på ski), og «{i % 7}» blåbær. aaa --'
  for i in range(300)
]
ODD = [
  '',
  ' ',
  '   \n\t',
  'U+2581 ▁ er et tegn, ikke et▁mellomrom',
  # Names of pieces that text must not yield.
  '<0x41> <0x4> <0x41><0x42>',
  '<s> </s> <pad> <unk> <mask>',
  '日本語 😀 e\u0301 \u00a0\u2028 \ufeff \x00\x7f',
  'a' * 3000,
  ' ' * 700,
]


@pytest.fixture(scope='module', params=['unigram', 'bpe'])
def content(request):
  return tokenizer_training.train(request.param, TEXTS, len(TEXTS), 380, 2)


@pytest.fixture(scope='module')
def ours(content):
  return tokenization.SentencePieceTokenizer(content)


@pytest.fixture(scope='module')
def theirs(content):
  import tokenizers

  text = sentencepiece_json.convert(content).decode('utf-8')
  return tokenizers.Tokenizer.from_str(text)


def random_texts(count):
  random = np.random.default_rng(3)
  alphabet = list('aab  ..--<>0x41s/æ▁日øgår1 ')
  for _ in range(count):
    yield ''.join(random.choice(alphabet, random.integers(1, 60)))


def test_ids_of_any_text_are_the_same_and_give_it_back(ours, theirs):
  theirs.encode_special_tokens = True  # a special token's name is text, as in a corpus
  for text in [*TEXTS[:20], *ODD, *random_texts(3000)]:
    got = theirs.encode(text, add_special_tokens=False).ids
    assert got == tokenization.to_hf_ids(ours.encode(text)).tolist(), text
    assert theirs.decode(got, skip_special_tokens=False) == text
  theirs.encode_special_tokens = False


def test_marks_and_masks(ours, theirs):
  for text in ('Ås <mask> på ski', '<mask><mask>', 'bjørner'):
    expected = [tokenization.BOS_ID, *ours.encode_template(text), tokenization.EOS_ID]
    assert theirs.encode(text).ids == tokenization.to_hf_ids(expected).tolist()
  pair = theirs.encode('Ås', 'ski').ids
  first, second = (
    theirs.encode(t, add_special_tokens=False).ids for t in ('Ås', 'ski')
  )
  assert pair == [0, *first, 2, 2, *second, 2]


def test_specials_stand_where_bart_has_them(ours, theirs):
  assert [theirs.id_to_token(i) for i in range(4)] == ['<s>', '<pad>', '</s>', '<unk>']
  assert theirs.token_to_id('<mask>') == ours.mask_id
  assert theirs.get_vocab_size() == ours.vocab_size


@pytest.mark.parametrize(
  ('part', 'field', 'value', 'message'),
  [
    ('trainer_spec', 'model_type', 3, 'of type 3'),
    ('normalizer_spec', 'add_dummy_prefix', True, 'rewrites text'),
    ('normalizer_spec', 'precompiled_charsmap', b'x', 'rewrites text'),
  ],
)
def test_models_without_a_counterpart_are_refused(content, part, field, value, message):
  model = sentencepiece_model_pb2.ModelProto.FromString(content)
  setattr(getattr(model, part), field, value)
  with pytest.raises(ValueError, match=f'mine.model.*{message}'):
    sentencepiece_json.convert(model.SerializeToString(), 'mine.model')


def test_sums_of_scores_are_exact_in_float32():
  content = tokenizer_training.train('unigram', TEXTS, len(TEXTS), 380, 2)
  model = sentencepiece_model_pb2.ModelProto.FromString(content)
  scores = np.array([piece.score for piece in model.pieces])
  assert (scores * 256 == np.round(scores * 256)).all() and (scores < 0).sum() > 100
