"""The model and the task of `launch.py`: names both runtimes have, and no files."""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import seqio
import tensorflow as tf
from flax import linen as nn
from flax.linen import partitioning as nn_partitioning

VOCABULARY = seqio.ByteVocabulary()
# The file that gets the time of each training step that really ran.
STEPS_FILE = os.environ['LAUNCH_STEPS_FILE']


def vocabulary():
  """A function, so that gin can name it."""
  return VOCABULARY


def note_step(_):
  """Appends a line: seconds since 1970, and CPU seconds of this process so far."""
  with open(STEPS_FILE, 'a') as f:
    f.write(f'{time.time()} {time.process_time()}\n')


class Network(nn.Module):
  """An embedding, the mean of the source and one hidden layer: 9,344 parameters."""

  @nn.compact
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
    def weights(name, shape, axes):
      normal = nn.initializers.normal(0.1)
      return nn_partitioning.param_with_axes(name, normal, shape, axes=axes)

    embedding = weights('embedding', (384, 8), ('vocab', 'embed'))
    hidden = weights('wi', (8, 16), ('embed', 'mlp'))
    output = weights('wo', (16, 384), ('mlp', 'vocab'))
    source = embedding[encoder_input_tokens].mean(axis=1, keepdims=True)
    state = embedding[decoder_input_tokens] + source
    if enable_dropout:
      jax.debug.callback(note_step, jnp.sum(state))
    return nn.relu(state @ hidden) @ output


def _examples(split, shuffle_files=False, seed=None):
  words = [' '.join(str(n * k % 97) for k in (1, 2, 3)) for n in np.arange(64)]
  lasts = [text.split()[-1] for text in words]
  return tf.data.Dataset.from_tensor_slices({'inputs': words, 'targets': lasts})


seqio.TaskRegistry.add(
  'launch_copy',
  source=seqio.FunctionDataSource(_examples, splits=('train', 'validation')),
  preprocessors=[
    seqio.preprocessors.tokenize,
    seqio.CacheDatasetPlaceholder(),
    seqio.preprocessors.append_eos,
  ],
  output_features={
    name: seqio.Feature(VOCABULARY, add_eos=True, dtype=tf.int32)
    for name in ('inputs', 'targets')
  },
)
