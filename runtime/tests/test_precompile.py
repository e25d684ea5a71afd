"""The precompile script, and T5X's function of that name."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tiny

from t5x import partitioning, precompile

HERE = pathlib.Path(__file__).parent


def plan(*flags):
  """Runs the script with the tiny model."""
  settings = {
    'MIXTURE_OR_TASK_NAME': "'tiny_copy'",
    'MODEL_DIR': "'/nowhere'",
    'TASK_FEATURE_LENGTHS': "{'inputs': 16, 'targets': 8}",
    'TRAIN_STEPS': 900,
    'USE_CACHED_TASKS': False,
    'BATCH_SIZE': 16,
  }
  path = f'{HERE}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'
  # The topology decides, not the eight devices of all tests.
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
    env={**os.environ, 'PYTHONPATH': path},
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
  # The model has two products, by 8 x 16 and 16 x 384: forward once, backward twice.
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
  # Its loop ends when all rows have ended, at the latest after 8 positions.
  assert found['longest_loop'] == 8


@pytest.mark.slow
@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--topology=v3-9'], 'Got: v3-9'),
    (['--topology=cpu:2', '--gin.BATCH_SIZE=15'], 'batch of 15 over 2'),
  ],
)
def test_wrong_input_is_one_message(flags, message):
  done = plan(*flags)
  assert done.returncode == 1
  assert message in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='needs libtpu')
def test_plan_of_a_training_step_for_a_tpu(tmp_path):
  done = plan('--topology=v3-8', f'--json={tmp_path}/plan.json')
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / 'plan.json').read_text())
  assert found['hbm_available_gib'] == pytest.approx(15.48)
  assert found['useful_flops'] == 3 * 2 * (16 * 8 / 8) * (8 * 16 + 16 * 384)
  # XLA also counts elementwise operations, which are two fifths of this small model's.
  assert found['useful_flops'] * 0.9 < found['flops'] < found['useful_flops'] * 1.8
  assert found['cycles_s'] > 0 and found['xla_s'] > 0


# ---- T5X's function ----


def make(folder, num_partitions=2, **changes):
  """Calls `precompile`; returns the program before optimization."""
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


def test_precompile_writes_the_program(tmp_path):
  checked = []
  first = make(
    tmp_path / 'first',
    verify_matching_vocabs_fn=lambda cfg, model: checked.append(cfg.split),
  )
  assert 'HloModule' in first
  assert 'HloModule' in (
    (tmp_path / 'first' / 'lowered_hlo_post_optimization').read_text()
  )
  assert np.load(tmp_path / 'first' / 'assignment').shape == (4, 2)
  assert checked == ['train']
  # Dropout's key is a constant of the program, and 0 is a seed like any other.
  programs = {first, *(make(tmp_path / str(n), random_seed=n) for n in (0, 42))}
  assert len(programs) == 3
  assert make(tmp_path / 'none', random_seed=None) in programs
