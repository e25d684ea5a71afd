"""The table of names: complete, invertible, and strict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bart_t5x import network, tokenization
from bart_t5x.hf import mapping

SHAPES = (
  {},
  {'num_encoder_layers': 1, 'num_decoder_layers': 1, 'num_heads': 1},
  {'emb_dim': 10, 'num_heads': 5, 'num_encoder_layers': 11, 'mlp_dim': 7},
  {'max_positions': 1030, 'emb_dim': 6, 'num_heads': 3},
)


def _params(scan_layers=False, seed=0, **shape):
  fields = {
      'vocab_size': 11, 'emb_dim': 4, 'num_heads': 2, 'num_encoder_layers': 2,
      'num_decoder_layers': 12, 'mlp_dim': 6, 'max_positions': 5,
      'vocab_multiple_of': 8, **shape,
  }  # fmt: skip
  config = network.BartConfig(scan_layers=scan_layers, **fields)
  tokens = jnp.ones((1, 2), jnp.int32)
  shapes = jax.eval_shape(
    lambda: network.Transformer(config).init(
      jax.random.key(0), tokens, tokens, tokens, enable_dropout=False
    )
  )['params']
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes
  )


def _assert_same(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize('framework', ['flax', 'torch'])
@pytest.mark.parametrize('scan_layers', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_there_and_back(framework, scan_layers, shape):
  """Every bit, and from there to Hugging Face again."""
  params = _params(scan_layers, **shape)
  tensors = mapping.to_hf(params, 11, framework)
  back = mapping.from_hf(
    tensors, framework, padded_vocab_size=16, scan_layers=scan_layers
  )
  # The five rows of padding come back as zeros, all else as it was.
  params['token_embedder']['embedding'][11:] = 0
  params['final_logits_bias'][11:] = 0
  _assert_same(back, params)
  _assert_same(mapping.to_hf(back, 11, framework), tensors)


def test_more_than_ten_layers_keep_their_order():
  params = _params()
  _assert_same(mapping.unstack_layers(mapping.stack_layers(params)), params)
  stacked = mapping.stack_layers(params)
  bias = stacked['decoder']['layers']['mlp']['wi']['bias']
  np.testing.assert_array_equal(
    bias[10], params['decoder']['layers_10']['mlp']['wi']['bias']
  )


def test_pad_and_bos_trade_places():
  params = _params()
  table = params['token_embedder']['embedding']
  tensors = mapping.to_hf(params, 11, 'torch')
  exported = tensors['model.shared.weight']
  assert exported.shape == (11, 4)
  # Rows go where the tokenizer's border sends their ids.
  np.testing.assert_array_equal(
    exported[tokenization.to_hf_ids(np.arange(11))], table[:11]
  )
  np.testing.assert_array_equal(exported[0], table[1])  # <s>
  np.testing.assert_array_equal(exported[1], table[0])  # padding
  np.testing.assert_array_equal(exported[2:], table[2:11])
  assert tensors['final_logits_bias'].shape == (1, 11)
  assert tensors['final_logits_bias'][0, 1] == params['final_logits_bias'][0]


def test_torch_kernels_are_transposed_and_position_tables_whole():
  params = _params()
  flax, torch = (mapping.to_hf(params, 11, name) for name in ('flax', 'torch'))
  name = 'model.encoder.layers.1.fc1'
  np.testing.assert_array_equal(flax[f'{name}.kernel'].T, torch[f'{name}.weight'])
  assert torch[f'{name}.weight'].flags.c_contiguous
  assert flax['model.decoder.embed_positions.embedding'].shape == (7, 4)
  assert len(flax) == len(torch)


def test_counts_of_published_models():
  """260 and 512 Flax leaves, the bias on the logits included."""
  assert len(mapping.leaves(6, 6)) == 260
  assert len(mapping.leaves(12, 12)) == 512


def test_torch_aliases_may_be_there():
  params = _params()
  tensors = mapping.to_hf(params, 11, 'torch')
  tensors |= {name: tensors['model.shared.weight'] for name in mapping.TORCH_ALIASES}
  back = mapping.from_hf(tensors, 'torch')
  assert back['token_embedder']['embedding'].shape == (11, 4)


def test_wrong_tensors_are_named():
  tensors = mapping.to_hf(_params(), 11, 'flax')
  tensors['model.encoder.layers.0.fc3.bias'] = tensors.pop(
    'model.encoder.layers.0.fc2.bias'
  )
  with pytest.raises(ValueError, match=r'Missing 1: .*fc2\.bias.*unexpected 1: .*fc3'):
    mapping.from_hf(tensors, 'flax')


def test_wrong_vocabularies_are_refused():
  params = _params()
  with pytest.raises(ValueError, match='has 16 rows, fewer than the vocabulary: 17'):
    mapping.to_hf(params, 17, 'flax')
  tensors = mapping.to_hf(params, 11, 'flax')
  with pytest.raises(ValueError, match='11 vocabulary rows, more than the 8'):
    mapping.from_hf(tensors, 'flax', padded_vocab_size=8)
