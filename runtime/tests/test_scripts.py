"""The scripts from the command line: results, kills and errors."""

import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from event_files import read_events

from t5x import checkpoints, train

pytestmark = pytest.mark.slow

HERE = pathlib.Path(__file__).parent
READING = {
  'TASK_FEATURE_LENGTHS': '{"inputs": 16, "targets": 8}',
  'USE_CACHED_TASKS': False,
  'BATCH_SIZE': 8,
}


def command(script, run_file, **macros):
  """Returns the command line of a script with the tiny model."""
  return [
    sys.executable,
    '-m',
    f't5x.{script}',
    f'--gin_file={HERE}/tiny.gin',
    f'--gin_file=t5x/configs/runs/{run_file}.gin',
    "--gin.MIXTURE_OR_TASK_NAME='tiny_noised'",
    *(f'--gin.{name}={value}' for name, value in macros.items()),
  ]


def train_command(model_dir, steps=40, run_file='pretrain', **macros):
  settings = {
    'MODEL_DIR': repr(str(model_dir)),
    'TRAIN_STEPS': steps,
    **READING,
    'RANDOM_SEED': 0,
    'train/utils.DatasetConfig.seed': 0,
    'utils.SaveCheckpointConfig.save_dataset': True,
    'utils.SaveCheckpointConfig.period': 20,
    'train.eval_steps': 2,
    'train.stats_period': 10,
    'train.eval_period': 20,
    **macros,
  }
  return command('train', run_file, **settings)


def environment(devices=1):
  flag = f'--xla_force_host_platform_device_count={devices}'
  return {
    **os.environ,
    'PYTHONPATH': str(HERE),
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} {flag}',  # The last one counts.
  }


def start(args, devices=1):
  return subprocess.Popen(
    args,
    env=environment(devices),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    # A shell that runs the tests in the background ignores it.
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
  )


def call(args, devices=1, code=0):
  """Runs a command; returns the lines of its output."""
  process = start(args, devices)
  out, _ = process.communicate(timeout=300)
  assert process.returncode == code, out
  return out.splitlines()


def read_until(process, pattern):
  lines = []
  for line in process.stdout:
    lines.append(line)
    if re.search(pattern, line):
      return
  raise AssertionError(f'No line with {pattern!r}:\n{"".join(lines)}')


def losses(lines):
  return [
    float(match[1])
    for line in lines
    if (match := re.search(r'step \d+ of .*\| loss ([\d.]+)', line))
  ]


def final_state(model_dir, steps=40):
  """Restores the state of a finished run."""
  step, state = train.train(
    **tiny.train_arguments(model_dir, task='tiny_noised', total_steps=steps)
  )
  assert step == steps
  return state.state_dict()


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """An uninterrupted run of 40 steps: (folder, lines of its log)."""
  folder = tmp_path_factory.mktemp('whole')
  return folder, call(train_command(folder))


def test_train(whole):
  folder, lines = whole
  assert re.search(r't5x\.train from .*/t5x/__init__\.py', lines[0])
  assert len(lines) <= 90, '\n'.join(lines)
  assert len(losses(lines)) == 4
  assert sum('tiny_noised: step' in line for line in lines) == 2
  assert lines[-1].endswith('Finished at step 40.')
  assert not [line for line in lines if 'WARNING' in line]
  assert checkpoints.all_steps(str(folder)) == [0, 20, 40]
  config = (folder / 'config.gin').read_text()
  assert 'TRAIN_STEPS = 40' in config and 'tiny_noised' in config
  events = read_events(folder / 'train')
  for tag in ('weight_gradient_norm', 'timing/target_tokens_per_second'):
    assert [step for step, name, _ in events if name == tag] == [10, 20, 30, 40]
  (recorded,) = [value for _, tag, value in events if tag == 'config']
  assert 'TRAIN_STEPS = 40' in recorded.decode()


def test_infer(whole, tmp_path):
  settings = {
    'CHECKPOINT_PATH': repr(str(whole[0] / 'checkpoint_40')),
    'INFER_OUTPUT_DIR': repr(str(tmp_path)),
    'TASK_FEATURE_LENGTHS': READING['TASK_FEATURE_LENGTHS'],
    'infer.mode': repr('score'),
    'infer.num_shards': 2,
    'utils.DatasetConfig.batch_size': 4,
  }
  call([*command('infer', 'infer', **settings), '--shard_id=1'])
  name = 'tiny_noised-score.jsonl-00001-of-00002'
  assert len((tmp_path / name).read_text().splitlines()) == tiny.TEST_EXAMPLES // 2
  assert (tmp_path / f'{name}.COMPLETED').exists()


