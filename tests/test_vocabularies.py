"""Tokenizers as seqio vocabularies."""

import copy
import pathlib
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
  vocabulary = vocabularies.load_vocabulary(corpus_dir)
  assert vocabulary.pad_id == tokenization.PAD_ID == 0
  assert vocabulary.bos_id == tokenization.BOS_ID == 1
  assert vocabulary.eos_id == tokenization.EOS_ID == 2
  assert vocabulary.unk_id == tokenization.UNK_ID == 3
  assert vocabulary.mask_id == 4
  assert vocabulary.special_ids == (0, 1, 2, 3, 4)
  assert vocabulary.vocab_size == SIZES[corpus_dir.name]
  assert vocabulary.extra_ids == 0
  assert vocabulary.word_start_table.shape == (vocabulary.vocab_size,)
  assert not vocabulary.word_start_table.flags.writeable


@pytest.mark.parametrize('text', ODD)
def test_corpus_text_has_no_specials_and_comes_back(corpus_dir, text):
  vocabulary = vocabularies.load_vocabulary(corpus_dir)
  ids = vocabulary.encode(text)
  assert not set(ids) & set(vocabulary.special_ids)
  assert vocabulary.decode(ids) == text
  graph = vocabulary.encode_tf(tf.constant(text))
  assert graph.dtype == tf.int32 and graph.numpy().tolist() == ids


@pytest.mark.parametrize('text', TEMPLATES + ODD)
def test_templates_have_masks(corpus_dir, text):
  vocabulary = vocabularies.load_vocabulary(corpus_dir, templates=True)
  ids = vocabulary.encode(text)
  assert ids.count(vocabulary.mask_id) == text.count('<mask>')
  assert set(ids) & set(vocabulary.special_ids) <= {vocabulary.mask_id}
  assert vocabulary.encode_tf(tf.constant(text)).numpy().tolist() == ids


def test_decoding_stops_at_the_end_and_keeps_masks(corpus_dir):
  vocabulary = vocabularies.load_vocabulary(corpus_dir)
  ids = vocabulary.encode('på Ås')
  row = [1, *ids, 4, 3, 2, *ids, 0]
  assert vocabulary.decode(row) == 'på Ås<mask>'
  # Rows of a padded vocabulary stand for nothing.
  assert vocabulary.decode([vocabulary.vocab_size, *ids]) == 'på Ås'
  batch = tf.constant([row, [0] * len(row)])
  assert vocabulary.decode_tf(batch).numpy().tolist() == ['på Ås<mask>'.encode(), b'']
  assert vocabulary.decode_tf(batch[0]).numpy() == 'på Ås<mask>'.encode()


def test_inside_tf_data(corpus_dir):
  vocabulary = vocabularies.load_vocabulary(corpus_dir)
  dataset = tf.data.Dataset.from_tensor_slices(TEXTS[:5]).map(vocabulary.encode_tf)
  assert dataset.element_spec == tf.TensorSpec([None], tf.int32)
  assert [ids.tolist() for ids in dataset.as_numpy_iterator()] == [
    vocabulary.encode(text) for text in TEXTS[:5]
  ]


@pytest.mark.parametrize('templates', [False, True])
def test_some_texts_at_once(corpus_dir, templates):
  vocabulary = vocabularies.load_vocabulary(corpus_dir, templates)
  texts = [*TEMPLATES, *ODD, *TEXTS[:3]]
  rows = vocabulary.encode_tf(tf.constant(texts))
  assert rows.dtype == tf.int32
  assert rows.to_list() == [vocabulary.encode(text) for text in texts]
  assert vocabulary.encode_tf(tf.constant(['', ''])).to_list() == [[], []]


def test_iterators_can_be_saved(corpus_dir, tmp_path):
  vocabulary = vocabularies.load_vocabulary(corpus_dir)
  dataset = tf.data.Dataset.from_tensor_slices(TEXTS).map(vocabulary.encode_tf)
  iterator = iter(dataset)
  next(iterator)
  path = tf.train.Checkpoint(iterator=iterator).save(str(tmp_path / 'state'))
  expected = next(iterator).numpy()
  fresh = iter(dataset)
  tf.train.Checkpoint(iterator=fresh).read(path)
  assert (next(fresh).numpy() == expected).all()


def test_seqio_tokenizes_with_it(corpus_dir):
  vocabulary = vocabularies.load_vocabulary(corpus_dir)
  dataset = tf.data.Dataset.from_tensors({'targets': 'på Ås'})
  features = {'targets': seqio.Feature(vocabulary, add_eos=True)}
  dataset = seqio.preprocessors.tokenize(dataset, features, copy_pretokenized=False)
  dataset = seqio.preprocessors.append_eos(dataset, features)
  (example,) = dataset.as_numpy_iterator()
  assert example['targets'].tolist() == [*vocabulary.encode('på Ås'), 2]


def test_missing_file(tmp_path):
  vocabulary = vocabularies.load_vocabulary(tmp_path / 'none')
  assert not vocabulary.available
  assert vocabulary == vocabularies.load_vocabulary(tmp_path / 'none')
  assert vocabulary != vocabularies.load_vocabulary(tmp_path / 'other')
  hash(vocabulary), repr(vocabulary), pickle.dumps(vocabulary)
  with pytest.raises(FileNotFoundError, match='bart_t5x.prepare'):
    vocabulary.encode('x')


def test_file_that_comes_later(folders, tmp_path):
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


def test_copies_and_pickles(corpus_dir):
  vocabulary = vocabularies.load_vocabulary(corpus_dir, templates=True)
  ids = vocabulary.encode('på <mask> Ås')
  for other in (pickle.loads(pickle.dumps(vocabulary)), copy.deepcopy(vocabulary)):
    assert other == vocabulary and other.encode('på <mask> Ås') == ids
  # The file's content does not travel.
  assert len(pickle.dumps(vocabulary)) < 1000


def test_naming_a_vocabulary_reads_nothing(folders, monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError('read')

  monkeypatch.setattr(tf.io.gfile, 'GFile', refuse)
  vocabulary = vocabularies.load_vocabulary(folders / 'bpe')
  assert vocabulary.available
  seqio.Feature(vocabulary)


def test_path_may_be_a_pathlib_path(folders):
  path = pathlib.Path(folders) / 'bpe' / 'tokenizer.model'
  assert vocabularies.BartVocabulary(path).vocab_size == SIZES['bpe']
