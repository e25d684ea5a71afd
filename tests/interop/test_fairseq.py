"""fairseq's file, written by PyTorch itself, gives the logits of the same weights."""

import dataclasses
import json

import numpy as np
import pytest

from bart_t5x import network
from bart_t5x.hf import import_model

pytestmark = pytest.mark.torch_peer

# As fairseq's `bart_base` calls what Case.config has.
SETTINGS = {
    'arch': 'bart_base', 'encoder_embed_dim': 24, 'encoder_ffn_embed_dim': 40,
    'encoder_layers': 2, 'decoder_layers': 3, 'encoder_attention_heads': 3,
    'max_source_positions': 20, 'max_target_positions': 20, 'dropout': 0.1,
    'attention_dropout': 0.1, 'activation_fn': 'gelu', 'share_all_embeddings': True,
    'layernorm_embedding': True, 'no_scale_embedding': True,
}  # fmt: skip


def test_logits_of_an_imported_fairseq_model(torch_peer, make_case, tmp_path):
  case = make_case(seed=8)
  case.params['final_logits_bias'][:] = 0
  folder = tmp_path / 'fairseq'
  folder.mkdir()
  answer = torch_peer(
    {
      **case.for_peer('torch'),
      'fairseq': np.array(str(folder / 'model.pt')),
      'settings': np.array(json.dumps(SETTINGS)),
    }
  )
  source = import_model.read_source(folder)
  config = network.BartConfig(**source.fields)
  imported = dataclasses.replace(
    case, config=config, params=import_model.to_params(source, config)
  )
  np.testing.assert_allclose(
    case.hf_columns(imported.logits()), answer['logits'], rtol=0, atol=2e-5
  )
