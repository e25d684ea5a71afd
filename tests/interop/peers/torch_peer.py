"""Runs PyTorch's BART on given weights and inputs, with transformers 5.

Usage: torch_peer.py IN.npz OUT.npz. IN holds `config` (JSON of a BartConfig),
`param:NAME` for every parameter by its name in PyTorch, without the tied aliases,
and `input_ids`, `attention_mask`, `decoder_input_ids` with Hugging Face's ids. OUT
gets `encoded` and `logits`. With `fairseq` (a path) and `settings` (JSON) the weights
are also saved by `torch.save` as fairseq does it.
"""

import argparse
import json
import sys

import numpy as np
import torch
from transformers import BartConfig, BartForConditionalGeneration

_ALIASES = {
  'model.encoder.embed_tokens.weight',
  'model.decoder.embed_tokens.weight',
  'lm_head.weight',
}


def save_fairseq(path, settings, state):
  """Without the bias on the logits, which fairseq's BART does not have."""
  tensors = {
    name.removeprefix('model.'): tensor
    for name, tensor in state.items()
    if name not in ('model.shared.weight', 'final_logits_bias')
  }
  for name in ('encoder.embed_tokens', 'decoder.embed_tokens'):
    tensors[f'{name}.weight'] = state['model.shared.weight']
  tensors['decoder.output_projection.weight'] = state['model.shared.weight']
  tensors['encoder.version'] = torch.tensor([3.0])
  torch.save({'args': argparse.Namespace(**settings), 'model': tensors}, path)


def main():
  given = dict(np.load(sys.argv[1]))
  config = BartConfig(**json.loads(str(given['config'])))
  model = BartForConditionalGeneration(config).eval()
  state = {
    name.removeprefix('param:'): torch.from_numpy(array)
    for name, array in given.items()
    if name.startswith('param:')
  }
  if 'fairseq' in given:
    settings = json.loads(str(given['settings']))
    save_fairseq(str(given['fairseq']), settings, state)
  report = model.load_state_dict(state, strict=False)
  wrong = set(report.missing_keys) - _ALIASES, set(report.unexpected_keys)
  if any(wrong):
    raise ValueError(f'Missing and unexpected: {wrong}')
  model.tie_weights()
  inputs = {
    name: torch.from_numpy(given[name])
    for name in ('input_ids', 'attention_mask', 'decoder_input_ids')
  }
  with torch.no_grad():
    output = model(**inputs)
  np.savez(
    sys.argv[2],
    encoded=output.encoder_last_hidden_state.numpy(),
    logits=output.logits.numpy(),
  )


if __name__ == '__main__':
  main()
