"""What a planned step costs, as a table for the screen and as a file of numbers."""

import dataclasses
import json
import math
import os
from typing import Any

from etils import epath

from t5x.planning.step_costs import StepCosts
from t5x.planning.topologies import GIB, Topology


@dataclasses.dataclass(frozen=True)
class Plan:
  """A step that fits, and the run it belongs to.

  Attributes:
    name: of the topology.
    topology: it.
    kind: train, eval or decode.
    batch_size: rows over all devices.
    target_tokens: target slots of a batch.
    steps: of the run; None where there is no run of such steps.
    costs: of one step.
  """

  name: str
  topology: Topology
  kind: str
  batch_size: int
  target_tokens: int
  steps: int | None
  costs: StepCosts

  @property
  def mfu(self) -> float | None:
    """Share of the devices' peak that useful operations take, by the estimate."""
    costs = self.costs
    if not costs.useful_flops:
      return None
    return costs.useful_flops / (costs.estimate_s * self.topology.chip.flops)

  @property
  def tokens_per_s(self) -> float:
    """Target slots a second, over all devices."""
    return self.target_tokens / self.costs.estimate_s

  @property
  def hours(self) -> float | None:
    """Hours of all steps; evaluations and saving come on top."""
    return None if self.steps is None else self.steps * self.costs.estimate_s / 3600

  @property
  def bound(self) -> str:
    """What limits the roofline: 'compute' or 'memory'."""
    costs, chip = self.costs, self.topology.chip
    computing = costs.flops / chip.flops
    return (
      'compute' if computing >= costs.bytes_accessed / chip.hbm_bandwidth else 'memory'
    )


def as_numbers(plan: Plan) -> dict[str, Any]:
  """What `--json` writes; sizes in GiB, times in seconds, a device if not said."""
  costs, memory = plan.costs, plan.costs.memory
  return {
    'topology': plan.name,
    'devices': plan.topology.devices,
    'step': plan.kind,
    'batch_size': plan.batch_size,
    'hbm_gib': memory.total / GIB,
    'hbm_available_gib': plan.topology.chip.hbm_bytes / GIB,
    'hbm_arguments_gib': memory.arguments / GIB,
    'hbm_temporaries_gib': (memory.temporaries + memory.outputs) / GIB,
    'hbm_code_gib': memory.code / GIB,
    'flops': costs.flops,
    'useful_flops': costs.useful_flops,
    'bytes_accessed': costs.bytes_accessed,
    'estimate_s': costs.estimate_s,
    'xla_s': costs.xla_s,
    'kernel_s': costs.kernel_s,
    'collective_s': costs.collective_s,
    'roofline_s': costs.roofline_s,
    'cycles_s': costs.cycles_s,
    'bound': plan.bound,
    'mfu': plan.mfu,
    'tokens_per_s': plan.tokens_per_s,
    'hours': plan.hours,
    'compile_s': costs.compile_s,
    'loops': dict(costs.loops),
    'kernels': [
      {
        'name': kernel.name,
        'calls': kernel.calls // plan.topology.devices,
        'seconds': taken,
        'bound': limit,
      }
      for kernel, taken, limit in costs.kernels
    ],
  }


def write_json(plan: Plan, path: str | os.PathLike[str]) -> None:
  """Writes `as_numbers` to a file."""
  epath.Path(path).write_text(json.dumps(as_numbers(plan), indent=2) + '\n')


def size_text(number: float) -> str:
  """A number of bytes for the screen."""
  return (
    f'{number / GIB:.2f} GiB' if number >= GIB / 10 else f'{number / 2**20:.1f} MiB'
  )


def _seconds(value: float | None) -> str:
  if value is None:
    return 'not known'
  return f'{value:.4g} s' if value >= 1e-6 or not value else 'less than a microsecond'


