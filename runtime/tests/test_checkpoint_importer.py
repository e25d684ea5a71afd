"""Names of Mesh TensorFlow's T5, and a checkpoint of its kind written on the spot."""

import flax.traverse_util
import jax
import numpy as np
import pytest

from t5x import checkpoint_importer

NAMES = {
  'shared/embedding': 'target/token_embedder/embedding',
  'shared/embedding_slot_vr': 'state/param_states/token_embedder/embedding/v_row',
  'encoder/embedding': 'target/encoder/token_embedder/embedding',
  'transformer/embedding_slot_v': (
    'state/param_states/decoder/token_embedder/embedding/v'
  ),
  'encoder/block_003/layer_000/SelfAttention/q': (
    'target/encoder/layers_3/attention/query/kernel'
  ),
  'decoder/block_011/layer_000/SelfAttention/o_slot_vc': (
    'state/param_states/decoder/layers_11/self_attention/out/kernel/v_col'
  ),
  'decoder/block_000/layer_001/EncDecAttention/k': (
    'target/decoder/layers_0/encoder_decoder_attention/key/kernel'
  ),
  'transformer/block_000/layer_000/SelfAttention/v': (
    'target/decoder/layers_0/self_attention/value/kernel'
  ),
  'encoder/block_000/layer_001/DenseReluDense/wi/kernel': (
    'target/encoder/layers_0/mlp/wi/kernel'
  ),
  'decoder/block_002/layer_002/DenseReluDense/wi_1/kernel_slot_v': (
    'state/param_states/decoder/layers_2/mlp/wi_1/kernel/v'
  ),
  'decoder/block_002/layer_002/DenseReluDense/wo/kernel': (
    'target/decoder/layers_2/mlp/wo/kernel'
  ),
  'encoder/block_000/layer_001/layer_norm/scale': (
    'target/encoder/layers_0/pre_mlp_layer_norm/scale'
  ),
  'decoder/block_000/layer_001/rms_norm/scale': (
    'target/decoder/layers_0/pre_cross_attention_layer_norm/scale'
  ),
  'transformer/block_000/layer_001/layer_norm/scale': (
    'target/decoder/layers_0/pre_mlp_layer_norm/scale'
  ),
  'encoder/final_layer_norm/scale': 'target/encoder/encoder_norm/scale',
  'transformer/rms_norm/scale': 'target/decoder/decoder_norm/scale',
  'decoder/logits/kernel': 'target/decoder/logits_dense/kernel',
  'global_step': 'state/step',
}


@pytest.mark.parametrize('name', NAMES)
def test_names(name):
  got = checkpoint_importer.t5_importer.apply({name: 5})
  assert got == {NAMES[name]: 5}


def test_unknown_names_are_all_named():
  with pytest.raises(ValueError, match='2 variables: a/b, c'):
    checkpoint_importer.t5_importer.apply({'c': 1, 'a/b': 2, 'global_step': 3})


def test_rules_of_ones_own():
  translator = checkpoint_importer.CheckpointTranslator()

  @translator.add(r'(\w+)/w')
  def weight(opts, key, val, layer):
    return f'{opts["prefix"]}/{layer}', val + 1

  @translator.add(r'drop/.*')
  def drop(opts, key, val):
    return None, None

  got = translator.apply({'a/w': 1, 'drop/x/w': 2}, prefix='p')
  assert got == {'p/a': 2}
  # A pattern must match the whole name.
  with pytest.raises(ValueError, match='a/w/more'):
    translator.apply({'a/w/more': 1}, prefix='p')
  assert weight and drop


TF_VARIABLES = {
  'global_step': np.int64(3),
  'shared/embedding': np.ones((4, 2), np.float32),
  'shared/embedding_slot_vr': np.full(4, 2.0, np.float32),
  'shared/embedding_slot_vc': np.full(2, 3.0, np.float32),
  'encoder/block_000/layer_000/SelfAttention/relative_attention_bias': np.ones(
    (2, 3), np.float32
  ),
  'encoder/block_000/layer_000/SelfAttention/relative_attention_bias_slot_v': np.ones(
    (2, 3), np.float32
  ),
}


