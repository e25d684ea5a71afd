"""The passes of `prepare`: the same bytes however many workers, honest baselines."""

import math
import multiprocessing
import os

import numpy as np
import pytest
import tensorflow as tf

from bart_t5x import corpora, corpus_build, documents, sentences, tokenization

WORDS = 'fjell fjord skog sjø bjørn ulv elg rev gård kirke skole båt vei bro'.split()


def texts(number):
  random = np.random.default_rng(3)
  return [
    f'Tekst {i}. '
    + ' '.join(
      ' '.join(random.choice(WORDS, 6)).capitalize() + '.' for _ in range(i % 9)
    )
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
  source = corpora.Source(lambda: iter(texts(number)))
  return corpus_build.build(source, str(folder), SETTINGS | settings, workers)


def read(folder, split):
  """(tokens, sentence_starts, example_id) of each document."""
  rows = []
  for name in sorted(os.listdir(folder)):
    if name.startswith(split):
      for row in tf.data.TFRecordDataset(str(folder / name)).as_numpy_iterator():
        feature = tf.train.Example.FromString(row).features.feature
        values = {k: list(v.int64_list.value) for k, v in feature.items()}
        (example_id,) = values['example_id']
        rows.append((values['tokens'], values['sentence_starts'], example_id))
  return rows


def test_shards_hold_every_document_as_it_was(tmp_path):
  corpus = build(tmp_path / 'out')
  tokenizer = tokenization.read_tokenizer(str(tmp_path / 'out' / 'tokenizer.json'))
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
      assert example_id == documents.digest(text.encode())
      pieces = [tokenizer.decode(p) for p in np.split(tokens, starts[1:])]
      assert pieces == sentences.split_sentences(text)
  assert sorted(found) == sorted(texts(600))
  assert list(found.values()).count('validation') == 20
  total = sum(corpus['splits'][split]['bytes'] for split in corpus['splits'])
  assert total == sum(len(text.encode()) for text in texts(600))


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_bytes_whatever_the_number_of_workers(tmp_path, monkeypatch):
  # Batches small enough for every worker to get some.
  monkeypatch.setattr(corpus_build, '_BATCH_BYTES', 5000)
  corpora_made = [
    build(tmp_path / str(workers), workers=workers) for workers in (1, 2, 3)
  ]
  assert corpora_made[0] == corpora_made[1] == corpora_made[2]
  first = contents(tmp_path / '1')
  assert len(first) == 5
  assert contents(tmp_path / '2') == first and contents(tmp_path / '3') == first


def kill_the_workers(*args):
  for worker in multiprocessing.active_children():
    worker.kill()


def test_death_of_a_worker_is_reported(tmp_path, monkeypatch):
  # More batches than are under way at a time: some are left when the workers die.
  monkeypatch.setattr(corpus_build, '_BATCH_BYTES', 500)
  monkeypatch.setattr(corpus_build.shards.ShardWriter, 'write', kill_the_workers)
  with pytest.raises(RuntimeError, match='worker process ended.*--num_workers'):
    build(tmp_path / 'out', workers=2)


def test_baselines_by_hand():
  class Speller:
    def decode(self, ids):
      return f'token {ids}'

  train = corpus_build.Totals(vocab_size=8, shards=1)
  train.documents, train.tokens = 2, 6
  train.histogram[:] = [0, 0, 0, 0, 0, 3, 2, 1]
  validation = corpus_build.Totals(vocab_size=8, shards=1)
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


def test_unigram_model_lies_between_certainty_and_a_uniform_guess(tmp_path):
  corpus = build(tmp_path / 'out')
  assert 1 < corpus['baselines']['unigram_loss'] < math.log(330)


def test_the_tokenizer_never_sees_what_is_held_out(tmp_path, monkeypatch):
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


@pytest.mark.parametrize('number', [0, 1, 39])
def test_too_few_documents(tmp_path, number):
  with pytest.raises(corpus_build.CorpusTooSmall) as error:
    build(tmp_path / 'out', number=number)
  message = str(error.value)
  if number:
    assert f'{number} different' in message and '20 are to be held out' in message
  else:
    assert 'no text' in message


@pytest.mark.parametrize(
  ('num_bytes', 'shards'),
  [(0, 1), (1, 1), (2**21 + 1, 2), (10**8, 64), (2**34, 64), (2**36, 256)],
)
def test_number_of_shards(num_bytes, shards):
  assert corpus_build.default_num_shards(num_bytes) == shards


@pytest.mark.parametrize('kind', ['unigram', 'bpe'])
def test_sentencepiece_corpora(tmp_path, kind):
  corpus = build(tmp_path / 'out', tokenizer=kind, vocab_size=320)
  assert corpus['vocab_size'] == 320
  tokenizer = tokenization.read_tokenizer(str(tmp_path / 'out' / 'tokenizer.model'))
  rows = read(tmp_path / 'out', 'train') + read(tmp_path / 'out', 'validation')
  assert sorted(tokenizer.decode(ids) for ids, _, _ in rows) == sorted(texts(600))
