"""Exported and imported tokenizer files."""

import io
import json

import numpy as np
import pytest
import sentencepiece
import tensorflow as tf
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from bart_t5x import corpus_format, tokenization, tokenizer_training, vocabularies
from bart_t5x.hf import tokenizers as hf_tokenizers

# ---- export ----

TEXTS = [
  f'Ås har {i} bjørner  ({i * 3} % av dem går på ski), og «{i % 7}» blåbær. aaa --'
  for i in range(300)
]
ODD = [
  '',
  ' ',
  '   \n\t',
  'U+2581 ▁ er et tegn, ikke et▁mellomrom',
  # Names of pieces that text is not encoded as.
  '<0x41> <0x4> <0x41><0x42>',
  '<s> </s> <pad> <unk> <mask>',
  '日本語 😀 e\u0301 \u00a0\u2028 \ufeff \x00\x7f',
  'a' * 3000,
  ' ' * 700,
]
KINDS = ('bytelevel', 'unigram', 'bpe')


def random_texts(count):
  random = np.random.default_rng(3)
  alphabet = list('aab  ..--<>0x41s/æ▁日øgår1 ')
  for _ in range(count):
    yield ''.join(random.choice(alphabet, random.integers(1, 60)))


@pytest.fixture(scope='module', params=KINDS)
def source(request, tmp_path_factory):
  """The tokenizer of a corpus."""
  folder = tmp_path_factory.mktemp('corpus')
  content = tokenizer_training.train(request.param, TEXTS, len(TEXTS), 380, 2)
  path = folder / tokenization.read_tokenizer(request.param, content).file_name
  path.write_bytes(content)
  return path


@pytest.fixture
def ours(source):
  return tokenization.read_tokenizer(str(source))


@pytest.fixture
def written(source, tmp_path):
  hf_tokenizers.write(source, tmp_path, 64)
  return tmp_path


@pytest.fixture
def theirs(written):
  """The tokenizer as transformers loads it."""
  return tokenizers.Tokenizer.from_file(str(written / 'tokenizer.json'))


def test_files_for_auto_tokenizer(source, written):
  assert (written / source.name).read_bytes() == source.read_bytes()
  config = json.loads((written / 'tokenizer_config.json').read_text())
  assert config['model_max_length'] == 64
  assert config['tokenizer_class'] == 'PreTrainedTokenizerFast'
  # As in BART's own tokenizer, the mask includes the space before it.
  assert config['mask_token']['content'] == '<mask>' and config['mask_token']['lstrip']
  assert config['bos_token'] == '<s>' and 'id' not in config['mask_token']


def test_same_ids_for_any_text_and_back(ours, theirs):
  theirs.encode_special_tokens = True  # In a corpus, names of special tokens are text.
  for text in [*TEXTS[:20], *ODD, *random_texts(3000)]:
    got = theirs.encode(text, add_special_tokens=False).ids
    assert got == tokenization.to_hf_ids(ours.encode(text)).tolist(), text
    assert theirs.decode(got, skip_special_tokens=False) == text


def test_marks_and_masks(ours, theirs):
  for text in ('Ås <mask> på ski', '<mask><mask>', 'bjørner', ''):
    expected = [tokenization.BOS_ID, *ours.encode_template(text), tokenization.EOS_ID]
    assert theirs.encode(text).ids == tokenization.to_hf_ids(expected).tolist()
  pair = theirs.encode('Ås', 'ski').ids
  first, second = (
    theirs.encode(t, add_special_tokens=False).ids for t in ('Ås', 'ski')
  )
  assert pair == [0, *first, 2, 2, *second, 2]
  assert [theirs.id_to_token(i) for i in range(4)] == ['<s>', '<pad>', '</s>', '<unk>']
  assert theirs.token_to_id('<mask>') == ours.mask_id
  assert theirs.get_vocab_size() == ours.vocab_size


@pytest.mark.parametrize(
  ('part', 'field', 'value'),
  [
    ('trainer_spec', 'model_type', 3),
    ('normalizer_spec', 'add_dummy_prefix', True),
    ('normalizer_spec', 'precompiled_charsmap', b'x'),
  ],
)
def test_models_without_a_counterpart_are_rejected(part, field, value):
  content = tokenizer_training.train('unigram', TEXTS, len(TEXTS), 380, 2)
  model = sentencepiece_model_pb2.ModelProto.FromString(content)
  setattr(getattr(model, part), field, value)
  with pytest.raises(ValueError, match='mine.model'):
    hf_tokenizers.sentencepiece_to_json(model.SerializeToString(), 'mine.model')


# ---- import ----

SPECIALS = ['<s>', '<pad>', '</s>', '<unk>']
WORDS = 'fjord snø bokmål ærlig sjø på og huset barna Åse vinter bjørn'.split()
FOREIGN_TEXTS = [
  'På fjorden er snøen ærlig.  Huset og barna!',
  ' Åse på vinterbjørn ',
  'ukjent: 日本 😀 ｆｕｌｌ',
  'æ\u2581ø',
  '',
]


