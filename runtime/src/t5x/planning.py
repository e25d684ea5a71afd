"""Plans of a run's steps, compiled for devices that are not there.

`precompile` shows them. The programs are the run's own steps, traced with shapes in
place of data and state, so that neither corpus nor checkpoint is needed. Every figure
but the time of compiling is an estimate:

- Memory is the compiler's `memory_analysis()`. Where a program does not fit, the trace
  shows what fills the memory (`fullest_moment`).
- Operations, bytes and seconds are XLA's `cost_analysis()`, in which the body of a loop
  counts once and kernels cost what they declare (`pl.CostEstimate`). Loops are added in
  full: operations by the trace, bytes and seconds by the cycles that the TPU's compiler
  notes at each instruction of the compiled program.
- Traffic between devices is a roofline over the links, nothing overlapped.
"""

import collections
import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf
from absl import logging
from jax.experimental import topologies as jax_topologies
from jax.extend import core

from t5x import data, data_iterators, inference, partitioning
from t5x import trainer as trainer_lib

GIB = 2**30

BatchSpec = Mapping[str, jax.ShapeDtypeStruct]


# ---- topologies ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one JAX device can do: a core of v2 and v3, a chip later on."""

  kind: str  # As JAX calls it.
  flops: float  # bfloat16 operations per second.
  hbm_bytes: float  # Memory that a program may use.
  hbm_bandwidth: float  # Bytes per second.
  # Bytes per second to its neighbours; the links of a chip are shared by its devices.
  link_bandwidth: float
  clock: float  # Cycles per second.


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice as Google Cloud names it; `shape` is the compiler's name, None for CPUs."""

  name: str
  chip: Chip
  shape: str | None
  devices: int
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Peak, HBM and its bandwidth: https://cloud.google.com/tpu/docs/system-architecture and
# the pages of each version; a device of v2 and v3 is half a chip. The HBM that a
# program may use is what the compiler (libtpu 0.0.42) says when a program does not fit.
# Clocks and links of v2 and v3: Jouppi et al., A Domain-Specific Supercomputer for
# Training Deep Neural Networks, CACM 63(7), 2020 (496 and 656 Gbit/s per link, of which
# a 2x2 slice connects two); of v4: Jouppi et al., ISCA 2023 (six links of 50 GB/s,
# three connected). Later clocks follow from the peak and the size of the matrix units.
_V2 = Chip('TPU v2', 22.9e12, 7.48 * GIB, 350e9, 62e9, 700e6)
_V3 = Chip('TPU v3', 61.6e12, 15.48 * GIB, 450e9, 82e9, 940e6)
_V4 = Chip('TPU v4', 275e12, 30.75 * GIB, 1228e9, 150e9, 1050e6)
_V5E = Chip('TPU v5 lite', 197e12, 15.75 * GIB, 819e9, 100e9, 1500e6)
_V5P = Chip('TPU v5', 459e12, 95.74 * GIB, 2765e9, 300e9, 1750e6)
_V6E = Chip('TPU v6 lite', 918e12, 31.25 * GIB, 1640e9, 224e9, 1750e6)
# Two cores of a server, for figures of some size.
_CPU = Chip('cpu', 0.4e12, 16 * GIB, 20e9, 10e9, 3e9)

# Elements that a vector unit takes per cycle, by which XLA counts transcendentals.
_VECTOR_LANES = 1024

_ONE_HOST_OF_EIGHT = {'chips_per_host_bounds': (2, 4, 1)}

TOPOLOGIES = {
  topology.name: topology
  for topology in (
    Topology('v2-8', _V2, 'v2:2x2', 8),
    Topology('v3-8', _V3, 'v3:2x2', 8),
    Topology('v4-8', _V4, 'v4:2x2x1', 4, {'chip_config_name': 'megacore'}),
    Topology('v5e-8', _V5E, 'v5e:2x4', 8, _ONE_HOST_OF_EIGHT),
    Topology('v5p-8', _V5P, 'v5p:2x2x1', 4),
    Topology('v6e-8', _V6E, 'v6e:2x4', 8, _ONE_HOST_OF_EIGHT),
  )
}


def find_topology(name: str | None) -> Topology:
  """Returns the topology of that name; `cpu:N` is N CPU devices.

  Raises:
    ValueError: the name is unknown.
  """
  kind, _, count = (name or '').partition(':')
  if kind == 'cpu' and count.isdigit() and int(count):
    return Topology(name, _CPU, None, int(count))
  if name not in TOPOLOGIES:
    raise ValueError(
      f'--topology must be one of {", ".join(TOPOLOGIES)}, or cpu:N. Got: {name}'
    )
  return TOPOLOGIES[name]


def has_compiler() -> bool:
  """Whether libtpu is installed."""
  return importlib.util.find_spec('libtpu') is not None


