"""No Python function runs inside `tf.data` while training, in none of our tasks."""

import pathlib

import gin
import pytest
import seqio
import tensorflow as tf
from tensorflow.core.framework import graph_pb2

import tasks  # noqa: F401, registers them
from bart_t5x import tokenizer_training
from bart_t5x.features import BartFeatureConverter
from tasks import text_to_text

DATA = pathlib.Path(__file__).parent / 'data'
LENGTHS = {'inputs': 64, 'targets': 64}
IN_PYTHON = {'PyFunc', 'PyFuncStateless', 'EagerPyFunc', 'GeneratorDataset'}
# Those of the small models have the same pipelines.
NAMES = [
  name
  for name in (*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names())
  if not name.endswith('_mini')
]
# One of each kind; the others take longer than they are likely to tell.
QUICK = ('norwegian_denoising', 'norwegian_fill_in', 'norec', 'norne_nb', 'nb_nn')
CASES = [
  *((name, 'bytelevel') for name in QUICK),
  *(
    pytest.param(name, 'bytelevel', marks=pytest.mark.slow)
    for name in NAMES
    if name not in QUICK
  ),
  ('norec', 'unigram'),
  ('norwegian_fill_in', 'unigram'),
]


def operations(dataset):
  """Names of all operations of a dataset, those of its functions among them."""
  variant = tf.data.experimental.to_variant(dataset)
  content = tf.raw_ops.DatasetToGraphV2(input_dataset=variant).numpy()
  graph = graph_pb2.GraphDef.FromString(content)
  nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
  return {node.op for node in nodes}


@pytest.fixture(autouse=True)
def clean_gin():
  gin.clear_config()
  yield
  gin.clear_config()


def vocabulary_folder(kind, corpus_dir, folder):
  """Where a vocabulary of the kind is."""
  if kind == 'bytelevel':
    return corpus_dir
  texts = [f'Sak {i}: «Å, så fælt!», sa bjørnen på Ås.' for i in range(300)]
  content = tokenizer_training.train(kind, texts, len(texts), 320, 2)
  (folder / 'tokenizer.model').write_bytes(content)
  return str(folder)


def use(monkeypatch, name, vocabulary_dir, corpus_dir):
  """Lets a task and its parts read the tests' vocabulary and data."""
  monkeypatch.setenv('BART_T5X_DATA', str(DATA))
  for task in seqio.get_subtasks(seqio.get_mixture_or_task(name)):
    prepared = 'denoising' in task.name
    if prepared:
      monkeypatch.setattr(task.source, 'corpus_dir', corpus_dir)
    for feature in task.output_features.values():
      if hasattr(feature.vocabulary, 'path'):
        folder = corpus_dir if prepared else vocabulary_dir
        monkeypatch.setattr(feature.vocabulary, 'path', folder)
        monkeypatch.setattr(feature.vocabulary, '_content', None)


def training_data(name, split):
  return seqio.get_dataset(
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


@pytest.mark.parametrize(('name', 'kind'), CASES)
def test_registered_tasks(name, kind, corpus_dir, tmp_path, monkeypatch):
  use(monkeypatch, name, vocabulary_folder(kind, corpus_dir, tmp_path), corpus_dir)
  split = {'norwegian_fill_in': 'test'}.get(name, 'train')
  if 'norsumm' in name:
    split = 'validation'
  (tmp_path / 'inputs.txt').write_text('Sjø <mask> snø.\n' * 3)
  gin.bind_parameter('input_file.dataset.path', str(tmp_path / 'inputs.txt'))
  dataset = training_data(name, split)
  found = operations(dataset)
  assert len(found) > 20 and not found & IN_PYTHON
  # So where it stands can be saved.
  iterator = iter(dataset)
  next(iterator)
  path = tf.train.Checkpoint(iterator=iterator).write(str(tmp_path / 'state'))
  want = next(iterator)
  again = iter(dataset)
  tf.train.Checkpoint(iterator=again).read(path)
  tf.nest.map_structure(tf.debugging.assert_equal, next(again), want)


def test_a_python_function_would_be_seen(corpus_dir, monkeypatch):
  vocabulary = text_to_text.load_vocabulary(corpus_dir)
  monkeypatch.setattr(type(vocabulary), '_graph_encoder', lambda self: None)
  texts = tf.data.Dataset.from_tensors('sjø')
  assert operations(texts.map(vocabulary.encode_tf)) & IN_PYTHON == {'PyFunc'}
  generated = tf.data.Dataset.from_generator(
    lambda: iter([1]), output_signature=tf.TensorSpec([], tf.int32)
  )
  assert 'GeneratorDataset' in operations(generated)
