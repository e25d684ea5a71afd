"""A model and tasks so small that a whole run takes seconds.

The model is a T5X encoder-decoder in forty lines of Flax: a token's embedding, a mean
over the source, one hidden layer. It learns to copy its input's last token, roughly.
The tasks are made of arithmetic: no file, no download, no vocabulary model.
"""

import functools

import jax.numpy as jnp
import numpy as np
import seqio
import tensorflow as tf
from flax import linen as nn
from flax.linen import partitioning as nn_partitioning

from t5x import (
  data,
  models,
  optimizers,
  partitioning,
  restore,
  trainer,
)

VOCABULARY = seqio.ByteVocabulary()
VOCABULARY_SIZE = 384
TRAIN_EXAMPLES = 64
TEST_EXAMPLES = 10


def vocabulary():
  """The vocabulary of model and tasks; a function, so that gin can name it."""
  return VOCABULARY


class Steps(nn.Module):
  """Counts decoding steps: one number a row stands for a real model's cache."""

  @nn.compact
  def __call__(self, rows):
    steps = self.variable('cache', 'steps', jnp.zeros, (rows, 1), jnp.float32)
    steps.value = steps.value + 1


class Network(nn.Module):
  """A module with the interface that `EncoderDecoderModel` asks for."""

  width: int = 8
  hidden: int = 16
  dropout_rate: float = 0.1

  def setup(self):
    self.embedding = nn_partitioning.param_with_axes(
      'embedding',
      nn.initializers.normal(0.1),
      (VOCABULARY_SIZE, self.width),
      jnp.float32,
      axes=('vocab', 'embed'),
    )
    self.wi = nn_partitioning.param_with_axes(
      'wi',
      nn.initializers.normal(0.1),
      (self.width, self.hidden),
      jnp.float32,
      axes=('embed', 'mlp'),
    )
    self.wo = nn_partitioning.param_with_axes(
      'wo',
      nn.initializers.normal(0.1),
      (self.hidden, VOCABULARY_SIZE),
      jnp.float32,
      axes=('mlp', 'vocab'),
    )
    self.dropout = nn.Dropout(self.dropout_rate)
    self.steps = Steps()

  def encode(
    self,
    encoder_input_tokens,
    encoder_segment_ids=None,
    encoder_positions=None,
    enable_dropout=True,
  ):
    tokens = encoder_input_tokens.astype(jnp.int32)
    real = (tokens != 0)[..., None]
    embedded = jnp.where(real, self.embedding[tokens], 0.0)
    # A running mean, so that segments of a packed row stay different.
    count = jnp.maximum(jnp.cumsum(real, axis=1), 1)
    return jnp.cumsum(embedded, axis=1) / count

  def decode(
    self,
    encoded,
    encoder_input_tokens,
    decoder_input_tokens,
    decoder_target_tokens,
    encoder_segment_ids=None,
    decoder_segment_ids=None,
    decoder_positions=None,
    enable_dropout=True,
    decode=False,
    max_decode_length=None,
  ):
    if decode:
      self.steps(decoder_input_tokens.shape[0])
    here = self.embedding[decoder_input_tokens.astype(jnp.int32)]
    state = here + encoded[:, -1:]
    state = nn.relu(state @ self.wi)
    state = self.dropout(state, deterministic=not enable_dropout)
    return state @ self.wo

  def __call__(
    self,
    encoder_input_tokens,
    decoder_input_tokens,
    decoder_target_tokens,
    encoder_segment_ids=None,
    decoder_segment_ids=None,
    encoder_positions=None,
    decoder_positions=None,
    *,
    decode=False,
    enable_dropout=True,
  ):
    encoded = self.encode(encoder_input_tokens, enable_dropout=enable_dropout)
    return self.decode(
      encoded,
      encoder_input_tokens,
      decoder_input_tokens,
      decoder_target_tokens,
      enable_dropout=enable_dropout,
      decode=decode,
    )


def _examples(split, shuffle_files=False, seed=None):
  """Text of `number` words; the target is the last of them."""
  count, offset = {
    'train': (TRAIN_EXAMPLES, 0),
    'validation': (16, 1000),
    'test': (TEST_EXAMPLES, 2000),
  }[split]
  numbers = np.arange(offset, offset + count)
  words = [' '.join(str(n * k % 97) for k in (1, 2, 3)) for n in numbers]
  lasts = [text.split()[-1] for text in words]
  return tf.data.Dataset.from_tensor_slices({'inputs': words, 'targets': lasts})


def share_equal(targets, predictions):
  """Fraction of predictions equal to their target."""
  equal = [target == guess for target, guess in zip(targets, predictions, strict=True)]
  return {'equal': float(np.mean(equal))}


