"""Foreign tokenizers: the ids of their makers' files, in ours."""

import io
import json

import numpy as np
import pytest
import sentencepiece
import tensorflow as tf
from sentencepiece import sentencepiece_model_pb2

from bart_t5x import corpus_format, tokenization, vocabularies
from bart_t5x.hf import tokenizer_import

SPECIALS = ['<s>', '<pad>', '</s>', '<unk>']
WORDS = 'fjord snø bokmål ærlig sjø på og huset barna Åse vinter bjørn'.split()
TEXTS = [
  'På fjorden er snøen ærlig.  Huset og barna!',
  ' Åse på vinterbjørn ',
  'ukjent: 日本 😀 ｆｕｌｌ',
  'æ\u2581ø',
  '',
]


def spm(kind):
  """A model as others train them: normalizing, with a space before, bytes unknown."""
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
  return spm(request.param)


def pieces_of(model):
  return [p.piece for p in sentencepiece_model_pb2.ModelProto.FromString(model).pieces]


def outside(folder, vocab_size):
  """The imported tokenizer, read as a run reads it."""
  file = tokenizer_import.read(folder, vocab_size)
  (folder / 'out').mkdir(exist_ok=True)
  (folder / 'out' / file.name).write_bytes(file.content)
  return tokenization.read_tokenizer(str(folder / 'out' / file.name))


def expected_ids(model, order, text):
  """Ids inside: of the model's pieces, by their place in the order of ids outside."""
  processor = sentencepiece.SentencePieceProcessor(model_proto=model)
  found = processor.EncodeAsPieces(text)
  return [order.index(piece) if piece in order else 3 for piece in found]


def check(tokenizer, model, order):
  assert tokenizer.vocab_size == len(order)
  assert tokenizer.mask_id == order.index('<mask>')
  for text in TEXTS:
    assert tokenizer.encode(text) == expected_ids(model, order, text)
  sentence = TEXTS[0].replace('  ', ' ').replace('!', '')
  known = [i for i in tokenizer.encode(sentence) if i != 3]
  processor = sentencepiece.SentencePieceProcessor(model_proto=model)
  assert tokenizer.decode(known) == processor.DecodePieces([order[i] for i in known])


def test_ids_of_a_dictionary(model, tmp_path):
  """In its own order, with fillers, and without some of the model's pieces."""
  pieces = pieces_of(model)[3:]
  symbols = np.random.default_rng(0).permutation(pieces).tolist()[5:]
  symbols.insert(3, 'madeupword0000')
  order = [*SPECIALS, *symbols, '<mask>']
  (tmp_path / 'sentencepiece.bpe.model').write_bytes(model)
  (tmp_path / 'dict.txt').write_text(''.join(f'{s} 5\n' for s in symbols))
  tokenizer = outside(tmp_path, len(order))
  check(tokenizer, model, order)
  assert not tokenizer.lossless
  # Some text holds a piece that the dictionary lacks.
  words = tokenizer.encode(' '.join(WORDS))
  assert 3 in words and max(words) < len(order) - 1


def test_pieces_behind_the_specials(model, tmp_path):
  """As XLM-R numbers them, where there is no dictionary."""
  order = [*SPECIALS, *pieces_of(model)[3:], '<mask>']
  (tmp_path / 'spiece.model').write_bytes(model)
  check(outside(tmp_path, len(order)), model, order)


@pytest.mark.parametrize('templates', [False, True])
def test_the_graph_agrees(model, tmp_path, templates):
  pieces = pieces_of(model)[3:]
  (tmp_path / 'spiece.model').write_bytes(model)
  (tmp_path / 'dict.txt').write_text(''.join(f'{s} 5\n' for s in pieces[7:]))
  outside(tmp_path, 4 + len(pieces[7:]) + 1)
  vocabulary = vocabularies.load_vocabulary(str(tmp_path / 'out'), templates)
  for text in [*TEXTS, 'på <mask> og <mask><mask> snø']:
    in_graph = tf.function(vocabulary.encode_tf)(tf.constant(text))
    assert in_graph.numpy().tolist() == vocabulary.encode(text), text


def test_documents_by_sentence(model, tmp_path):
  """What it loses does not shift where sentences begin."""
  order = [*SPECIALS, *pieces_of(model)[3:], '<mask>']
  (tmp_path / 'spiece.model').write_bytes(model)
  tokenizer = outside(tmp_path, len(order))
  text = 'Huset på fjorden.   Barna og snø.'
  ((ids, starts), (no_ids, no_starts)) = corpus_format.encode(tokenizer, [text, ''])
  first = tokenizer.encode('Huset på fjorden.')
  assert starts.tolist() == [0, len(first)]
  assert ids.tolist() == first + tokenizer.encode('Barna og snø.')
  assert no_ids.size == no_starts.size == 0


def test_models_of_prepare_are_taken_as_they_are(tmp_path):
  from bart_t5x import tokenizer_training

  texts = ['På fjellet bor det bjørner. ' * 3] * 20
  content = tokenizer_training.train('unigram', texts, len(texts), 277, 2)
  (tmp_path / 'tokenizer.model').write_bytes(content)
  assert tokenizer_import.read(tmp_path, 277) == ('tokenizer.model', content)


def test_vocab_and_merges(make_run, tmp_path):
  """The files of BART's slow tokenizer give the ids of the fast one's."""
  run = make_run(tmp_path / 'a')
  own = json.loads((run.corpus / 'tokenizer.json').read_text())
  folder = tmp_path / 'model'
  folder.mkdir()
  vocabulary = own['model']['vocab']
  (folder / 'vocab.json').write_text(json.dumps(vocabulary))
  merges = [' '.join(pair) for pair in own['model']['merges']]
  (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *merges, '']))
  ours = tokenization.read_tokenizer(str(run.corpus / 'tokenizer.json'))
  found = outside(folder, 301)
  assert found.lossless
  for text in [*TEXTS, 'På fjellet nr. 7 <mask> bor\n\tbjørner']:
    assert found.encode(text) == ours.encode(text)
    assert found.encode_template(text) == ours.encode_template(text)
    assert found.decode(found.encode(text)) == text


def write(name, content):
  return lambda folder: (folder / name).write_bytes(content)


FAULTS = {
  'holds no tokenizer: neither': [],
  'is no SentencePiece model': [write('spiece.model', b'\xff\xff\xff')],
  'it has no pieces': [write('spiece.model', b'')],
  'gives 62 ids with the specials, the model has 300': [
    lambda folder: (folder / 'spiece.model').write_bytes(spm('bpe'))
  ],
  'vocab.json is damaged': [write('vocab.json', b'{'), write('merges.txt', b'')],
  'is no list of merges': [
    write('vocab.json', b'{"a": 0}'),
    write('merges.txt', b'a b c\n'),
  ],
  'does not fit its vocabulary': [
    write('vocab.json', b'{"a": 0}'),
    write('merges.txt', b'a b\n'),
  ],
  'is no byte-level BPE': [write('tokenizer.json', b'{"pre_tokenizer": null}')],
}


@pytest.mark.parametrize('message', FAULTS)
def test_bad_files(tmp_path, message):
  for fault in FAULTS[message]:
    fault(tmp_path)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    tokenizer_import.read(tmp_path, 300)
