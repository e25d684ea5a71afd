"""Compiles a step and says what it would take on its devices. Every figure an estimate.

The time of a step is accounted as

- XLA's own estimate of the program (`optimal_seconds`: for each instruction the larger
  of computing and moving), in which the bodies of loops count once, times what counting
  them in full adds;
- a roofline of each kernel that XLA cannot see into (`jaxpr_costs.Kernel`);
- a roofline of the traffic between devices, as if nothing else went on meanwhile.
"""

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from t5x.planning import abstract_steps, hlo_costs, hlo_text, jaxpr_costs, live_arrays
from t5x.planning.topologies import GIB, Chip, Topology


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device while a step runs.

  Attributes:
    arguments: the state and the batch.
    outputs: results that do not take the place of arguments.
    temporaries: what is kept in between.
    code: the program.
  """

  arguments: int
  outputs: int
  temporaries: int
  code: int

  @property
  def total(self) -> int:
    """All of it."""
    return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class StepCosts:
  """What a step takes, on one device unless said otherwise.

  Attributes:
    memory: bytes.
    flops: operations of matrix products, recomputation and padding included.
    useful_flops: those of the model's forward pass, three times if it is trained.
    bytes_accessed: bytes to and from HBM.
    xla_s: seconds by XLA's estimate, loops in full, kernels and traffic left out.
    kernel_s: seconds of kernels by roofline.
    collective_s: seconds of traffic between devices by roofline.
    roofline_s: seconds if all computing or all moving were the only limit.
    cycles_s: seconds by the cycles that the compiler notes at each instruction, with
      kernels and traffic; a more cautious figure than the estimate. None for CPUs.
    compile_s: seconds that compiling took here.
    loops: trips of each loop; None where they depend on data.
    longest_loop: what such loops count for.
    kernels: (kernel, seconds of its calls on a device, what limits it).
  """

  memory: Memory
  flops: float
  useful_flops: float
  bytes_accessed: float
  xla_s: float
  kernel_s: float
  collective_s: float
  roofline_s: float
  cycles_s: float | None
  compile_s: float
  loops: Mapping[str, int | None]
  longest_loop: int
  kernels: Sequence[tuple[jaxpr_costs.Kernel, float, str]]

  @property
  def estimate_s(self) -> float:
    """Seconds of a step by the account above."""
    return self.xla_s + self.kernel_s + self.collective_s


class DoesNotFitError(ValueError):
  """A program needs more memory than a device has.

  Attributes:
    needed: bytes, at least; infinite if the compiler does not say.
    available: bytes.
    held: arrays that are there at the same time, by falling size.
  """

  def __init__(
    self,
    needed: float,
    available: float,
    held: Sequence[live_arrays.LargeArray] = (),
  ):
    message = f'A device has {available / GIB:.2f} GiB, which is not enough.'
    if math.isfinite(needed):
      message = (
        f'The step needs {needed / GIB:.2f} GiB a device or more, and '
        f'{available / GIB:.2f} GiB are there: '
        f'{(needed - available) / GIB:.2f} GiB too much.'
      )
    super().__init__(message)
    self.needed, self.available, self.held = needed, available, held


def _parse_size(text: str) -> float:
  """'31.52G' as bytes."""
  units = {'': 1, 'B': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
  number, unit = re.match(r'([\d.]+)\s*([KMGTB]?)', text).groups()
  return float(number) * units[unit]


def read_refusal(message: str) -> tuple[float, float] | None:
  """(bytes needed, bytes there) by the compiler's message, None if it says neither."""
  for pattern in (
    r'Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm',
    r'\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)',
  ):
    found = re.search(pattern, message)
    if found:
      needed, available = map(_parse_size, found.groups())
      return needed, available
  return None


def measure(step: abstract_steps.AbstractStep, topology: Topology) -> StepCosts:
  """Compiles a step for a topology and accounts for it.

  Args:
    step: partitioned over the topology's devices.
    topology: which.

  Raises:
    DoesNotFitError: it needs more memory than there is.
  """
  available = topology.chip.hbm_bytes
  begun = time.perf_counter()
  traced = step.trace()

  def refuse(needed: float) -> DoesNotFitError:
    held = live_arrays.fullest_moment(traced.jaxpr.jaxpr, step.bytes_on_device)
    return DoesNotFitError(needed, available, held)

  try:
    compiled = traced.lower().compile()
  except Exception as error:
    # JAX has a class of its own for it, which is not public.
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    needed, available = read_refusal(str(error)) or (math.inf, available)
    raise refuse(needed) from error
  seconds = time.perf_counter() - begun
  memory = _memory(compiled.memory_analysis())
  if memory.total > available:
    raise refuse(memory.total)
  account = hlo_costs.account(hlo_text.parse(compiled.as_text()), step.longest_loop)
  kernels = jaxpr_costs.kernels(traced.jaxpr)
  return _costs(step, topology, compiled, memory, account, kernels, seconds)


