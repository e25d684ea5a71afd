"""Names and layouts of parameters."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from random_params import random_params

from bart_t5x import network, tokenization
from bart_t5x.hf import mapping

CONFIG = network.BartConfig(
    vocab_size=11, emb_dim=4, num_heads=2, num_encoder_layers=2, num_decoder_layers=12,
    mlp_dim=6, max_positions=5, vocab_multiple_of=8,
)  # fmt: skip
SHAPES = (
  {},
  {'emb_dim': 10, 'num_heads': 5, 'num_encoder_layers': 11, 'max_positions': 1030},
)


def params_of(config=CONFIG):
  return random_params(config, np.random.default_rng(0))


def assert_same(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize('framework', ['flax', 'torch'])
@pytest.mark.parametrize('scan_layers', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_round_trip_is_bit_exact(framework, scan_layers, shape):
  config = dataclasses.replace(CONFIG, scan_layers=scan_layers, **shape)
  params = params_of(config)
  tensors = mapping.to_hf(params, config, framework)
  back = mapping.from_hf(tensors, config, framework)
  # The five rows of padding come back as zeros.
  params['token_embedder']['embedding'][11:] = 0
  params['final_logits_bias'][11:] = 0
  assert_same(back, params)
  assert_same(mapping.to_hf(back, config, framework), tensors)


def test_pad_and_bos_are_swapped():
  params = params_of()
  table = params['token_embedder']['embedding']
  tensors = mapping.to_hf(params, CONFIG, 'torch')
  exported = tensors['model.shared.weight']
  # Rows move as the tokenizer's ids do.
  ids = tokenization.to_hf_ids(np.arange(11))
  np.testing.assert_array_equal(exported[ids], table[:11])
  np.testing.assert_array_equal(exported[0], table[1])  # <s>
  np.testing.assert_array_equal(exported[1], table[0])  # padding
  assert tensors['final_logits_bias'].shape == (1, 11)
  assert tensors['final_logits_bias'][0, 1] == params['final_logits_bias'][0]


def test_names_and_layouts_of_both_frameworks():
  params = params_of()
  flax, torch = (mapping.to_hf(params, CONFIG, name) for name in ('flax', 'torch'))
  name = 'model.encoder.layers.1.fc1'
  np.testing.assert_array_equal(flax[f'{name}.kernel'].T, torch[f'{name}.weight'])
  assert torch[f'{name}.weight'].flags.c_contiguous
  assert flax['model.decoder.embed_positions.embedding'].shape == (7, 4)
  np.testing.assert_array_equal(
    torch['model.decoder.layers.10.encoder_attn.q_proj.bias'],
    flatten_dict(params)['decoder', 'layers_10', 'encoder_decoder_attention', 'query',
                         'bias'],
  )  # fmt: skip


def test_wrong_tensors_are_named():
  tensors = mapping.to_hf(params_of(), CONFIG, 'flax')
  tensors['model.encoder.layers.0.fc3.bias'] = tensors.pop(
    'model.encoder.layers.0.fc2.bias'
  )
  with pytest.raises(ValueError, match=r'Missing 1: .*fc2\.bias.*unexpected 1: .*fc3'):
    mapping.from_hf(tensors, CONFIG, 'flax')


def test_parameters_of_another_network_are_rejected():
  params = params_of()
  del params['decoder']['layers_0']['mlp']['wo']
  for changes, message in (
    ({'mlp_dim': 7}, r'mlp_dim = 7, the weights 6'),
    ({'emb_dim': 8}, r'emb_dim = 8, the weights 4'),
    ({'num_decoder_layers': 13}, 'num_decoder_layers = 13, the weights 12'),
    ({}, 'Missing 2: .*decoder/layers_0/mlp/wo'),
  ):
    with pytest.raises(ValueError, match=message):
      mapping.to_hf(params, dataclasses.replace(CONFIG, **changes), 'flax')
