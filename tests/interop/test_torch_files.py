"""Files that PyTorch wrote, read in an environment with PyTorch."""

import json

import numpy as np
import pytest

from bart_t5x import network
from bart_t5x.hf import mapping

pytestmark = pytest.mark.torch_peer

# As fairseq's `bart_base` names the fields of Case.config.
SETTINGS = {
    'arch': 'bart_base', 'encoder_embed_dim': 24, 'encoder_ffn_embed_dim': 40,
    'encoder_layers': 2, 'decoder_layers': 3, 'encoder_attention_heads': 3,
    'max_source_positions': 20, 'max_target_positions': 20, 'dropout': 0.1,
    'attention_dropout': 0.1, 'activation_fn': 'gelu', 'share_all_embeddings': True,
    'layernorm_embedding': True, 'no_scale_embedding': True,
}  # fmt: skip


def test_weights_and_settings(ask_peer, make_case, tmp_path):
  case = make_case(seed=8)
  hf = mapping.to_hf(case.params, case.config, 'torch')
  table = hf.pop('model.shared.weight')
  del hf['final_logits_bias']
  tensors = {name.removeprefix('model.'): tensor for name, tensor in hf.items()}
  tensors |= {f'{side}.embed_tokens.weight': table for side in ('encoder', 'decoder')}
  answer = ask_peer(
    'torch',
    'torch_files',
    folder=str(tmp_path),
    settings=json.dumps(SETTINGS),
    **{f'param:{name}': tensor for name, tensor in tensors.items()},
  )
  some = {
    **tensors,
    'transposed': table.T,
    'tied': table,
    'half': np.array([1.5, -2], np.float16),
    'brain': np.array([[0.5], [3]], np.float32),
  }
  for kind, expected in (('zip', some), ('stream', some), ('fairseq', tensors)):
    for name, tensor in expected.items():
      found = answer.pop(f'{kind}:{name}')
      assert found.dtype == tensor.dtype
      np.testing.assert_array_equal(found, tensor, err_msg=f'{kind}:{name}')
  config = network.BartConfig(**json.loads(str(answer.pop('fields'))))
  for name in ('vocab_size', 'emb_dim', 'num_heads', 'num_decoder_layers', 'mlp_dim'):
    assert getattr(config, name) == getattr(case.config, name)
  # Code in a file is not executed.
  assert 'malicious.bin' in str(answer.pop('error'))
  assert not (tmp_path / 'trace').exists() and not answer
