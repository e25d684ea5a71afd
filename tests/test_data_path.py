"""From shards to batches, as a T5X run reads them: shared by hosts, and resumed."""

import os

import gin
import jax
import numpy as np
import pytest
import seqio
from jax.sharding import Mesh, PartitionSpec

from bart_t5x import noise, prepare
from bart_t5x.features import BartFeatureConverter
from tasks import fill_in, pretrain

LENGTHS = {'inputs': 64, 'targets': 64}
BATCH = 8


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
    # One process stands for a host here: its batches are all there is.
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


@pytest.mark.parametrize(('host', 'hosts'), [(0, 1), (1, 2)])
@pytest.mark.parametrize('at', [5, 61])
def test_p17_mixture_resumes_from_a_checkpoint(mixture, host, hosts, at, tmp_path):
  # 61 batches are more than an epoch of either corpus, and not a whole number of them.
  from t5x import checkpoints

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


def test_sentencepiece_in_every_kind_of_task(unigram_corpus, tmp_path):
  from tasks import finetune

  (tmp_path / 'train.tsv').write_text('ord\tklasse\nfjord på\tsubstantiv\n')
  names = [f'path_test_unigram_{k}' for k in ('denoising', 'finetune', 'fill_in')]
  denoising = pretrain.add_denoising_task(names[0], unigram_corpus, noise.Recipe())
  finetune_task = finetune.add_text_to_text_task(
    names[1],
    lambda row: {'inputs': row['ord'], 'targets': row['klasse']},
    files={'train': str(tmp_path / 'train.tsv')},
    corpus_dir=unigram_corpus,
  )
  fill_in_task = fill_in.add_fill_in_task(names[2], unigram_corpus)
  vocabulary = denoising.output_features['targets'].vocabulary
  try:
    example = next(denoising.get_dataset(LENGTHS).as_numpy_iterator())
    assert example['targets'][0] == 1 and example['targets'][-1] == 2
    assert vocabulary.mask_id in example['inputs']
    tuning = finetune_task.get_dataset(LENGTHS, 'train')
    example = next(tuning.as_numpy_iterator())
    assert vocabulary.decode(example['inputs'].tolist()) == 'fjord på'
    (tmp_path / 'lines.txt').write_text('barna <mask> på <s> fjorden\n')
    gin.bind_parameter('input_file.dataset.path', str(tmp_path / 'lines.txt'))
    (example,) = fill_in_task.get_dataset(LENGTHS, 'test').as_numpy_iterator()
    ids = example['inputs'].tolist()
    assert ids.count(vocabulary.mask_id) == 1 and ids.count(1) == 1  # <s> is text
    assert vocabulary.decode(ids) == 'barna<mask> på <s> fjorden'
  finally:
    gin.clear_config()
    for name in names:
      seqio.TaskRegistry.remove(name)