def mean_score(targets, scores):
  """Mean log-likelihood of the targets."""
  return {'mean_score': float(np.mean(scores))}


def register(name='tiny_copy', seeded=False):
  """Registers the task, once.

  Args:
    name: its name.
    seeded: whether a random step of the pipeline changes the data each epoch.
  """
  if name in seqio.TaskRegistry.names():
    return
  feature = functools.partial(seqio.Feature, VOCABULARY, add_eos=True, dtype=tf.int32)

  @seqio.map_over_dataset(num_seeds=1)
  def swap_some(example, seed):
    inputs = example['inputs']
    noise = tf.random.stateless_uniform(tf.shape(inputs), seed)
    return {**example, 'inputs': tf.where(noise < 0.2, tf.ones_like(inputs), inputs)}

  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(_examples, splits=('train', 'validation', 'test')),
    preprocessors=[
      seqio.preprocessors.tokenize,
      *([swap_some] if seeded else []),
      seqio.CacheDatasetPlaceholder(),
      seqio.preprocessors.append_eos,
    ],
    output_features={'inputs': feature(), 'targets': feature()},
    metric_fns=[share_equal, mean_score],
  )


register('tiny_copy')
register('tiny_noised', seeded=True)


def two_vocabularies(name):
  """Registers a task whose inputs and targets are in vocabularies of their own.

  Args:
    name: its name.

  Returns:
    Its features.
  """
  if name not in seqio.TaskRegistry.names():
    seqio.TaskRegistry.add(
      name,
      source=seqio.FunctionDataSource(_examples, splits=('train', 'test')),
      preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
      output_features={
        'inputs': seqio.Feature(seqio.ByteVocabulary(extra_ids=3)),
        'targets': seqio.Feature(VOCABULARY),
      },
      metric_fns=[],
    )
  return seqio.TaskRegistry.get(name).output_features


def with_a_broken_metric(name='tiny_broken'):
  """Registers a task whose metric cannot be computed, and returns its name."""

  def broken(targets, scores):
    raise ValueError('no count')

  if name not in seqio.TaskRegistry.names():
    like = seqio.TaskRegistry.get('tiny_copy')
    seqio.TaskRegistry.add(
      name, like.source, like.output_features, like.preprocessors, metric_fns=[broken]
    )
  return name


LENGTHS = {'inputs': 16, 'targets': 8}
EVALUATOR = functools.partial(
  seqio.Evaluator, logger_cls=[seqio.TensorBoardLogger, seqio.JSONLogger]
)


def make_model(dropout_rate=0.1):
  """The model as tiny.gin binds it."""
  return models.EncoderDecoderModel(
    module=Network(dropout_rate=dropout_rate),
    input_vocabulary=VOCABULARY,
    output_vocabulary=VOCABULARY,
    optimizer_def=optimizers.adamw(learning_rate=0.01),
  )


def dataset_config(split, task='tiny_copy', **changes):
  """What to read, packed, in the task's own order."""
  settings = {
    'task_feature_lengths': LENGTHS,
    'batch_size': 8,
    'shuffle': False,
    'seed': 0,
    'pack': True,
    **changes,
  }
  return data.DatasetConfig(mixture_or_task_name=task, split=split, **settings)


def checkpoint_config(period=5, save_dataset=True, initial=None, **save):
  """Saves every `period` steps; starts from `initial` if given."""
  return restore.CheckpointConfig(
    save=restore.SaveCheckpointConfig(period=period, save_dataset=save_dataset, **save),
    restore=restore.RestoreCheckpointConfig(path=initial or [], mode='specific'),
  )


def train_arguments(model_dir, task='tiny_copy', **changes):
  """Arguments of `train.train` for a run of ten steps.

  Args:
    model_dir: the run's folder.
    task: what to train on.
    **changes: arguments to replace.
  """
  return {
    'model': make_model(),
    'train_dataset_cfg': dataset_config('train', task, shuffle=True),
    'train_eval_dataset_cfg': None,
    'infer_eval_dataset_cfg': None,
    'checkpoint_cfg': checkpoint_config(),
    'partitioner': partitioning.PjitPartitioner(
      num_partitions=1,
      logical_axis_rules=partitioning.standard_logical_axis_rules(),
    ),
    'trainer_cls': functools.partial(
      trainer.Trainer,
      learning_rate_fn=optimizers.create_learning_rate_scheduler(),
      num_microbatches=None,
    ),
    'model_dir': str(model_dir),
    'total_steps': 10,
    'eval_steps': 2,
    'eval_period': 5,
    'random_seed': 0,
    'inference_evaluator_cls': EVALUATOR,
    'summarize_config_fn': lambda model_dir, summary_writer, step: None,
    **changes,
  }