def wanted_state():
  placeholder = np.zeros(1, np.float32)
  return {
    'state': {
      'step': np.int32(0),
      'param_states': {
        'token_embedder': {
          'embedding': {
            'v_row': np.zeros(4, np.float32),
            'v_col': np.zeros(2, np.float32),
            'v': placeholder,
            'm': placeholder,
          }
        },
        'encoder': {
          'relpos_bias': {
            'rel_embedding': {
              'v_row': placeholder,
              'v_col': placeholder,
              'v': np.zeros((2, 3), np.float32),
              'm': placeholder,
            }
          }
        },
      },
    },
    'target': {
      'token_embedder': {'embedding': np.zeros((4, 2), np.float32)},
      'encoder': {'relpos_bias': {'rel_embedding': np.zeros((2, 3), np.float32)}},
    },
  }


@pytest.fixture(scope='module')
def tf_checkpoint(tmp_path_factory):
  import tensorflow as tf

  prefix = str(tmp_path_factory.mktemp('mtf') / 'model.ckpt-3')
  with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    for name, value in TF_VARIABLES.items():
      tf.compat.v1.get_variable(name, initializer=value)
    session.run(tf.compat.v1.global_variables_initializer())
    tf.compat.v1.train.Saver().save(session, prefix, write_meta_graph=False)
  return prefix


def test_a_checkpoint_is_restored(tf_checkpoint):
  restore = checkpoint_importer.restore_from_t5_checkpoint
  state = restore(wanted_state(), tf_checkpoint)
  assert jax.tree.structure(state) == jax.tree.structure(wanted_state())
  flat = flax.traverse_util.flatten_dict(state, sep='/')
  assert flat['state/step'] == 3 and flat['state/step'].dtype == np.int32
  # Positions that only block 0 has are those of all blocks.
  np.testing.assert_array_equal(
    flat['target/encoder/relpos_bias/rel_embedding'], np.ones((2, 3))
  )
  entry = 'state/param_states/token_embedder/embedding/'
  np.testing.assert_array_equal(flat[entry + 'v_row'], np.full(4, 2.0))
  np.testing.assert_array_equal(flat[entry + 'v'], np.zeros(1))
  lazy = restore(wanted_state(), tf_checkpoint, lazy_parameters=True)
  embedding = lazy['target']['token_embedder']['embedding']
  assert isinstance(embedding, checkpoint_importer.LazyArray)
  np.testing.assert_array_equal(embedding.get(), np.ones((4, 2)))


def test_positions_of_each_block_stay_there():
  name = 'encoder/block_{:03}/layer_000/SelfAttention/relative_attention_bias'
  data = checkpoint_importer.t5_importer.apply({name.format(i): i for i in (0, 1)})
  assert checkpoint_importer._share_positions(data) == {
    'target/encoder/layers_0/relpos_bias/rel_embedding': 0,
    'target/encoder/layers_1/relpos_bias/rel_embedding': 1,
  }


def test_other_models_are_refused(tf_checkpoint):
  restore = checkpoint_importer.restore_from_t5_checkpoint
  state = wanted_state()
  state['target']['more'] = np.zeros(1)
  with pytest.raises(ValueError, match='Missing: target/more'):
    restore(state, tf_checkpoint, strict=False)
  state = wanted_state()
  del state['target']['encoder']
  with pytest.raises(ValueError, match='Not in the model: target/encoder/relpos_bias'):
    restore(state, tf_checkpoint)
  assert 'encoder' not in restore(state, tf_checkpoint, strict=False)['target']
  state = wanted_state()
  state['target']['token_embedder']['embedding'] = np.zeros((5, 2))
  with pytest.raises(ValueError, match=r'is \(4, 2\), the model has \(5, 2\)'):
    restore(state, tf_checkpoint)
