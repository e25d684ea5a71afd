"""The denoising tasks, from shards to batches."""

import collections
import dataclasses
import os
import subprocess
import sys

import gin
import numpy as np
import pytest
import seqio
from noise_cases import RECIPES

from bart_t5x import noise
from bart_t5x.features import BartFeatureConverter
from tasks import pretrain

LENGTHS = {'inputs': 64, 'targets': 64}
NOISE = noise.Recipe(whole_words=True, random_ratio=0.1)


@pytest.fixture(scope='module')
def task(corpus_dir):
  name = 'tasks_test_denoising'
  yield pretrain.add_denoising_task(name, corpus_dir, NOISE, shuffle_buffer_size=64)
  seqio.TaskRegistry.remove(name)


def batches(provider, batch_size=4, **kwargs):
  kwargs = {'shuffle': True, 'seed': 3, 'num_epochs': None, **kwargs}
  return seqio.get_dataset(
    provider.name,
    LENGTHS,
    BartFeatureConverter(pack=True),
    batch_size=batch_size,
    verbose=False,
    **kwargs,
  )


def noised(task, hosts=1, split='train', **kwargs):
  """Source and target of each (example id, piece, epoch), over all hosts."""
  found = {}
  for index in range(hosts):
    shard = seqio.ShardInfo(index=index, num_shards=hosts)
    ds = task.get_dataset(LENGTHS, split, shard_info=shard, **kwargs)
    for example in ds.as_numpy_iterator():
      key = tuple(int(example[k]) for k in ('example_id', 'piece', 'epoch'))
      assert key not in found
      found[key] = example['inputs'].tolist(), example['targets'].tolist()
  return found


def test_p13_targets_give_the_text_back(task, corpus_dir):
  with open(os.path.join(os.path.dirname(corpus_dir), 'texts.txt')) as f:
    texts = set(f.read().splitlines())
  pieces = collections.defaultdict(dict)
  for split in ('train', 'validation'):
    for (example, piece, _), (_, target) in noised(task, split=split).items():
      assert target[0] == 1 and target[-1] == 2
      pieces[example][piece] = target[1:-1]
  vocabulary = task.output_features['targets'].vocabulary
  made = {
    vocabulary.decode([t for i in range(len(p)) for t in p[i]]) for p in pieces.values()
  }
  assert made == texts


@pytest.mark.parametrize('hosts', [2, 3])
def test_p15_p16_hosts_and_order_change_no_example(task, hosts):
  alone = noised(task, seed=3, num_epochs=2, shuffle=False)
  shared = noised(task, hosts, seed=3, num_epochs=2, shuffle=True)
  assert alone == shared


def test_p15_evaluation_noise_is_frozen(task):
  runs = [
    noised(task, split='validation', seed=seed, shuffle=shuffle)
    for seed, shuffle in ((3, False), (4, True), (None, False))
  ]
  assert runs[0] == runs[1] == runs[2]


def assert_same(a, b):
  for one, other in zip(a, b, strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])


def test_seqio_converter_takes_the_task(task):
  ds = seqio.get_dataset(
    task.name, LENGTHS, seqio.EncDecFeatureConverter(pack=True), verbose=False
  )
  assert 'decoder_targets_noised' not in ds.element_spec
  assert len(list(ds.take(3))) == 3


def test_t5x_reads_the_task(task):
  from t5x import utils

  config = utils.DatasetConfig(
    mixture_or_task_name=task.name,
    task_feature_lengths=LENGTHS,
    split='train',
    batch_size=4,
    shuffle=True,
    seed=3,
    pack=True,
  )
  ds = utils.get_dataset(config, 0, 1, BartFeatureConverter)
  assert_same(
    list(ds.take(5).as_numpy_iterator()),
    list(batches(task).take(5).as_numpy_iterator()),
  )
  config = dataclasses.replace(config, split='validation', shuffle=False, seed=42)
  evals = utils.get_training_eval_datasets(config, 0, 1, 3, BartFeatureConverter)
  first, second = (list(evals[task.name].as_numpy_iterator()) for _ in range(2))
  assert len(first) == 3
  assert_same(first, second)


@pytest.fixture
def gin_task(corpus_dir):
  name = 'tasks_test_gin'
  gin.clear_config()
  yield pretrain.add_denoising_task(name, corpus_dir)
  seqio.TaskRegistry.remove(name)
  gin.clear_config()


def sources_of(task):
  return [source for source, _ in noised(task, seed=1, shuffle=False).values()]