def foreign_model(kind):
  """SentencePiece by default options: normalizing, dummy prefix, no byte fallback."""
  random = np.random.default_rng(2)
  texts = [' '.join(random.choice(WORDS, 9)) + '.' for _ in range(400)]
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts), model_writer=model, model_type=kind,
    vocab_size=60, hard_vocab_limit=False, character_coverage=1.0, minloglevel=2,
  )  # fmt: skip
  return model.getvalue()


@pytest.fixture(scope='module', params=['unigram', 'bpe'])
def model(request):
  return foreign_model(request.param)


def pieces_of(model):
  return [p.piece for p in sentencepiece_model_pb2.ModelProto.FromString(model).pieces]


def check(tokenizer, model, order):
  """Ids are indices in `order` (pieces by Hugging Face's ids); others are unknown."""
  assert tokenizer.vocab_size == len(order)
  assert tokenizer.mask_id == order.index('<mask>')
  processor = sentencepiece.SentencePieceProcessor(model_proto=model)
  for text in FOREIGN_TEXTS:
    pieces = processor.EncodeAsPieces(text)
    expected = [order.index(piece) if piece in order else 3 for piece in pieces]
    assert tokenizer.encode(text) == expected
  sentence = FOREIGN_TEXTS[0].replace('  ', ' ').replace('!', '')
  known = [i for i in tokenizer.encode(sentence) if i != 3]
  assert tokenizer.decode(known) == processor.DecodePieces([order[i] for i in known])


def test_ids_of_a_dictionary(model, tmp_path):
  """A dictionary in another order, with fillers, lacking some pieces."""
  pieces = pieces_of(model)[3:]
  symbols = np.random.default_rng(0).permutation(pieces).tolist()[5:]
  symbols.insert(3, 'madeupword0000')
  order = [*SPECIALS, *symbols, '<mask>']
  (tmp_path / 'sentencepiece.bpe.model').write_bytes(model)
  (tmp_path / 'dict.txt').write_text(''.join(f'{s} 5\n' for s in symbols))
  tokenizer = hf_tokenizers.read(tmp_path)
  check(tokenizer, model, order)
  assert not tokenizer.lossless
  words = tokenizer.encode(' '.join(WORDS))
  assert 3 in words and max(words) < len(order) - 1


def test_ids_without_a_dictionary_are_xlm_rs(model, tmp_path):
  order = [*SPECIALS, *pieces_of(model)[3:], '<mask>']
  (tmp_path / 'spiece.model').write_bytes(model)
  tokenizer = hf_tokenizers.read(tmp_path)
  check(tokenizer, model, order)
  # Sentence starts stay right although the tokenizer drops spaces.
  text = 'Huset på fjorden.   Barna og snø.'
  ((ids, starts), (no_ids, no_starts)) = corpus_format.encode(tokenizer, [text, ''])
  first = tokenizer.encode('Huset på fjorden.')
  assert starts.tolist() == [0, len(first)]
  assert ids.tolist() == first + tokenizer.encode('Barna og snø.')
  assert no_ids.size == no_starts.size == 0


@pytest.mark.parametrize('templates', [False, True])
def test_tf_data_gives_the_same_ids(model, tmp_path, templates):
  pieces = pieces_of(model)[3:]
  (tmp_path / 'spiece.model').write_bytes(model)
  (tmp_path / 'dict.txt').write_text(''.join(f'{s} 5\n' for s in pieces[7:]))
  tokenizer = hf_tokenizers.read(tmp_path)
  (tmp_path / tokenizer.file_name).write_bytes(tokenizer.content)
  vocabulary = vocabularies.load_vocabulary(str(tmp_path), templates)
  for text in [*FOREIGN_TEXTS, 'på <mask> og <mask><mask> snø']:
    in_graph = tf.function(vocabulary.encode_tf)(tf.constant(text))
    assert in_graph.numpy().tolist() == vocabulary.encode(text), text


@pytest.mark.parametrize('kind', ['unigram', 'bpe'])
def test_models_of_prepare_stay_as_they_are(tmp_path, kind):
  content = tokenizer_training.train(kind, TEXTS, len(TEXTS), 380, 2)
  (tmp_path / 'tokenizer.model').write_bytes(content)
  assert hf_tokenizers.read(tmp_path).content == content


FAULTS = {
  'has no tokenizer': {},
  'is not a valid SentencePiece model': {'spiece.model': b'\xff\xff\xff'},
  'vocab.json is damaged': {'vocab.json': b'{', 'merges.txt': b''},
  'merges.txt does not fit': {'vocab.json': b'{"a": 0}', 'merges.txt': b'a b\n'},
}


@pytest.mark.parametrize('message', FAULTS)
def test_bad_files(tmp_path, message):
  for name, content in FAULTS[message].items():
    (tmp_path / name).write_bytes(content)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    hf_tokenizers.read(tmp_path)
