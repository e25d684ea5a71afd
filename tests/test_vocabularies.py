"""Tokenizers as seqio vocabularies."""

import pickle

import pytest
import seqio
import tensorflow as tf

from bart_t5x import tokenization, tokenizer_training, vocabularies

TEXTS = [f'Sak {i}: «Å, så fælt!», sa bjørnen på Ås. {i} er 3,14.' for i in range(300)]
SIZES = {'bytelevel': 330, 'unigram': 320, 'bpe': 320}
ODD = ['', ' ', 'på Ås', '<s> </s> <mask>', ' ▁ ▁▁x▁', 'linje\n\n\tny 日本 😀']
TEMPLATES = ['Ås <mask> på.', '<mask>', 'a \u00a0<mask>\u2003 <mask>b', '<mask><mask>▁']


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp('corpora')
  for kind, size in SIZES.items():
    content = tokenizer_training.train(kind, TEXTS, len(TEXTS), size, 2)
    (root / kind).mkdir()
    file = tokenization.read_tokenizer(kind, content).file_name
    (root / kind / file).write_bytes(content)
  return root


@pytest.fixture(params=tokenizer_training.KINDS)
def corpus_dir(request, folders):
  return folders / request.param


def test_ids(corpus_dir):
  v = vocabularies.load_vocabulary(corpus_dir)
  assert (v.pad_id, v.bos_id, v.eos_id, v.unk_id, v.mask_id) == (0, 1, 2, 3, 4)
  assert v.special_ids == (0, 1, 2, 3, 4)
  assert (v.vocab_size, v.extra_ids) == (SIZES[corpus_dir.name], 0)


@pytest.mark.parametrize('templates', [False, True])
def test_ids_in_graph_and_python(corpus_dir, templates):
  vocabulary = vocabularies.load_vocabulary(corpus_dir, templates)
  texts = [*TEMPLATES, *ODD, *TEXTS[:3]]
  rows = vocabulary.encode_tf(tf.constant(texts))
  assert rows.dtype == tf.int32
  for text, row in zip(texts, rows.to_list(), strict=True):
    ids = vocabulary.encode(text)
    assert row == ids == vocabulary.encode_tf(tf.constant(text)).numpy().tolist()
    masks = text.count('<mask>') if templates else 0
    assert [i for i in ids if i in vocabulary.special_ids] == [4] * masks
    assert templates or vocabulary.decode(ids) == text
  assert vocabulary.encode_tf(tf.constant(['', ''])).to_list() == [[], []]


def test_decoding_stops_at_eos_and_keeps_masks(corpus_dir):
  vocabulary = vocabularies.load_vocabulary(corpus_dir)
  ids = vocabulary.encode('på Ås')
  row = [1, *ids, 4, 3, 2, *ids, 0]
  assert vocabulary.decode(row) == 'på Ås<mask>'
  # Ids beyond the vocabulary, of a padded embedding, are dropped.
  assert vocabulary.decode([vocabulary.vocab_size, *ids]) == 'på Ås'
  batch = tf.constant([row, [0] * len(row)])
  assert vocabulary.decode_tf(batch).numpy().tolist() == ['på Ås<mask>'.encode(), b'']
  assert vocabulary.decode_tf(batch[0]).numpy() == 'på Ås<mask>'.encode()


def test_iterators_can_be_saved(corpus_dir, tmp_path):
  vocabulary = vocabularies.load_vocabulary(corpus_dir)
  dataset = tf.data.Dataset.from_tensor_slices(TEXTS).map(vocabulary.encode_tf)
  assert dataset.element_spec == tf.TensorSpec([None], tf.int32)
  iterator = iter(dataset)
  assert next(iterator).numpy().tolist() == vocabulary.encode(TEXTS[0])
  path = tf.train.Checkpoint(iterator=iterator).save(str(tmp_path / 'state'))
  expected = next(iterator).numpy()
  fresh = iter(dataset)
  tf.train.Checkpoint(iterator=fresh).read(path)
  assert (next(fresh).numpy() == expected).all()


def test_missing_file(tmp_path):
  vocabulary = vocabularies.load_vocabulary(tmp_path / 'none')
  assert not vocabulary.available
  assert vocabulary == vocabularies.load_vocabulary(tmp_path / 'none')
  assert vocabulary != vocabularies.load_vocabulary(tmp_path / 'other')
  hash(vocabulary), repr(vocabulary), pickle.dumps(vocabulary)
  with pytest.raises(FileNotFoundError, match='bart_t5x.prepare'):
    vocabulary.encode('x')


def test_file_that_appears_later(folders, tmp_path):
  vocabulary = vocabularies.load_vocabulary(tmp_path)
  before = hash(vocabulary)
  assert not vocabulary.available
  content = (folders / 'unigram' / 'tokenizer.model').read_bytes()
  (tmp_path / 'tokenizer.model').write_bytes(content)
  assert vocabulary.available
  assert vocabulary == vocabularies.load_vocabulary(folders / 'unigram')
  assert hash(vocabulary) == before


def test_equal_by_content(folders, tmp_path):
  one = vocabularies.load_vocabulary(folders / 'bytelevel')
  file = folders / 'bytelevel' / 'tokenizer.json'
  copied = tmp_path / 'tokenizer.json'
  copied.write_bytes(file.read_bytes())
  assert one == vocabularies.BartVocabulary(copied)
  assert hash(one) == hash(vocabularies.BartVocabulary(copied))
  assert one != vocabularies.load_vocabulary(folders / 'bpe')
  assert one != vocabularies.load_vocabulary(folders / 'bytelevel', templates=True)
  assert one != seqio.ByteVocabulary()


def test_pickles(corpus_dir):
  vocabulary = vocabularies.load_vocabulary(corpus_dir, templates=True)
  ids = vocabulary.encode('på <mask> Ås')
  pickled = pickle.dumps(vocabulary)
  other = pickle.loads(pickled)
  assert other == vocabulary and other.encode('på <mask> Ås') == ids
  assert len(pickled) < 1000  # without the file's content


def test_file_is_read_lazily(folders, monkeypatch):
  monkeypatch.setattr(tf.io.gfile, 'GFile', None)
  vocabulary = vocabularies.load_vocabulary(folders / 'bpe')
  assert vocabulary.available
  seqio.Feature(vocabulary)
