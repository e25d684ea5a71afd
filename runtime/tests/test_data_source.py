"""What tells the data of a position from other data."""

import dataclasses
import shutil

import pytest
import seqio

from t5x import data, data_source

SPLITS = ('train', 'validation')


def register(name, folder):
  """A task over the text files of a folder."""
  seqio.TaskRegistry.add(
    name,
    source=seqio.TextLineDataSource({s: f'{folder}/{s}-*.txt' for s in SPLITS}),
    preprocessors=[],
    output_features={'text': seqio.Feature(seqio.ByteVocabulary())},
  )
  return name


@pytest.fixture
def corpus(tmp_path):
  """The configuration of a task over two files, and their folder."""
  folder = tmp_path / 'corpus'
  folder.mkdir()
  for i in range(2):
    (folder / f'train-{i}.txt').write_text(f'line {i}\n')
  (folder / 'validation-0.txt').write_text('a line to look at\n')
  name = register('described', folder)
  yield config(name), folder
  for known in list(seqio.TaskRegistry.names()):
    if known.startswith('described'):
      seqio.TaskRegistry.remove(known)


def config(task, split='train'):
  return data.DatasetConfig(
    mixture_or_task_name=task,
    task_feature_lengths={'text': 4},
    split=split,
    batch_size=1,
    shuffle=False,
    seed=0,
  )


def test_the_same_data_are_the_same_in_any_folder(corpus, tmp_path):
  cfg, folder = corpus
  there = data_source.describe(cfg)
  assert (there['task'], there['split']) == ('described', 'train')
  as_object = dataclasses.replace(
    cfg, mixture_or_task_name=seqio.TaskRegistry.get('described')
  )
  assert data_source.describe(as_object) == there
  shutil.move(folder, tmp_path / 'moved')
  seqio.TaskRegistry.remove('described')
  register('described', tmp_path / 'moved')
  assert data_source.differences(there, data_source.describe(cfg)) == []


def grow(folder):
  with open(folder / 'train-1.txt', 'a') as file:
    file.write('one more\n')


def add(folder):
  (folder / 'train-2.txt').write_text('line 2\n')


def rename(folder):
  (folder / 'train-1.txt').rename(folder / 'train-7.txt')


@pytest.mark.parametrize('change', [grow, add, rename])
def test_changed_files_are_told(corpus, tmp_path, change):
  cfg, folder = corpus
  before = data_source.describe(cfg)
  validation = data_source.describe(config('described', 'validation'))
  change(folder)
  seqio.TaskRegistry.remove('described')
  # Elsewhere, as seqio lists the files of a pattern once.
  register('described', shutil.copytree(folder, tmp_path / 'changed'))
  (told,) = data_source.differences(before, data_source.describe(cfg))
  assert 'files have other names or sizes' in told
  # Another split's files do not matter.
  assert data_source.describe(config('described', 'validation')) == validation


def test_another_task_and_split_are_named(corpus):
  cfg, folder = corpus
  other = data_source.describe(
    config(register('described_too', folder), split='validation')
  )
  assert data_source.differences(data_source.describe(cfg), other) == [
    "the task was 'described' and is 'described_too'",
    "the split was 'train' and is 'validation'",
  ]


def test_a_mixture_has_the_files_of_all_its_tasks(corpus, tmp_path):
  _, folder = corpus
  other = tmp_path / 'other'
  shutil.copytree(folder, other)
  register('described_other', other)
  name = 'described_mixture'
  seqio.MixtureRegistry.add(name, ['described', 'described_other'], default_rate=1.0)
  try:
    before = data_source.describe(config(name))
    grow(other)
    assert data_source.differences(before, data_source.describe(config(name)))
  finally:
    seqio.MixtureRegistry.remove(name)


def test_a_cached_task_is_known_by_what_its_cache_counts(corpus, tmp_path):
  cfg, folder = corpus
  cached = dataclasses.replace(cfg, use_cached=True)
  cache = tmp_path / 'cache' / 'described'
  cache.mkdir(parents=True)
  (cache / 'COMPLETED').touch()
  info = cache / 'info.train.json'
  info.write_text('{"num_shards": 1}')
  seqio.add_global_cache_dirs([str(tmp_path / 'cache')])
  try:
    before = data_source.describe(cached)
    grow(folder)
    assert data_source.describe(cached) == before
    info.write_text('{"num_shards": 16}')
    assert data_source.differences(before, data_source.describe(cached))
  finally:
    seqio.set_global_cache_dirs([])


def test_functions_and_readers_that_seqio_does_not_know_have_names_only():
  unknown = data_source.describe(config('read by a function of the user'))
  assert unknown['task'] == 'read by a function of the user'
