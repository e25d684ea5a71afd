"""Runs model and tokenizer of an exported folder, loaded with from_pretrained.

Usage: hf_folder_peer.py IN.npz OUT.npz. IN holds `folder`, `framework` ('flax' or
'torch'), `input_ids`, `attention_mask` and `texts` (JSON list). With
`decoder_input_ids`, OUT gets `logits`; with `max_length`, it gets `greedy` and `beams`
(4, no length penalty). It always gets, as JSON, `ids` and `decoded` (of the texts),
`special` (ids of special tokens) and `problems` (keys missing or unexpected).
"""

import json
import sys

import numpy as np
import transformers

_ENCODER = ('input_ids', 'attention_mask')


def load_flax(folder, given):
  # Missing and unexpected keys are warnings here; the logits show them.
  model = transformers.FlaxBartForConditionalGeneration.from_pretrained(folder)
  encoder = {name: given[name] for name in _ENCODER}

  def forward(tokens):
    return model(**encoder, decoder_input_ids=tokens).logits

  def generate(**settings):
    return model.generate(**encoder, **settings).sequences

  return forward, generate, {}


def load_torch(folder, given):
  import torch

  model, info = transformers.BartForConditionalGeneration.from_pretrained(
    folder, output_loading_info=True
  )
  model.eval()
  encoder = {name: torch.from_numpy(given[name]) for name in _ENCODER}

  def forward(tokens):
    with torch.no_grad():
      output = model(**encoder, decoder_input_ids=torch.from_numpy(tokens))
    return output.logits.numpy()

  def generate(**settings):
    return model.generate(**encoder, **settings).numpy()

  return forward, generate, info


def main():
  given = dict(np.load(sys.argv[1]))
  folder = str(given['folder'])
  load = load_flax if str(given['framework']) == 'flax' else load_torch
  forward, generate, info = load(folder, given)
  answer = {}
  if 'decoder_input_ids' in given:
    answer['logits'] = forward(given['decoder_input_ids'])
  if 'max_length' in given:
    settings = {'max_length': int(given['max_length']), 'do_sample': False}
    answer['greedy'] = generate(num_beams=1, **settings)
    answer['beams'] = generate(num_beams=4, length_penalty=0.0, **settings)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  ids = [tokenizer(text)['input_ids'] for text in json.loads(str(given['texts']))]
  decoded = [tokenizer.decode(row[1:-1]) for row in ids]
  special = ('bos', 'pad', 'eos', 'unk', 'mask')
  np.savez(
    sys.argv[2],
    **answer,
    ids=json.dumps(ids),
    decoded=json.dumps(decoded),
    special=json.dumps([getattr(tokenizer, f'{s}_token_id') for s in special]),
    problems=json.dumps(
      [*info.get('missing_keys', ()), *info.get('unexpected_keys', ())]
    ),
  )


if __name__ == '__main__':
  main()
