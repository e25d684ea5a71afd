"""The base run's TPU settings against plain attention and all logits at once.

On eight CPU devices, with an interpreted kernel and a smaller model.
"""

import inspect

import gin
import jax
import numpy as np
import pytest

from bart_t5x import flash
from t5x import planning
from t5x.train import train as train_script

pytestmark = pytest.mark.slow

CUT = {
  'network.BartConfig.vocab_size': 512,
  'network.BartConfig.num_encoder_layers': 1,
  'network.BartConfig.num_decoder_layers': 1,
  'TASK_FEATURE_LENGTHS': {'inputs': 136, 'targets': 136},
  'BATCH_SIZE': 8,
  'LOSS_NORMALIZING_FACTOR': 8 * 136,
  'MIXTURE_OR_TASK_NAME': 'norwegian_denoising',
  # Settings are compared, not rounding: bfloat16 has 8 bits.
  'COMPUTE_DTYPE': 'float32',
}
# The file's own settings, with what it would choose on a TPU.
ON_TPU = {'network.BartConfig.attention_impl': 'flash'}
PLAIN = {
  'network.BartConfig.attention_impl': 'plain',
  'network.BartConfig.remat_policy': 'none',
  'model.BartModel.loss_chunk_length': None,
  'trainer.Trainer.num_microbatches': None,
}


@pytest.fixture
def other_trains():
  """Lets another function replace `train`, which the gin files bind."""
  gin.enter_interactive_mode()
  yield
  with gin.unlock_config():
    gin.configurable(train_script, module='__main__')
  gin.exit_interactive_mode()


def loss_and_gradients(call_script, bindings):
  """(loss, gradients) of a packed batch with dropout over all devices."""

  def train(**arguments):
    model, partitioner = arguments['model'], arguments['partitioner']
    spec = planning.batch_spec(
      arguments['train_dataset_cfg'], model.FEATURE_CONVERTER_CLS
    )
    shapes = {name: x.shape for name, x in spec.items()}
    types = {name: x.dtype for name, x in spec.items()}
    variables = model.get_initial_variables(jax.random.PRNGKey(0), shapes, types)
    step = partitioner.partition(
      jax.value_and_grad(model.loss_fn, has_aux=True),
      in_axis_resources=(None, partitioner.data_partition_spec, None),
      out_axis_resources=None,
    )
    (loss, _), gradients = step(
      variables['params'], packed_batch(spec), jax.random.key(1, impl='unsafe_rbg')
    )
    return float(loss), jax.tree.map(np.asarray, gradients)

  train.__signature__ = inspect.signature(train_script)
  outcome = call_script(train, ['gin/bart_base_no.gin'], {**CUT, **bindings})
  assert outcome.code == 0, outcome.text
  return outcome.result


def packed_batch(spec):
  """Rows of three segments of random lengths, and padding."""
  random = np.random.default_rng(0)
  batch = {}
  for side, tokens in (
    ('encoder', 'encoder_input_tokens'),
    ('decoder', 'decoder_target_tokens'),
  ):
    rows, length = spec[tokens].shape
    ends = np.sort(random.integers(20, length, (rows, 3)), axis=1)
    segments = 1 + (np.arange(length)[:, None] >= ends[:, None]).sum(-1)
    segments = np.where(segments > 3, 0, segments)
    ids = np.where(segments, random.integers(5, 512, (rows, length)), 0)
    starts = np.concatenate([np.zeros((rows, 1), int), ends[:, :2]], 1)
    own = np.take_along_axis(starts, np.maximum(segments - 1, 0), 1)
    batch[tokens] = ids
    batch[f'{side}_segment_ids'] = segments
    batch[f'{side}_positions'] = np.where(segments, np.arange(length) - own, 0)
  targets, segments = batch['decoder_target_tokens'], batch['decoder_segment_ids']
  before = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
  batch['decoder_input_tokens'] = np.where(batch['decoder_positions'] > 0, before, 0)
  batch['decoder_loss_weights'] = segments > 0
  batch['decoder_targets_noised'] = np.where(segments, 1 + targets % 2, 0)
  assert set(batch) == set(spec)
  return {name: x.astype(spec[name].dtype) for name, x in batch.items()}


def test_tpu_settings_give_the_same_loss_and_gradients(call_script, other_trains):
  assert jax.device_count() == 8
  with flash.interpreted():
    loss, gradients = loss_and_gradients(call_script, ON_TPU)
  plain_loss, plain_gradients = loss_and_gradients(call_script, PLAIN)
  np.testing.assert_allclose(loss, plain_loss, rtol=2e-6)
  assert jax.tree.structure(gradients) == jax.tree.structure(plain_gradients)
  for (path, found), expected in zip(
    jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(plain_gradients)
  ):
    # Relative to the parameter's own gradient and to all: gradients of key biases are
    # 0 except for rounding, as softmax ignores a shift.
    norm = np.linalg.norm(expected)
    total = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(plain_gradients)))
    difference = np.linalg.norm(found - expected)
    assert difference <= 2e-5 * norm + 1e-7 * total, jax.tree_util.keystr(path)
