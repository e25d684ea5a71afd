"""From shards to batches: resumed by hosts, and without Python inside `tf.data`."""

import os
import pathlib

import gin
import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf
from jax.sharding import Mesh, PartitionSpec
from tensorflow.core.framework import graph_pb2

import tasks  # noqa: F401, registers them
from bart_t5x import noise, prepare
from bart_t5x.features import BartFeatureConverter
from tasks import pretrain, text_to_text

LENGTHS = {'inputs': 64, 'targets': 64}
BATCH = 8
# Before this file registers tasks of its own.
REGISTERED = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]


@pytest.fixture(autouse=True)
def clear_gin():
  gin.clear_config()
  yield
  gin.clear_config()


@pytest.fixture(scope='module')
def second_corpus(corpus_dir, tmp_path_factory):
  """Another corpus with the same vocabulary."""
  folder = tmp_path_factory.mktemp('second')
  lines = [
    f'Ei lita ord{i % 60} på fjorden, {i} gonger.  Åse såg ho.' for i in range(90)
  ]
  (folder / 'texts.txt').write_text('\n'.join(lines))
  output = folder / 'prepared'
  args = ['--source=text', f'--input={folder / "texts.txt"}', f'--output_dir={output}']
  args += [f'--tokenizer_file={corpus_dir}', '--min_validation_documents=10']
  assert prepare.main([*args, '--num_workers=1']) == 0
  return str(output)


@pytest.fixture(scope='module')
def mixture(corpus_dir, second_corpus):
  """Two denoising tasks over two corpora, three to one."""
  for name, folder in (('path_test_nb', corpus_dir), ('path_test_nn', second_corpus)):
    pretrain.add_denoising_task(name, folder, noise.Recipe(), shuffle_buffer_size=64)
  name = 'path_test_mixture'
  seqio.MixtureRegistry.add(name, [('path_test_nb', 3), ('path_test_nn', 1)])
  yield name
  seqio.MixtureRegistry.remove(name)
  for name in ('path_test_nb', 'path_test_nn'):
    seqio.TaskRegistry.remove(name)


def host_dataset(name, host=0, hosts=1):
  from t5x import utils

  config = utils.DatasetConfig(
    mixture_or_task_name=name,
    task_feature_lengths=LENGTHS,
    split='train',
    batch_size=BATCH,
    shuffle=True,
    seed=3,
    pack=True,
  )
  return utils.get_dataset(config, host, hosts, BartFeatureConverter)