def test_main_runs_a_script_unless_it_is_a_dry_run(tmp_path):
  args = train_command(tmp_path / 'run', steps=2)
  args[2] = 't5x.main'
  lines = call([*args, '--run_mode=train', '--dry_run'])
  assert 'configuration is valid' in lines[-1]
  assert not (tmp_path / 'run').exists()
  lines = call([*args, '--run_mode=train'])
  assert lines[-1].endswith('Finished at step 2.')


def test_precompile(tmp_path):
  settings = {
    'MODEL_DIR': repr(str(tmp_path)),
    **READING,
    'partitioning.PjitPartitioner.backend': None,
  }
  args = command('main', 'precompile', **settings)
  call([*args, '--run_mode=precompile'], devices=4)
  assert 'HloModule' in (tmp_path / 'lowered_hlo_post_optimization').read_text()
  assert np.load(tmp_path / 'assignment').size == 4


def test_wrong_input_is_one_message(tmp_path):
  process = subprocess.run(
    train_command(tmp_path, TRAIN_STPES=5),
    env=environment(),
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert process.returncode == 1
  assert process.stderr.count('ERROR: ') == 1 and 'Traceback' not in process.stderr
  assert "'TRAIN_STEPS'" in process.stderr[process.stderr.index('ERROR: ') :]


def test_a_killed_run_resumes_bit_for_bit(whole, tmp_path):
  # Saves at every step, so that most kills interrupt a save.
  often = {'utils.SaveCheckpointConfig.period': 1, 'utils.SaveCheckpointConfig.keep': 3}
  delays = random.Random(0)
  for number in (signal.SIGKILL, signal.SIGINT):
    process = start(train_command(tmp_path, steps=40, **often))
    read_until(process, 'Starting at step|Resuming from')
    time.sleep(delays.uniform(0, 6))
    if number == signal.SIGINT:
      process.send_signal(number)  # Stops after a step...
      time.sleep(0.1)
    process.send_signal(number)  # ...or at once.
    assert process.wait() in (-number, 128 + number, 0)
  call(train_command(tmp_path, steps=40, **often))
  jax.tree.map(
    np.testing.assert_array_equal, final_state(tmp_path), final_state(whole[0])
  )


def call_together(args):
  """Runs two processes of four devices as one run; returns both outputs."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{probe.getsockname()[1]}'
  args = [*args, f'--coordinator_address={address}', '--process_count=2']
  processes = [start([*args, f'--process_index={i}'], devices=4) for i in range(2)]
  outputs = [process.communicate(timeout=400)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  return outputs


def test_two_processes_train_evaluate_save_and_resume_as_one(tmp_path):
  settings = {
    'run_file': 'finetune',
    'INITIAL_CHECKPOINT_PATH': '[]',
    'MIXTURE_OR_TASK_NAME': '"tiny_copy"',
    'DROPOUT_RATE': 0.0,
    'train.eval_period': 5,
    'utils.SaveCheckpointConfig.period': 5,
    # Rows are examples, in order: any number of processes reads the same batches.
    'train/utils.DatasetConfig.pack': False,
    'train/utils.DatasetConfig.shuffle': False,
  }
  alone = call(train_command(tmp_path / 'alone', steps=10, **settings), devices=8)
  call_together(train_command(tmp_path / 'two', steps=5, **settings))
  first, second = call_together(train_command(tmp_path / 'two', steps=10, **settings))
  assert 'Resuming from' in first
  assert '[0/2]' in first and '[1/2]' in second
  assert losses(second.splitlines()) == []

  def losses_by_step(folder):
    return {
      step: value
      for step, tag, value in read_events(tmp_path / folder / 'train')
      if tag == 'loss_per_nonpadding_target_token'
    }

  assert len(losses(first.splitlines())) == 1 and len(losses(alone)) == 2
  one, two = losses_by_step('alone'), losses_by_step('two')
  assert one.keys() == two.keys() == {5, 10}
  np.testing.assert_allclose(list(two.values()), list(one.values()), atol=1e-5)

  def params(folder):
    saved = tmp_path / folder / 'checkpoint_10' / 'state'
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata(saved).item_metadata.tree
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return reader.restore(saved, args=ocp.args.PyTreeRestore(tree, args))['target']

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    params('two'),
    params('alone'),
  )
  metrics = tmp_path / 'two' / 'inference_eval' / 'tiny_copy-metrics.jsonl'
  assert '"step": 10' in metrics.read_text()
