"""Datasets from a small seqio registry: checks, batches, vocabularies."""

import dataclasses
import shutil
import sys
import types

import gin
import numpy as np
import pytest
import seqio
import tensorflow as tf
from gin import config as gin_config

from t5x import data, data_iterators, multihost

VOCABULARY = seqio.PassThroughVocabulary(100)
FEATURES = {
  'inputs': seqio.Feature(VOCABULARY, add_eos=False),
  'targets': seqio.Feature(VOCABULARY, add_eos=False),
}
LENGTHS = {'inputs': 8, 'targets': 6}


def _examples(start, count):
  def make(split, shuffle_files, seed=None):
    del split, shuffle_files, seed

    def example(i):
      i = tf.cast(i, tf.int32)
      tokens = tf.range(1, 3 + i % 4) + (i % 7)
      return {'inputs': tokens, 'targets': tokens[: 1 + i % 3] + 10}

    return tf.data.Dataset.range(start, start + count).map(example)

  return make


def _register(name, start, count, splits=('train', 'validation'), preprocessors=()):
  if name in seqio.TaskRegistry.names():
    return
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(_examples(start, count), splits=splits),
    preprocessors=list(preprocessors),
    output_features=FEATURES,
    metric_fns=[],
  )


_register('numbers_low', 0, 40)
_register('numbers_high', 1000, 24, splits=('train',))
if 'numbers' not in seqio.MixtureRegistry.names():
  seqio.MixtureRegistry.add('numbers', [('numbers_low', 2.0), ('numbers_high', 1.0)])


def config(**changes):
  fields = {
    'mixture_or_task_name': 'numbers',
    'task_feature_lengths': LENGTHS,
    'split': 'train',
    'batch_size': 8,
    'shuffle': True,
    'seed': 3,
    'pack': True,
  }
  return data.DatasetConfig(**{**fields, **changes})


def batches(cfg, count, shard_id=0, num_shards=1, num_epochs=None):
  ds = data.get_dataset(
    cfg, shard_id, num_shards, seqio.EncDecFeatureConverter, num_epochs
  )
  return [dict(b) for b in ds.take(count).as_numpy_iterator()]


def assert_same(left, right):
  assert len(left) == len(right)
  for one, other in zip(left, right):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])


def test_same_seed_same_batches_and_other_seed_others():
  first = batches(config(), 3)
  assert_same(first, batches(config(), 3))
  other = batches(config(seed=4), 3)
  assert any(
    not np.array_equal(a['encoder_input_tokens'], b['encoder_input_tokens'])
    for a, b in zip(first, other)
  )
  assert first[0]['encoder_input_tokens'].shape == (8, 8)
  assert first[0]['decoder_target_tokens'].shape == (8, 6)


def test_no_seed_draws_one(monkeypatch):
  seeds = iter([11, 12])
  monkeypatch.setattr(multihost, 'broadcast_int', lambda drawn: next(seeds))
  cfg = config(seed=None)
  drawn = [batches(cfg, 2), batches(cfg, 2)]
  assert_same(drawn[0], batches(config(seed=11), 2))
  assert_same(drawn[1], batches(config(seed=12), 2))


def test_pack_acts():
  packed = batches(config(), 1)[0]
  assert packed['encoder_segment_ids'].max() > 1
  plain = batches(config(pack=False), 1)[0]
  assert 'encoder_segment_ids' not in plain


@pytest.mark.parametrize('custom', [True, False])
def test_use_custom_packing_ops_reaches_the_converter(custom):
  asked = []

  def converter(**settings):
    asked.append(settings)
    return seqio.EncDecFeatureConverter(pack=settings['pack'])

  cfg = config(use_custom_packing_ops=custom)
  data.get_dataset(cfg, 0, 1, converter)
  assert asked == [{'pack': True, 'use_custom_packing_ops': custom}]


def test_shuffle_acts():
  ordered = batches(config(mixture_or_task_name='numbers_low', shuffle=False), 2)
  shuffled = batches(config(mixture_or_task_name='numbers_low'), 2)
  key = 'encoder_input_tokens'
  assert not all(np.array_equal(a[key], b[key]) for a, b in zip(ordered, shuffled))


