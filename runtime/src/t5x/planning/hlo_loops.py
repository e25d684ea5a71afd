"""How often the loops of an optimised XLA program run.

`jax.lax.scan` becomes a `while` whose condition compares a counter with a bound. Both
are followed through copies, tuples and fusions to the constants they come from.
"""

import dataclasses
import math
import re

from t5x.planning.hlo_text import Computation, Instruction, Module

_TRANSPARENT = frozenset(
  {'copy', 'bitcast', 'convert', 'reshape', 'optimization-barrier'}
)


@dataclasses.dataclass(frozen=True)
class _Scope:
  """A computation with what its parameters stand for.

  Attributes:
    computation: it.
    loop: the `while` that calls it and the scope of that, for a body or condition.
    arguments: of a fusion or call: where each parameter comes from.
  """

  computation: Computation
  loop: tuple['_Scope', Instruction] | None = None
  arguments: tuple[tuple['_Scope', str], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Value:
  """Where a value comes from: a number, an element of the loop's tuple, or neither."""

  number: int | None = None
  element: int | None = None
  scope: _Scope | None = None
  instruction: Instruction | None = None


def _trace(module: Module, scope: _Scope, name: str) -> _Value:
  """Follows an instruction to its source."""
  instruction = scope.computation.instructions[name]
  opcode = instruction.opcode
  if opcode == 'constant':
    found = re.match(r'(-?\d+)\)', instruction.text)
    return _Value(number=int(found.group(1)) if found else None)
  if opcode in _TRANSPARENT:
    return _trace(module, scope, instruction.operands[0])
  if opcode == 'parameter' and scope.arguments:
    return _trace(module, *scope.arguments[int(instruction.text.partition(')')[0])])
  if opcode == 'get-tuple-element':
    index = int(instruction.attribute('index'))
    tuple_ = scope.computation.instructions[instruction.operands[0]]
    if tuple_.opcode == 'tuple':
      return _trace(module, scope, tuple_.operands[index])
    if tuple_.opcode == 'parameter' and scope.loop:
      return _Value(element=index)
  if opcode in ('fusion', 'call'):
    inner = _enter(module, scope, instruction)
    root = inner.computation.root
    if root.opcode in _TRANSPARENT | {'constant', 'parameter'}:
      return _trace(module, inner, root.name)
    return _Value(scope=inner, instruction=root)
  return _Value(scope=scope, instruction=instruction)


def _enter(module: Module, scope: _Scope, instruction: Instruction) -> _Scope:
  called = instruction.called('calls') or instruction.called('to_apply')
  arguments = tuple((scope, operand) for operand in instruction.operands)
  return _Scope(module.computations[called], scope.loop, arguments)


def _element(module: Module, scope: _Scope, loop: Instruction, index: int) -> _Value:
  """An element of the tuple that a loop starts from."""
  start = scope.computation.instructions[loop.operands[0]]
  if start.opcode != 'tuple':
    return _Value()
  return _trace(module, scope, start.operands[index])


def trip_count(
  module: Module, computation: Computation, loop: Instruction
) -> int | None:
  """How often a loop runs.

  Args:
    module: the program.
    computation: in which the loop stands.
    loop: a `while`.

  Returns:
    The count, or None where it depends on data or on an enclosing loop.
  """
  known = loop.config.get('known_trip_count')
  if known:
    return int(known['n'])
  outer = _Scope(computation)
  inside = (outer, loop)
  condition = _Scope(module.computations[loop.called('condition')], inside)
  body = _Scope(module.computations[loop.called('body')], inside)

  test = _trace(module, condition, condition.computation.root.name)
  if test.instruction is None or test.instruction.opcode != 'compare':
    return None
  left, right = (
    _trace(module, test.scope, operand) for operand in test.instruction.operands
  )
  counter, bound = (left, right) if left.element is not None else (right, left)
  if counter.element is None:
    return None
  if bound.element is not None:
    bound = _element(module, outer, loop, bound.element)
  start = _element(module, outer, loop, counter.element)
  step = _step(module, body, counter.element)
  if None in (bound.number, start.number, step):
    return None
  distance = (bound.number - start.number) / step
  inclusive = test.instruction.attribute('direction') in ('LE', 'GE')
  return max(math.floor(distance) + 1 if inclusive else math.ceil(distance), 0)


def _step(module: Module, body: _Scope, index: int) -> int | None:
  """What the body adds to the counter, an element of its tuple."""
  root = body.computation.root
  if root.opcode != 'tuple':
    return None
  update = _trace(module, body, root.operands[index])
  if update.instruction is None or update.instruction.opcode not in ('add', 'subtract'):
    return None
  values = [_trace(module, update.scope, name) for name in update.instruction.operands]
  if index not in [value.element for value in values]:
    return None
  numbers = [value.number for value in values if value.number is not None]
  if len(numbers) != 1 or not numbers[0]:
    return None
  return numbers[0] if update.instruction.opcode == 'add' else -numbers[0]
