"""Answers questions of the tests with Hugging Face's libraries, in their environment.

Usage: peer.py FRAMEWORK ROOT, FRAMEWORK being flax or torch, ROOT the repository. Each
line on stdin names a folder with given.npz: a `question`, the name of a function here,
and its arguments. The answer is answer.npz and a line on stdout: `done`, or a traceback
as JSON.
"""

import argparse
import json
import logging
import os
import pathlib
import sys
import traceback
import warnings

import numpy as np
import transformers

FRAMEWORK, ROOT = sys.argv[1:]
_ENCODER = ('input_ids', 'attention_mask')


def _load(folder):
  """The model, and arguments of its calls."""
  if FRAMEWORK == 'flax':
    # Missing keys are warnings here; the logits show them.
    model, params = transformers.FlaxBartForConditionalGeneration.from_pretrained(
      folder, _do_init=False
    )
    return model, {'params': params}
  model, info = transformers.BartForConditionalGeneration.from_pretrained(
    folder, output_loading_info=True
  )
  assert not info['missing_keys'] and not info['unexpected_keys'], info
  return model, {}


def _tensors(given, names):
  if FRAMEWORK == 'flax':
    return {name: given[name] for name in names}
  import torch

  return {name: torch.from_numpy(given[name]) for name in names}


def logits(given):
  """Logits, encoder states and number of parameters of the model in `folder`."""
  model, weights = _load(str(given['folder']))
  inputs = _tensors(given, (*_ENCODER, 'decoder_input_ids'))
  if FRAMEWORK == 'flax':
    import jax

    output = model(**inputs, **weights)
    size = sum(leaf.size for leaf in jax.tree.leaves(weights))
  else:
    import torch

    with torch.no_grad():
      output = model.eval()(**inputs)
    size = model.num_parameters()
  return {
    'logits': np.asarray(output.logits),
    'encoded': np.asarray(output.encoder_last_hidden_state),
    'num_parameters': size,
  }


class _Records(logging.Handler):
  def __init__(self):
    super().__init__()
    self.messages = []

  def emit(self, record):
    self.messages.append(record.getMessage())


def generate(given):
  """Ids by `generate`, for each dictionary of arguments in `calls`, and warnings."""
  model, _ = _load(str(given['folder']))
  inputs = _tensors(given, _ENCODER)
  answer, records = {}, _Records()
  transformers.logging.set_verbosity_warning()
  logging.getLogger('transformers').addHandler(records)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always', UserWarning)
    for i, settings in enumerate(json.loads(str(given['calls']))):
      answer[str(i)] = np.asarray(model.generate(**inputs, **settings))
  logging.getLogger('transformers').removeHandler(records)
  messages = [*records.messages, *(str(warning.message) for warning in caught)]
  return {**answer, 'warnings': json.dumps(messages)}


def tokenize(given):
  """Ids and decoded `texts` (JSON) by the folder's tokenizer, and special ids."""
  tokenizer_class = getattr(transformers, str(given.get('tokenizer', 'AutoTokenizer')))
  tokenizer = tokenizer_class.from_pretrained(str(given['folder']))
  ids = [tokenizer(text)['input_ids'] for text in json.loads(str(given['texts']))]
  special = ('bos', 'pad', 'eos', 'unk', 'mask')
  return {
    'ids': json.dumps(ids),
    'decoded': json.dumps([tokenizer.decode(row[1:-1]) for row in ids]),
    'special': json.dumps([getattr(tokenizer, f'{s}_token_id') for s in special]),
  }


def fill_mask(given):
  """The most probable token for the mask in `text`, by transformers' pipeline."""
  fill = transformers.pipeline('fill-mask', model=str(given['folder']))
  return {'token': fill(str(given['text']), top_k=1)[0]['token']}


def ctranslate2(given):
  """Ids by CTranslate2's greedy search, for the folder converted by its own tool."""
  import ctranslate2
  from ctranslate2.converters import TransformersConverter

  folder = str(given['folder'])
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  output = TransformersConverter(folder).convert(f'{folder}-ctranslate2')
  translator = ctranslate2.Translator(output, device='cpu', intra_threads=1)
  results = translator.translate_batch(
    [
      tokenizer.convert_ids_to_tokens(row[mask == 1])
      for row, mask in zip(given['input_ids'], given['attention_mask'], strict=True)
    ],
    beam_size=1,
    max_decoding_length=int(given['length']),
    return_end_token=True,
  )
  rows = [tokenizer.convert_tokens_to_ids(r.hypotheses[0]) for r in results]
  return {'ids': json.dumps(rows)}


class _Malicious:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (self.path, 'w')


def torch_files(given):
  """Writes files with torch.save in `folder`, and reads them by `torch_files`.

  Answers `FORMAT:NAME` for FORMAT zip, stream and fairseq, the `fields` of the fairseq
  model with `settings`, and the `error` of a malicious file.
  """
  import torch

  sys.path.insert(0, ROOT)
  from bart_t5x.hf import fairseq
  from bart_t5x.hf import torch_files as ours

  folder = pathlib.Path(str(given['folder']))
  state = {
    name.removeprefix('param:'): torch.from_numpy(array)
    for name, array in given.items()
    if name.startswith('param:')
  }
  table = state['encoder.embed_tokens.weight']
  some = {
    **state,
    'transposed': table.T,
    'tied': table,
    'half': torch.tensor([1.5, -2.0], dtype=torch.float16),
    'brain': torch.nn.Parameter(torch.tensor([[0.5], [3.0]], dtype=torch.bfloat16)),
  }
  answer = {}
  for kind in ('zip', 'stream'):
    file = folder / f'{kind}.bin'
    torch.save(some, file, _use_new_zipfile_serialization=kind == 'zip')
    answer |= {f'{kind}:{name}': array for name, array in ours.read(file).items()}
  settings = argparse.Namespace(**json.loads(str(given['settings'])))
  torch.save({'args': settings, 'model': state}, folder / fairseq.MODEL)
  fields, tensors = fairseq.read(fairseq.find(folder))
  answer |= {f'fairseq:{name}': array for name, array in tensors.items()}
  torch.save({'w': _Malicious(str(folder / 'trace'))}, folder / 'malicious.bin')
  try:
    ours.read(folder / 'malicious.bin')
  except ValueError as e:
    answer['error'] = str(e)
  return {**answer, 'fields': json.dumps(fields)}


def main():
  # Libraries print to stdout too.
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  for line in sys.stdin:
    folder = pathlib.Path(line.strip())
    try:
      given = dict(np.load(folder / 'given.npz'))
      answer = globals()[str(given.pop('question'))](given)
      np.savez(folder / 'answer.npz', **answer)
      outcome = 'done'
    except Exception:
      outcome = json.dumps(traceback.format_exc())
    print(outcome, file=answers, flush=True)


if __name__ == '__main__':
  main()