def devices_of(topology: Topology) -> Sequence[jax.Device]:
  """Returns the devices of a topology; those of TPUs can only be compiled for.

  JAX gets as many CPU devices, since a program may ask for their number; so call it
  before JAX makes its devices.

  Raises:
    ValueError: libtpu is not installed.
  """
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', topology.devices)
  if topology.shape is None:
    return jax.devices('cpu')
  if not has_compiler():
    raise ValueError(
      f'Compiling for {topology.name} needs the package libtpu: pip install '
      '"jax[tpu]". No TPU is needed. --topology=cpu:8 works without it.'
    )
  # Else libtpu asks the metadata server of a TPU VM.
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  os.environ['TPU_WORKER_HOSTNAMES'] = 'localhost'
  os.environ['TPU_ACCELERATOR_TYPE'] = topology.name
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  return jax_topologies.get_topology_desc(
    platform='tpu', topology_name=topology.shape, **topology.options
  ).devices


# ---- a run's steps, without arrays ---------------------------------------------

# The argument of `train` that describes the step's batches.
_DATASETS = {
  'train': 'train_dataset_cfg',
  'eval': 'train_eval_dataset_cfg',
  'decode': 'infer_eval_dataset_cfg',
}


@dataclasses.dataclass(frozen=True)
class Step:
  """A step of a run, ready to be traced."""

  kind: str  # train, eval or decode
  function: Any  # Partitioned; has `trace`.
  arguments: tuple[Any, ...]  # Shapes and dtypes.
  batch: BatchSpec
  # The model's pass over a batch, without the mesh, and its arguments; None for
  # decoding, whose length depends on the model.
  forward: tuple[Callable[..., Any], tuple[Any, ...]] | None
  parts: int  # That a batch is split into over the devices.
  state_parts: Mapping[
    tuple[int, ...], int
  ]  # The same for the state's arrays by shape.
  microbatches: int = 1

  @property
  def rows(self) -> int:
    """Rows of the batch over all devices."""
    return next(iter(self.batch.values())).shape[0]

  @property
  def target_tokens(self) -> int:
    """Target slots of the batch, padding included."""
    names = 'decoder_target_tokens', 'targets'
    targets = next(self.batch[name] for name in names if name in self.batch)
    return math.prod(targets.shape[:2])

  @property
  def longest_loop(self) -> int:
    """Trips of loops whose length depends on data: decoding ends at the last slot."""
    return self.target_tokens // self.rows if self.kind == 'decode' else 1

  def bytes_on_device(self, shape: tuple[int, ...], dtype: Any) -> float:
    """Bytes of an array on a device: split as in the state, or else by rows."""
    size = math.prod(shape) * jax.numpy.dtype(dtype).itemsize
    return size / self.state_parts.get(shape, self.parts)


def batch_spec(
  cfg: data.DatasetConfig, converter_cls: Callable[..., seqio.FeatureConverter]
) -> BatchSpec:
  """Returns shapes and dtypes of a batch over all hosts; reads no data."""
  provider = data.check_dataset_config(cfg, 1, converter_cls)
  example = {
    name: tf.TensorSpec([None] * feature.rank, feature.dtype)
    for name, feature in provider.output_features.items()
  }
  # A dataset of the task's type, whose generator is never called.
  examples = tf.data.Dataset.from_generator(lambda: iter(()), output_signature=example)
  converter = converter_cls(
    pack=cfg.pack, use_custom_packing_ops=cfg.use_custom_packing_ops
  )
  rows = converter(examples, cfg.task_feature_lengths)
  zeros = data_iterators.get_zeros_batch_like_dataset(rows.batch(1), 1)
  return {
    name: jax.ShapeDtypeStruct((cfg.batch_size, *x.shape[1:]), x.dtype)
    for name, x in zeros.items()
  }


