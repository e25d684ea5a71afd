"""Seconds per decoded batch, of this model and of BART in Flax and PyTorch.

    export FLAX_PEER_PYTHON=.venv-flax-peer/bin/python
    export TORCH_PEER_PYTHON=.venv-torch-peer/bin/python
    OMP_WAIT_POLICY=PASSIVE python benchmarks/decode.py

The others are those of transformers. All have random weights of the size of
`train_step.py` and decode 8 rows of 128 tokens to 64 tokens, with no end token,
greedily and with 4 beams. They run in separate processes that take turns. Prints
medians, also of the first call, which compiles, and of CPU seconds, on which other
processes have less effect.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np
import train_step
from train_step import ROWS, VOCABULARY

INPUTS, OUTPUTS = 128, 64


def _ours(beams):
  """Returns a function that decodes the tokens [rows, inputs]."""
  import functools

  import jax

  from t5x import decoding

  greedy = functools.partial(decoding.temperature_sample, temperature=0.0)
  bart = train_step.our_bart(
    {'max_positions': INPUTS},
    decode_fn=greedy if beams == 1 else decoding.beam_search,
  )
  shapes = {
    'encoder_input_tokens': (ROWS, INPUTS),
    'decoder_input_tokens': (ROWS, OUTPUTS),
  }
  params = bart.get_initial_variables(jax.random.key(0), shapes)['params']

  @jax.jit
  def run(params, inputs):
    batch = {
      'encoder_input_tokens': inputs,
      'decoder_input_tokens': np.zeros((ROWS, OUTPUTS), np.int32),
    }
    # An end token that is never predicted.
    options = {'eos_id': -1}
    return bart.predict_batch_with_aux(
      params, batch, decoder_params=options, num_decodes=beams
    )[0]

  return functools.partial(run, params)


def _peer_config():
  return train_step.peer_config(
    max_position_embeddings=INPUTS, forced_eos_token_id=None, eos_token_id=VOCABULARY
  )


def _flax(beams):
  import jax
  import transformers

  bart = transformers.FlaxBartForConditionalGeneration(_peer_config())

  @jax.jit
  def run(params, inputs):
    return bart.generate(
      inputs,
      attention_mask=np.ones((ROWS, INPUTS), np.int32),
      params=params,
      max_length=OUTPUTS + 1,
      num_beams=beams,
      early_stopping=False,
    ).sequences

  return lambda inputs: run(bart.params, inputs)


def _torch(beams):
  import torch
  import transformers

  bart = transformers.BartForConditionalGeneration(_peer_config()).eval()

  def run(inputs):
    tokens = torch.from_numpy(inputs).long()
    return bart.generate(
      tokens,
      attention_mask=torch.ones_like(tokens),
      max_new_tokens=OUTPUTS,
      num_beams=beams,
    )

  return run


def _measure(implementation, beams, calls):
  """Decodes and prints one line of JSON: seconds and CPU seconds of each call."""
  run = {'ours': _ours, 'flax': _flax, 'torch': _torch}[implementation](beams)
  inputs = np.random.default_rng(0).integers(4, VOCABULARY, (ROWS, INPUTS), np.int32)
  walls, cpus = [], []
  for _ in range(calls + 1):
    before = time.perf_counter(), sum(os.times()[:2])
    shape = np.asarray(run(inputs)).shape
    walls.append(time.perf_counter() - before[0])
    cpus.append(sum(os.times()[:2]) - before[1])
  assert shape[-1] in (OUTPUTS, OUTPUTS + 1), shape
  print(json.dumps({'seconds': walls, 'cpu_seconds': cpus}))


def _in_turns(pythons, beams, calls, rounds):
  """Returns {implementation: (first call, later calls, their CPU seconds)}."""
  found = {name: ([], [], []) for name in pythons}
  for _ in range(rounds):
    for name, python in pythons.items():
      command = [python, __file__, f'--run={name}', f'--beams={beams}']
      output = subprocess.run(
        [*command, f'--calls={calls}'], stdout=subprocess.PIPE, check=True
      )
      times = json.loads(output.stdout.splitlines()[-1])
      firsts, walls, cpus = found[name]
      firsts.append(times['seconds'][0])
      walls.extend(times['seconds'][1:])
      cpus.extend(times['cpu_seconds'][1:])
  return {name: tuple(map(np.median, times)) for name, times in found.items()}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--run', choices=('ours', 'flax', 'torch'), help='run only this, in this process'
  )
  parser.add_argument('--beams', type=int, help='default: 1 and 4')
  parser.add_argument('--calls', type=int, default=5, help='after the first')
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  if args.run:
    _measure(args.run, args.beams, args.calls)
    return
  pythons = {'ours': sys.executable}
  for name in ('flax', 'torch'):
    if python := os.environ.get(f'{name.upper()}_PEER_PYTHON'):
      pythons[name] = python
  print('| beams | | s per batch | CPU s per batch | first call, s | s / ours |')
  print('|---|---|---|---|---|---|')
  for beams in [args.beams] if args.beams else [1, 4]:
    found = _in_turns(pythons, beams, args.calls, args.rounds)
    for name, (first, wall, cpu) in found.items():
      ratio = wall / found['ours'][1]
      figures = f'{wall:.2f} | {cpu:.2f} | {first:.1f} | {ratio:.2f}'
      print(f'| {beams} | {name} | {figures} |', flush=True)


if __name__ == '__main__':
  main()
