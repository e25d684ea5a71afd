"""What an optimised XLA program does in one run, every loop counted in full.

XLA's own cost analysis counts the body of a loop once. Here the program's text is
walked: operations of matrix products, bytes to and from HBM, the cycles that the TPU's
compiler notes at each instruction, and what it cannot see into: kernels (Pallas) and
traffic between devices.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from t5x.planning import hlo_loops
from t5x.planning.hlo_text import Computation, Instruction, Module, Shape

# Instructions that move nothing and compute nothing.
_FREE = frozenset({
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all',
  'partition-id', 'replica-id', 'copy-done', 'async-done', 'async-update', 'iota',
  'optimization-barrier', 'domain', 'opt-barrier',
})  # fmt: skip

COLLECTIVES = frozenset({
  'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute',
  'all-reduce-start', 'all-gather-start', 'collective-permute-start',
  'ragged-all-to-all', 'collective-broadcast',
})  # fmt: skip

_KERNEL = 'tpu_custom_call'


@dataclasses.dataclass(frozen=True)
class Item:
  """An instruction that costs something.

  Attributes:
    instruction: it.
    times: how often it runs.
    flops: operations of its matrix products, once.
    bytes: to and from HBM, once.
    cycles: the compiler's note, once; 0 where it made none.
  """

  instruction: Instruction
  times: int
  flops: float
  bytes: float
  cycles: float

  @property
  def is_collective(self) -> bool:
    """Whether devices talk to each other in it."""
    return self.instruction.opcode in COLLECTIVES

  @property
  def is_kernel(self) -> bool:
    """Whether the compiler cannot see into it."""
    return (
      self.instruction.opcode == 'custom-call'
      and f'custom_call_target="{_KERNEL}"' in self.instruction.text
    )

  def noted_cost(self) -> tuple[float, float]:
    """(operations, bytes) that a kernel claims for itself, which XLA counts."""
    noted = self.instruction.config.get('custom_call_config', {}).get('cost_estimate')
    noted = noted or {}
    return float(noted.get('flops', 0)), float(noted.get('bytes_accessed', 0))


@dataclasses.dataclass(frozen=True)
class Account:
  """The costs of a program.

  Attributes:
    items: what it runs.
    loops: trips of each loop by name; None where the program does not tell.
  """

  items: Sequence[Item]
  loops: Mapping[str, int | None]

  def total(self, quantity: str, once: bool = False) -> float:
    """The sum of 'flops', 'bytes' or 'cycles'.

    Args:
      quantity: which.
      once: whether loops count as one trip, as in XLA's cost analysis.
    """
    return float(
      sum(
        getattr(item, quantity) * (bool(item.times) if once else item.times)
        for item in self.items
      )
    )


def account(module: Module, unknown_trips: int = 1) -> Account:
  """Walks a program from its entry.

  Args:
    module: it.
    unknown_trips: what loops of unknown length count for.
  """
  walk = _Walk(module, unknown_trips, {})
  return Account(list(walk.through(module.entry, 1)), walk.loops)


@dataclasses.dataclass(frozen=True)
class _Walk:
  """A walk over a program."""

  module: Module
  unknown_trips: int
  loops: dict[str, int | None]

  def through(self, computation: Computation, times: int) -> Iterator[Item]:
    """What a computation runs, when it is run `times` times."""
    for instruction in computation.instructions.values():
      yield from self._items(computation, instruction, times)

  def _items(
    self, computation: Computation, instruction: Instruction, times: int
  ) -> Iterator[Item]:
    module, opcode = self.module, instruction.opcode
    if opcode == 'while':
      trips = hlo_loops.trip_count(module, computation, instruction)
      self.loops[instruction.name] = trips
      body = module.computations[instruction.called('body')]
      yield from self.through(
        body, times * (self.unknown_trips if trips is None else trips)
      )
    elif opcode in ('call', 'async-start'):
      called = instruction.called('to_apply') or instruction.called('calls')
      yield from self.through(module.computations[called], times)
    elif opcode == 'conditional':
      branches = [
        list(self.through(branch, times)) for branch in _branches(module, instruction)
      ]
      yield from max(branches, key=lambda items: sum(i.bytes for i in items))
    elif not _is_free(instruction):
      yield Item(
        instruction,
        times,
        _flops(module, computation, instruction),
        _bytes(module, computation, instruction),
        float(instruction.config.get('window_config', {}).get('estimated_cycles', 0)),
      )


def _is_free(instruction: Instruction) -> bool:
  return (
    instruction.opcode in _FREE
    or instruction.opcode.endswith('-done')
    or 'custom_call_target="AllocateBuffer"' in instruction.text
  )


def _branches(module: Module, instruction: Instruction) -> list[Computation]:
  listed = re.search(r'branch_computations=\{([^}]*)\}', instruction.text)
  names = (
    [name.strip().lstrip('%') for name in listed.group(1).split(',')]
    if listed
    else [instruction.called(f'{side}_computation') for side in ('true', 'false')]
  )
  return [module.computations[name] for name in names]


# ---- matrix products -----------------------------------------------------------


def _flops(module: Module, computation: Computation, instruction: Instruction) -> float:
  """Operations of the matrix products in an instruction."""
  if instruction.opcode == 'fusion':
    inner = module.computations[instruction.called('calls')]
    return sum(_flops(module, inner, i) for i in inner.instructions.values())
  if instruction.opcode == 'dot':
    return _dot_flops(computation, instruction)
  if instruction.opcode == 'convolution':
    return _convolution_flops(computation, instruction)
  return 0.0


def _operand(computation: Computation, instruction: Instruction, index: int) -> Shape:
  return computation.instructions[instruction.operands[index]].shapes[0]


def _dot_flops(computation: Computation, instruction: Instruction) -> float:
  left = _operand(computation, instruction, 0)
  contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.text)
  depth = 1
  for axis in contracted.group(1).split(',') if contracted else ():
    depth *= left.dims[int(axis)] if axis else 1
  return 2.0 * instruction.shapes[0].elements * depth


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
  """Two operations for each product of an element that is not padding.

  The TPU's compiler writes every matrix product as a convolution, batched ones over
  windows that are mostly padding.
  """
  left, right = (_operand(computation, instruction, i) for i in (0, 1))
  labels = re.match(r'(\w+)_(\w+)->(\w+)', instruction.attribute('dim_labels'))
  left_axes, right_axes, out_axes = labels.groups()
  output = instruction.shapes[0]
  window = _window(instruction, sum(axis.isdigit() for axis in left_axes))
  valid = 1
  for place, numbers in enumerate(window):
    axis = str(place)
    valid *= _valid_products(
      left.dims[left_axes.index(axis)], output.dims[out_axes.index(axis)], *numbers
    )
  depth = right.dims[right_axes.index('i')]
  groups = int(instruction.attribute('batch_group_count') or 1)
  rows = left.dims[left_axes.index('b')] // groups
  return 2.0 * depth * output.dims[out_axes.index('f')] * rows * valid


def _window(instruction: Instruction, spatial: int) -> list[tuple[int, ...]]:
  """(size, stride, padding before, dilation of the left and the right) by dimension."""
  text = re.search(r'window=\{([^}]*)\}', instruction.text)
  fields = dict(part.split('=') for part in text.group(1).split()) if text else {}
  numbers = {
    name: [int(n.split('_')[0]) for n in fields[name].split('x')]
    if name in fields
    else [default] * spatial
    for name, default in (
      ('size', 1),
      ('stride', 1),
      ('pad', 0),
      ('lhs_dilate', 1),
      ('rhs_dilate', 1),
    )
  }
  return list(zip(*numbers.values()))


@functools.cache
def _valid_products(
  base: int, output: int, size: int, stride: int, pad: int, left: int, right: int
) -> int:
  """Pairs of an output and a window position that meet an element of the base."""
  positions = np.arange(output)[:, None] * stride - pad + np.arange(size) * right
  inside = (positions >= 0) & (positions < (base - 1) * left + 1)
  return int(np.count_nonzero(inside & (positions % left == 0)))


# ---- memory --------------------------------------------------------------------


def _in_memory(shapes: Sequence[Shape]) -> int:
  return sum(shape.bytes for shape in shapes if shape.space == 0)


def _bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
  """Bytes that an instruction reads from HBM and writes to it.

  Of an operand that is only sliced, the slices; of a result that is updated in place,
  the update, as XLA counts.
  """
  operands = [computation.instructions[name] for name in instruction.operands]
  if instruction.opcode == 'fusion':
    inner = module.computations[instruction.called('calls')]
    read = sum(
      _read(module, inner, parameter) if _in_memory(operand.shapes) else 0
      for parameter, operand in zip(inner.parameters, operands)
    )
    return read + _written(inner, inner.root, instruction.shapes)
  if instruction.opcode in ('dynamic-slice', 'slice', 'gather'):
    return 2 * _in_memory(instruction.shapes)
  if instruction.opcode == 'dynamic-update-slice':
    return 2 * _in_memory(operands[1].shapes)
  read = sum(_in_memory(operand.shapes) for operand in operands)
  if instruction.opcode in ('copy-start', 'all-reduce-start'):
    return 2 * read
  return read + _in_memory(instruction.shapes)


def _users(computation: Computation, name: str) -> list[Instruction]:
  return [i for i in computation.instructions.values() if name in i.operands]


def _read(module: Module, inner: Computation, parameter: Instruction) -> int:
  """Bytes of a fusion's operand that it reads."""
  whole = sum(shape.bytes for shape in parameter.shapes)
  read = 0
  for user in _users(inner, parameter.name):
    place = user.operands.index(parameter.name)
    if user.opcode in ('dynamic-slice', 'slice', 'gather') and place == 0:
      read += user.shapes[0].bytes
    elif user.opcode == 'dynamic-update-slice' and place == 0:
      continue
    elif user.opcode == 'bitcast':
      read += _read(module, inner, user)
    elif user.opcode == 'fusion':
      deeper = module.computations[user.called('calls')]
      read += _read(module, deeper, deeper.parameters[place])
    else:
      return whole
  return min(read, whole)


def _written(inner: Computation, root: Instruction, shapes: Sequence[Shape]) -> int:
  """Bytes of a fusion's results that it writes."""
  if root.opcode == 'tuple':
    return sum(
      _written(inner, inner.instructions[name], (shape,))
      for name, shape in zip(root.operands, shapes)
    )
  if not _in_memory(shapes):
    return 0
  if root.opcode in ('bitcast', 'copy') and root.operands:
    source = inner.instructions[root.operands[0]]
    if source.opcode == 'dynamic-update-slice':
      root = source
  if root.opcode == 'dynamic-update-slice':
    return inner.instructions[root.operands[1]].shapes[0].bytes
  return _in_memory(shapes)