def make_step(
  arguments: Mapping[str, Any], kind: str, batch_size: int | None = None
) -> Step:
  """Makes one of a run's steps.

  Args:
    arguments: those of `train.train`, by name.
    kind: train, eval or decode; without such batches those of training are taken.
    batch_size: rows over all devices; the run's own by default.

  Raises:
    ValueError: the batch does not divide among the devices.
  """
  model, partitioner = arguments['model'], arguments['partitioner']
  cfg = arguments.get(_DATASETS[kind]) or arguments['train_dataset_cfg']
  cfg = dataclasses.replace(
    cfg,
    batch_size=batch_size or cfg.batch_size,
    pack=cfg.pack and kind != 'decode',
  )
  partitioner.get_data_layout(cfg.batch_size)
  batch = batch_spec(cfg, model.FEATURE_CONVERTER_CLS)
  initializer = arguments['train_state_initializer_cls'](
    optimizer_def=model.optimizer_def,
    init_fn=model.get_initial_variables,
    input_shapes={name: spec.shape for name, spec in batch.items()},
    input_types={name: spec.dtype for name, spec in batch.items()},
    partitioner=partitioner,
  )
  state, axes = initializer.global_train_state_shape, initializer.train_state_axes
  if arguments['use_hardware_rng']:
    trainer_lib.set_hardware_rng_ops()
  _, key = jax.random.split(jax.random.PRNGKey(arguments['random_seed'] or 0))
  step = functools.partial(
    Step,
    kind,
    batch=batch,
    parts=partitioner.data_mesh_size,
    state_parts=_state_parts(state, axes, partitioner.mesh.shape),
  )
  if kind == 'decode':
    function = inference.partition_step(model.predict_batch_with_aux, partitioner, axes)
    indices = jax.ShapeDtypeStruct((cfg.batch_size,), np.int32)
    shapes = (
      state.params,
      batch,
      jax.ShapeDtypeStruct(key.shape, key.dtype),
      indices,
      state.flax_mutables,
    )
    return step(function, shapes, forward=None)

  trainer = arguments['trainer_cls'](
    model=model,
    train_state=state,
    partitioner=partitioner,
    train_state_axes=axes,
    eval_names=(),
    summary_dir=None,
    rng=key,
  )
  training = kind == 'train'
  function = (
    trainer._partitioned_train_step if training else trainer._partitioned_eval_step
  )
  trainer.close()
  forward = functools.partial(model.loss_fn, dropout_rng=key if training else None)
  microbatches = getattr(trainer, '_num_microbatches', None) if training else None
  return step(
    function,
    (state, batch),
    forward=(forward, (state.params, batch)),
    microbatches=microbatches or 1,
  )


def _state_parts(state, axes, mesh_shape):
  """The optimizer's arrays have the shapes of the parameters that they belong to."""
  found = {}

  def add(spec, leaf):
    names = jax.tree.leaves(tuple(spec or ()))
    found[leaf.shape] = math.prod(mesh_shape[name] for name in names)

  jax.tree.map(add, axes.params, state.params, is_leaf=partitioning.is_spec)
  return found


# ---- the trace: operations and live arrays -------------------------------------


