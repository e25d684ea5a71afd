"""Corpora, hosts' shares of them, epochs, and tasks by name."""

import collections
import json
import os
import pathlib
import shutil
import sys

import gin
import numpy as np
import pytest
import seqio
import tensorflow as tf
from gin import config as gin_config

from bart_t5x import data, vocabularies
from bart_t5x.data import CorpusSource, EpochTask


def documents(corpus_dir, hosts=1, **kwargs):
  """The example ids that each host reads."""
  shards = [
    CorpusSource(corpus_dir).get_dataset(
      shard_info=seqio.ShardInfo(index=i, num_shards=hosts), **kwargs
    )
    for i in range(hosts)
  ]
  return [[int(d['example_id']) for d in s.as_numpy_iterator()] for s in shards]


def test_reads_what_prepare_wrote(corpus_dir):
  source = CorpusSource(corpus_dir)
  assert source.splits == ('train', 'validation')
  for split in source.splits:
    read = list(source.get_dataset(split, shuffle=False).as_numpy_iterator())
    assert len(read) == source.num_input_examples(split)
    for document in read:
      assert document['tokens'].dtype == np.int32
      starts = document['sentence_starts']
      assert starts[0] == 0 and (np.diff(starts) > 0).all()
      assert starts[-1] < len(document['tokens'])


@pytest.mark.parametrize('shuffle', [False, True])
@pytest.mark.parametrize('hosts', [1, 2, 3, 4, 8])
def test_p16_hosts_split_the_corpus(corpus_dir, hosts, shuffle):
  (everything,) = documents(corpus_dir, shuffle=False)
  assert len(everything) == len(set(everything)) == 280
  shares = documents(corpus_dir, hosts, shuffle=shuffle, seed=5)
  assert sorted(sum(shares, [])) == sorted(everything)
  sizes = [len(share) for share in shares]
  # A document's file is drawn by its digest, so sizes vary by their square root.
  assert max(sizes) - min(sizes) <= 4 * (280 / hosts) ** 0.5


def test_seed_orders_the_files(corpus_dir):
  orders = [documents(corpus_dir, seed=seed)[0] for seed in (1, 1, 2, 3, 4)]
  assert orders[0] == orders[1]
  assert len({tuple(order) for order in orders}) > 1
  assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(orders[0]))}


def test_missing_corpus_names_the_command(tmp_path):
  source = CorpusSource(str(tmp_path / 'absent'))
  assert source.num_input_examples('train') is None
  with pytest.raises(FileNotFoundError, match='does not exist.*bart_t5x.prepare'):
    source.get_dataset()


@pytest.fixture
def copy(corpus_dir, tmp_path):
  return pathlib.Path(shutil.copytree(corpus_dir, tmp_path / 'copy'))


def test_unfinished_corpus_raises(copy):
  os.remove(copy / 'corpus.json')
  with pytest.raises(FileNotFoundError, match='is not complete.*bart_t5x.prepare'):
    CorpusSource(copy).get_dataset()


def test_damaged_corpus_json_is_named(copy):
  text = (copy / 'corpus.json').read_text()
  (copy / 'corpus.json').write_text(text[:-9])
  with pytest.raises(ValueError, match='copy/corpus.json.*--overwrite'):
    CorpusSource(copy).get_dataset()


def test_missing_shards_and_splits_raise(copy):
  with pytest.raises(FileNotFoundError, match="no split 'test'"):
    CorpusSource(copy).get_dataset('test')
  os.remove(copy / 'train-00002-of-00004.tfrecord')
  with pytest.raises(ValueError, match='00002-of-00004.*not exist'):
    CorpusSource(copy).get_dataset()


def test_cut_off_and_damaged_shards_raise(copy):
  path = copy / 'train-00002-of-00004.tfrecord'
  whole = path.read_bytes()
  path.write_bytes(whole[:-7])
  with pytest.raises(ValueError, match='00002-of-00004.*bytes'):
    CorpusSource(copy).get_dataset()
  # Of the right size, but with a wrong checksum.
  path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
  with pytest.raises(tf.errors.DataLossError):
    list(CorpusSource(copy).get_dataset())


def test_changed_tokenizer_raises(copy):
  path = copy / 'tokenizer.json'
  text = path.read_text()
  ids = json.loads(text)['model']['vocab']
  text = text.replace(f'"a": {ids["a"]}', f'"a": {ids["b"]}')
  path.write_text(text.replace(f'"b": {ids["b"]}', f'"b": {ids["a"]}'))
  with pytest.raises(ValueError, match='copy/tokenizer.json'):
    vocabularies.load_vocabulary(copy).encode('ab')


