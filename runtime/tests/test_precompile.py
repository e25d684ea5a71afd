"""Planning a run's steps by the command that a user gives."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tiny

from t5x import data, partitioning, planning, precompile

HERE = pathlib.Path(__file__).parent


def plan(*flags):
  """Calls the script with the tiny model; neither data nor devices are there."""
  settings = {
    'MIXTURE_OR_TASK_NAME': "'tiny_copy'",
    'MODEL_DIR': "'/nowhere'",
    'TASK_FEATURE_LENGTHS': "{'inputs': 16, 'targets': 8}",
    'TRAIN_STEPS': 900,
    'USE_CACHED_TASKS': False,
    'BATCH_SIZE': 16,
  }
  path = f'{HERE}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'
  return subprocess.run(
    [
      sys.executable,
      '-m',
      't5x.precompile',
      f'--gin_file={HERE}/tiny.gin',
      '--gin_file=t5x/configs/runs/pretrain.gin',
      *(f'--gin.{name}={value}' for name, value in settings.items()),
      *flags,
    ],
    env={**os.environ, 'PYTHONPATH': path, 'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


@pytest.mark.slow
def test_plan_of_a_training_step(tmp_path):
  done = plan('--topology=cpu:4', f'--json={tmp_path}/plan.json')
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / 'plan.json').read_text())
  # Of tiny.py: two products with 8 x 16 and 16 x 384, forward once and backward twice.
  assert found['useful_flops'] == 3 * 2 * (16 * 8 / 4) * (8 * 16 + 16 * 384)
  assert found['devices'] == 4
  assert found['hours'] == pytest.approx(900 * found['estimate_s'] / 3600)
  assert found['tokens_per_s'] == pytest.approx(16 * 8 / found['estimate_s'])
  assert '900 steps' in done.stdout and 'estimate' in done.stdout


@pytest.mark.slow
def test_plan_of_a_decoding_step(tmp_path):
  done = plan('--topology=cpu:2', '--step=decode', f'--json={tmp_path}/plan.json')
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / 'plan.json').read_text())
  assert found['step'] == 'decode' and found['hours'] is None
  # Its loop ends when the data says so; at the latest after 8 positions.
  assert None in found['loops'].values()
  assert 'counted as 8 trips' in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], '--topology must be one of v2-8'),
    (['--topology=v3-9'], 'cpu:N. Got: v3-9'),
    (['--topology=cpu:2', '--gin.BATCH_SIZE=15'], 'batch of 15 over 2'),
  ],
)
def test_wrong_input_gives_one_message(flags, message):
  done = plan(*flags)
  assert done.returncode == 1
  assert message in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.skipif(not planning.has_compiler(), reason='libtpu is not installed')
def test_plan_of_a_training_step_for_a_tpu(tmp_path):
  done = plan('--topology=v3-8', f'--json={tmp_path}/plan.json')
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / 'plan.json').read_text())
  assert found['hbm_available_gib'] == pytest.approx(15.48)
  assert found['useful_flops'] == 3 * 2 * (16 * 8 / 8) * (8 * 16 + 16 * 384)
  # XLA counts elementwise operations too.
  assert found['useful_flops'] * 0.9 < found['flops'] < found['useful_flops'] * 1.3
  assert 0 < found['roofline_s'] <= found['estimate_s']
  assert found['cycles_s'] > 0 and found['xla_s'] > 0


# ---- T5X's function ----


def make(folder, num_partitions=2, **changes):
  """Calls `precompile`; returns the program before XLA's work on it."""
  precompile.precompile(
    **{
      'model': tiny.make_model(),
      'train_dataset_cfg': tiny.dataset_config('train'),
      'partitioner': partitioning.PjitPartitioner(
        num_partitions=num_partitions,
        logical_axis_rules=partitioning.standard_logical_axis_rules(),
      ),
      'model_dir': str(folder),
      'random_seed': 1,
      **changes,
    }
  )
  return (folder / 'lowered_hlo_pre_optimization').read_text()


def test_arguments_of_precompile_make_the_program(tmp_path):
  checked, asked = [], []

  def get_dataset(*args):
    asked.append(args)
    return data.get_dataset(*args)

  first = make(
    tmp_path / 'first',
    get_dataset_fn=get_dataset,
    verify_matching_vocabs_fn=lambda cfg, model: checked.append(cfg.split),
  )
  assert 'HloModule' in first
  assert 'HloModule' in (
    (tmp_path / 'first' / 'lowered_hlo_post_optimization').read_text()
  )
  assert np.load(tmp_path / 'first' / 'assignment').shape == (4, 2)
  assert checked == ['train']
  assert len(asked) == 1
  # Dropout's key is a constant of the program, and 0 is a seed like others.
  programs = {first, *(make(tmp_path / str(n), random_seed=n) for n in (0, 42))}
  assert len(programs) == 3
  assert make(tmp_path / 'none', random_seed=None) in programs
