"""The passes of `prepare`: duplicates, splits, shards, baselines."""

import math
import random

import numpy as np
import pytest
import tensorflow as tf

from bart_t5x import corpus_build, corpus_format, sentences, text_sources, tokenization

WORDS = 'fjell fjord skog sjø bjørn ulv elg rev gård kirke skole båt vei bro'.split()


def texts(number):
  rng = np.random.default_rng(3)
  return [
    f'Tekst {i}. '
    + ' '.join(' '.join(rng.choice(WORDS, 6)).capitalize() + '.' for _ in range(i % 9))
    for i in range(number)
  ]


SETTINGS = {
  'source': 'text',
  'license': None,
  'vocab_size': 330,
  'tokenizer': 'bytelevel',
  'min_frequency': 2,
  'tokenizer_bytes': None,
  'validation_share': 0.01,
  'min_validation_documents': 20,
  'num_shards': 3,
}


def build(folder, documents=texts(600), workers=1, **settings):
  folder.mkdir()
  source = text_sources.Source([lambda: iter(documents)])
  corpus_build.build(source, str(folder), SETTINGS | settings, workers)
  return corpus_format.read(folder)


def read(path):
  """Returns (tokens, sentence_starts, example_id) of each document of a shard."""
  rows = []
  for row in tf.data.TFRecordDataset(path).as_numpy_iterator():
    feature = tf.train.Example.FromString(row).features.feature
    values = {k: list(v.int64_list.value) for k, v in feature.items()}
    (example_id,) = values['example_id']
    rows.append((values['tokens'], values['sentence_starts'], example_id))
  return rows


