"""Datasets of a small seqio registry, and the training iterator over them."""

import dataclasses
import shutil
import sys
import types

import clu.data.dataset_iterator as clu_iterators
import gin
import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf
from gin import config as gin_config
from jax.sharding import PartitionSpec

from t5x import data, data_iterators, multihost

VOCABULARY = seqio.PassThroughVocabulary(100)
TEXT = seqio.ByteVocabulary()
LENGTHS = {'inputs': 8, 'targets': 6}
BATCH = 8
KEY = 'encoder_input_tokens'


def source(start, count, splits=('train',)):
  def make(split, shuffle_files, seed=None):
    def example(i):
      i = tf.cast(i, tf.int32)
      tokens = tf.range(1, 3 + i % 4) + (i % 7)
      return {'inputs': tokens, 'targets': tokens[: 1 + i % 3] + 10}

    return tf.data.Dataset.range(start, start + count).map(example)

  return seqio.FunctionDataSource(make, splits=splits)


@seqio.map_over_dataset(num_seeds=1)
def replace_at_random(example, seed):
  noise = tf.random.stateless_uniform(
    tf.shape(example['inputs']), seed, 1, 90, tf.int32
  )
  return {**example, 'inputs': noise}


def map_in_python(ds):
  def example(ex):
    inputs = tf.py_function(lambda tokens: tokens, [ex['inputs']], tf.int32)
    return {**ex, 'inputs': tf.ensure_shape(inputs, [None])}

  return ds.map(example)


for name, data_source, preprocessors in (
  ('numbers_low', source(0, 40, ('train', 'validation')), []),
  ('numbers_high', source(1000, 24), []),
  ('numbers_noised', source(0, 40), [replace_at_random]),
  ('numbers_in_python', source(0, 40), [map_in_python]),
  ('numbers_cacheable', source(0, 8), [seqio.CacheDatasetPlaceholder()]),
):
  seqio.TaskRegistry.add(
    name,
    source=data_source,
    preprocessors=preprocessors,
    output_features={k: seqio.Feature(VOCABULARY, add_eos=False) for k in LENGTHS},
    metric_fns=[],
  )
for name, low in (('numbers', 'numbers_low'), ('resumed', 'numbers_noised')):
  seqio.MixtureRegistry.add(name, [(low, 2.0), ('numbers_high', 1.0)])


def config(task='numbers', **changes):
  fields = {
    'task_feature_lengths': LENGTHS,
    'split': 'train',
    'batch_size': BATCH,
    'shuffle': True,
    'seed': 3,
    'pack': True,
  }
  return data.DatasetConfig(task, **{**fields, **changes})


def plain(task='numbers_low', **changes):
  """A configuration that keeps examples and their order."""
  return config(task, **{'shuffle': False, 'pack': False, **changes})


def batches(cfg, count, shard_id=0, num_shards=1, num_epochs=None):
  ds = data.get_dataset(
    cfg, shard_id, num_shards, seqio.EncDecFeatureConverter, num_epochs
  )
  return list(ds.take(count).as_numpy_iterator())


