"""Runs PyTorch's BART on given weights and inputs, with transformers 5.

Usage: torch_peer.py IN.npz OUT.npz. IN holds `config` (JSON of a BartConfig),
`param:NAME` for every parameter by its name in PyTorch, without the tied aliases,
and `input_ids`, `attention_mask`, `decoder_input_ids` with Hugging Face's ids. OUT
gets `encoded` and `logits`.
"""

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


def main():
  given = dict(np.load(sys.argv[1]))
  config = BartConfig(**json.loads(str(given['config'])))
  model = BartForConditionalGeneration(config).eval()
  state = {
    name.removeprefix('param:'): torch.from_numpy(array)
    for name, array in given.items()
    if name.startswith('param:')
  }
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