@pytest.mark.parametrize('kind', ['bytelevel', 'unigram'])
def test_shards_hold_every_document(tmp_path, kind):
  corpus = build(tmp_path / 'out', tokenizer=kind, vocab_size=320)
  path = tokenization.find_tokenizer_file(tmp_path / 'out')
  tokenizer = tokenization.read_tokenizer(path)
  assert corpus['vocab_size'] == tokenizer.vocab_size == 320
  found = {}
  for split, counts in corpus['splits'].items():
    shards = corpus_format.shard_paths(tmp_path / 'out', split, counts['shards'])
    rows = []
    for path in shards:
      rows += (shard := read(path))
      assert shard
    ids = [example_id for *_, example_id in rows]
    assert ids == sorted(ids)
    assert counts['documents'] == len(rows)
    assert counts['tokens'] == sum(len(tokens) for tokens, _, _ in rows)
    assert counts['sentences'] == sum(len(starts) for _, starts, _ in rows)
    lengths = sorted(len(tokens) for tokens, _, _ in rows)
    assert counts['length_quantiles']['100%'] == lengths[-1]
    assert counts['length_quantiles']['50%'] == lengths[(len(lengths) - 1) // 2]
    for tokens, starts, example_id in rows:
      text = tokenizer.decode(tokens)
      found[text] = split
      assert example_id == corpus_format.digest(text.encode())
      pieces = [tokenizer.decode(p) for p in np.split(tokens, starts[1:])]
      assert pieces == sentences.split_sentences(text)
  assert sorted(found) == sorted(texts(600))
  assert list(found.values()).count('validation') == 20
  for name, count in (('bytes', str.encode), ('words', str.split)):
    total = sum(split[name] for split in corpus['splits'].values())
    assert total == sum(len(count(text)) for text in texts(600))
  assert 1 < corpus['baselines']['unigram_loss'] < math.log(320)


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize('kind', ['bytelevel', 'unigram'])
def test_same_bytes_for_any_order_and_number_of_workers(tmp_path, monkeypatch, kind):
  build(tmp_path / 'a', tokenizer=kind, vocab_size=320)
  # Batches small enough for every worker to get some, and many files to merge.
  monkeypatch.setattr(corpus_build, '_BATCH_BYTES', 5000)
  monkeypatch.setattr(corpus_build.Spool, 'FILE_BYTES', 5000)
  shuffled = random.Random(1).sample(texts(600), 600)
  build(tmp_path / 'b', shuffled, workers=3, tokenizer=kind, vocab_size=320)
  first = contents(tmp_path / 'a')
  assert len(first) == 6 and contents(tmp_path / 'b') == first


def test_baselines_by_hand():
  class Speller:
    def decode(self, ids):
      return f'token {ids}'

  train = corpus_build.Totals(8)
  train.documents, train.tokens = 2, 6
  train.histogram[:] = [0, 0, 0, 0, 0, 3, 2, 1]
  validation = corpus_build.Totals(8)
  validation.documents, validation.tokens = 1, 4
  validation.histogram[:] = [0, 0, 0, 0, 0, 1, 0, 3]
  baselines = corpus_build.baselines(train, validation, Speller())
  # Train: <s> 2, </s> 2, tokens 3 2 1, one more for each of 8: 18 in all.
  log = math.log
  expected = -(log(3 / 18) + log(3 / 18) + log(4 / 18) + 3 * log(2 / 18)) / 6
  assert baselines['unigram_loss'] == pytest.approx(expected, abs=1e-12)
  assert baselines['commonest_token'] == 'token [5]'
  assert baselines['commonest_token_id'] == 5
  assert baselines['commonest_token_share'] == 0.25


def test_tokenizer_never_sees_held_out_text(tmp_path, monkeypatch):
  seen = []

  def train(kind, stream, *rest):
    seen.extend(stream)
    raise KeyError

  monkeypatch.setattr(corpus_build.tokenizer_training, 'train', train)
  with pytest.raises(KeyError):
    build(tmp_path / 'out')
  by_digest = sorted(texts(600), key=lambda text: corpus_format.digest(text.encode()))
  assert seen == by_digest[20:]
  all_bytes = sum(len(text.encode()) for text in texts(600))
  whole = list(seen)
  seen.clear()
  with pytest.raises(KeyError):
    build(tmp_path / 'half', tokenizer_bytes=all_bytes // 2)
  assert set(seen) < set(whole)
  assert 0.35 < sum(len(text.encode()) for text in seen) / all_bytes < 0.65


def test_too_few_documents(tmp_path):
  with pytest.raises(ValueError, match='39 distinct.*20'):
    build(tmp_path / 'out', texts(39))


def digests(texts):
  return sorted(corpus_format.digest(text.encode()) for text in texts)


@pytest.mark.parametrize('most_files', [2, 3, 256])
@pytest.mark.parametrize('file_bytes', [1, 1000, 1 << 20])
def test_spool_sorts_and_drops_duplicates(
  tmp_path, monkeypatch, file_bytes, most_files
):
  monkeypatch.setattr(corpus_build.Spool, 'FILE_BYTES', file_bytes)
  monkeypatch.setattr(corpus_build.Spool, 'MOST_FILES', most_files)
  spool = corpus_build.Spool(str(tmp_path))
  texts = [f'dokument {i * i % 61}' for i in range(100)] + ['', 'å' * 3000]
  for text in texts:
    spool.add(corpus_format.digest(text.encode()), text.encode())
  assert spool.documents == 102
  for _ in range(2):  # it can be read again
    rows = list(spool.read())
    assert [digest for digest, _ in rows] == digests(set(texts))
    assert {text.decode() for _, text in rows} == set(texts)
  assert len(list(tmp_path.iterdir())) <= most_files + 102 // most_files


def count(sizes, share=0.0, at_least=1, **settings):
  settings = {
    'validation_share': share,
    'min_validation_documents': at_least,
  } | settings
  return corpus_build.count(sizes, 9000, 3, {'num_shards': None} | settings)


def held_out(kept, values):
  return sum(kept.shard_of(value)[0] == 'validation' for value in values)


@pytest.mark.parametrize('at_least', [1, 100])
def test_minimum_held_out(at_least):
  values = digests(f'dokument {i}' for i in range(500))
  kept = count([(value, 10) for value in values], at_least=at_least)
  assert held_out(kept, values) == at_least
  assert (kept.documents, kept.bytes) == (500, 5000)
  assert (kept.duplicates, kept.empty) == (8500, 3)


def test_share_held_out():
  values = digests(f'dokument {i}' for i in range(2000))
  kept = count([(value, 10) for value in values], share=0.05)
  assert 60 < held_out(kept, values) < 140  # 100 by the share


def test_some_document_is_left_for_training():
  with pytest.raises(ValueError, match='too few'):
    count([(1, 10), (2, 10)], share=0.5)


def test_hash_of_the_text():
  assert count([(1, 1), (2, 1)]).text_sha256 == count([(1, 9), (2, 9)]).text_sha256
  assert count([(1, 1), (3, 1)]).text_sha256 != count([(1, 1), (2, 1)]).text_sha256
