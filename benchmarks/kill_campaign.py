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

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import jax  # noqa: E402 - after the variables that it reads.
import tensorflow as tf  # noqa: E402

from bart_t5x import checkpoints  # noqa: E402

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
  infer_eval_dataset_cfg = @infer_eval/utils.DatasetConfig()
  inference_evaluator_cls = @seqio.Evaluator
utils.SaveCheckpointConfig.period = 4
seqio.Evaluator.num_examples = 8
infer_eval/utils.DatasetConfig:
  mixture_or_task_name = %MIXTURE_OR_TASK_NAME
  task_feature_lengths = %TASK_FEATURE_LENGTHS
  split = 'validation'
  batch_size = 8
  shuffle = False
  seed = 42
"""


def start(folder: pathlib.Path, module: str, *args: str) -> subprocess.Popen:
  """Starts a script on the corpus in `folder`; its output goes to log.txt."""
  environment = {
    **os.environ,
    'BART_T5X_DATA': str(folder),
    'TMPDIR': str(folder / 'tmp'),
  }
  with open(folder / 'log.txt', 'a') as log:
    return subprocess.Popen(
      [sys.executable, '-m', module, *args],
      cwd=ROOT,
      env=environment,
      stdout=log,
      stderr=log,
    )


def train(folder: pathlib.Path, run: pathlib.Path) -> subprocess.Popen:
  """Starts or resumes a run."""
  flags = (f'--gin_file={folder / "run.gin"}', f'--gin.MODEL_DIR={str(run)!r}')
  return start(folder, 't5x.train', *flags)


def check_finished(folder: pathlib.Path, code: int) -> None:
  """Ends the campaign if a script failed."""
  if code != 0:
    raise SystemExit(f'A script ended with code {code}. See {folder / "log.txt"}.')


def make_corpus(folder: pathlib.Path, draw: random.Random) -> None:
  """Makes the corpus `mini` of 400 documents."""
  words = [''.join(draw.choices('abdefghiklmnoprstuvyæøå', k=6)) for _ in range(400)]
  texts = [
    ' '.join(' '.join(draw.choices(words, k=7)).capitalize() + '.' for _ in range(5))
    for _ in range(400)
  ]
  (folder / 'texts.txt').write_text('\n'.join(texts), encoding='utf-8')
  process = start(
      folder, 'bart_t5x.prepare', '--source=text', f'--input={folder / "texts.txt"}',
      f'--output_dir={folder / "mini"}', '--vocab_size=512', '--num_workers=1',
      '--min_validation_documents=40',
  )  # fmt: skip
  check_finished(folder, process.wait())


def contents(run: pathlib.Path) -> dict[str, object]:
  """What must be equal in two runs, each part under a name."""
  found = {}
  for path in run.rglob('*'):
    name = path.relative_to(run).as_posix()
    if 'events.out.tfevents' in name:
      for event in tf.compat.v1.train.summary_iterator(str(path)):
        for value in event.summary.value:
          found[f'{name.rpartition("/")[0]}: {value.tag}, step {event.step}'] = (
            value.tensor.SerializeToString()
          )
      continue
    if '/d/' not in name:  # Orbax gives its files random names.
      found[name] = 'exists'
    if name.endswith('-metrics.jsonl') or name == 'metrics.jsonl':
      for line in map(json.loads, path.read_text().splitlines()):
        for metric, value in line.get('values', line).items():
          found[f'{name}: {metric}, step {line["step"]}, {line.get("source")}'] = value
    if name.startswith('checkpoint_') and '/' not in name:
      for leaf, array in jax.tree_util.tree_leaves_with_path(
        checkpoints.read_state(path)
      ):
        found[f'{name}: {jax.tree_util.keystr(leaf)}'] = (array.dtype, array.tobytes())
  timings = ('timing/', 'per_second', 'config')
  return {k: v for k, v in found.items() if not any(t in k for t in timings)}


def main():
  """Runs the campaign."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument('--seed', type=int, default=0, help='of the times of the kills')
  arguments = parser.parse_args()
  draw = random.Random(arguments.seed)
  folder = pathlib.Path(tempfile.mkdtemp(prefix='kill_campaign_'))
  print(f'Runs are in {folder}.')
  (folder / 'tmp').mkdir()
  (folder / 'run.gin').write_text(GIN)
  make_corpus(folder, draw)
  begun = time.monotonic()
  check_finished(folder, train(folder, folder / 'whole').wait())
  seconds = time.monotonic() - begun
  expected = contents(folder / 'whole')
  print(f'Uninterrupted: {seconds:.0f} s, {len(expected)} values to compare.')

  kills, runs, different = 0, 0, 0
  while kills < arguments.kills:
    run = folder / f'run_{runs}'
    runs += 1
    while True:
      process = train(folder, run)
      try:
        delay = draw.uniform(0, seconds) if kills < arguments.kills else None
        check_finished(folder, process.wait(delay))
        break
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        kills += 1
        saved = sorted(path.name for path in run.glob('checkpoint_*'))
        print(f'Kill {kills} in {run.name} after {delay:.1f} s: {saved}', flush=True)
    found = contents(run)
    for name in sorted(expected.keys() | found.keys()):
      if expected.get(name) != found.get(name):
        different += 1
        problem = 'lost' if name not in found else 'not as expected'
        print(f'{run.name}, {problem}: {name}')
  left = os.listdir(folder / 'tmp')
  print(f'{kills} kills in {runs} runs: {different} differences. In TMPDIR: {left}')
  raise SystemExit(1 if different or left else 0)


if __name__ == '__main__':
  main()