def stamp(dataset):
  """A preprocessor that returns its stamps as a feature."""

  def label(documents):
    names = ('example_id', 'seed', 'epoch')
    return {'targets': tf.stack([documents[name] for name in names], axis=1)}

  return dataset.map(label).unbatch()


@pytest.fixture(scope='module')
def task(corpus_dir):
  return EpochTask(
    'stamped',
    source=CorpusSource(corpus_dir),
    preprocessors=[stamp],
    output_features={
      'targets': seqio.Feature(
        seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.int64
      )
    },
  )


def stamps(task, split='train', **kwargs):
  dataset = task.get_dataset(None, split, **kwargs)
  return [tuple(e['targets'].tolist()) for e in dataset.as_numpy_iterator()]


def test_each_epoch_is_stamped_complete_and_in_its_own_order(task):
  seen = stamps(task, shuffle=True, seed=11, num_epochs=3)
  assert {seed for _, seed, _ in seen} == {11}
  epochs = collections.Counter(epoch for _, _, epoch in seen)
  assert epochs == {0: 280, 1: 280, 2: 280}
  assert len(set(seen)) == 840
  first, second, third = ([i for i, _, e in seen if e == epoch] for epoch in range(3))
  assert first != second != third


def test_p17_later_epochs_resume_in_their_order(task, tmp_path, monkeypatch):
  # Buffers so small that most of what follows has not been read at the checkpoint.
  monkeypatch.setattr(data, '_SHUFFLED_DOCUMENTS', 16)
  monkeypatch.setattr(data, '_DOCUMENTS_PER_BATCH', 4)

  def begin():
    return iter(task.get_dataset(None, shuffle=True, seed=11, num_epochs=5))

  iterator = begin()
  for _ in range(100):
    next(iterator)
  path = tf.train.Checkpoint(iterator=iterator).write(str(tmp_path / 'state'))
  want = [e['targets'].numpy().tolist() for e in iterator]
  resumed = begin()
  tf.train.Checkpoint(iterator=resumed).read(path)
  assert [e['targets'].numpy().tolist() for e in resumed] == want
  assert len(want) == 5 * 280 - 100


def test_evaluation_has_no_epochs_and_one_seed(task):
  seen = stamps(task, 'validation', shuffle=True, seed=11, num_epochs=2)
  assert {(seed, epoch) for _, seed, epoch in seen} == {(data.EVALUATION_SEED, 0)}
  assert len(seen) == 40


def test_use_cached_without_cacheable_step_raises(task):
  with pytest.raises(ValueError, match='use_cached=False'):
    task.get_dataset(None, use_cached=True)


def test_replaced_task_still_stamps(task):
  changed = task.replace(name='changed')
  assert isinstance(changed, EpochTask)
  assert stamps(changed, seed=2, shuffle=False)[0][1:] == (2, 0)


def test_missing_module_and_failed_import_in_a_module(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'lacking_module.py').write_text('import no_such_library')
  with pytest.raises(ImportError, match="--module names 'absent.tasks'.*PYTHONPATH"):
    data.import_tasks('absent.tasks', '--module')
  with pytest.raises(ImportError, match="MIXTURE_OR_TASK_MODULE names 'absent'"):
    data.find_task('any', 'absent')
  with pytest.raises(ImportError, match="^No module named 'no_such_library'"):
    data.import_tasks('lacking_module')


def test_a_module_of_the_users_that_is_named_tasks(tmp_path, monkeypatch):
  for name in [name for name in sys.modules if name.partition('.')[0] == 'tasks']:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'tasks.py').write_text('')
  with pytest.raises(ValueError, match=str(tmp_path / 'tasks.py')):
    data.find_task('no_such_task', 'tasks')
  monkeypatch.delitem(sys.modules, 'tasks')


def test_module_registers_configurables_after_gin_was_locked(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'late_module.py').write_text(
    'import gin\n@gin.configurable\ndef late(x=3):\n  return x\n'
  )
  gin.finalize()
  try:
    data.import_tasks('late_module')
    assert gin.config_is_locked()
  finally:
    gin.clear_config()
    gin_config._REGISTRY.pop('late_module.late')
