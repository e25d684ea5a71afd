"""A model and tasks so small that a whole run takes seconds.

The model adds a token's embedding to a mean over the source and has one hidden layer.
The tasks need no files.
"""

import functools

import jax.numpy as jnp
import numpy as np
import seqio
import tensorflow as tf
from flax import linen as nn
from flax.linen import partitioning as nn_partitioning

from t5x import data, models, optimizers, partitioning, restore, trainer

VOCABULARY = seqio.ByteVocabulary()
VOCABULARY_SIZE = 384
TRAIN_EXAMPLES = 64
TEST_EXAMPLES = 10


def vocabulary():
  """Returns the vocabulary, for gin."""
  return VOCABULARY


class Steps(nn.Module):
  """Counts decoding steps per row, in place of a cache."""

  @nn.compact
  def __call__(self, rows):
    steps = self.variable('cache', 'steps', jnp.zeros, (rows, 1), jnp.float32)
    steps.value = steps.value + 1


class Network(nn.Module):
  """A module with the interface that `EncoderDecoderModel` needs."""

  width: int = 8
  hidden: int = 16
  dropout_rate: float = 0.1

  def setup(self):
    sizes = {'vocab': VOCABULARY_SIZE, 'embed': self.width, 'mlp': self.hidden}

    def param(name, *axes):
      return nn_partitioning.param_with_axes(
        name,
        nn.initializers.normal(0.1),
        tuple(sizes[axis] for axis in axes),
        jnp.float32,
        axes=axes,
      )

    self.embedding = param('embedding', 'vocab', 'embed')
    self.wi = param('wi', 'embed', 'mlp')
    self.wo = param('wo', 'mlp', 'vocab')
    self.dropout = nn.Dropout(self.dropout_rate)
    self.steps = Steps()

  def encode(self, encoder_input_tokens, enable_dropout=True):
    tokens = encoder_input_tokens.astype(jnp.int32)
    real = (tokens != 0)[..., None]
    embedded = jnp.where(real, self.embedding[tokens], 0.0)
    # A running mean, so that segments of a packed row differ.
    count = jnp.maximum(jnp.cumsum(real, axis=1), 1)
    return jnp.cumsum(embedded, axis=1) / count

  def decode(
    self,
    encoded,
    encoder_input_tokens,
    decoder_input_tokens,
    decoder_target_tokens,
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
  """Texts of three numbers; the target is the last of them."""
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
  equal = [target == guess for target, guess in zip(targets, predictions, strict=True)]
  return {'equal': float(np.mean(equal))}


def mean_score(targets, scores):
  return {'mean_score': float(np.mean(scores))}


def register(name, seeded=False):
  """Registers a task; `seeded` adds noise that changes with each epoch."""
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


def with_a_broken_metric(name='tiny_broken'):
  """Registers a task whose metric raises; returns its name."""

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
  """Returns the model that tiny.gin binds."""
  return models.EncoderDecoderModel(
    module=Network(dropout_rate=dropout_rate),
    input_vocabulary=VOCABULARY,
    output_vocabulary=VOCABULARY,
    optimizer_def=optimizers.adamw(learning_rate=0.01),
  )


def dataset_config(split, task='tiny_copy', **changes):
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
  return restore.CheckpointConfig(
    save=restore.SaveCheckpointConfig(period=period, save_dataset=save_dataset, **save),
    restore=restore.RestoreCheckpointConfig(path=initial or [], mode='specific'),
  )


def train_arguments(model_dir, task='tiny_copy', **changes):
  """Returns arguments of `train.train` for a run of ten steps."""
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
