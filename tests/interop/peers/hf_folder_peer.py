"""Loads an exported folder as any user would, with the transformers at hand.

Usage: hf_folder_peer.py IN.npz OUT.npz. IN holds `folder`, `framework` ('flax' or
'torch'), `input_ids`, `attention_mask`, `decoder_input_ids`, `texts` (JSON list) and
`max_length` (0: nothing is generated). OUT gets `logits`, `greedy`, `beams` (4, no
length penalty), and as JSON `ids` and `decoded` (of the texts), `special` (ids by
name) and `problems` (keys missing or unexpected).
"""

import json
import sys

import numpy as np
import transformers

_INPUTS = ('input_ids', 'attention_mask', 'decoder_input_ids')


def run_flax(folder, given, settings):
  # Missing and unexpected keys are warnings here; the logits show them.
  model = transformers.FlaxBartForConditionalGeneration.from_pretrained(folder)
  logits = model(**{name: given[name] for name in _INPUTS}).logits

  def generate(**more):
    encoder = {name: given[name] for name in _INPUTS[:2]}
    return model.generate(**encoder, **settings, **more).sequences

  return logits, generate, {}


def run_torch(folder, given, settings):
  import torch

  model, info = transformers.BartForConditionalGeneration.from_pretrained(
    folder, output_loading_info=True
  )
  model.eval()
  tensors = {name: torch.from_numpy(given[name]) for name in _INPUTS}
  with torch.no_grad():
    logits = model(**tensors).logits.numpy()

  def generate(**more):
    encoder = {name: tensors[name] for name in _INPUTS[:2]}
    return model.generate(**encoder, **settings, **more).numpy()

  return logits, generate, info


def main():
  given = dict(np.load(sys.argv[1]))
  folder = str(given['folder'])
  run = run_flax if str(given['framework']) == 'flax' else run_torch
  settings = {'max_length': int(given['max_length']), 'do_sample': False}
  logits, generate, info = run(folder, given, settings)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  ids = [tokenizer(text)['input_ids'] for text in json.loads(str(given['texts']))]
  decoded = [tokenizer.decode(row[1:-1]) for row in ids]
  generated = {}
  if settings['max_length']:
    generated['greedy'] = generate(num_beams=1)
    generated['beams'] = generate(num_beams=4, length_penalty=0.0)
  special = ('bos', 'pad', 'eos', 'unk', 'mask')
  np.savez(
    sys.argv[2],
    logits=logits,
    **generated,
    ids=json.dumps(ids),
    decoded=json.dumps(decoded),
    special=json.dumps([getattr(tokenizer, f'{s}_token_id') for s in special]),
    problems=json.dumps(
      [*info.get('missing_keys', ()), *info.get('unexpected_keys', ())]
    ),
  )


if __name__ == '__main__':
  main()
