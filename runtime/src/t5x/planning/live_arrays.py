"""What a traced function holds at its fullest moment, before any compiler changed it.

A compiler that refuses a program says how much memory it lacks and not what fills it.
So this follows the trace: results of products, gathers, kernels and loops are stored;
what elementwise operations make is stored where such an operation reads it, and is else
taken to be computed again from its sources wherever it is used, as compilers do.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from t5x.planning import jaxpr_costs

# Bytes that an array of a shape and dtype takes on one device.
SizeOf = Callable[[tuple[int, ...], Any], float]

# Functions whose operations count as their caller's.
_INLINED = frozenset({
  'jit', 'pjit', 'closed_call', 'core_call', 'custom_jvp_call', 'custom_vjp_call',
})  # fmt: skip

# Operations without a body that read and write arrays whole.
_STORED = frozenset({
  'dot_general', 'conv_general_dilated', 'pallas_call', 'gather', 'scatter',
  'scatter-add', 'dynamic_update_slice', 'sort', 'top_k', 'concatenate', 'cumsum',
  'random_bits', 'threefry2x32', 'psum', 'all_gather', 'reduce_scatter', 'all_to_all',
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LargeArray:
  """Arrays of one size that exist at the same time.

  Attributes:
    shape: over all devices.
    dtype: of the elements.
    count: how many there are.
    where: the place that makes the first; '' for arguments.
    bytes: of one, on one device.
  """

  shape: tuple[int, ...]
  dtype: str
  count: int
  where: str
  bytes: float

  @property
  def total(self) -> float:
    """Bytes of all, on one device."""
    return self.count * self.bytes


@dataclasses.dataclass(eq=False)
class _Value:
  """One array: where it is made and what it takes on a device."""

  shape: tuple[int, ...]
  dtype: Any
  where: str
  bytes: float


@dataclasses.dataclass(eq=False)
class _Operation:
  """An equation, with values in place of variables."""

  name: str
  inputs: Sequence[_Value]
  outputs: Sequence[_Value]
  bodies: Sequence[Any]
  where: str

  @property
  def stores(self) -> bool:
    """Whether its results are stored whatever reads them."""
    return self.reads_whole or self.name.startswith(('reduce', 'arg'))

  @property
  def reads_whole(self) -> bool:
    """Whether what it reads has to be stored."""
    return bool(self.bodies) or self.name in _STORED


def fullest_moment(jaxpr: Any, size_of: SizeOf) -> list[LargeArray]:
  """The arrays that exist when a function holds most, by falling size of all.

  Args:
    jaxpr: of the function.
    size_of: what an array takes on one device.
  """
  values = {v: _value(v, '', size_of) for v in (*jaxpr.constvars, *jaxpr.invars)}
  arguments = [x for x in values.values() if x is not None]
  _, held = _fullest(jaxpr, values, '', size_of)
  found: dict[Any, LargeArray] = {}
  for value in (*arguments, *held):
    key = value.shape, str(value.dtype), bool(value.where)
    new = LargeArray(value.shape, str(value.dtype), 0, value.where, value.bytes)
    before = found.get(key, new)
    found[key] = dataclasses.replace(before, count=before.count + 1)
  return sorted(found.values(), key=lambda array: -array.total)


def _value(variable: Any, where: str, size_of: SizeOf) -> _Value | None:
  """None for random keys and gradients of integers, which take no room."""
  shape, dtype = getattr(variable.aval, 'shape', ()), variable.aval.dtype
  if not isinstance(dtype, np.dtype) or dtype == jax.dtypes.float0:
    return None
  return _Value(shape, dtype, where, size_of(shape, dtype))


def _operations(
  jaxpr: Any, values: dict[Any, _Value | None], path: str, size_of: SizeOf
) -> Iterator[_Operation]:
  """The equations of a function in order; fills `values` by variable."""
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    bodies = list(jaxpr_costs.inner_jaxprs(equation.params))
    place = '/'.join(p for p in (path, str(equation.source_info.name_stack)) if p)
    inputs = [_of(variable, values) for variable in equation.invars]
    if name in _INLINED and len(bodies) == 1:
      (body,) = bodies
      inner = dict(zip(body.invars, inputs, strict=True))
      yield from _operations(body, inner, place, size_of)
      results = [_of(variable, inner) for variable in body.outvars]
      values.update(zip(equation.outvars, results, strict=True))
      continue
    where = f'{place}/{name}'.lstrip('/')
    made = [_value(variable, where, size_of) for variable in equation.outvars]
    values.update(zip(equation.outvars, made, strict=True))
    yield _Operation(
      name,
      [x for x in inputs if x is not None],
      [x for x in made if x is not None],
      bodies,
      where,
    )


def _of(variable: Any, values: Mapping[Any, _Value | None]) -> _Value | None:
  return None if isinstance(variable, core.Literal) else values.get(variable)


def _fullest(
  jaxpr: Any, values: dict[Any, _Value | None], path: str, size_of: SizeOf
) -> tuple[float, list[_Value]]:
  """(bytes, arrays) of a part at its fullest moment; its arguments are its caller's."""
  operations = list(_operations(jaxpr, values, path, size_of))
  results = [_of(variable, values) for variable in jaxpr.outvars]
  ends, stored = _lives(operations, [x for x in results if x is not None])
  leaving: dict[int, list[_Value]] = {}
  live: dict[_Value, None] = {}
  total, best, held = 0.0, -1.0, []
  for index, operation in enumerate(operations):
    for value in operation.outputs:
      if value in stored:
        live[value] = None
        total += value.bytes
        leaving.setdefault(ends.get(value, index), []).append(value)
    within, inner = _inside(operation, size_of)
    if total + within > best:
      best, held = total + within, [*live, *inner]
    for value in leaving.pop(index, ()):
      del live[value]
      total -= value.bytes
  return max(best, 0.0), held


def _inside(operation: _Operation, size_of: SizeOf) -> tuple[float, list[_Value]]:
  """The fullest moment of the fullest body."""
  if operation.name == 'shard_map':  # Shapes there are those of a device's part.
    size_of = size_on_one_device
  parts = (_fullest(body, {}, operation.where, size_of) for body in operation.bodies)
  return max(parts, key=lambda part: part[0], default=(0.0, []))


def _lives(
  operations: Sequence[_Operation], results: Sequence[_Value]
) -> tuple[dict[_Value, int], set[_Value]]:
  """(the last operation that needs a value, the values that are stored)."""
  ends = {}
  stored = set(results)
  for index, operation in enumerate(operations):
    ends.update(dict.fromkeys(operation.inputs, index))
    if operation.reads_whole:
      stored.update(operation.inputs)
    if operation.stores:
      stored.update(operation.outputs)
  ends.update(dict.fromkeys(results, len(operations)))
  for operation in reversed(operations):
    needed = [ends[x] for x in operation.outputs if x not in stored and x in ends]
    for value in operation.inputs if needed else ():
      ends[value] = max(ends[value], *needed)
  return ends, stored


def size_on_one_device(shape: tuple[int, ...], dtype: Any) -> float:
  """Bytes of an array that is not split."""
  return float(math.prod(shape) * jax.numpy.dtype(dtype).itemsize)