def assert_same(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


def assert_differ(left, right):
  with pytest.raises(AssertionError):
    assert_same(left, right)


# ---- Datasets ----


def test_seed_decides_the_batches():
  first = batches(config(), 3)
  assert_same(first, batches(config(), 3))
  assert_differ(first, batches(config(seed=4), 3))
  assert first[0][KEY].shape == (8, 8)
  assert first[0]['decoder_target_tokens'].shape == (8, 6)


def test_without_a_seed_one_is_drawn(monkeypatch):
  seeds = iter([11, 12])
  monkeypatch.setattr(multihost, 'broadcast_int', lambda drawn: next(seeds))
  for seed in (11, 12):
    assert_same(batches(config(seed=None), 2), batches(config(seed=seed), 2))


def test_packing():
  assert batches(config(), 1)[0]['encoder_segment_ids'].max() > 1
  assert 'encoder_segment_ids' not in batches(plain(), 1)[0]
  asked = []

  def converter(**settings):
    asked.append(settings)
    return seqio.EncDecFeatureConverter(pack=settings['pack'])

  data.get_dataset(config(use_custom_packing_ops=True), 0, 1, converter)
  assert asked == [{'pack': True, 'use_custom_packing_ops': True}]


def test_shuffling():
  assert_differ(batches(plain(), 2), batches(plain(shuffle=True), 2))


def test_shards_divide_the_task():
  def rows(parts):
    return sorted(tuple(row) for batch in parts for row in batch[KEY])

  cfg = plain(batch_size=4)
  halves = [batches(cfg, 10, i, 2, num_epochs=1) for i in range(2)]
  assert all(batch[KEY].shape == (2, 8) for batch in halves[0])
  assert rows(batches(cfg, 10, num_epochs=1)) == rows(halves[0] + halves[1])


def test_trim_output_features():
  short = plain(task_feature_lengths={'inputs': 2, 'targets': 2})
  assert batches(short, 1)[0][KEY].shape == (8, 2)
  with pytest.raises(tf.errors.InvalidArgumentError):
    batches(dataclasses.replace(short, trim_output_features=False), 1)


def test_use_cached_needs_a_cache(tmp_path):
  cfg = config('numbers_cacheable')
  assert batches(cfg, 1)
  seqio.add_global_cache_dirs([str(tmp_path)])
  with pytest.raises(ValueError, match=f"'numbers_cacheable'.*{tmp_path}"):
    batches(dataclasses.replace(cfg, use_cached=True), 1)


@pytest.mark.parametrize(
  'changes, parts',
  [
    ({'task': 'numbers_lo'}, "'numbers_lo'.*'numbers_low'"),
    ({'task': 7}, '7'),
    ({'split': 'test'}, "'test'.*train, validation"),
    ({'task_feature_lengths': {**LENGTHS, 'target': 6}}, "'target'.*'targets'"),
    ({'task_feature_lengths': None}, 'None'),
    ({'task_feature_lengths': {'inputs': 0, 'targets': 6}}, "'inputs'.*0"),
    ({'task_feature_lengths': {'inputs': 8}}, 'targets'),
    ({'batch_size': 9}, '2.*9'),
  ],
)
def test_invalid_configs_are_errors(changes, parts):
  with pytest.raises(ValueError, match=parts):
    data.get_dataset(config(**changes), 0, 2, seqio.EncDecFeatureConverter)


@pytest.mark.parametrize(
  'field, value',
  [
    ('runtime_preprocessors', [abs]),
    ('num_prefetch_threads', 2),
    ('num_workers', 1),
    ('batch_size', 0),
    ('batch_size', 8.5),
    ('batch_size', '8'),
  ],
)
def test_unsupported_fields_and_batch_sizes_are_errors(field, value):
  with pytest.raises(ValueError, match=field):
    config(**{field: value})


def test_unsupported_options_of_t5x_are_errors():
  with pytest.raises(ValueError, match='save_dataset'):
    data.get_dataset(
      config(), 0, 1, seqio.EncDecFeatureConverter, continue_from_last_checkpoint=True
    )
  with pytest.raises(ValueError, match='deterministic'):
    evaluation(config(), deterministic=True)


def test_splits_may_be_expressions():
  provider = types.SimpleNamespace(splits=('train', 'test'))
  assert data._has_split(provider, 'train[:5%]+test')
  assert not data._has_split(provider, 'train+dev')


def test_a_module_may_register_tasks_and_configurables(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(str(tmp_path))
  (tmp_path / 'late_tasks.py').write_text(
    'import gin, seqio\n'
    'seqio.TaskRegistry.add("late", source=seqio.FunctionDataSource('
    'lambda split, shuffle_files: None, splits=["train"]), output_features={},'
    ' metric_fns=[])\n'
    '@gin.configurable\ndef made_for_a_test(x=3):\n  return x\n'
  )
  gin.finalize()
  try:
    assert data.find_provider(config('late', module='late_tasks')).name == 'late'
    assert gin.config_is_locked()
    assert sys.modules['late_tasks'].made_for_a_test() == 3
  finally:
    gin.clear_config()
    gin_config._REGISTRY.pop('late_tasks.made_for_a_test')


def test_a_missing_module_differs_from_a_missing_import_of_it(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'lacking_tasks.py').write_text('import no_such_library')
  for absent in ('no_such_tasks', 'no_such_package.tasks'):
    with pytest.raises(ImportError, match=f"TASK_MODULE names '{absent}'"):
      data.import_module(absent)
  with pytest.raises(ImportError, match="^No module named 'no_such_library'"):
    data.import_module('lacking_tasks')


def test_zeros_like_dataset():
  ds = data.get_dataset(config(), 0, 1, seqio.EncDecFeatureConverter)
  zeros = data_iterators.get_zeros_batch_like_dataset(ds, batch_size=2)
  for name, spec in ds.element_spec.items():
    assert zeros[name].shape == (2, *spec.shape[1:])
    assert zeros[name].dtype == spec.dtype.as_numpy_dtype
    assert not zeros[name].any()
  assert data_iterators.get_zeros_batch_like_dataset(ds)[name].shape[0] == 8


# ---- Evaluation ----


def evaluation(cfg, shard_id=0, num_shards=1, eval_steps=3, **kwargs):
  return data.get_training_eval_datasets(
    cfg, shard_id, num_shards, eval_steps, seqio.EncDecFeatureConverter, **kwargs
  )


def evaluated(cfg, *args, **kwargs):
  (ds,) = evaluation(cfg, *args, **kwargs).values()
  return list(ds.as_numpy_iterator())


def test_evaluation_covers_the_mixture_and_its_tasks_with_the_split():
  both = evaluation(config(shuffle=False))
  assert list(both) == ['numbers_high', 'numbers_low', 'numbers']
  some = evaluation(config(split='validation', use_memory_cache=False))
  assert list(some) == ['numbers_low', 'numbers']
  assert 'Cache' in type(both['numbers']).__name__
  assert 'Cache' not in type(some['numbers']).__name__


def test_evaluation_repeats_short_data_and_stops():
  got = evaluated(plain('numbers_high'), eval_steps=5)
  assert len(got) == 5  # 24 examples are 3 batches.
  assert_same(got[0], got[3])


def test_evaluation_distributes_rows_over_hosts():
  halves = [evaluated(plain(), i, 2) for i in range(2)]
  for batch, left, right in zip(evaluated(plain()), *halves, strict=True):
    np.testing.assert_array_equal(batch[KEY][0::2], left[KEY])
    np.testing.assert_array_equal(batch[KEY][1::2], right[KEY])


# ---- Vocabularies ----


def test_vocabularies_of_task_and_model():
  assert data.get_vocabulary(config()) == (VOCABULARY, VOCABULARY)
  model = types.SimpleNamespace(
    input_vocabulary=VOCABULARY, output_vocabulary=VOCABULARY
  )
  data.verify_matching_vocabs(config(), model)
  model.output_vocabulary = TEXT
  with pytest.raises(ValueError, match="output.*'numbers'"):
    data.verify_matching_vocabs(config(), model)


def test_vocabularies_without_inputs():
  def get(**vocabularies):
    features = {k: seqio.Feature(v) for k, v in vocabularies.items()}
    task = seqio.Task('t', source(0, 1), output_features=features, preprocessors=[])
    return data.get_vocabulary(config(task))

  assert get(targets=TEXT, weights=VOCABULARY) == (TEXT, TEXT)
  assert get(targets=VOCABULARY) == (VOCABULARY, VOCABULARY)
  with pytest.raises(ValueError, match='other'):
    get(targets=TEXT, other=seqio.ByteVocabulary(extra_ids=5))


def test_vocabulary_sizes_are_rounded_up():
  def rounded(size, *divisor):
    vocabulary = types.SimpleNamespace(vocab_size=size)
    return data.round_vocab_size_to_multiple(vocabulary, *divisor)

  assert [rounded(n) for n in (1, 128, 129)] == [128, 128, 256]
  assert rounded(10, 4) == 12


# ---- Descriptions of the data ----


def register_files(name, folder):
  """Registers a task over the text files of a folder."""
  splits = {s: f'{folder}/{s}-*.txt' for s in ('train', 'validation')}
  features = {'text': seqio.Feature(TEXT)}
  seqio.TaskRegistry.add(name, seqio.TextLineDataSource(splits), features, [])


def described(task='described', **changes):
  return data.describe_source(
    config(task, **{'task_feature_lengths': {'text': 4}, **changes})
  )


@pytest.fixture
def corpus(tmp_path):
  """The folder of the task 'described'."""
  folder = tmp_path / 'corpus'
  folder.mkdir()
  for name in ('train-0', 'train-1', 'validation-0'):
    (folder / f'{name}.txt').write_text('a line\n')
  register_files('described', folder)
  yield folder
  seqio.TaskRegistry.remove('described')


def test_moved_files_keep_their_description(corpus, tmp_path):
  before = described()
  assert (before['task'], before['split']) == ('described', 'train')
  assert described(seqio.TaskRegistry.get('described')) == before
  shutil.move(corpus, tmp_path / 'moved')
  seqio.TaskRegistry.remove('described')
  register_files('described', tmp_path / 'moved')
  assert described() == before


def grow(folder):
  (folder / 'train-1.txt').write_text('a longer line\n')


def add(folder):
  (folder / 'train-2.txt').write_text('a line\n')


def rename(folder):
  (folder / 'train-1.txt').rename(folder / 'train-7.txt')


@pytest.mark.parametrize('change', [grow, add, rename])
def test_changed_files_change_the_description_of_their_split(corpus, tmp_path, change):
  before, validation = described(), described(split='validation')
  change(corpus)
  seqio.TaskRegistry.remove('described')
  # In another folder, because seqio lists the files of a pattern once.
  register_files('described', shutil.copytree(corpus, tmp_path / 'changed'))
  assert described()['files'] != before['files']
  assert described(split='validation') == validation


def test_a_mixture_has_the_files_of_all_its_tasks(corpus, tmp_path):
  other = shutil.copytree(corpus, tmp_path / 'other')
  register_files('other', other)
  seqio.MixtureRegistry.add('both', ['described', 'other'], default_rate=1.0)
  try:
    before = described('both')
    grow(other)
    assert described('both') != before
  finally:
    seqio.MixtureRegistry.remove('both')
    seqio.TaskRegistry.remove('other')


def test_a_cached_task_is_described_by_the_counts_of_its_cache(corpus, tmp_path):
  cache = tmp_path / 'cache' / 'described'
  cache.mkdir(parents=True)
  (cache / 'COMPLETED').touch()
  info = cache / 'info.train.json'
  info.write_text('{"num_shards": 1}')
  seqio.add_global_cache_dirs([str(tmp_path / 'cache')])
  try:
    before = described(use_cached=True)
    grow(corpus)
    assert described(use_cached=True) == before
    info.write_text('{"num_shards": 16}')
    assert described(use_cached=True) != before
  finally:
    seqio.set_global_cache_dirs([])


def test_unknown_tasks_are_described_by_name():
  assert described('read by a function')['task'] == 'read by a function'


# ---- The training iterator ----

LAYOUT = types.SimpleNamespace(batch_size=BATCH, shard_id=0, num_shards=1)


def partitioner(data_axis=8, model_axis=1):
  devices = np.array(jax.devices()[: data_axis * model_axis])
  return types.SimpleNamespace(
    mesh=jax.sharding.Mesh(devices.reshape(data_axis, model_axis), ('data', 'model')),
    data_partition_spec=PartitionSpec('data'),
  )


def dataset(task='resumed', **changes):
  return data.get_dataset(config(task, **changes), 0, 1, seqio.EncDecFeatureConverter)


def iterator(ds=None, save_dataset=True, layout=LAYOUT, **kwargs):
  return data_iterators.prepare_train_iter(
    dataset() if ds is None else ds,
    partitioner=partitioner(layout.batch_size),
    checkpoint_cfg=types.SimpleNamespace(
      save=types.SimpleNamespace(save_dataset=save_dataset),
      restore=types.SimpleNamespace(restore_dataset=False),
    ),
    data_layout=layout,
    **kwargs,
  )


def take(it, count):
  return [jax.tree.map(np.asarray, next(it)) for _ in range(count)]


@pytest.mark.parametrize('taken', [0, 30])  # 30 batches are many epochs.
def test_resumes_at_the_next_batch(tmp_path, taken):
  through = iterator()
  take(through, taken)
  through.save(tmp_path / 'state')
  expected = take(through, 6)
  resumed = iterator()
  resumed.restore(tmp_path / 'state')
  assert_same(take(resumed, 6), expected)
  assert_differ(expected, take(iterator(dataset(seed=6)), 6))


def test_saving_does_not_change_the_batches(tmp_path):
  unsaved, saved = iterator(), iterator()
  for step in range(4):
    assert_same(take(unsaved, 2), take(saved, 2))
    saved.save(tmp_path / str(step))


def test_a_batch_fetched_ahead_is_not_lost(tmp_path):
  it = iterator()
  take(it, 2)
  it.peek_async()
  it.save(tmp_path / 'before')
  taken = take(it, 1)
  it.save(tmp_path / 'after')
  taken += take(it, 2)

  resumed = iterator()
  resumed.restore(tmp_path / 'before')
  assert_same(take(resumed, 3), taken)
  resumed.peek_async()
  resumed.restore(tmp_path / 'after')
  assert_same(take(resumed, 2), taken[1:])


def test_upstream_can_read_the_saved_state(tmp_path):
  it = iterator()
  take(it, 3)
  it.save(tmp_path / 'state')
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    'state.data-00000-of-00001',
    'state.index',
  ]
  upstream = iter(dataset())
  state = tf.train.Checkpoint(ds=upstream)
  state.read(str(tmp_path / 'state')).assert_consumed()
  assert_same(take(it, 1)[0], {k: v.numpy() for k, v in next(upstream).items()})


def test_a_state_of_other_batches_is_an_error(tmp_path):
  def numbers(rows):
    ds = tf.data.Dataset.range(100).map(lambda i: {'x': i})
    ds = ds.batch(rows, drop_remainder=True).prefetch(2)
    layout = types.SimpleNamespace(batch_size=rows, shard_id=0, num_shards=1)
    return iterator(ds, layout=layout)

  saved = numbers(8)
  take(saved, 1)
  saved.save(tmp_path / 'state')
  other = numbers(4)
  other.restore(tmp_path / 'state')
  with pytest.raises(ValueError, match=f'{tmp_path}/state'):
    take(other, 1)


def test_reset_starts_again():
  # Without shuffling: TensorFlow shuffles each iteration differently.
  it = iterator(dataset(shuffle=False))
  first = take(it, 2)
  it.peek_async()
  it.reset()
  assert_same(take(it, 2), first)


def test_prefetches_unless_the_state_is_saved():
  unsaved, saved = iterator(save_dataset=False), iterator()
  assert 'Prefetch' in type(unsaved._iterator._dataset).__name__
  assert 'Prefetch' not in type(saved._iterator._dataset).__name__
  assert_same(take(unsaved, 3), take(saved, 3))


def test_state_outside_of_tf_data_cannot_be_saved():
  in_python = dataset('numbers_in_python')
  with pytest.raises(ValueError, match='the_task'):
    iterator(in_python, task_name='the_task')
  take(iterator(in_python, save_dataset=False), 1)
  noisy = tf.data.Dataset.range(100).map(
    lambda i: {'x': tf.random.uniform([]) + tf.cast(i, tf.float32)}
  )
  with pytest.raises(ValueError, match='RandomUniform'):
    iterator(noisy.shuffle(10).repeat().batch(BATCH, drop_remainder=True))
  options = tf.data.Options()
  options.experimental_external_state_policy = (
    tf.data.experimental.ExternalStatePolicy.IGNORE
  )
  take(iterator(in_python.with_options(options)), 1)


@pytest.mark.parametrize('shape', [(8, 1), (2, 4), (1, 8)])
def test_batches_are_sharded_over_the_mesh(shape):
  local = np.arange(BATCH * 3).reshape(BATCH, 3)
  it = data_iterators.ShardedDatasetIterator(
    iter([{'tokens': local}]), partitioner(*shape), {'tokens': (BATCH, 3)}
  )
  placed = next(it)['tokens']
  np.testing.assert_array_equal(placed, local)
  for piece in placed.addressable_shards:
    assert piece.data.shape == (BATCH // shape[0], 3)
    np.testing.assert_array_equal(piece.data, local[piece.index])


def test_wrong_types_and_batch_sizes_are_errors():
  with pytest.raises(ValueError, match='list'):
    iterator([1, 2])
  layout = types.SimpleNamespace(batch_size=8, shard_id=0, num_shards=2)
  with pytest.raises(ValueError, match='8 rows.* 4'):
    iterator(save_dataset=False, layout=layout)


def test_custom_iterators(tmp_path):
  class Counter(clu_iterators.DatasetIterator):
    element_spec = {'n': clu_iterators.ArraySpec(np.int32, (BATCH,))}
    count = 0

    def __next__(self):
      self.count += 1
      return {'n': np.full(BATCH, self.count, np.int32)}

    def save(self, filename):
      filename = tmp_path / filename
      filename.write_text(str(self.count))

    def restore(self, filename):
      self.count = int(filename.read_text())

    def reset(self):
      self.count = 0

  it = iterator(Counter())
  take(it, 3)
  it.peek_async()
  it.save(tmp_path / 'state')
  assert (tmp_path / 'state').read_text() == '3'
  it.reset()
  it.restore(tmp_path / 'state')
  assert take(it, 1)[0]['n'][0] == 4
  assert it.element_spec == Counter.element_spec
