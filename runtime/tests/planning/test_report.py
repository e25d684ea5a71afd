"""Plans as tables and numbers, and the search for a batch."""

import json
import math

import pytest

from t5x.planning import jaxpr_costs, report, step_costs, topologies

GIB = topologies.GIB


@pytest.fixture
def plan():
  costs = step_costs.StepCosts(
    memory=step_costs.Memory(2 * GIB, 0, 5 * GIB, GIB // 2),
    flops=30e12,
    useful_flops=24.64e12,
    bytes_accessed=45e9,
    xla_s=0.5,
    kernel_s=0.25,
    collective_s=0.05,
    roofline_s=0.487,
    cycles_s=0.9,
    compile_s=12.0,
    loops={'while.1': 16, 'while.2': None},
    longest_loop=3,
    kernels=[(jaxpr_costs.Kernel('flash', 96, 1e12, 1e12, 1e9), 0.25, 'memory')],
  )
  topology = topologies.find('v3-8')
  return report.Plan('v3-8', topology, 'train', 256, 262144, 9000, costs)


def test_numbers(plan, tmp_path):
  path = tmp_path / 'plan.json'
  report.write_json(plan, path)
  found = json.loads(path.read_text())
  assert found['hbm_gib'] == 7.5
  assert found['hbm_available_gib'] == pytest.approx(15.48)
  assert found['estimate_s'] == pytest.approx(0.8)
  assert found['mfu'] == pytest.approx(24.64 / 0.8 / 61.6)
  assert found['tokens_per_s'] == pytest.approx(262144 / 0.8)
  assert found['hours'] == pytest.approx(9000 * 0.8 / 3600)
  assert found['bound'] == 'compute'
  assert found['kernels'] == [
    {'name': 'flash', 'calls': 12, 'seconds': 0.25, 'bound': 'memory'}
  ]
  named = {
    'flops', 'useful_flops', 'bytes_accessed', 'xla_s', 'roofline_s', 'compile_s'
  }  # fmt: skip
  assert named <= set(found)


def test_the_table_calls_estimates_so(plan):
  text = report.table(plan)
  for part in ('7.50 GiB of 15.48 GiB', '0.8 s', '50.0%', '2.00 hours, estimate'):
    assert part in text, text
  assert 'Kernel flash: 12 calls, 0.25 s, bound by memory.' in text
  assert 'while.2; counted as 3 trips' in text
  assert text.splitlines()[-1].endswith('but the time of compiling is an estimate.')


@pytest.mark.parametrize(
  ('per_row', 'fixed', 'available', 'start', 'unit'),
  [
    (30, 100, 1000, 8, 8),
    (30, 100, 1000, 800, 8),
    (1, 5, 10_000, 8, 8),
    (100, 950, 1000, 8, 8),
    (7, 0, 5000, 64, 1),
  ],
)
@pytest.mark.parametrize('told', [False, True])
def test_the_search_ends_at_the_largest_batch(
  per_row, fixed, available, start, unit, told
):
  def needed(size):
    # Above its line at large sizes, as padding makes programs.
    total = fixed + per_row * size + (size > 40) * 13
    return total if total <= available or told else math.inf

  tried, size = {}, start
  while size is not None:
    assert size % unit == 0 and size > 0 and size not in tried
    tried[size] = needed(size)
    size = report.next_batch(tried, available, unit)
  fits = [s for s, n in tried.items() if n <= available]
  sizes = range(unit, 20_000, unit)
  largest = max((s for s in sizes if needed(s) <= available), default=0)
  assert max(fits, default=0) >= 0.97 * largest - unit
  assert len(tried) <= 12


def test_a_search_whose_end_is_not_known():
  assert 'fits: 64 rows, 8 a device. Sizes compiled: 1.' in report.found_batch(
    {64: 5}, 9, 8
  )
  text = report.found_batch({64: 5, 72: math.inf}, 9, 8)
  assert 'a device; 72 do not. Sizes compiled: 2.' in text
