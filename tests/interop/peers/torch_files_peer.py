"""Writes files with torch.save, and reads them with this project's own reader.

Usage: torch_files_peer.py IN.npz OUT.npz. IN holds `root` (of the repository), `folder`
(to write into), `settings` (JSON, fairseq's) and `param:NAME` for every parameter by
its name in PyTorch. OUT gets `FORMAT:NAME` for FORMAT zip, stream and fairseq, and as
JSON the `fields` of the fairseq model and the `error` of a malicious file.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import torch


class Malicious:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (self.path, 'w')


def fairseq_state(settings, state):
  """As fairseq saves it: without the bias on the logits, which its BART lacks."""
  tensors = {
    name.removeprefix('model.'): tensor
    for name, tensor in state.items()
    if name not in ('model.shared.weight', 'final_logits_bias')
  }
  for name in ('encoder.embed_tokens', 'decoder.embed_tokens',
               'decoder.output_projection'):  # fmt: skip
    tensors[f'{name}.weight'] = state['model.shared.weight']
  tensors['encoder.version'] = torch.tensor([3.0])
  return {'args': argparse.Namespace(**settings), 'model': tensors}


def main():
  given = dict(np.load(sys.argv[1]))
  sys.path.insert(0, str(given['root']))
  from bart_t5x.hf import fairseq, torch_files

  folder = pathlib.Path(str(given['folder']))
  state = {
    name.removeprefix('param:'): torch.from_numpy(array)
    for name, array in given.items()
    if name.startswith('param:')
  }
  some = {
    **state,
    'transposed': state['model.shared.weight'].T,
    'tied': state['model.shared.weight'],
    'half': torch.tensor([1.5, -2.0], dtype=torch.float16),
    'brain': torch.nn.Parameter(torch.tensor([[0.5], [3.0]], dtype=torch.bfloat16)),
  }
  answer = {}
  for kind in ('zip', 'stream'):
    file = folder / f'{kind}.bin'
    torch.save(some, file, _use_new_zipfile_serialization=kind == 'zip')
    for name, array in torch_files.read(file).items():
      answer[f'{kind}:{name}'] = array
  settings = json.loads(str(given['settings']))
  torch.save(fairseq_state(settings, state), folder / fairseq.MODEL)
  fields, tensors = fairseq.read(fairseq.find(folder))
  answer |= {f'fairseq:{name}': array for name, array in tensors.items()}
  answer['fields'] = np.array(json.dumps(fields))
  torch.save({'w': Malicious(str(folder / 'trace'))}, folder / 'malicious.bin')
  try:
    torch_files.read(folder / 'malicious.bin')
  except ValueError as e:
    answer['error'] = np.array(json.dumps(str(e)))
  np.savez(sys.argv[2], **answer)


if __name__ == '__main__':
  main()