def test_gin_binds_the_noise_after_the_task_is_registered(gin_task):
  plain = sources_of(gin_task)
  with gin.unlock_config():
    gin.parse_config_files_and_bindings(
      ['gin/noise/default.gin'],
      [
        'noise.Recipe.permute_ratio = 0.0',
        'noise.Recipe.infill_ratio = 0.0',
        'noise.Recipe.random_ratio = 0.0',
      ],
      skip_unknown=False,
    )
  bound = sources_of(gin_task)
  assert bound != plain
  targets = [target for _, target in noised(gin_task, seed=1, shuffle=False).values()]
  assert bound == targets


@pytest.mark.parametrize(
  ('name', 'recipe'),
  [
    *((name, RECIPES[name]) for name in ('default', 'paper', 'fairseq', 'hf_compat')),
    ('infilling', noise.Recipe(permute_ratio=0, whole_words=True)),
  ],
)
def test_recipes_in_gin(gin_task, name, recipe):
  gin.parse_config_file(f'gin/noise/{name}.gin')
  assert noise.Recipe() == recipe
  # As each file says.
  assert noise.longest_source(recipe, 1024) <= 896
  # Each field is bound, so that the file describes all of its noise.
  bound = gin.config_str()
  for field in dataclasses.fields(noise.Recipe):
    assert f'Recipe.{field.name} =' in bound


def test_text_must_be_cached(corpus_dir):
  name = 'tasks_test_text'
  source = seqio.FunctionDataSource(lambda split, shuffle_files: None, ['train'])
  task = pretrain.add_denoising_task(name, corpus_dir, source=source)
  with pytest.raises(ValueError, match='USE_CACHED_TASKS = True'):
    task.get_dataset(LENGTHS)
  seqio.TaskRegistry.remove(name)


CACHED = """
import os, sys
import seqio
import tensorflow as tf
from bart_t5x import noise
from tasks import pretrain

CORPUS = os.environ['CORPUS']
TEXTS = os.path.join(os.path.dirname(CORPUS), 'texts.txt')

recipe = noise.Recipe()
pretrain.add_denoising_task('cached_corpus', CORPUS, recipe)
pretrain.add_denoising_task(
  'cached_text', CORPUS, recipe, source=seqio.TextLineDataSource({'train': TEXTS})
)
"""

COMPARE = """
import cached_tasks
LENGTHS = {'inputs': 64, 'targets': 64}
seqio = cached_tasks.seqio
tf = cached_tasks.tf
seqio.add_global_cache_dirs(['cache'])

def dataset(name, use_cached, split):
  task = seqio.get_mixture_or_task(name)
  return task.get_dataset(
    LENGTHS, split, use_cached=use_cached, seed=3, num_epochs=2, shuffle=True
  )

def examples(*args):
  return {
    tuple(int(e[k]) for k in ('example_id', 'piece', 'epoch')):
      (e['inputs'].tolist(), e['targets'].tolist())
    for e in dataset(*args).as_numpy_iterator()
  }

plain = examples('cached_corpus', False, 'train')
assert examples('cached_corpus', True, 'train') == plain
held_out = examples('cached_corpus', False, 'validation')
assert examples('cached_corpus', True, 'validation') == held_out
text = examples('cached_text', True, 'train')
assert {k: v for k, v in text.items() if k in plain} == plain

iterator = iter(dataset('cached_corpus', True, 'train'))
for _ in range(700):
  next(iterator)
path = tf.train.Checkpoint(i=iterator).write('state')
want = [e['inputs'].numpy().tolist() for e in iterator]
resumed = iter(dataset('cached_corpus', True, 'train'))
tf.train.Checkpoint(i=resumed).read(path)
assert [e['inputs'].numpy().tolist() for e in resumed] == want and want

from bart_t5x import inspect
assert inspect.main([
  '--task=cached_text', '--module=cached_tasks', '--use_cached', '--cache_dir=cache',
  '--inputs_length=64', '--targets_length=64', '--num_examples=1', '--num_summed=9',
]) == 0
print('same')
"""


@pytest.mark.slow
def test_seqio_caches_the_same_examples(corpus_dir, tmp_path):
  (tmp_path / 'cached_tasks.py').write_text(CACHED)
  (tmp_path / 'compare.py').write_text(COMPARE)
  paths = [str(tmp_path), os.getcwd(), os.environ.get('PYTHONPATH', '')]
  env = {**os.environ, 'CORPUS': corpus_dir, 'PYTHONPATH': os.pathsep.join(paths)}
  cache = [
    sys.executable,
    '-m',
    'seqio.scripts.cache_tasks_main',
    '--output_cache_dir=cache',
    '--tasks=cached_.*',
    '--module_import=cached_tasks',
  ]
  for command in (cache, [sys.executable, 'compare.py']):
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
  assert 'document ' in run.stdout and run.stdout.endswith('same\n')
