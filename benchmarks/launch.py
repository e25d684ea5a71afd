"""Time of a run to its first step, and from its last write to its end.

    python benchmarks/launch.py
    export UPSTREAM_T5X=/path/to/t5x UPSTREAM_PYTHON=/path/to/python  # with upstream

Starts `python -m t5x.train` several times, on a model of 9,344 parameters for 40 steps.
With UPSTREAM_T5X it alternates with google-research/t5x, both on UPSTREAM_PYTHON. The
model itself records when its first step runs. Prints medians and extremes.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
RUNTIME = HERE.parent / 'runtime'
OURS = str(RUNTIME / 'src')
# Names that T5X imports and PyPI does not have.
STAND_INS = str(RUNTIME / 'tests' / 'upstream_stand_ins')
PYTHON = os.environ.get('UPSTREAM_PYTHON', sys.executable)

GIN = """
from __gin__ import dynamic_registration
from t5x import models
from t5x import optimizers
from t5x import utils
import launch_task

include 't5x/configs/runs/pretrain.gin'

MODEL = @models.EncoderDecoderModel()
models.EncoderDecoderModel:
  module = @launch_task.Network()
  input_vocabulary = @launch_task.vocabulary()
  output_vocabulary = @launch_task.vocabulary()
  optimizer_def = @optimizers.adamw()
optimizers.adamw.learning_rate = 0.01
MIXTURE_OR_TASK_NAME = 'launch_copy'
TASK_FEATURE_LENGTHS = {{'inputs': 16, 'targets': 8}}
TRAIN_STEPS = 40
BATCH_SIZE = 8
USE_CACHED_TASKS = False
MODEL_DIR = '{folder}'
"""

# (row of the table, key, format)
ROWS = (
  ('launch to the first step, s', 'first_step', '{:.1f}'),
  ('the same in CPU seconds', 'cpu_to_first_step', '{:.1f}'),
  ('last write to the end of the program, s', 'exit', '{:.2f}'),
  ('launch to the end, s', 'total', '{:.1f}'),
  ('the same in CPU seconds', 'cpu', '{:.1f}'),
  ('lines on the screen', 'lines', '{:.0f}'),
)
# Modules that a user imports without wanting to train.
IMPORTED = ('optimizers', 'losses', 'models')


def environment(runtime: str, **more: str) -> dict[str, str]:
  """The environment that makes a folder's `t5x` the one that runs."""
  paths = [runtime, str(HERE), *([] if runtime == OURS else [STAND_INS])]
  return {
    **os.environ,
    'PYTHONPATH': os.pathsep.join(paths),
    'JAX_PLATFORMS': 'cpu',
    **more,
  }


def last_write(folder: pathlib.Path) -> float:
  """The newest time of change under a folder, seconds since 1970."""
  return max(path.stat().st_mtime for path in (folder, *folder.rglob('*')))


def train(runtime: str) -> dict[str, float]:
  """Runs 40 steps in a folder of their own; returns what was measured."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name) / 'run'
    gin_file = pathlib.Path(name) / 'launch.gin'
    gin_file.write_text(GIN.format(folder=folder))
    steps, log = pathlib.Path(name) / 'steps', pathlib.Path(name) / 'log'
    command = [PYTHON, '-m', 't5x.train', f'--gin_file={gin_file}']
    command += [f'--gin_search_paths={runtime},{runtime}/t5x/configs']
    with open(log, 'w') as output:
      begun = time.time()
      process = subprocess.Popen(
        command,
        env=environment(runtime, LAUNCH_STEPS_FILE=str(steps)),
        cwd=name,
        stdout=output,
        stderr=subprocess.STDOUT,
      )
      _, status, usage = os.wait4(process.pid, 0)
      ended = time.time()
    if status:
      raise SystemExit(log.read_text())
    at, cpu = map(float, steps.read_text().splitlines()[0].split())
    return {
      'first_step': at - begun,
      'cpu_to_first_step': cpu,
      'cpu': usage.ru_utime + usage.ru_stime,
      'exit': ended - last_write(folder),
      'total': ended - begun,
      'lines': log.read_text().count('\n'),
    }


def import_seconds(runtime: str, module: str) -> tuple[float, bool]:
  """Imports a module in a new Python: (CPU seconds, whether TensorFlow came along)."""
  code = (
    f'import sys, time, t5x.{module}\n'
    "print(time.process_time(), 'tensorflow' in sys.modules)"
  )
  out = subprocess.run(
    [PYTHON, '-c', code],
    env=environment(runtime),
    capture_output=True,
    text=True,
    check=True,
  ).stdout.split()
  return float(out[-2]), out[-1] == 'True'


def main():
  """Measures and prints two tables."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--runs', type=int, default=3, help='of each, after a first')
  arguments = parser.parse_args()
  runtimes = {'ours': OURS}
  if 'UPSTREAM_T5X' in os.environ:
    runtimes['upstream'] = os.path.abspath(os.environ['UPSTREAM_T5X'])

  measured = {name: [] for name in runtimes}
  for turn in range(arguments.runs + 1):
    for name, runtime in runtimes.items():
      figures = train(runtime)
      if turn:  # The first fills the disk cache.
        measured[name].append(figures)
  header = ['', *runtimes, *(['upstream / ours'] if len(runtimes) > 1 else [])]
  print('|' + '|'.join(f' {cell} ' for cell in header) + '|')
  print('|' + ' --- |' * len(header))
  for title, key, form in ROWS:
    cells, medians = [title], []
    for figures in measured.values():
      values = sorted(run[key] for run in figures)
      medians.append(statistics.median(values))
      low, mid, high = (form.format(x) for x in (values[0], medians[-1], values[-1]))
      cells.append(f'{mid} ({low}–{high})')
    if len(medians) > 1:
      cells.append(f'{medians[1] / medians[0]:.1f}')
    print('| ' + ' | '.join(cells) + ' |')

  print('\n| CPU seconds to import | ' + ' | '.join(runtimes) + ' |')
  print('|' + ' --- |' * (len(runtimes) + 1))
  for module in IMPORTED:
    cells = [f'`t5x.{module}`']
    for runtime in runtimes.values():
      seconds, tensorflow = import_seconds(runtime, module)
      cells.append(f'{seconds:.1f}' + (', with TensorFlow' if tensorflow else ''))
    print('| ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
  main()