def table(plan: Plan) -> str:
  """The plan for the screen."""
  costs, memory, chip = plan.costs, plan.costs.memory, plan.topology.chip
  rows = [
    ('topology', f'{plan.name}: {plan.topology.devices} x {chip.kind}'),
    ('step', f'{plan.kind}, {plan.batch_size} rows, {plan.target_tokens} targets'),
    ('HBM a device', f'{size_text(memory.total)} of {size_text(chip.hbm_bytes)}'),
    ('  arguments', size_text(memory.arguments)),
    ('  temporaries', size_text(memory.temporaries + memory.outputs)),
    ('  code', size_text(memory.code)),
    ('FLOPs a device', f'{costs.flops / 1e12:.4g} T'),
    ('  of them useful', f'{costs.useful_flops / 1e12:.4g} T' if plan.mfu else '-'),
    ('bytes moved a device', f'{costs.bytes_accessed / 1e9:.4g} GB'),
    ('time of a step, estimate', _seconds(costs.estimate_s)),
    ("  XLA's estimate", f'{_seconds(costs.xla_s)}, loops in full'),
    ('  kernels, by roofline', _seconds(costs.kernel_s)),
    ('  between devices', f'{_seconds(costs.collective_s)}, nothing overlapped'),
    ("by the compiler's cycles", _seconds(costs.cycles_s)),
    (
      'by roofline of the whole',
      f'{_seconds(costs.roofline_s)}, bound by {plan.bound}',
    ),
    ('MFU, estimate', f'{plan.mfu:.1%}' if plan.mfu else '-'),
    ('target tokens a second', f'{plan.tokens_per_s:,.0f}, estimate'),
  ]
  if plan.hours is not None:
    rows.append((f'{plan.steps:,} steps', f'{plan.hours:.2f} hours, estimate'))
  rows.append(('compiled in', f'{costs.compile_s:.0f} s'))
  lines = [f'{name:<26}{value}' for name, value in rows]
  lines += [
    f'Kernel {kernel.name}: {kernel.calls // plan.topology.devices} calls, '
    f'{taken:.4g} s, bound by {limit}.'
    for kernel, taken, limit in costs.kernels
  ]
  unknown = [name for name, trips in costs.loops.items() if trips is None]
  if unknown:
    lines.append(
      f'Loops whose length depends on data: {", ".join(unknown)}; counted as '
      f'{costs.longest_loop} trips, the most there can be.'
    )
  if plan.topology.shape is None:
    lines.append('On CPUs speeds and memory are placeholders: compare, do not believe.')
  lines.append(
    'Nothing was run: every figure but the time of compiling is an estimate.'
  )
  return '\n'.join(lines)


def found_batch(tried: dict[int, float], available: float, parts: int) -> str:
  """What the search for a batch found.

  Args:
    tried: bytes needed by batch size, at least one of which fits.
    available: bytes there are.
    parts: what the batch is split into.
  """
  best = max(size for size, needed in tried.items() if needed <= available)
  more = min((size for size in tried if size > best), default=None)
  text = f'The largest batch found that fits: {best} rows, {best // parts} a device'
  if more is not None:
    text += f'; {more} do not'
    if math.isfinite(tried[more]):
      text += f' ({size_text(tried[more])})'
  return (
    f'{text}. Sizes compiled: {len(tried)}. What follows from the batch has to '
    'follow: the number of steps, and constants like LOSS_NORMALIZING_FACTOR.'
  )


def next_batch(tried: dict[int, float], available: float, unit: int) -> int | None:
  """The batch size to try next, on the way to the largest that fits.

  Memory grows about linearly with the batch: the line through the two sizes nearest to
  the limit is followed, and sizes known to fit and not to fit close in on it.

  Args:
    tried: bytes needed by batch size; infinite where the compiler did not say.
    available: bytes there are.
    unit: batch sizes are its multiples.

  Returns:
    A multiple of `unit`, or None: the answer is known to a unit or to 3 %.
  """
  fits = [size for size, needed in tried.items() if needed <= available]
  fails = [size for size, needed in tried.items() if needed > available]
  low, high = max(fits, default=0), min(fails, default=None)
  if high is not None and (high - low <= unit or low >= 0.97 * high):
    return None
  known = sorted((s, n) for s, n in tried.items() if math.isfinite(n))
  guess = 2 * low if high is None else (low + high) / 2
  if len(known) >= 2:
    nearest = sorted(sorted(known, key=lambda p: abs(p[1] - available))[:2])
    (left, below), (right, above) = nearest
    if above > below:
      guess = left + (available - below) * (right - left) / (above - below)
  units = int(guess // unit)
  least, most = low // unit + 1, math.inf if high is None else high // unit - 1
  return int(min(max(units, least), most)) * unit
