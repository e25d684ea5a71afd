"""Plans of a run's steps, and the largest batch, with costs made up."""

import dataclasses
import functools

import pytest
import tiny

from t5x.planning import planner, step_costs, topologies

GIB = topologies.GIB


@pytest.fixture
def arguments(tmp_path):
  return tiny.train_arguments(tmp_path, total_steps=500)


@pytest.fixture
def memory_of_rows(monkeypatch):
  """Steps take a GiB and 0.1 GiB a row; sizes tried are listed."""
  tried = []

  def measure(step, topology):
    rows = step.batch['decoder_target_tokens'].shape[0]
    tried.append((step.kind, rows))
    needed = int((1 + 0.1 * rows) * GIB)
    if needed > topology.chip.hbm_bytes:
      raise step_costs.DoesNotFitError(needed, topology.chip.hbm_bytes)
    return step_costs.StepCosts(
      memory=step_costs.Memory(GIB, 0, needed - GIB, 0),
      flops=1e12,
      useful_flops=1e12,
      bytes_accessed=1e9,
      xla_s=1.0,
      kernel_s=0.0,
      collective_s=0.0,
      roofline_s=1.0,
      cycles_s=None,
      compile_s=0.0,
      loops={},
      longest_loop=1,
      kernels=(),
    )

  monkeypatch.setattr(step_costs, 'measure', measure)
  return tried


def test_the_runs_own_batch(arguments, memory_of_rows, capsys):
  plan = planner.show(arguments, 'cpu:8')
  assert memory_of_rows == [('train', 8)]
  assert (plan.batch_size, plan.steps) == (8, 500)
  assert '8 rows, 64 targets' in capsys.readouterr().out


def test_the_largest_batch(arguments, memory_of_rows):
  plan = planner.Planner(arguments, 'cpu:8').largest()
  # 16 GiB hold 150 rows, and eight devices take multiples of eight.
  assert plan.batch_size == 144
  assert len(memory_of_rows) <= 5


def test_the_screen_says_what_was_found(arguments, memory_of_rows, capsys):
  planner.show(arguments, 'cpu:8', find_batch=True)
  shown = capsys.readouterr().out
  assert 'step                      train, 144 rows' in shown
  last = shown.splitlines()[-1]
  assert 'fits: 144 rows, 18 a device; 152 do not (16.20 GiB).' in last
  assert f'Sizes compiled: {len(memory_of_rows)}.' in last


def test_the_largest_batch_divides_by_its_microbatches(arguments, memory_of_rows):
  cut = functools.partial(arguments['trainer_cls'], num_microbatches=5)
  own = tiny.dataset_config('train', batch_size=40)
  changed = {**arguments, 'trainer_cls': cut, 'train_dataset_cfg': own}
  assert planner.Planner(changed, 'cpu:8').largest().batch_size == 120
  assert all(rows % 40 == 0 for _, rows in memory_of_rows)


def test_nothing_fits(arguments, memory_of_rows, monkeypatch):
  cpu = topologies.find('cpu:8')
  small = dataclasses.replace(cpu, chip=dataclasses.replace(cpu.chip, hbm_bytes=GIB))
  monkeypatch.setattr(topologies, 'find', lambda name: small)
  with pytest.raises(ValueError, match='0.80 GiB too much') as caught:
    planner.show(arguments, 'cpu:8', find_batch=True)
  assert 'What to change' in str(caught.value)


def test_evaluation_takes_its_own_batches(arguments, memory_of_rows):
  planner.Planner(arguments, 'cpu:8', 'eval').plan()
  own = tiny.dataset_config('validation', batch_size=16)
  changed = {**arguments, 'train_eval_dataset_cfg': own}
  planner.Planner(changed, 'cpu:8', 'eval').plan()
  assert memory_of_rows == [('eval', 8), ('eval', 16)]


def test_no_topology():
  with pytest.raises(ValueError, match='--topology=v2-8'):
    with planner.devices_in_force(None):
      pass
