"""Kills training runs at random times, restarts them and checks that nothing is lost.

    python benchmarks/kill_campaign.py --kills 50

Makes a corpus of made-up words and trains a tiny BART on it without interruption. Then
trains it again in another folder, kills it by SIGKILL after a time drawn from the
length of the uninterrupted run, and restarts it until it finishes; further runs follow
until there were enough kills. Each finished run must have the same files as the
uninterrupted one, and bit for bit the same arrays and metrics. Exits with 1 if not.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import jax
import tensorflow as tf

from bart_t5x import checkpoints

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Something happens every few steps: saves, deletions, reports and evaluations.
GIN = """
from __gin__ import dynamic_registration
import __main__ as train_script
import seqio
from t5x import utils

include 'gin/bart_mini_no.gin'
include 'gin/models/tiny.gin'

TRAIN_STEPS = 40
WARMUP_STEPS = 5
BATCH_SIZE = 8
LOSS_NORMALIZING_FACTOR = 512
DROPOUT_RATE = 0.1
train_script.train:
  eval_period = 7
  eval_steps = 2
  stats_period = 3
  run_eval_before_training = False  # It would evaluate again at each restart.
  infer_eval_dataset_cfg = @train_eval/utils.DatasetConfig()
  inference_evaluator_cls = @seqio.Evaluator
utils.SaveCheckpointConfig.period = 4
seqio.Evaluator:
  num_examples = 8
  logger_cls = [@seqio.TensorBoardLogger, @seqio.JSONLogger]
"""


def start(folder: pathlib.Path, *command: str) -> subprocess.Popen:
  """Starts a module on the corpus in `folder`; its output goes to log.txt."""
  paths = {'BART_T5X_DATA': str(folder), 'TMPDIR': str(folder / 'tmp')}
  environment = {**os.environ, **paths, 'JAX_PLATFORMS': 'cpu'}
  command = [sys.executable, '-m', *command]
  with open(folder / 'log.txt', 'a') as log:
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def finish(process: subprocess.Popen, timeout: float | None = None) -> None:
  """Waits for a process; ends the campaign if it failed."""
  if process.wait(timeout) != 0:
    raise SystemExit(f'A script ended with code {process.returncode}. See log.txt.')


def make_corpus(folder: pathlib.Path, draw: random.Random) -> None:
  """Makes the corpus `mini` of 400 documents."""
  words = [''.join(draw.choices('abdefghiklmnoprstuvyæøå', k=6)) for _ in range(400)]
  sentences = [' '.join(draw.choices(words, k=7)).capitalize() for _ in range(2000)]
  texts = ['. '.join(sentences[i : i + 5]) for i in range(0, len(sentences), 5)]
  (folder / 'texts.txt').write_text('\n'.join(texts), encoding='utf-8')
  finish(start(
      folder, 'bart_t5x.prepare', '--source=text', f'--input={folder / "texts.txt"}',
      f'--output_dir={folder / "mini"}', '--vocab_size=512', '--num_workers=1',
      '--min_validation_documents=40',
  ))  # fmt: skip


def contents(run: pathlib.Path) -> dict[str, object]:
  """What must be equal in two runs, each part under a name."""
  found = {}
  for path in run.rglob('*'):
    name = path.relative_to(run).as_posix()
    if 'events.out.tfevents' in name:  # A point may be in several files.
      for event in tf.compat.v1.train.summary_iterator(str(path)):
        for value in event.summary.value:
          key = f'{path.parent.relative_to(run)}: {value.tag}, step {event.step}'
          found[key] = value.tensor.SerializeToString()
    elif '/d/' not in name:  # Orbax's random names.
      found[name] = 'a file or folder'
    if name.endswith('metrics.jsonl'):
      for line in map(json.loads, path.read_text().splitlines()):
        for metric, value in line.pop('values', line).items():
          key = f'{name}: {metric}, {line}'
          # seqio's file has an evaluation twice if it was repeated.
          found[key + ' again' * (key in found and name == 'metrics.jsonl')] = value
    if path.parent == run and name.startswith('checkpoint_'):
      state = checkpoints.read_state(path)
      for leaf, array in jax.tree_util.tree_leaves_with_path(state):
        key = f'{name}: {jax.tree_util.keystr(leaf)}'
        found[key] = array.dtype, array.tobytes()
  changing = ('timing/', 'per_second', ': config')
  return {k: v for k, v in found.items() if not any(part in k for part in changing)}


def main():
  """Runs the campaign."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument('--seed', type=int, default=0, help='of the times of the kills')
  arguments = parser.parse_args()
  draw = random.Random(arguments.seed)
  folder = pathlib.Path(tempfile.mkdtemp(prefix='kill_campaign_'))
  print(f'Runs and log.txt are in {folder}.', flush=True)
  (folder / 'tmp').mkdir()
  (folder / 'run.gin').write_text(GIN)
  make_corpus(folder, draw)

  def train(run):
    flags = f'--gin_file={folder / "run.gin"}', f'--gin.MODEL_DIR={str(run)!r}'
    return start(folder, 't5x.train', *flags)

  begun = time.monotonic()
  finish(train(folder / 'whole'))
  seconds = time.monotonic() - begun
  expected = contents(folder / 'whole')
  print(f'Uninterrupted: {seconds:.0f} s, {len(expected)} values.', flush=True)
  kills, runs, different = 0, 0, 0
  while kills < arguments.kills:
    run = folder / f'run_{runs}'
    runs += 1
    while True:
      process = train(run)
      try:
        finish(process, draw.uniform(0, seconds) if kills < arguments.kills else None)
        break
      except subprocess.TimeoutExpired as timeout:
        process.kill()
        process.wait()
        kills += 1
        print(f'Kill {kills} after {timeout.timeout:.1f} s, {run.name}', flush=True)
    found = contents(run)
    for name in sorted(expected.keys() | found.keys()):
      if expected.get(name) != found.get(name):
        different += 1
        print(f'{run.name}, {"not equal" if name in found else "lost"}: {name}')
  left = os.listdir(folder / 'tmp')
  print(f'{kills} kills in {runs} runs: {different} differences. In TMPDIR: {left}')
  raise SystemExit(bool(different or left))


if __name__ == '__main__':
  main()
