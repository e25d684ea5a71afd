"""Reads the text of an optimised XLA program (`compiled.as_text()`).

Only what an account of its costs needs: computations, their instructions, shapes as
they lie in memory, and how often each loop runs.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_BITS = {
  'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16, 'bf16': 16,
  'f16': 16, 's32': 32, 'u32': 32, 'f32': 32, 's64': 64, 'u64': 64, 'f64': 64,
  'c64': 64, 'c128': 128, 'f8e4m3fn': 8, 'f8e5m2': 8,
}  # fmt: skip

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_ASSIGNMENT = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')
_ARRAY = re.compile(r'([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?')
_OPCODE = re.compile(r'^\s*([a-z][\w\-]*)\(')
_COMMENT = re.compile(r'/\*.*?\*/')
_OPERAND = re.compile(r'%([\w.\-]+)')


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array as it lies in memory.

  Attributes:
    dtype: XLA's name of it.
    dims: sizes.
    order: dimensions from the fastest to the slowest; empty if not told.
    tile: sizes that the fastest dimensions are padded to multiples of, slow to fast.
    space: memory space; 0 is HBM, others lie on the chip or on the host.
  """

  dtype: str
  dims: tuple[int, ...]
  order: tuple[int, ...] = ()
  tile: tuple[int, ...] = ()
  space: int = 0

  @functools.cached_property
  def elements(self) -> int:
    """Elements, padding not counted."""
    count = 1
    for size in self.dims:
      count *= size
    return count

  @functools.cached_property
  def bytes(self) -> int:
    """Bytes, with the padding that the tiles ask for."""
    sizes = [self.dims[axis] for axis in self.order] or list(reversed(self.dims))
    for place, tile in enumerate(reversed(self.tile)):
      if place < len(sizes):
        sizes[place] = -(-sizes[place] // tile) * tile
    count = 1
    for size in sizes:
      count *= size
    return count * _BITS.get(self.dtype, 0) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: unique in the module.
    opcode: such as 'fusion'.
    shapes: of the result, a tuple's leaves in their order.
    operands: names of instructions of the same computation.
    text: what stands behind the opcode.
    is_root: whether it is the computation's result.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  text: str
  is_root: bool

  def called(self, attribute: str) -> str | None:
    """The computation that an attribute names: calls, body, condition, to_apply."""
    found = re.search(rf'\b{attribute}=%?([\w.\-]+)', self.text)
    return found.group(1) if found else None

  def attribute(self, name: str) -> str | None:
    """The value of an attribute that is one word, such as dim_labels."""
    found = re.search(rf'\b{name}=([^\s,]+)', self.text)
    return found.group(1) if found else None

  @functools.cached_property
  def config(self) -> Mapping[str, Any]:
    """The backend's notes, empty where there are none that can be read."""
    start = self.text.find('backend_config={')
    if start < 0:
      return {}
    try:
      return json.JSONDecoder().raw_decode(self.text, start + len('backend_config='))[0]
    except ValueError:
      return {}

  @property
  def op_name(self) -> str:
    """Where in the program it comes from, as JAX names it."""
    found = re.search(r'op_name="([^"]*)"', self.text)
    return found.group(1) if found else ''


@dataclasses.dataclass(frozen=True)
class Computation:
  """A function of the module: its instructions by name, in their order."""

  name: str
  instructions: Mapping[str, Instruction]

  @functools.cached_property
  def root(self) -> Instruction:
    """The instruction whose result is the computation's."""
    return next(i for i in self.instructions.values() if i.is_root)

  @functools.cached_property
  def parameters(self) -> Sequence[Instruction]:
    """The parameters by their numbers."""
    found = [i for i in self.instructions.values() if i.opcode == 'parameter']
    return sorted(found, key=lambda i: int(i.text.partition(')')[0]))


@dataclasses.dataclass(frozen=True)
class Module:
  """A program."""

  computations: Mapping[str, Computation]
  entry: Computation


def _shape(match: re.Match) -> Shape:
  dtype, dims, layout = match.groups()
  sizes = tuple(int(n) for n in dims.split(',') if n)
  order, _, notes = (layout or '').partition(':')
  tile = re.match(r'T\(([\d,]+)\)', notes)
  space = re.search(r'S\((\d+)\)', notes)
  return Shape(
    dtype,
    sizes,
    tuple(int(n) for n in order.split(',') if n),
    tuple(int(n) for n in tile.group(1).split(',')) if tile else (),
    int(space.group(1)) if space else 0,
  )


def _closing(text: str, start: int) -> int:
  """Where the parenthesis that opens at `start` closes."""
  depth = 0
  for index in range(start, len(text)):
    depth += (text[index] == '(') - (text[index] == ')')
    if depth == 0:
      return index
  raise ValueError(f'A parenthesis of an HLO line does not close: {text[:200]}')


def _instruction(name: str, is_root: bool, right: str) -> Instruction | None:
  """Reads what stands right of '='."""
  right = _COMMENT.sub('', right)
  if right.startswith('('):
    end = _closing(right, 0) + 1
  else:
    end = right.index(' ')
  opcode = _OPCODE.match(right[end:])
  if opcode is None:
    return None
  start = end + opcode.end() - 1
  stop = _closing(right, start)
  arguments = right[start + 1 : stop]
  return Instruction(
    name,
    opcode.group(1),
    tuple(map(_shape, _ARRAY.finditer(right[:end]))),
    tuple(_OPERAND.findall(arguments)),
    right[start + 1 :],
    is_root,
  )


def parse(text: str) -> Module:
  """Reads a module.

  Args:
    text: of `jax.stages.Compiled.as_text()`.

  Raises:
    ValueError: it has no entry computation.
  """
  computations, entry, name, instructions = {}, None, None, {}
  for line in text.splitlines():
    if line.startswith('}'):
      name = None
    elif name is None:
      head = _COMPUTATION.match(line)
      if head:
        name, instructions = head.group(2), {}
        computations[name] = Computation(name, instructions)
        entry = name if head.group(1) else entry
    else:
      found = _ASSIGNMENT.match(line)
      if found:
        made = _instruction(found.group(2), bool(found.group(1)), found.group(3))
        if made is not None:
          instructions[made.name] = made
  if entry is None:
    raise ValueError('The text is no HLO module: it has no ENTRY computation.')
  return Module(computations, computations[entry])