def _memory(analysis: Any) -> Memory:
  return Memory(
    arguments=analysis.argument_size_in_bytes,
    outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    temporaries=analysis.temp_size_in_bytes,
    code=analysis.generated_code_size_in_bytes,
  )


def _costs(step, topology, compiled, memory, account, kernels, seconds) -> StepCosts:
  chip, devices = topology.chip, topology.devices
  timed = [(k, *_kernel_seconds(k, chip, devices)) for k in kernels]
  kernel_s = sum(taken for _, taken, _ in timed)
  collective_s = sum(
    item.times * _traffic(item) / chip.link_bandwidth
    for item in account.items
    if item.is_collective
  )
  visible = [i for i in account.items if not (i.is_kernel or i.is_collective)]
  flops = account.total('flops') + sum(k.calls * k.flops for k in kernels) / devices
  moved = sum(i.times * i.bytes for i in visible)
  moved += sum(k.calls * k.bytes for k in kernels) / devices
  cycles = sum(i.times * i.cycles for i in visible)
  return StepCosts(
    memory=memory,
    flops=flops,
    useful_flops=useful_flops(step) / devices,
    bytes_accessed=moved,
    xla_s=_xla_seconds(compiled, account, visible, chip),
    kernel_s=kernel_s,
    collective_s=collective_s,
    roofline_s=max(flops / chip.flops, moved / chip.hbm_bandwidth),
    cycles_s=cycles / chip.clock + kernel_s + collective_s if cycles else None,
    compile_s=seconds,
    loops=account.loops,
    longest_loop=step.longest_loop,
    kernels=timed,
  )


def _xla_seconds(compiled, account, visible, chip) -> float:
  """XLA's estimate without kernels, loops in full.

  What a kernel claims for itself is in XLA's figure, and is taken out. The rest is
  scaled by what loops add to the rooflines of the instructions.
  """
  once, full = (
    sum(
      (bool(item.times) if count_once else item.times)
      * _roofline(item.flops, item.bytes, chip)
      for item in visible
    )
    for count_once in (True, False)
  )
  optimal = (compiled.cost_analysis() or {}).get('optimal_seconds', 0.0)
  if optimal <= 0 or not once:
    # On CPUs XLA has no estimate: the rooflines stand for it.
    return full
  claimed = sum(
    _roofline(*item.noted_cost(), chip) for item in account.items if item.is_kernel
  )
  return max(optimal - claimed, 0.0) * full / once


def _roofline(flops: float, moved: float, chip: Chip) -> float:
  return max(flops / chip.flops, moved / chip.hbm_bandwidth)


def useful_flops(step: abstract_steps.AbstractStep) -> float:
  """Operations that the step is for, on all devices together.

  Those of the matrix products in the model's forward pass, as traced, times the passes
  that the step is worth: recomputation, padding and the optimizer do not count. For
  decoding, whose passes the compiled loop makes, 0: not known.
  """
  if step.forward is None:
    return 0.0
  function, arguments = step.forward
  return step.passes * jaxpr_costs.matmul_flops(function, *arguments)


def _kernel_seconds(
  kernel: jaxpr_costs.Kernel, chip: Chip, devices: int
) -> tuple[float, str]:
  """Seconds of a kernel's calls on one device, and what limits them."""
  limits = {
    'matrix units': kernel.flops / chip.flops,
    'vector units': kernel.vector_operations / chip.vector_operations,
    'memory': kernel.bytes / chip.hbm_bandwidth,
  }
  limit = max(limits, key=limits.get)
  return kernel.calls * limits[limit] / devices, limit


def _traffic(item: hlo_costs.Item) -> float:
  """Bytes that a device sends: a ring passes all on twice for a sum, once otherwise."""
  size = sum(shape.bytes for shape in item.instruction.shapes)
  return 2 * size if item.instruction.opcode.startswith('all-reduce') else size