def _bodies(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
  """The jaxprs among an equation's parameters that run with it."""
  for key, value in params.items():
    # Not the rules of differentiation, nor the condition of a loop.
    if key in ('cond_jaxpr', 'fwd_jaxpr_thunk', 'bwd', 'jvp_jaxpr_fun', 'update_jaxpr'):
      continue
    if isinstance(value, core.ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
      yield value


def matmul_flops(jaxpr: core.Jaxpr, loops_once: bool = False) -> float:
  """Counts operations of matrix products, and those that kernels declare.

  Loops count in full or once; of a conditional's branches the costliest one.
  """
  total = 0.0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      left = equation.invars[0].aval.shape
      depth = math.prod(left[axis] for axis in contracted)
      total += 2.0 * equation.outvars[0].aval.size * depth
    elif name == 'pallas_call':
      total += params['cost_estimate'].flops if params['cost_estimate'] else 0
    elif name == 'cond':
      total += max(matmul_flops(b.jaxpr, loops_once) for b in params['branches'])
    else:
      times = 1
      if name == 'scan' and not loops_once:
        times = params['length']
      elif name == 'shard_map':  # Its body is one device's part.
        axes = params.get('manual_axes') or params['mesh'].axis_names
        times = math.prod(params['mesh'].shape[axis] for axis in axes)
      total += times * sum(matmul_flops(b, loops_once) for b in _bodies(params))
  return total


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


@dataclasses.dataclass(eq=False)
class _Array:
  shape: tuple[int, ...]
  dtype: np.dtype
  where: str  # Name stack and operation; '' for arguments.
  bytes: float  # On one device.


@dataclasses.dataclass(frozen=True)
class LargeArray:
  """Arrays of one size that exist at the same time."""

  shape: tuple[int, ...]  # Over all devices.
  dtype: str
  count: int
  where: str  # What makes the first; '' for arguments.
  bytes: float  # Of all, on one device.


def fullest_moment(
  jaxpr: core.Jaxpr, size_of: Callable[[tuple[int, ...], Any], float]
) -> list[LargeArray]:
  """Returns the arrays that exist when a function holds most, largest first.

  Results of products, gathers, kernels and loops are stored. What elementwise
  operations make is stored where such an operation reads it, and is else recomputed
  from its sources wherever it is used, as compilers do.

  Args:
    jaxpr: of the function.
    size_of: bytes of an array of a shape and dtype on one device.
  """
  arrays = {v: _array(v, '', size_of) for v in (*jaxpr.constvars, *jaxpr.invars)}
  arguments = [x for x in arrays.values() if x is not None]
  groups = collections.defaultdict(list)
  for array in (*arguments, *_fullest(jaxpr, arrays, '', size_of)):
    groups[array.shape, str(array.dtype), bool(array.where)].append(array)
  found = [
    LargeArray(shape, dtype, len(group), group[0].where, sum(x.bytes for x in group))
    for (shape, dtype, _), group in groups.items()
  ]
  return sorted(found, key=lambda array: -array.bytes)


def _array(variable, where, size_of):
  """None for random keys and gradients of integers, which take no memory."""
  shape, dtype = getattr(variable.aval, 'shape', ()), variable.aval.dtype
  if not isinstance(dtype, np.dtype) or dtype == jax.dtypes.float0:
    return None
  return _Array(shape, dtype, where, size_of(shape, dtype))


def _operations(jaxpr, arrays, path, size_of):
  """Yields (name, inputs, outputs, bodies, where) in order; fills `arrays`."""

  def of(variables, known):
    return [None if isinstance(v, core.Literal) else known.get(v) for v in variables]

  for equation in jaxpr.eqns:
    name, bodies = equation.primitive.name, list(_bodies(equation.params))
    place = '/'.join(p for p in (path, str(equation.source_info.name_stack)) if p)
    inputs = of(equation.invars, arrays)
    if name in _INLINED and len(bodies) == 1:
      (body,) = bodies
      inner = dict(zip(body.invars, inputs, strict=True))
      yield from _operations(body, inner, place, size_of)
      arrays.update(zip(equation.outvars, of(body.outvars, inner), strict=True))
      continue
    where = f'{place}/{name}'.lstrip('/')
    outputs = [_array(variable, where, size_of) for variable in equation.outvars]
    arrays.update(zip(equation.outvars, outputs, strict=True))
    yield name, [x for x in inputs if x], [x for x in outputs if x], bodies, where


def _fullest(jaxpr, arrays, path, size_of) -> list[_Array]:
  """What a part holds at its fullest moment, without its arguments."""
  operations = list(_operations(jaxpr, arrays, path, size_of))
  known = [arrays.get(v) for v in jaxpr.outvars if not isinstance(v, core.Literal)]
  results = [x for x in known if x]
  # The last operation that needs each array, and the arrays that are stored.
  ends, stored = {}, set(results)
  for index, (name, inputs, outputs, bodies, _) in enumerate(operations):
    ends.update(dict.fromkeys(inputs, index))
    reads_whole = bool(bodies) or name in _STORED
    if reads_whole:
      stored.update(inputs)
    if reads_whole or name.startswith(('reduce', 'arg')):
      stored.update(outputs)
  ends.update(dict.fromkeys(results, len(operations)))
  for _, inputs, outputs, _, _ in reversed(operations):
    # What is recomputed keeps its sources.
    needed = [ends[x] for x in outputs if x not in stored and x in ends]
    for array in inputs if needed else ():
      ends[array] = max(ends[array], *needed)

  live: dict[_Array, None] = {}
  leaving = collections.defaultdict(list)
  total, best, held = 0.0, -1.0, []
  for index, (name, _, outputs, bodies, where) in enumerate(operations):
    for array in outputs:
      if array in stored:
        live[array] = None
        total += array.bytes
        leaving[ends.get(array, index)].append(array)
    # Shapes within shard_map are those of a device's part.
    size = _whole_bytes if name == 'shard_map' else size_of
    inner = max(
      (_fullest(body, {}, where, size) for body in bodies), key=_total, default=[]
    )
    if total + _total(inner) > best:
      best, held = total + _total(inner), [*live, *inner]
    for array in leaving.pop(index, ()):
      del live[array]
      total -= array.bytes
  return held


def _whole_bytes(shape, dtype):
  return float(math.prod(shape) * jax.numpy.dtype(dtype).itemsize)


def _total(arrays):
  return sum(array.bytes for array in arrays)


# ---- the compiled program: what loops add --------------------------------------

_COLLECTIVE = re.compile(
  r'(all-reduce|all-gather|reduce-scatter|(ragged-)?all-to-all|collective-permute|'
  r'collective-broadcast)(-start)?'
)
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(')
_COST = re.compile(
  r'"cost_estimate":\{"flops":"(\d+)","transcendentals":"(\d+)","bytes_accessed":"(\d+)"'
)


@dataclasses.dataclass
class Program:
  """What XLA's cost analysis does not show of a compiled program, loops in full."""

  cycles: float = 0  # Of all but kernels and collectives, as the compiler notes them.
  cycles_loops_once: float = 0
  # Calls by (name, operations, transcendentals, bytes), the costs those of one call.
  kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  kernels_loops_once: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  sent_bytes: float = 0
  # Trips by the loop's name; None where they depend on data.
  loops: dict[str, int | None] = dataclasses.field(default_factory=dict)


def read_program(text: str, longest_loop: int = 1) -> Program:
  """Reads the text of a compiled program (`compiled.as_text()`).

  Args:
    text: the program.
    longest_loop: trips that loops count for whose length depends on data.
  """
  computations, entry, lines = {}, None, []
  for line in text.splitlines():
    if not line.startswith(' '):
      head = _COMPUTATION.match(line)
      lines = []
      if head:
        computations[head[2]] = lines
        entry = head[2] if head[1] else entry
    else:
      lines.append(line)

  program = Program()

  def walk(computation, times):
    for line in computations[computation]:
      found = _INSTRUCTION.match(line)
      if not found:
        continue
      name, shape, opcode = found.groups()
      if opcode == 'while':
        trips = program.loops[name] = _trip_count(line, computations)
        trips = longest_loop if trips is None else trips
        walk(_called(line, 'body')[0], times * trips)
      elif opcode in ('call', 'conditional', 'async-start'):
        # Of a conditional all branches count.
        for callee in _called(line, r'\w*computations?', 'to_apply', 'calls'):
          walk(callee, times)
      elif 'custom_call_target="tpu_custom_call"' in line:
        cost = _COST.search(line)
        kernel = name.partition('.')[0], *map(int, cost.groups() if cost else (0,) * 3)
        program.kernels[kernel] += times
        program.kernels_loops_once[kernel] += 1
      elif _COLLECTIVE.fullmatch(opcode):
        # A ring passes everything on twice for a sum, once otherwise.
        twice = 2 if opcode.startswith('all-reduce') else 1
        program.sent_bytes += times * twice * _bytes(shape)
      else:
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        program.cycles += times * int(cycles[1]) if cycles else 0
        program.cycles_loops_once += int(cycles[1]) if cycles else 0

  walk(entry, 1)
  return program


def _called(line, *attributes):
  """The computations that an instruction's attributes name."""
  found = re.findall(
    rf'\b(?:{"|".join(attributes)})=\{{?(%?[\w.\-]+(?:, %[\w.\-]+)*)', line
  )
  return [name.lstrip('%') for names in found for name in names.split(', ')]


def _trip_count(line, computations):
  """Trips of a loop that counts from 0 to a constant, as scans do; else None."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
  if known:
    return int(known[1])
  condition = list(computations[_called(line, 'condition')[0]])
  for callee in _called('\n'.join(condition), 'calls'):
    condition += computations[callee]
  text = '\n'.join(condition)
  bounds = re.findall(r'= s32\[\]\S* constant\((\d+)\)', text)
  directions = re.findall(r' compare\(.*direction=(\w+)', text)
  return int(bounds[0]) if len(bounds) == 1 and directions == ['LT'] else None


def _bytes(shapes):
  """Bytes of the arrays in an instruction's result."""
  total = 0
  for dtype, sizes in re.findall(r'([a-z]+\d*)\w*\[([\d,]*)\]', shapes):
    bits = int(re.sub(r'\D', '', dtype) or 8)
    total += bits // 8 * math.prod(int(size) for size in sizes.split(',') if size)
  return total


# ---- the plan ------------------------------------------------------------------


class DoesNotFitError(ValueError):
  """A program needs more memory than a device has.

  `needed` is infinite where the compiler does not say; `held` are the arrays that the
  traced step holds at its fullest moment.
  """

  def __init__(self, needed: float, available: float, held: Sequence[LargeArray] = ()):
    if math.isfinite(needed):
      super().__init__(
        f'The step needs {needed / GIB:.2f} GiB per device or more, and '
        f'{available / GIB:.2f} GiB are available: '
        f'{(needed - available) / GIB:.2f} GiB too much.'
      )
    else:
      super().__init__(
        f'The step needs more than the {available / GIB:.2f} GiB per device.'
      )
    self.needed, self.available, self.held = needed, available, held


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a step takes; per device, in bytes and seconds, where not named otherwise."""

  topology: Topology
  step: str
  batch_size: int  # Over all devices.
  target_tokens: int  # Over all devices, padding included.
  steps: int | None  # Of the run.
  arguments: float  # Memory of the state and the batch.
  temporaries: float  # Memory of results and of what is kept in between.
  code: float  # Memory of the program.
  flops: float  # Operations, recomputation and padding included.
  useful_flops: float  # Of the forward pass's products, three times in training.
  bytes_accessed: float  # To and from HBM.
  xla_s: float  # XLA's estimate without kernels.
  kernels: Sequence[tuple[str, int, float, str]]  # (name, calls, seconds, limited by)
  collective_s: float  # Traffic between devices.
  cycles_s: float | None  # By the compiler's cycles, with kernels and traffic.
  loops: Mapping[str, int | None]
  longest_loop: int
  compile_s: float

  @property
  def memory(self) -> float:
    """All memory."""
    return self.arguments + self.temporaries + self.code

  @property
  def kernel_s(self) -> float:
    """Kernels, by roofline of what they declare."""
    return sum(seconds for _, _, seconds, _ in self.kernels)

  @property
  def estimate_s(self) -> float:
    """A step, by XLA's estimate and rooflines of kernels and traffic."""
    return self.xla_s + self.kernel_s + self.collective_s

  @property
  def rooflines(self) -> Mapping[str, float]:
    """Seconds if all computing or all moving were the only limit."""
    chip = self.topology.chip
    return {
      'compute': self.flops / chip.flops,
      'memory': self.bytes_accessed / chip.hbm_bandwidth,
    }

  @property
  def mfu(self) -> float | None:
    """Share of the peak that useful operations take."""
    share = self.useful_flops / (self.estimate_s * self.topology.chip.flops)
    return share or None

  @property
  def hours(self) -> float | None:
    """All steps, without evaluations and checkpoints."""
    return None if self.steps is None else self.steps * self.estimate_s / 3600

  def as_numbers(self) -> dict[str, Any]:
    """Returns what `--json` writes."""
    rooflines = self.rooflines
    return {
      'topology': self.topology.name,
      'devices': self.topology.devices,
      'step': self.step,
      'batch_size': self.batch_size,
      'hbm_gib': self.memory / GIB,
      'hbm_available_gib': self.topology.chip.hbm_bytes / GIB,
      'hbm_arguments_gib': self.arguments / GIB,
      'hbm_temporaries_gib': self.temporaries / GIB,
      'hbm_code_gib': self.code / GIB,
      'flops': self.flops,
      'useful_flops': self.useful_flops,
      'bytes_accessed': self.bytes_accessed,
      'estimate_s': self.estimate_s,
      'xla_s': self.xla_s,
      'kernel_s': self.kernel_s,
      'collective_s': self.collective_s,
      'roofline_s': max(rooflines.values()),
      'cycles_s': self.cycles_s,
      'bound': max(rooflines, key=rooflines.get),
      'mfu': self.mfu,
      'tokens_per_s': self.target_tokens / self.estimate_s,
      'hours': self.hours,
      'compile_s': self.compile_s,
      'loops': dict(self.loops),
      'kernels': [
        dict(zip(('name', 'calls', 'seconds', 'bound'), kernel))
        for kernel in self.kernels
      ],
    }

  def table(self) -> str:
    """Returns the plan for the screen."""
    numbers, chip = self.as_numbers(), self.topology.chip
    rows = [
      ('topology', f'{self.topology.name}: {self.topology.devices} x {chip.kind}'),
      ('step', f'{self.step}, {self.batch_size} rows, {self.target_tokens} targets'),
      ('HBM per device', f'{_size(self.memory)} of {_size(chip.hbm_bytes)}'),
      ('  arguments', _size(self.arguments)),
      ('  temporaries', _size(self.temporaries)),
      ('  code', _size(self.code)),
      ('FLOPs per device', f'{self.flops / 1e12:.4g} T'),
      ('  useful', f'{self.useful_flops / 1e12:.4g} T' if self.mfu else '-'),
      ('bytes moved per device', f'{self.bytes_accessed / 1e9:.4g} GB'),
      ('time per step, estimate', f'{self.estimate_s:.4g} s'),
      ("  XLA's estimate", f'{self.xla_s:.4g} s, loops in full'),
      ('  kernels, by roofline', f'{self.kernel_s:.4g} s'),
      ('  between devices', f'{self.collective_s:.4g} s, not overlapped'),
      ("by the compiler's cycles", f'{self.cycles_s:.4g} s' if self.cycles_s else '-'),
      (
        'by roofline of the whole',
        f'{numbers["roofline_s"]:.4g} s, bound by {numbers["bound"]}',
      ),
      ('MFU, estimate', f'{self.mfu:.1%}' if self.mfu else '-'),
      ('target tokens per second', f'{numbers["tokens_per_s"]:,.0f}, estimate'),
    ]
    if self.hours is not None:
      rows.append((f'{self.steps:,} steps', f'{self.hours:.2f} hours, estimate'))
    rows.append(('compiled in', f'{self.compile_s:.0f} s'))
    lines = [f'{name:<26}{value}' for name, value in rows]
    for name, calls, seconds, bound in self.kernels:
      cost = f'{seconds:.4g} s, bound by {bound}' if seconds else 'no cost declared'
      lines.append(f'Kernel {name}: {calls} calls, {cost}.')
    unknown = [name for name, trips in self.loops.items() if trips is None]
    if unknown:
      lines.append(
        f'Loops whose length depends on data: {", ".join(unknown)}; counted as '
        f'{self.longest_loop} trips, the maximum.'
      )
    if self.topology.shape is None:
      lines.append('On CPUs speeds and memory are placeholders, only for comparison.')
    lines.append(
      'Nothing was run: every figure but the time of compiling is an estimate.'
    )
    return '\n'.join(lines)


def _size(number):
  return (
    f'{number / GIB:.2f} GiB' if number >= GIB / 10 else f'{number / 2**20:.1f} MiB'
  )


def plan(
  arguments: Mapping[str, Any],
  topology: Topology,
  kind: str = 'train',
  batch_size: int | None = None,
) -> Plan:
  """Compiles a step for a topology, whose devices the mesh must have.

  See `make_step` for the arguments.

  Raises:
    DoesNotFitError: the step needs more memory than there is.
  """
  step = make_step(arguments, kind, batch_size)
  steps = arguments.get('relative_steps') or arguments.get('total_steps')
  logging.info(
    'Compiling the %s step of %d rows for %s.', kind, step.rows, topology.name
  )
  begun = time.perf_counter()
  traced = step.function.trace(*step.arguments)
  compiled = _compile(traced, step, topology.chip.hbm_bytes)
  seconds = time.perf_counter() - begun
  memory = compiled.memory_analysis()
  useful = 0.0
  if step.forward:
    function, shapes = step.forward
    passes = 3 if kind == 'train' else 1  # A backward pass counts as two.
    useful = passes * matmul_flops(jax.make_jaxpr(function)(*shapes).jaxpr)
  return Plan(
    topology=topology,
    step=kind,
    batch_size=step.rows,
    target_tokens=step.target_tokens,
    steps=steps if kind == 'train' else None,
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes,
    code=memory.generated_code_size_in_bytes,
    useful_flops=useful / topology.devices,
    **_costs(compiled, traced.jaxpr.jaxpr, topology.chip, step.longest_loop),
    longest_loop=step.longest_loop,
    compile_s=seconds,
  )


def _compile(traced, step, available):
  """Compiles; raises DoesNotFitError."""
  try:
    compiled = traced.lower().compile()
    memory = compiled.memory_analysis()
    needed = (
      memory.argument_size_in_bytes + memory.temp_size_in_bytes
      + memory.output_size_in_bytes - memory.alias_size_in_bytes
      + memory.generated_code_size_in_bytes
    )  # fmt: skip
  except jax.errors.JaxRuntimeError as error:
    # The compiler's verdict and its figures come as text only.
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    size = r'([\d.]+)([KMGT]?)'
    found = re.search(rf'Used {size} of {size} hbm', str(error)) or re.search(
      rf'\({size}\) exceeds available HBM \({size}\)', str(error)
    )
    needed = math.inf
    if found:
      needed, available = (
        float(number) * 1024 ** ' KMGT'.index(unit or ' ')
        for number, unit in (found.groups()[:2], found.groups()[2:])
      )
  if needed <= available:
    return compiled
  held = fullest_moment(traced.jaxpr.jaxpr, step.bytes_on_device)
  raise DoesNotFitError(needed, available, held)


def _costs(compiled, jaxpr, chip, longest_loop) -> dict[str, Any]:
  """Operations, bytes and seconds of a compiled program, loops in full."""
  program = read_program(compiled.as_text(), longest_loop)
  analysis = compiled.cost_analysis() or {}
  in_full, once = matmul_flops(jaxpr), matmul_flops(jaxpr, loops_once=True)
  by_flops = in_full / once if once else 1.0
  # CPUs have no cycles.
  by_cycles = program.cycles / program.cycles_loops_once if program.cycles else by_flops

  def roofline(flops, transcendentals, moved):
    limits = {
      'matrix units': flops / chip.flops,
      'vector units': transcendentals / (_VECTOR_LANES * chip.clock),
      'memory': moved / chip.hbm_bandwidth,
    }
    limit = max(limits, key=limits.get)
    return limits[limit], limit

  timed = [
    (k[0], n, n * roofline(*k[1:])[0], roofline(*k[1:])[1])
    for k, n in program.kernels.items()
  ]
  kernel_s = sum(seconds for _, _, seconds, _ in timed)
  once_s, once_bytes = (
    sum(n * cost(k) for k, n in program.kernels_loops_once.items())
    for cost in (lambda k: roofline(*k[1:])[0], lambda k: k[3])
  )
  moved = max(analysis.get('bytes accessed', 0.0) - once_bytes, 0.0) * by_cycles
  moved += sum(n * k[3] for k, n in program.kernels.items())
  flops = analysis.get('flops', 0.0) * by_flops
  collective_s = program.sent_bytes / chip.link_bandwidth
  xla_s = max(analysis.get('optimal_seconds', 0.0) - once_s, 0.0) * by_cycles
  cycles_s = program.cycles / chip.clock + kernel_s + collective_s
  return {
    'flops': flops,
    'bytes_accessed': moved,
    # On CPUs XLA has no estimate: a roofline stands for it.
    'xla_s': xla_s or max(flops / chip.flops, moved / chip.hbm_bandwidth),
    'kernels': timed,
    'collective_s': collective_s,
    'cycles_s': cycles_s if program.cycles else None,
    'loops': program.loops,
  }


# ---- the largest batch ---------------------------------------------------------

# Compilations that `find_batch` makes at most: each may take minutes.
_MOST_TRIES = 10


def find_batch(
  arguments: Mapping[str, Any], topology: Topology, kind: str = 'train'
) -> tuple[Plan, str]:
  """Returns the plan of the largest batch that fits, to 3 % or a row per device.

  The text says what was found.

  Raises:
    DoesNotFitError: not even one row per device fits.
  """
  step = make_step(arguments, kind)
  size, unit = step.rows, step.parts * step.microbatches
  available = topology.chip.hbm_bytes
  tried, best, error = {}, None, None
  while size is not None and len(tried) < _MOST_TRIES:
    try:
      found = plan(arguments, topology, kind, size)
      tried[size] = found.memory
      if best is None or size > best.batch_size:
        best = found
    except DoesNotFitError as refused:
      error = refused
      tried[size] = max(refused.needed, available + 1)
    fits = 'fits' if tried[size] <= available else 'does not fit'
    logging.info('%d rows: %s (%s).', size, fits, _size(tried[size]))
    size = next_batch(tried, available, unit)
  if best is None:
    raise error
  rows = best.batch_size
  text = (
    f'The largest batch found that fits: {rows} rows, {rows // step.parts} per device'
  )
  more = min((size for size in tried if size > rows), default=None)
  if more is not None:
    text += f'; {more} do not ({_size(tried[more])})'
  return best, (
    f'{text}. Sizes compiled: {len(tried)}. Settings that depend on the batch must '
    'follow: the number of steps, and constants like LOSS_NORMALIZING_FACTOR.'
  )


def next_batch(tried: Mapping[int, float], available: float, unit: int) -> int | None:
  """Returns the batch size to try next, a multiple of `unit`.

  Memory grows about linearly with the batch: the line through the two sizes nearest to
  the limit is followed, and sizes known to fit and not to fit close in on it.

  Args:
    tried: bytes needed by batch size; infinite where the compiler did not say.
    available: bytes there are.
    unit: rows by which a batch can grow.

  Returns:
    The size, or None: the answer is known to a unit or to 3 %.
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


# ---- why a step does not fit ---------------------------------------------------

_MOST_LINES = 8  # Arrays that are listed.
_LEAST_SHARE = 0.02  # Of all that is held, for a remedy to be worth naming.


def _is_scores(array):
  # Scores have two lengths as their last axes; projections have heads there.
  return 'atten' in array.where and len(array.shape) > 3 and min(array.shape[-2:]) > 127


def _is_logits(array):
  return any(w in array.where for w in ('logits', 'loss', 'project', '->...v'))


# (name, which arrays, what to change, only in training), the largest savings first.
_REMEDIES: tuple[tuple[str, Callable[[LargeArray], bool], str, bool], ...] = (
  (
    'attention scores',
    _is_scores,
    'attend without storing them, by a kernel of the platform or in chunks '
    "(bart_t5x: network.BartConfig.attention_impl = 'auto' or 'chunked')",
    False,
  ),
  (
    'logits',
    _is_logits,
    'compute the loss of fewer positions at a time (bart_t5x: '
    'model.BartModel.loss_chunk_length)',
    False,
  ),
  (
    'what the backward pass needs',
    lambda array: array.where and not _is_logits(array),
    'recompute more of it (bart_t5x: network.BartConfig.remat_policy = '
    "'attention', 'dots' or, with the least memory, 'full')",
    True,
  ),
  (
    'everything that grows with the batch',
    lambda array: array.where,
    'fewer rows per batch (--find_batch finds how many fit), or for training the same '
    'rows in parts: trainer.Trainer.num_microbatches = 2 halves it',
    False,
  ),
  (
    'parameters and optimizer state',
    lambda array: not array.where,
    'more devices per copy of the model (partitioning.PjitPartitioner.num_partitions)',
    False,
  ),
)


def advice(error: DoesNotFitError, kind: str) -> str:
  """Describes by how much a step does not fit, what it holds and what to change."""
  whole = sum(array.bytes for array in error.held)
  lines = [
    str(error),
    'As traced, before the compiler fuses and shares, a device holds '
    f'{_size(whole)} at the fullest moment (shapes over all devices):',
  ]
  made = [array for array in error.held if array.where]
  listed = [
    (array.bytes, f'{array.count} x {array.dtype}[{",".join(map(str, array.shape))}], '
     f'the first in {_place(array.where)}')
    for array in made[:_MOST_LINES]
  ]  # fmt: skip
  arguments = sum(array.bytes for array in error.held if not array.where)
  listed.append((arguments, 'parameters, optimizer state and the batch'))
  listed.append((sum(array.bytes for array in made[_MOST_LINES:]), 'smaller ones'))
  lines += [f'  {_size(size):>10}  {what}' for size, what in listed if size]
  lines.append('What to change:')
  for name, belongs, change, training in _REMEDIES:
    share = sum(array.bytes for array in error.held if belongs(array))
    if share >= _LEAST_SHARE * whole and (kind == 'train' or not training):
      lines.append(f'  - {name} ({_size(share)}): {change}')
  return '\n'.join(lines)


def _place(where):
  """Without passes and methods, and each module once."""
  # 'jvp(Transformer.hidden)' is a pass, 'Decoder.start' a method; 'd,vd->v' stays.
  parts = [
    p for p in where.split('/') if '->' in p or not re.search(r'[().]|^remat', p)
  ]
  return '/'.join(dict.fromkeys(parts))