def test_shards_divide_the_task_between_them():
  cfg = config(
    mixture_or_task_name='numbers_low', shuffle=False, pack=False, batch_size=4
  )
  whole = batches(cfg, 10, num_epochs=1)
  halves = [batches(cfg, 10, i, 2, num_epochs=1) for i in range(2)]
  assert all(b['encoder_input_tokens'].shape == (2, 8) for b in halves[0])
  rows = lambda parts: sorted(  # noqa: E731 - a key for both sides
    tuple(r) for b in parts for r in b['encoder_input_tokens']
  )
  assert rows(whole) == rows(halves[0] + halves[1])


def test_trim_output_features_acts():
  short = config(
    mixture_or_task_name='numbers_low',
    task_feature_lengths={'inputs': 2, 'targets': 2},
    pack=False,
  )
  assert batches(short, 1)[0]['encoder_input_tokens'].shape == (8, 2)
  with pytest.raises(tf.errors.InvalidArgumentError):
    batches(dataclasses.replace(short, trim_output_features=False), 1)


def test_use_cached_asks_for_the_cache(tmp_path):
  _register('numbers_cacheable', 0, 8, preprocessors=[seqio.CacheDatasetPlaceholder()])
  cfg = config(mixture_or_task_name='numbers_cacheable')
  assert batches(cfg, 1)
  seqio.add_global_cache_dirs([str(tmp_path)])
  with pytest.raises(ValueError, match=f"'numbers_cacheable'.*{tmp_path}"):
    batches(dataclasses.replace(cfg, use_cached=True), 1)


@pytest.mark.parametrize(
  'changes, parts',
  [
    ({'mixture_or_task_name': 'numbers_lo'}, "'numbers_lo'.*'numbers_low'"),
    ({'mixture_or_task_name': 7}, '7'),
    ({'split': 'test'}, "'test'.*train, validation"),
    (
      {'task_feature_lengths': {'inputs': 8, 'targets': 6, 'target': 6}},
      "'target'.*'targets'",
    ),
    ({'task_feature_lengths': None}, 'None'),
    ({'task_feature_lengths': {'inputs': 0, 'targets': 6}}, "'inputs'.*0"),
    ({'task_feature_lengths': {'inputs': 8}}, 'targets'),
    ({'batch_size': 9}, '2.*9'),
  ],
)
def test_invalid_configs_are_errors_that_name_the_value(changes, parts):
  with pytest.raises(ValueError, match=parts):
    data.get_dataset(config(**changes), 0, 2, seqio.EncDecFeatureConverter)


@pytest.mark.parametrize(
  'field, value',
  [('runtime_preprocessors', [abs]), ('num_prefetch_threads', 2), ('num_workers', 1)],
)
def test_airio_fields_are_errors(field, value):
  with pytest.raises(ValueError, match=field):
    config(**{field: value})


@pytest.mark.parametrize('size', [0, -8, 8.5, '8'])
def test_batch_size_must_be_a_positive_integer(size):
  with pytest.raises(ValueError, match=f'batch_size.*{size!r}'):
    config(batch_size=size)


def test_continuing_from_a_checkpoint_is_an_error():
  with pytest.raises(ValueError, match='save_dataset'):
    data.get_dataset(
      config(), 0, 1, seqio.EncDecFeatureConverter, continue_from_last_checkpoint=True
    )


def test_splits_may_be_expressions():
  provider = types.SimpleNamespace(splits=('train', 'test'))
  assert data._has_split(provider, 'train[:5%]+test')
  assert not data._has_split(provider, 'train+dev')


