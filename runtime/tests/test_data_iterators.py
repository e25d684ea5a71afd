"""The training iterator: saved and restored to the very next batch."""

import types

import clu.data.dataset_iterator as clu_iterators
import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf
from jax.sharding import PartitionSpec

from t5x import data, data_iterators

BATCH = 8
VOCABULARY = seqio.PassThroughVocabulary(1000)
FEATURES = {
  'inputs': seqio.Feature(VOCABULARY, add_eos=False),
  'targets': seqio.Feature(VOCABULARY, add_eos=False),
}


def _source(start, count):
  def make(split, shuffle_files, seed=None):
    del split, shuffle_files, seed

    def example(i):
      tokens = tf.range(1, 3 + tf.cast(i % 5, tf.int32)) + tf.cast(i % 50, tf.int32)
      return {'inputs': tokens, 'targets': tokens[:3]}

    return tf.data.Dataset.range(start, start + count).map(example)

  return make


@seqio.map_over_dataset(num_seeds=1)
def _random_replacement(example, seed):
  """Noise that has to be the same after resuming."""
  noise = tf.random.stateless_uniform(
    tf.shape(example['inputs']), seed, 1, 900, tf.int32
  )
  return {**example, 'inputs': noise}


def _in_python(ds):
  def slow(tokens):
    return tokens

  def example(ex):
    inputs = tf.py_function(slow, [ex['inputs']], tf.int32)
    return {**ex, 'inputs': tf.ensure_shape(inputs, [None])}

  return ds.map(example)


def _register():
  if 'resume_mixture' in seqio.MixtureRegistry.names():
    return
  for name, start, steps in [
    ('resume_a', 0, [_random_replacement]),
    ('resume_b', 500, []),
    ('resume_in_python', 0, [_in_python]),
  ]:
    seqio.TaskRegistry.add(
      name,
      source=seqio.FunctionDataSource(_source(start, 60), splits=['train']),
      preprocessors=steps,
      output_features=FEATURES,
      metric_fns=[],
    )
  seqio.MixtureRegistry.add('resume_mixture', [('resume_a', 3.0), ('resume_b', 1.0)])


_register()


def partitioner(data_axis=8, model_axis=1):
  devices = np.array(jax.devices()[: data_axis * model_axis])
  return types.SimpleNamespace(
    mesh=jax.sharding.Mesh(devices.reshape(data_axis, model_axis), ('data', 'model')),
    data_partition_spec=PartitionSpec('data'),
  )


def checkpointing(save_dataset=True, restore_dataset=False):
  return types.SimpleNamespace(
    save=types.SimpleNamespace(save_dataset=save_dataset),
    restore=types.SimpleNamespace(restore_dataset=restore_dataset),
  )


LAYOUT = types.SimpleNamespace(batch_size=BATCH, shard_id=0, num_shards=1)


def dataset(task='resume_mixture', seed=5, pack=True):
  cfg = data.DatasetConfig(
    task, {'inputs': 12, 'targets': 8}, 'train', BATCH, True, seed, pack=pack
  )
  return data.get_dataset(cfg, 0, 1, seqio.EncDecFeatureConverter)


def iterator(ds=None, save_dataset=True, **kwargs):
  return data_iterators.prepare_train_iter(
    dataset() if ds is None else ds,
    partitioner=partitioner(),
    checkpoint_cfg=checkpointing(save_dataset),
    data_layout=LAYOUT,
    **kwargs,
  )


def take(it, count):
  return [jax.tree.map(np.asarray, next(it)) for _ in range(count)]


def assert_same(left, right):
  assert len(left) == len(right)
  for one, other in zip(left, right):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])


def assert_differ(left, right):
  with pytest.raises(AssertionError):
    assert_same(left, right)


@pytest.mark.parametrize('taken', [0, 1, 7, 30])
def test_resumes_at_the_next_batch(tmp_path, taken):
  # 120 shuffled examples, packed, some 3 batches an epoch: 30 are many epochs in.
  through = iterator()
  take(through, taken)
  through.save(tmp_path / 'train_ds-000-of-001')
  expected = take(through, 6)
  resumed = iterator()
  resumed.restore(tmp_path / 'train_ds-000-of-001')
  assert_same(take(resumed, 6), expected)
  assert_differ(expected, take(iterator(dataset(seed=6)), 6))


def test_saving_does_not_disturb(tmp_path):
  plain, saving = iterator(), iterator()
  for step in range(4):
    assert_same(take(plain, 2), take(saving, 2))
    saving.save(tmp_path / str(step))


def test_a_batch_fetched_ahead_is_not_lost(tmp_path):
  it = iterator()
  take(it, 2)
  it.peek_async()
  it.save(tmp_path / 'before')
  batches = take(it, 1)
  it.save(tmp_path / 'after')
  batches += take(it, 2)

  resumed = iterator()
  resumed.restore(tmp_path / 'before')
  assert_same(take(resumed, 3), batches)
  resumed.peek_async()
  resumed.restore(tmp_path / 'after')
  assert_same(take(resumed, 2), batches[1:])