def train_iterator(name, host, hosts):
  """The training loop's iterator, whose state is saved with checkpoints."""
  from t5x import data_iterators, utils

  devices = np.array(jax.devices()[: BATCH // hosts]).reshape(-1, 1)

  class Partitioner:
    mesh = Mesh(devices, ('data', 'model'))
    data_partition_spec = PartitionSpec('data')

  class Layout:
    # This process is a whole host.
    batch_size = BATCH // hosts
    shard_id = host
    num_shards = 1

  save = utils.SaveCheckpointConfig(save_dataset=True)
  return data_iterators.prepare_train_iter(
    host_dataset(name, host, hosts),
    partitioner=Partitioner,
    checkpoint_cfg=utils.CheckpointConfig(save=save),
    data_layout=Layout,
  )


def take(iterator, count):
  return [jax.tree.map(np.asarray, next(iterator)) for _ in range(count)]


def test_p17_mixture_resumes_from_a_checkpoint(mixture, tmp_path):
  # 61 batches are more than an epoch of either corpus, and not a whole number of them.
  from t5x import checkpoints

  host, hosts, at = 1, 2, 61
  handler = checkpoints.DatasetCheckpointHandler('train_ds-0', True)
  through = train_iterator(mixture, host, hosts)
  take(through, at)
  handler.save(tmp_path, checkpoints.DatasetArgs(through))
  want = take(through, 12)
  resumed = train_iterator(mixture, host, hosts)
  handler.restore(tmp_path, checkpoints.DatasetArgs(resumed))
  for one, other in zip(take(resumed, 12), want, strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(scope='module')
def unigram_corpus(corpus_dir, tmp_path_factory):
  texts = os.path.join(os.path.dirname(corpus_dir), 'texts.txt')
  output = tmp_path_factory.mktemp('unigram') / 'prepared'
  args = ['--source=text', f'--input={texts}', f'--output_dir={output}']
  args += ['--tokenizer=unigram', '--vocab_size=340', '--min_validation_documents=20']
  assert prepare.main([*args, '--num_workers=1']) == 0
  return str(output)


# ---- no Python in tf.data ----

DATA = pathlib.Path(__file__).parent / 'data'
IN_PYTHON = {'PyFunc', 'PyFuncStateless', 'EagerPyFunc', 'GeneratorDataset'}
# One task of each kind.
QUICK = ('norwegian_denoising', 'norwegian_fill_in', 'norec', 'norne_nb', 'nb_nn')
CASES = [
  *((name, 'bytelevel') for name in QUICK),
  *(
    pytest.param(name, 'bytelevel', marks=pytest.mark.slow)
    for name in REGISTERED
    if name not in QUICK and not name.endswith('_mini')  # the same pipelines
  ),
  ('norwegian_denoising', 'unigram'),
  ('norec', 'unigram'),
  ('norwegian_fill_in', 'unigram'),
]


def operations(dataset):
  """Returns the names of all operations of a dataset and its functions."""
  variant = tf.data.experimental.to_variant(dataset)
  content = tf.raw_ops.DatasetToGraphV2(input_dataset=variant).numpy()
  graph = graph_pb2.GraphDef.FromString(content)
  nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
  return {node.op for node in nodes}


def use_test_data(monkeypatch, name, corpus_dir):
  """Makes a task and its subtasks read the tests' corpus and data."""
  monkeypatch.setenv('BART_T5X_DATA', str(DATA))
  for task in seqio.get_subtasks(seqio.get_mixture_or_task(name)):
    if 'denoising' in task.name:
      monkeypatch.setattr(task.source, 'corpus_dir', corpus_dir)
    for feature in task.output_features.values():
      if hasattr(feature.vocabulary, 'path'):
        monkeypatch.setattr(feature.vocabulary, 'path', corpus_dir)
        monkeypatch.setattr(feature.vocabulary, '_content', None)


@pytest.mark.parametrize(('name', 'kind'), CASES)
def test_no_python_in_registered_tasks(name, kind, request, tmp_path, monkeypatch):
  corpora = {'bytelevel': 'corpus_dir', 'unigram': 'unigram_corpus'}
  use_test_data(monkeypatch, name, request.getfixturevalue(corpora[kind]))
  split = {'norwegian_fill_in': 'test'}.get(name, 'train')
  if 'norsumm' in name:
    split = 'validation'
  (tmp_path / 'inputs.txt').write_text('Sjø <mask> snø.\n' * 3)
  gin.bind_parameter('input_file.dataset.path', str(tmp_path / 'inputs.txt'))
  dataset = seqio.get_dataset(
    name,
    LENGTHS,
    BartFeatureConverter(pack='denoising' in name),
    dataset_split=split,
    shuffle=True,
    seed=0,
    num_epochs=None,
    batch_size=2,
    verbose=False,
  )
  found = operations(dataset)
  assert not found & IN_PYTHON
  # The functions of the preprocessors are searched too.
  denoises = 'denoising' in name
  assert len(found) > (50 if denoises else 20)
  assert ('StatelessRandomUniform' if denoises else 'ConcatV2') in found
  # So its iterator can be saved.
  iterator = iter(dataset)
  next(iterator)
  path = tf.train.Checkpoint(iterator=iterator).write(str(tmp_path / 'state'))
  want = next(iterator)
  again = iter(dataset)
  tf.train.Checkpoint(iterator=again).read(path)
  tf.nest.map_structure(tf.debugging.assert_equal, next(again), want)


def test_python_functions_are_detected(corpus_dir, monkeypatch):
  vocabulary = text_to_text.load_vocabulary(corpus_dir)
  monkeypatch.setattr(type(vocabulary), '_graph_encoder', lambda self: None)
  texts = tf.data.Dataset.from_tensors('sjø')
  assert operations(texts.map(vocabulary.encode_tf)) & IN_PYTHON == {'PyFunc'}