def test_module_is_imported(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(str(tmp_path))
  (tmp_path / 'late_tasks.py').write_text(
    'import seqio\n'
    'seqio.TaskRegistry.add("late", source=seqio.FunctionDataSource('
    'lambda split, shuffle_files: None, splits=["train"]), output_features={},'
    ' metric_fns=[])\n'
  )
  provider = data.find_provider(
    config(mixture_or_task_name='late', module='late_tasks')
  )
  assert provider.name == 'late'


def test_a_module_may_define_configurables_after_gin_was_locked(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(str(tmp_path))
  (tmp_path / 'configurable_tasks.py').write_text(
    'import gin\n@gin.configurable\ndef made_for_a_test(x=3):\n  return x\n'
  )
  gin.finalize()
  try:
    data.import_module('configurable_tasks')
    assert gin.config_is_locked()
    assert sys.modules['configurable_tasks'].made_for_a_test() == 3
  finally:
    gin.clear_config()
    gin_config._REGISTRY.pop('configurable_tasks.made_for_a_test')


def test_a_missing_module_differs_from_a_missing_import_of_it(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'lacking_tasks.py').write_text('import no_such_library')
  for absent in ('no_such_tasks', 'no_such_package.tasks'):
    with pytest.raises(ImportError, match=f"TASK_MODULE names '{absent}'"):
      data.import_module(absent)
  with pytest.raises(ImportError, match="^No module named 'no_such_library'"):
    data.import_module('lacking_tasks')


def evaluation(cfg, shard_id=0, num_shards=1, eval_steps=3, **kwargs):
  return data.get_training_eval_datasets(
    cfg, shard_id, num_shards, eval_steps, seqio.EncDecFeatureConverter, **kwargs
  )


def test_evaluation_covers_tasks_with_the_split_and_the_mixture():
  sets = evaluation(config(split='validation', shuffle=False))
  assert list(sets) == ['numbers_low', 'numbers']
  assert list(evaluation(config(shuffle=False))) == [
    'numbers_high',
    'numbers_low',
    'numbers',
  ]


def test_evaluation_repeats_short_data_and_stops():
  cfg = config(mixture_or_task_name='numbers_high', shuffle=False, pack=False)
  got = list(evaluation(cfg, eval_steps=5)['numbers_high'].as_numpy_iterator())
  assert len(got) == 5  # 24 examples are 3 batches.
  assert_same([got[0]], [got[3]])


def test_evaluation_deals_rows_to_hosts():
  cfg = config(mixture_or_task_name='numbers_low', shuffle=False, pack=False)
  whole = list(evaluation(cfg)['numbers_low'].as_numpy_iterator())
  halves = [
    list(evaluation(cfg, i, 2)['numbers_low'].as_numpy_iterator()) for i in range(2)
  ]
  key = 'encoder_input_tokens'
  for batch, left, right in zip(whole, *halves, strict=True):
    np.testing.assert_array_equal(batch[key][0::2], left[key])
    np.testing.assert_array_equal(batch[key][1::2], right[key])


def test_memory_cache_acts():
  name = 'numbers_low'
  cfg = config(mixture_or_task_name=name, shuffle=False)
  assert 'Cache' in type(evaluation(cfg)[name]).__name__
  without = evaluation(dataclasses.replace(cfg, use_memory_cache=False))[name]
  assert 'Cache' not in type(without).__name__


def test_deterministic_evaluation_is_an_error():
  with pytest.raises(ValueError, match='deterministic'):
    evaluation(config(), deterministic=True)


def test_vocabularies():
  assert data.get_vocabulary(config()) == (VOCABULARY, VOCABULARY)
  model = types.SimpleNamespace(
    input_vocabulary=VOCABULARY, output_vocabulary=VOCABULARY
  )
  data.verify_matching_vocabs(config(), model)
  model.output_vocabulary = seqio.ByteVocabulary()
  with pytest.raises(ValueError, match="output.*'numbers'"):
    data.verify_matching_vocabs(config(), model)


def _task_of(**vocabularies):
  return seqio.Task(
    'unregistered',
    source=seqio.FunctionDataSource(_examples(0, 1), splits=['train']),
    output_features={k: seqio.Feature(v) for k, v in vocabularies.items()},
    preprocessors=[],
  )


def test_vocabularies_without_inputs():
  text = seqio.ByteVocabulary()
  get = lambda **v: data.get_vocabulary(  # noqa: E731 - a shorthand
    config(mixture_or_task_name=_task_of(**v))
  )
  assert get(targets=text, weights=VOCABULARY) == (text, text)
  assert get(targets=VOCABULARY) == (VOCABULARY, VOCABULARY)
  with pytest.raises(ValueError, match='other'):
    get(targets=text, other=seqio.ByteVocabulary(extra_ids=5))


def test_vocabulary_sizes_are_rounded_up():
  size = lambda n: types.SimpleNamespace(vocab_size=n)  # noqa: E731 - a shorthand
  round_up = data.round_vocab_size_to_multiple
  assert [round_up(size(n)) for n in (1, 128, 129)] == [128, 128, 256]
  assert round_up(size(10), divisor=4) == 12


def test_zeros_like_dataset():
  ds = data.get_dataset(config(), 0, 1, seqio.EncDecFeatureConverter)
  zeros = data_iterators.get_zeros_batch_like_dataset(ds, batch_size=2)
  for name, spec in ds.element_spec.items():
    assert zeros[name].shape == (2, *spec.shape[1:])
    assert zeros[name].dtype == spec.dtype.as_numpy_dtype
    assert not zeros[name].any()
  assert data_iterators.get_zeros_batch_like_dataset(ds)[name].shape[0] == 8


# ---- Descriptions of the data ----

SPLITS = ('train', 'validation')


def register_files(name, folder):
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
  name = register_files('described', folder)
  yield described(name), folder
  for known in list(seqio.TaskRegistry.names()):
    if known.startswith('described'):
      seqio.TaskRegistry.remove(known)


def described(task, split='train'):
  return config(
    mixture_or_task_name=task, split=split, task_feature_lengths={'text': 4}
  )


def test_the_same_data_are_the_same_in_any_folder(corpus, tmp_path):
  cfg, folder = corpus
  there = data.describe_source(cfg)
  assert (there['task'], there['split']) == ('described', 'train')
  task = seqio.TaskRegistry.get('described')
  assert data.describe_source(described(task)) == there
  shutil.move(folder, tmp_path / 'moved')
  seqio.TaskRegistry.remove('described')
  register_files('described', tmp_path / 'moved')
  assert data.describe_source(cfg) == there


def grow(folder):
  with open(folder / 'train-1.txt', 'a') as file:
    file.write('one more\n')


def add(folder):
  (folder / 'train-2.txt').write_text('line 2\n')


def rename(folder):
  (folder / 'train-1.txt').rename(folder / 'train-7.txt')


@pytest.mark.parametrize('change', [grow, add, rename])
def test_changed_files_change_the_description_of_their_split(corpus, tmp_path, change):
  cfg, folder = corpus
  before = data.describe_source(cfg)
  validation = data.describe_source(described('described', 'validation'))
  change(folder)
  seqio.TaskRegistry.remove('described')
  # Elsewhere, as seqio lists the files of a pattern once.
  register_files('described', shutil.copytree(folder, tmp_path / 'changed'))
  assert data.describe_source(cfg)['files'] != before['files']
  assert data.describe_source(described('described', 'validation')) == validation


def test_a_mixture_has_the_files_of_all_its_tasks(corpus, tmp_path):
  _, folder = corpus
  other = shutil.copytree(folder, tmp_path / 'other')
  register_files('described_other', other)
  name = 'described_mixture'
  seqio.MixtureRegistry.add(name, ['described', 'described_other'], default_rate=1.0)
  try:
    before = data.describe_source(described(name))
    grow(other)
    assert data.describe_source(described(name)) != before
  finally:
    seqio.MixtureRegistry.remove(name)


def test_a_cached_task_is_described_by_the_counts_of_its_cache(corpus, tmp_path):
  cfg, folder = corpus
  cached = dataclasses.replace(cfg, use_cached=True)
  cache = tmp_path / 'cache' / 'described'
  cache.mkdir(parents=True)
  (cache / 'COMPLETED').touch()
  info = cache / 'info.train.json'
  info.write_text('{"num_shards": 1}')
  seqio.add_global_cache_dirs([str(tmp_path / 'cache')])
  try:
    before = data.describe_source(cached)
    grow(folder)
    assert data.describe_source(cached) == before
    info.write_text('{"num_shards": 16}')
    assert data.describe_source(cached) != before
  finally:
    seqio.set_global_cache_dirs([])


def test_what_a_function_of_the_user_reads_is_described_by_its_name():
  assert data.describe_source(described('read by a function'))['task'] == (
    'read by a function'
  )