def test_files_are_those_of_tf_train_checkpoint(tmp_path):
  it = iterator()
  take(it, 3)
  it.save(tmp_path / 'train_ds-000-of-001')
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    'train_ds-000-of-001.data-00000-of-00001',
    'train_ds-000-of-001.index',
  ]
  # The pipeline that upstream would build reads it, with TensorFlow's own means.
  plain = iter(dataset())
  state = tf.train.Checkpoint(ds=plain)
  state.read(str(tmp_path / 'train_ds-000-of-001')).assert_consumed()
  expected = take(it, 1)[0]
  got = next(plain)
  assert_same([expected], [{k: v.numpy() for k, v in got.items()}])


def test_a_state_of_other_batches_is_an_error(tmp_path):
  def numbers(rows):
    ds = tf.data.Dataset.range(100).map(lambda i: {'x': i})
    ds = ds.batch(rows, drop_remainder=True).prefetch(2)
    layout = types.SimpleNamespace(batch_size=rows, shard_id=0, num_shards=1)
    return data_iterators.prepare_train_iter(
      ds,
      partitioner=partitioner(1, 1),
      checkpoint_cfg=checkpointing(True),
      data_layout=layout,
    )

  saving = numbers(8)
  take(saving, 1)
  saving.save(tmp_path / 'train_ds')
  other = numbers(4)
  other.restore(tmp_path / 'train_ds')
  with pytest.raises(ValueError, match='train_ds'):
    take(other, 1)


def test_reset_starts_again():
  # Without shuffling: TensorFlow shuffles differently each time round.
  cfg = data.DatasetConfig(
    'resume_mixture', {'inputs': 12, 'targets': 8}, 'train', BATCH, False, 5
  )
  it = iterator(data.get_dataset(cfg, 0, 1, seqio.EncDecFeatureConverter))
  first = take(it, 2)
  it.peek_async()
  it.reset()
  assert_same(take(it, 2), first)


def test_prefetches_only_where_no_position_is_kept():
  prefetching = iterator(save_dataset=False)._iterator
  assert 'Prefetch' in type(prefetching._dataset).__name__
  plain = iterator(save_dataset=True)._iterator
  assert 'Prefetch' not in type(plain._dataset).__name__
  assert_same(take(iterator(save_dataset=False), 3), take(iterator(), 3))


def test_a_pipeline_with_python_in_it_fails_at_once():
  with pytest.raises(ValueError, match='resume_in_python'):
    iterator(dataset('resume_in_python'), task_name='resume_in_python')
  take(iterator(dataset('resume_in_python'), save_dataset=False), 1)


def test_a_stateful_random_operation_fails_at_once():
  noisy = tf.data.Dataset.range(100).map(
    lambda i: {'x': tf.random.uniform([]) + tf.cast(i, tf.float32)}
  )
  with pytest.raises(ValueError, match='RandomUniform'):
    iterator(noisy.shuffle(10).repeat().batch(BATCH, drop_remainder=True))


def test_external_state_can_be_ignored_on_request():
  options = tf.data.Options()
  options.experimental_external_state_policy = (
    tf.data.experimental.ExternalStatePolicy.IGNORE
  )
  take(iterator(dataset('resume_in_python').with_options(options)), 1)


@pytest.mark.parametrize('shape', [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_batches_are_spread_over_the_mesh(shape):
  local = np.arange(BATCH * 3).reshape(BATCH, 3)
  it = data_iterators.ShardedDatasetIterator(
    iter([{'tokens': local}]), partitioner(*shape), {'tokens': (BATCH, 3)}
  )
  placed = next(it)['tokens']
  np.testing.assert_array_equal(placed, local)
  for piece in placed.addressable_shards:
    assert piece.data.shape == (BATCH // shape[0], 3)
    np.testing.assert_array_equal(piece.data, local[piece.index])


def test_batch_size_must_be_the_layouts():
  layout = types.SimpleNamespace(batch_size=32, shard_id=0, num_shards=2)
  with pytest.raises(ValueError, match='8 rows.* 16'):
    data_iterators.prepare_train_iter(
      dataset(),
      partitioner=partitioner(),
      checkpoint_cfg=checkpointing(False),
      data_layout=layout,
    )


def test_other_types_are_errors():
  with pytest.raises(ValueError, match='list'):
    iterator([1, 2])


def test_iterators_of_other_kinds_pass_through(tmp_path):
  class Counter(clu_iterators.DatasetIterator):
    """Counts, and saves its count in one file."""

    element_spec = {'n': clu_iterators.ArraySpec(np.int32, (BATCH,))}
    position = 0

    def __next__(self):
      self.position += 1
      return {'n': np.full(BATCH, self.position, np.int32)}

    def save(self, filename):
      with open(filename, 'w') as out:
        out.write(str(self.position))

    def restore(self, filename):
      with open(filename) as source:
        self.position = int(source.read())

    def reset(self):
      self.position = 0

  it = iterator(Counter())
  take(it, 3)
  it.peek_async()
  it.save(tmp_path / 'state')
  assert (tmp_path / 'state').read_text() == '3'
  it.reset()
  it.restore(tmp_path / 'state')
  assert take(it, 1)[0]['n'][0] == 4
  assert it.element_spec == Counter.element_spec
