"""Counts what a traced function computes, before any compiler has changed it.

Two things come from here: the operations that a step is for (those of the model's own
forward pass), and what happens inside Pallas kernels, which XLA cannot see into.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

# Elements in one register of a TPU's vector unit, [sublanes, lanes].
_SUBLANES, _LANES = 8, 128

# Vector instructions for one element, where it is not one, as counted in the machine
# code that libtpu 0.0.42 makes for v3 (which multiplies no integers: 22 shifts and
# additions stand for one product with a constant).
_VECTOR_OPERATIONS = {'exp': 2, 'log': 2, 'div': 14, 'erf': 50, 'rsqrt': 6, 'sqrt': 8}
_INTEGER_PRODUCT = 22

# Change no value, or cost no vector instruction.
_FREE_IN_KERNELS = frozenset({
  'broadcast_in_dim', 'get', 'swap', 'reshape', 'squeeze', 'program_id', 'num_programs',
  'slice', 'concatenate', 'stop_gradient', 'iota', 'bitcast_convert_type', 'addupdate',
})  # fmt: skip

# Products of float32 in kernels: one pass over bfloat16 units at default precision, six
# at the highest (vmatmul instructions in machine code for v3).
_PASSES = {jax.lax.Precision.HIGHEST: 6, jax.lax.Precision.HIGH: 3}

# What is worked out of the grid's indices, to know in which cells a branch runs.
_INDEX_ARITHMETIC = {
  'eq': np.equal, 'ne': np.not_equal, 'lt': np.less, 'le': np.less_equal,
  'gt': np.greater, 'ge': np.greater_equal, 'add': np.add, 'sub': np.subtract,
  'mul': np.multiply, 'and': np.logical_and, 'or': np.logical_or, 'min': np.minimum,
  'max': np.maximum, 'rem': np.fmod, 'not': np.logical_not,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kernel:
  """What a Pallas call does in one run of the function, on all devices together.

  Attributes:
    name: of the kernel.
    calls: how often it is called.
    flops: of its matrix products as the matrix units do them: lanes padded, float32 at
      high precision in several passes.
    vector_operations: of the vector units, registers padded.
    bytes: of its operands and results, each block as often as the grid asks for it.
  """

  name: str
  calls: int
  flops: float
  vector_operations: float
  bytes: float


def matmul_flops(function: Callable[..., Any], *arguments: Any) -> float:
  """Operations of all matrix products of a function, loops in full.

  In kernels each cell of the grid counts, with lanes as they are.

  Args:
    function: of JAX.
    *arguments: arrays or their shapes.
  """
  closed = jax.make_jaxpr(function)(*arguments)
  return sum(
    times * _equation_flops(equation) for equation, times in _equations(closed.jaxpr)
  )


def kernels(jaxpr: Any) -> list[Kernel]:
  """The Pallas calls of a traced function, equal ones together.

  Those whose results nobody needs are left out, as a compiler does: the pass that gives
  a decoder's cache its shapes, and the last layer of a prompt's.
  """
  inner = getattr(jaxpr, 'jaxpr', jaxpr)
  needed, _ = partial_eval.dce_jaxpr(inner, [True] * len(inner.outvars))
  found: dict[Any, Kernel] = {}
  for equation, times in _equations(needed, into_kernels=False):
    if equation.primitive.name == 'pallas_call':
      kernel = _kernel(equation)
      key = dataclasses.replace(kernel, calls=0)
      before = found[key].calls if key in found else 0
      found[key] = dataclasses.replace(kernel, calls=before + times)
  return list(found.values())


def _equations(
  jaxpr: Any, times: int = 1, into_kernels: bool = True
) -> Iterator[tuple[Any, int]]:
  """(equation, how often it runs), the bodies of loops and functions in place."""
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == 'pallas_call' and not into_kernels:
      yield equation, times
      continue
    count = times
    if name == 'scan':
      count *= params['length']
    elif name == 'shard_map':
      count *= math.prod(params['mesh'].shape[axis] for axis in _manual_axes(params))
    elif name == 'pallas_call':
      count *= _grid_size(params['grid_mapping'])
    if name == 'cond':
      # One branch runs; the most expensive, as which one depends on data.
      bodies = [
        list(_equations(b.jaxpr, count, into_kernels)) for b in params['branches']
      ]
      yield from max(bodies, key=_matmuls)
      continue
    inner = list(inner_jaxprs(params))
    if not inner:
      yield equation, times
    for body in inner:
      yield from _equations(body, count, into_kernels)


def _matmuls(equations: Sequence[tuple[Any, int]]) -> tuple[float, int]:
  return sum(t * _equation_flops(e) for e, t in equations), len(equations)


def _manual_axes(params: Any) -> Sequence[str]:
  axes = params.get('manual_axes')
  return tuple(axes) if axes else tuple(params['mesh'].axis_names)


def _grid_size(grid_mapping: Any) -> int:
  sizes = [size for size in grid_mapping.grid if isinstance(size, int)]
  return math.prod(sizes)


def inner_jaxprs(params: Any) -> Iterator[Any]:
  """The jaxprs among an equation's parameters that run with it."""
  for key, value in params.items():
    # Rules of differentiation and the condition of a loop are not counted.
    if key in ('cond_jaxpr', 'fwd_jaxpr_thunk', 'bwd', 'jvp_jaxpr_fun', 'update_jaxpr'):
      continue
    if isinstance(value, core.ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
      yield value


# ---- matrix products -----------------------------------------------------------


def _equation_flops(equation: Any, padded: bool = False) -> float:
  name = equation.primitive.name
  if name == 'dot_general':
    return _dot_flops(equation, padded)
  if name == 'conv_general_dilated':
    kernel = equation.invars[1].aval.shape
    spec = equation.params['dimension_numbers'].rhs_spec
    depth = math.prod(kernel) // kernel[spec[0]]
    return 2.0 * equation.outvars[0].aval.size * depth
  return 0.0


def _padded(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


def _dot_flops(equation: Any, padded: bool) -> float:
  """2 · rows · depth · columns; padded: as matrix units of 128 x 128 do it."""
  left, right = (variable.aval for variable in equation.invars[:2])
  (left_contracted, right_contracted), (left_batch, right_batch) = equation.params[
    'dimension_numbers'
  ]
  depth = math.prod(left.shape[axis] for axis in left_contracted)
  batch = math.prod(left.shape[axis] for axis in left_batch)
  rows = left.size // max(depth * batch, 1)
  columns = right.size // max(depth * batch, 1)
  if not padded:
    return 2.0 * batch * rows * depth * columns
  precision = equation.params.get('precision')
  highest = max((_PASSES.get(p, 1) for p in precision or ()), default=1)
  passes = highest if left.dtype.itemsize >= 4 else 1
  rows = _padded(rows, _SUBLANES)
  return 2.0 * batch * rows * _padded(depth, _LANES) * _padded(columns, _LANES) * passes


# ---- kernels -------------------------------------------------------------------


def _kernel(equation: Any) -> Kernel:
  params = equation.params
  flops = vector = 0.0
  for inner, times in _Cells(params['grid_mapping'].grid).equations(params['jaxpr']):
    flops += times * _equation_flops(inner, padded=True)
    vector += times * _vector_operations(inner)
  name = params.get('name') or getattr(
    params.get('name_and_src_info'), 'name', 'kernel'
  )
  return Kernel(str(name), 1, flops, vector, _kernel_bytes(equation))


class _Cells:
  """The cells of a kernel's grid: which of them run which part of it."""

  def __init__(self, grid: Sequence[int]):
    self._grid = tuple(grid)
    # [axis, cell]
    self._indices = np.indices(self._grid).reshape(len(self._grid), math.prod(grid))

  def equations(self, jaxpr: Any) -> Iterator[tuple[Any, float]]:
    """(equation, how often it runs in all cells together)."""
    yield from self._walk(jaxpr, {}, np.ones(self._indices.shape[1]))

  def _walk(
    self, jaxpr: Any, known: dict[Any, Any], runs: np.ndarray
  ) -> Iterator[tuple[Any, float]]:
    """Walks a part that runs `runs` times in each cell.

    Args:
      jaxpr: the part.
      known: values of those of its variables that follow from the cell.
      runs: [cell].
    """
    for equation in jaxpr.eqns:
      name, params = equation.primitive.name, equation.params
      values = [_value(variable, known) for variable in equation.invars]
      if name == 'cond':
        yield from self._branch(equation, values, runs)
        continue
      count = runs * (params['length'] if name == 'scan' else 1)
      bodies = list(inner_jaxprs(params))
      for body in bodies:
        same = len(body.invars) == len(values) and name != 'scan'
        bound = _bound(body, values) if same else {}
        yield from self._walk(body, bound, count)
      if not bodies:
        result = self._result(equation, values)
        if result is not None:
          known[equation.outvars[0]] = result
        yield equation, float(runs.sum())

  def _branch(
    self, equation: Any, values: Sequence[Any], runs: np.ndarray
  ) -> Iterator[tuple[Any, float]]:
    branches = equation.params['branches']
    index = values[0]
    if index is None:
      parts = [
        list(self._walk(b.jaxpr, _bound(b.jaxpr, values[1:]), runs)) for b in branches
      ]
      yield from max(parts, key=_matmuls)
      return
    chosen = np.broadcast_to(np.asarray(index).astype(int), runs.shape)
    for number, branch in enumerate(branches):
      here = runs * (chosen.clip(0, len(branches) - 1) == number)
      if here.any():
        yield from self._walk(branch.jaxpr, _bound(branch.jaxpr, values[1:]), here)

  def _result(self, equation: Any, values: Sequence[Any]) -> Any:
    """The value of an equation in each cell, None if it follows from more."""
    name = equation.primitive.name
    if name == 'program_id':
      return self._indices[equation.params['axis']]
    if name == 'num_programs':
      return self._grid[equation.params['axis']]
    if any(value is None for value in values):
      return None
    if name == 'convert_element_type':
      return values[0]
    if name in _INDEX_ARITHMETIC:
      return _INDEX_ARITHMETIC[name](*values)
    return None


def _value(variable: Any, known: Mapping[Any, Any]) -> Any:
  if isinstance(variable, core.Literal):
    return variable.val if np.ndim(variable.val) == 0 else None
  return known.get(variable)


def _bound(jaxpr: Any, values: Sequence[Any]) -> dict[Any, Any]:
  return {v: x for v, x in zip(jaxpr.invars, values) if x is not None}


def _vector_operations(equation: Any) -> float:
  """Elements, registers padded, times the operations of one."""
  name = equation.primitive.name
  if name == 'dot_general' or name in _FREE_IN_KERNELS or not equation.outvars:
    return 0.0
  variables = equation.invars if name.startswith('reduce') else equation.outvars
  shape = max(
    (getattr(v.aval, 'shape', ()) for v in variables), key=math.prod, default=()
  )
  if not shape or math.prod(shape) < _LANES:
    return 0.0  # The scalar unit's.
  *_, rows, columns = (1, *shape)
  padded = _padded(rows, _SUBLANES) * _padded(columns, _LANES)
  others = math.prod(shape[:-2])
  operations = _VECTOR_OPERATIONS.get(name, 1)
  if name == 'mul' and equation.outvars[0].aval.dtype.kind in 'iu':
    operations = _INTEGER_PRODUCT
  return float(others * padded * operations)


def _kernel_bytes(equation: Any) -> float:
  """Bytes of the blocks that are moved, lanes padded.

  A block stays on the chip while the innermost indices of the grid, which its index map
  does not read, count up.
  """
  mapping = equation.params['grid_mapping']
  total = 0.0
  for block in mapping.block_mappings:
    sizes = [getattr(size, 'block_size', size) for size in block.block_shape]
    shape = [size if isinstance(size, int) else 1 for size in sizes] or [1]
    shape[-1] = _padded(shape[-1], _LANES)
    moves = math.prod(mapping.grid[: _indices_read(block, len(mapping.grid))])
    total += moves * math.prod(shape) * block.array_aval.dtype.itemsize
  return total


def _indices_read(block: Any, grid_rank: int) -> int:
  """How many of the grid's indices, outermost first, the block's place depends on."""
  jaxpr = block.index_map_jaxpr.jaxpr
  reads = {
    variable: {place} if place < grid_rank else set()
    for place, variable in enumerate(jaxpr.invars)
  }
  for equation in jaxpr.eqns:
    used = set()
    for variable in equation.invars:
      if not isinstance(variable, core.Literal):
        used |= reads.get(variable, set())
    reads.update({variable: used for variable in equation.outvars})
  used = set()
  for variable in jaxpr.outvars:
    if not isinstance(variable, core.Literal):
      used |= reads.get(variable, set())
  return max(used, default=-1) + 1
