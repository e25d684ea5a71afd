"""The passes of `prepare`: duplicates, splits, shards, baselines."""

import math
import os
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


def build(folder, number=600, workers=1, **settings):
  folder.mkdir()
  source = text_sources.Source(lambda: iter(texts(number)))
  return corpus_build.build(source, str(folder), SETTINGS | settings, workers)


def read(folder, split):
  """Returns (tokens, sentence_starts, example_id) of each document."""
  rows = []
  for name in sorted(os.listdir(folder)):
    if name.startswith(split):
      for row in tf.data.TFRecordDataset(str(folder / name)).as_numpy_iterator():
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
  for split in ('train', 'validation'):
    rows = read(tmp_path / 'out', split)
    counts = corpus['splits'][split]
    assert counts['documents'] == len(rows)
    assert counts['tokens'] == sum(len(tokens) for tokens, _, _ in rows)
    assert counts['sentences'] == sum(len(starts) for _, starts, _ in rows)
    for tokens, starts, example_id in rows:
      text = tokenizer.decode(tokens)
      found[text] = split
      assert example_id == corpus_format.digest(text.encode())
      pieces = [tokenizer.decode(p) for p in np.split(tokens, starts[1:])]
      assert pieces == sentences.split_sentences(text)
  assert sorted(found) == sorted(texts(600))
  assert list(found.values()).count('validation') == 20
  total = sum(corpus['splits'][split]['bytes'] for split in corpus['splits'])
  assert total == sum(len(text.encode()) for text in texts(600))
  assert 1 < corpus['baselines']['unigram_loss'] < math.log(320)


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_bytes_for_any_number_of_workers(tmp_path, monkeypatch):
  # Batches small enough for every worker to get some.
  monkeypatch.setattr(corpus_build, '_BATCH_BYTES', 5000)
  assert build(tmp_path / '1') == build(tmp_path / '3', workers=3)
  first = contents(tmp_path / '1')
  assert len(first) == 5 and contents(tmp_path / '3') == first


def test_baselines_by_hand():
  class Speller:
    def decode(self, ids):
      return f'token {ids}'

  train = corpus_build.Totals(8, [])
  train.documents, train.tokens = 2, 6
  train.histogram[:] = [0, 0, 0, 0, 0, 3, 2, 1]
  validation = corpus_build.Totals(8, [])
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
  assert len(seen) == 580
  all_bytes = sum(len(text.encode()) for text in texts(600))
  whole = list(seen)
  seen.clear()
  with pytest.raises(KeyError):
    build(tmp_path / 'half', tokenizer_bytes=all_bytes // 2)
  assert set(seen) < set(whole)
  assert 0.35 < sum(len(text.encode()) for text in seen) / all_bytes < 0.65


def test_too_few_documents(tmp_path):
  with pytest.raises(ValueError, match='39 different.* 40 '):
    build(tmp_path / 'out', number=39)


def collect(tmp_path, texts, share=0.1, at_least=5, name='spool'):
  return corpus_build.spool(texts, str(tmp_path / name), share, at_least)


def test_duplicates_and_empty_documents_are_dropped(tmp_path):
  texts = ['a', 'b', '', 'a', ' \n', 'c', 'a ', 'b']
  kept = collect(tmp_path, texts)
  assert [text.decode() for _, text in kept.read()] == ['a', 'b', 'c', 'a ']
  assert (kept.documents, kept.duplicates, kept.empty, kept.bytes) == (4, 2, 2, 5)


def test_split_depends_on_the_text_alone(tmp_path):
  texts = [f'dokument {i}' for i in range(2000)]
  shuffled = random.Random(1).sample(texts, len(texts))
  splits = []
  for name, order in (('a', texts), ('b', shuffled)):
    kept = collect(tmp_path, order, share=0.05, at_least=10, name=name)
    splits.append({t: kept.split_of(d) for d, t in kept.read()})
  assert splits[0] == splits[1]
  held_out = sum(split == 'validation' for split in splits[0].values())
  assert 60 < held_out < 140  # 100 by the share


@pytest.mark.parametrize('at_least', [1, 100])
def test_minimum_held_out(tmp_path, at_least):
  texts = [f'dokument {i}' for i in range(500)]
  kept = collect(tmp_path, texts, share=0.0, at_least=at_least)
  splits = [kept.split_of(value) for value, _ in kept.read()]
  assert splits.count('validation') == at_least


def test_hash_of_the_text(tmp_path):
  one = collect(tmp_path, ['a', 'b'], name='1').text_sha256
  assert collect(tmp_path, ['a', 'b', 'a', ''], name='2').text_sha256 == one
  assert collect(tmp_path, ['b', 'a'], name='3').text_sha256 != one
  assert collect(tmp_path, ['ab'], name='4').text_sha256 != one


def test_digest_set_equals_a_set():
  rng = random.Random(0)
  ours, plain = corpus_build.DigestSet(buffer_size=16), set()
  for _ in range(5000):
    value = rng.choice([rng.randrange(3000), 2**63 - 1 - rng.randrange(50)])
    assert ours.add(value) == (value not in plain)
    plain.add(value)
