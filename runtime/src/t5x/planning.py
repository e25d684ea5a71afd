"""Plans a run's steps by compiling them for devices that need not exist.

`precompile` is the script. Steps are traced with shapes in place of data and state, so
neither corpus nor checkpoint is needed. All figures are
estimates: memory by the compiler; operations, bytes and seconds by XLA's
`cost_analysis()`; traffic between devices by a roofline of the links, not overlapped.

The cost analysis counts the body of a loop once. So operations are multiplied by what
loops add to them in the trace, bytes and seconds by what they add to the cycles that
the TPU compiler estimates for each instruction. Kernels cost what they declare
(`pl.CostEstimate`).
"""

import collections
import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf
from absl import logging
from jax.experimental import topologies as jax_topologies
from jax.extend import core

from t5x import data, data_iterators, inference
from t5x import trainer as trainer_lib

GIB = 2**30


# ---- topologies ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
  """Hardware limits of one JAX device: a core of v2 and v3, a chip from v4."""

  kind: str  # JAX's `device_kind`.
  flops: float  # bfloat16 operations per second.
  hbm_bytes: float  # Available to programs.
  hbm_bandwidth: float  # Bytes per second.
  link_bandwidth: float  # Bytes per second to all neighbours, shared within a chip.
  clock: float  # Cycles per second.


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice as Google Cloud names it; `shape` is libtpu's name, None for CPUs."""

  name: str
  chip: Chip
  shape: str | None
  devices: int
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Peak, HBM and its bandwidth: https://cloud.google.com/tpu/docs/system-architecture and
# the pages of each version; a device of v2 and v3 is half a chip. Available HBM is what
# libtpu 0.0.42 reports when a program does not fit. Clocks and links of v2 and v3:
# Jouppi et al., A Domain-Specific Supercomputer for Training Deep Neural Networks,
# CACM 63(7), 2020 (496 and 656 Gbit/s per link, of which a 2x2 slice connects two); of
# v4: Jouppi et al., ISCA 2023 (six links of 50 GB/s, three connected). Later clocks
# follow from the peak and the size of the matrix units.
_V2 = Chip('TPU v2', 22.9e12, 7.48 * GIB, 350e9, 62e9, 700e6)
_V3 = Chip('TPU v3', 61.6e12, 15.48 * GIB, 450e9, 82e9, 940e6)
_V4 = Chip('TPU v4', 275e12, 30.75 * GIB, 1228e9, 150e9, 1050e6)
_V5E = Chip('TPU v5 lite', 197e12, 15.75 * GIB, 819e9, 100e9, 1500e6)
_V5P = Chip('TPU v5', 459e12, 95.74 * GIB, 2765e9, 300e9, 1750e6)
_V6E = Chip('TPU v6 lite', 918e12, 31.25 * GIB, 1640e9, 224e9, 1750e6)
# Placeholders in the range of two server cores.
_CPU = Chip('cpu', 0.4e12, 16 * GIB, 20e9, 10e9, 3e9)

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
  """Returns the topology of that name; `cpu:N` is N CPU devices."""
  kind, _, count = (name or '').partition(':')
  if kind == 'cpu' and count.isdigit() and int(count):
    return Topology(name, _CPU, None, int(count))
  if name not in TOPOLOGIES:
    raise ValueError(
      f'--topology must be one of {", ".join(TOPOLOGIES)}, or cpu:N. Got: {name}'
    )
  return TOPOLOGIES[name]


def devices_of(topology: Topology) -> Sequence[jax.Device]:
  """Returns the devices of a topology; those of TPUs can only be compiled for.

  Call it before JAX creates its devices: it also sets the number of CPU devices, since
  a program may depend on `jax.device_count()`.
  """
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', topology.devices)
  if topology.shape is None:
    return jax.devices('cpu')
  if not importlib.util.find_spec('libtpu'):
    raise ValueError(
      f'--topology={topology.name} needs the package libtpu, but no TPU: pip install '
      '"jax[tpu]". --topology=cpu:8 works without it.'
    )
  # Otherwise libtpu queries the metadata server of a TPU VM.
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  os.environ['TPU_WORKER_HOSTNAMES'] = 'localhost'
  os.environ['TPU_ACCELERATOR_TYPE'] = topology.name
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  return jax_topologies.get_topology_desc(
    platform='tpu', topology_name=topology.shape, **topology.options
  ).devices


# ---- a run's steps -------------------------------------------------------------

# The argument of `train` that describes the batches of a step.
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
  batch: Mapping[str, jax.ShapeDtypeStruct]
  # The model's loss function, traced without the mesh, and its arguments; None for
  # decoding, whose length depends on the data.
  forward: tuple[Callable[..., Any], tuple[Any, ...]] | None
  parts: int  # Devices that share the batch.
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
    """Trips of loops that depend on data: decoding ends at the last slot."""
    return self.target_tokens // self.rows if self.kind == 'decode' else 1


def batch_spec(
  cfg: data.DatasetConfig, converter_cls: Callable[..., seqio.FeatureConverter]
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes and dtypes of a batch over all hosts; reads no data."""
  provider = data.check_dataset_config(cfg, 1, converter_cls)
  example = {
    name: tf.TensorSpec([None] * feature.rank, feature.dtype)
    for name, feature in provider.output_features.items()
  }
  # The generator is never called.
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
  """Makes a step of a run from the arguments of `train.train`, by name.

  `kind` is train, eval or decode; without a dataset of that kind it takes training's.
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
  step = functools.partial(Step, kind, batch=batch, parts=partitioner.data_mesh_size)
  if kind == 'decode':
    function = inference.partition_step(model.predict_batch_with_aux, partitioner, axes)
    key_shape = jax.ShapeDtypeStruct(key.shape, key.dtype)
    indices = jax.ShapeDtypeStruct((cfg.batch_size,), np.int32)
    shapes = state.params, batch, key_shape, indices, state.flax_mutables
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
  function = getattr(trainer, f'_partitioned_{kind}_step')
  trainer.close()
  forward = functools.partial(model.loss_fn, dropout_rng=key if training else None)
  microbatches = getattr(trainer, '_num_microbatches', None) if training else None
  return step(
    function,
    (state, batch),
    forward=(forward, (state.params, batch)),
    microbatches=microbatches or 1,
  )


# ---- the trace: operations -----------------------------------------------------


def _bodies(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
  """Yields the jaxprs that run as part of an equation."""
  for key, value in params.items():
    # Not rules of differentiation, nor the condition of a loop.
    if key in ('cond_jaxpr', 'fwd_jaxpr_thunk', 'bwd', 'jvp_jaxpr_fun', 'update_jaxpr'):
      continue
    if isinstance(value, core.ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
      yield value


def matmul_flops(jaxpr: core.Jaxpr, loops_once: bool = False) -> float:
  """Counts operations of matrix products, and those that kernels declare.

  Loops count in full or once; a conditional counts as its costliest branch.
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


# ---- the compiled program ------------------------------------------------------

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
  """Costs that XLA's cost analysis does not report."""

  cycles: float = 0  # By the compiler's estimate, without kernels and collectives.
  # Calls of kernels by the (operations, transcendentals, bytes) that one declares.
  kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  sent_bytes: float = 0  # Between devices.
  # Trips by the loop's name; None if they depend on data.
  loops: dict[str, int | None] = dataclasses.field(default_factory=dict)


def read_program(text: str, longest_loop: int = 1, loops_once: bool = False) -> Program:
  """Reads the text of a compiled program (`compiled.as_text()`).

  Loops whose trips depend on data count `longest_loop` times.
  """
  computations, entry, lines = {}, None, []
  for line in text.splitlines():
    if line.startswith(' '):
      lines.append(line)
    elif head := _COMPUTATION.match(line):
      lines = computations[head[2]] = []
      entry = head[2] if head[1] else entry

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
        walk(_called(line, 'body')[0], times if loops_once else times * trips)
      elif opcode in ('call', 'conditional', 'async-start'):
        # All branches of a conditional count.
        for callee in _called(line, r'\w*computations?', 'to_apply', 'calls'):
          walk(callee, times)
      elif 'custom_call_target="tpu_custom_call"' in line:
        cost = _COST.search(line)
        program.kernels[tuple(map(int, cost.groups() if cost else (0, 0, 0)))] += times
      elif _COLLECTIVE.fullmatch(opcode):
        # A ring sends everything twice for a sum, once otherwise.
        twice = 2 if opcode.startswith('all-reduce') else 1
        program.sent_bytes += times * twice * _bytes(shape)
      elif cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
        program.cycles += times * int(cycles[1])

  walk(entry, 1)
  return program


def _called(line, *attributes):
  """Returns the computations that an instruction's attributes name."""
  found = re.findall(
    rf'\b(?:{"|".join(attributes)})=\{{?(%?[\w.\-]+(?:, %[\w.\-]+)*)', line
  )
  return [name.lstrip('%') for names in found for name in names.split(', ')]


def _trip_count(line, computations):
  """Returns the trips of a loop that counts from 0 to a constant, or None."""
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
  """Returns the bytes of all arrays in an instruction's result."""
  total = 0
  for dtype, sizes in re.findall(r'([a-z]+\d*)\w*\[([\d,]*)\]', shapes):
    bits = int(re.sub(r'\D', '', dtype) or 8)
    total += bits // 8 * math.prod(int(size) for size in sizes.split(',') if size)
  return total


# ---- why a step does not fit ---------------------------------------------------

_ALLOCATIONS = 'Largest program allocations'  # Heading in libtpu's message.
_MOST_LINES = 40  # Lines of it that are shown.

_REMEDIES = """What to change:
  - fewer rows per batch (--find_batch finds how many fit), or for training the same
    rows in parts: trainer.Trainer.num_microbatches
  - parameters and optimizer state: more devices per copy of the model,
    partitioning.PjitPartitioner.num_partitions
  - bart_t5x, attention scores: network.BartConfig.attention_impl = 'auto' or 'chunked'
  - bart_t5x, logits: a smaller model.BartModel.loss_chunk_length
  - bart_t5x, arrays for the backward pass: network.BartConfig.remat_policy =
    'attention', 'dots' or, with the least memory, 'full'"""


class DoesNotFitError(ValueError):
  """A program needs more memory than a device has.

  The message says by how much, lists the compiler's largest allocations if it reports
  them, and what to change. `needed` is infinite if the compiler does not report it.
  """

  def __init__(self, needed: float, available: float, allocations: str = ''):
    gib = needed / GIB, available / GIB, (needed - available) / GIB
    text = f'The step needs more than the {gib[1]:.2f} GiB per device.'
    if math.isfinite(needed):
      text = (
        'The step needs {:.2f} GiB per device or more, and {:.2f} GiB are available: '
        '{:.2f} GiB too much.'
      ).format(*gib)
    super().__init__('\n'.join(filter(None, [text, allocations, _REMEDIES])))
    self.needed, self.available = needed, available


# ---- the plan ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
  """Costs of a step, per device unless noted; bytes and seconds."""

  topology: Topology
  step: str
  batch_size: int  # Over all devices.
  target_tokens: int  # Over all devices, padding included.
  steps: int | None  # Of the run.
  arguments: float  # Memory of state and batch.
  temporaries: float  # Memory of results and intermediate arrays.
  code: float  # Memory of the program.
  flops: float  # Recomputation and padding included.
  useful_flops: float  # Products of the forward pass, three times in training.
  bytes_accessed: float  # To and from HBM.
  xla_s: float  # XLA's roofline of each instruction, kernels excluded.
  kernel_s: float  # Roofline of what kernels declare.
  collective_s: float  # Traffic between devices.
  cycles_s: float | None  # By the compiler's cycles, with kernels and traffic.
  longest_loop: int | None  # Assumed trips of loops that depend on data, if any.
  note: str = ''

  @property
  def memory(self) -> float:
    """All memory."""
    return self.arguments + self.temporaries + self.code

  @property
  def estimate_s(self) -> float:
    """Time of a step, by rooflines."""
    return self.xla_s + self.kernel_s + self.collective_s

  def as_numbers(self) -> dict[str, Any]:
    """Returns the contents of `--json`: the fields and figures derived from them."""
    chip, seconds = self.topology.chip, self.estimate_s
    # Hours exclude evaluations and checkpoints.
    return {
      **dataclasses.asdict(self),
      'topology': self.topology.name,
      'devices': self.topology.devices,
      'hbm_gib': self.memory / GIB,
      'hbm_available_gib': chip.hbm_bytes / GIB,
      'estimate_s': seconds,
      'mfu': self.useful_flops / (seconds * chip.flops) or None,
      'tokens_per_s': self.target_tokens / seconds,
      'hours': None if self.steps is None else self.steps * seconds / 3600,
    }

  def table(self) -> str:
    """Returns the plan for the screen."""
    numbers, chip = self.as_numbers(), self.topology.chip
    mfu, hours = numbers['mfu'], numbers['hours']
    rows = [
      ('topology', f'{self.topology.name}: {self.topology.devices} x {chip.kind}'),
      ('step', f'{self.step}, {self.batch_size} rows, {self.target_tokens} targets'),
      ('HBM per device', f'{_size(self.memory)} of {_size(chip.hbm_bytes)}'),
      ('  state and batch', _size(self.arguments)),
      ('  temporaries and code', _size(self.temporaries + self.code)),
      ('FLOPs per device', f'{self.flops / 1e12:.4g} T'),
      ('bytes moved per device', f'{self.bytes_accessed / 1e9:.4g} GB'),
      ('time per step, estimate', f'{self.estimate_s:.4g} s, by rooflines'),
      ('  XLA', f'{self.xla_s:.4g} s'),
      ('  kernels', f'{self.kernel_s:.4g} s'),
      ('  between devices', f'{self.collective_s:.4g} s, not overlapped'),
      ("by the compiler's cycles", f'{self.cycles_s:.4g} s' if self.cycles_s else '-'),
      ('MFU, estimate', f'{mfu:.1%}' if mfu else '-'),
      ('target tokens per second', f'{numbers["tokens_per_s"]:,.0f}, estimate'),
    ]
    if hours is not None:
      rows.append((f'{self.steps:,} steps', f'{hours:.2f} hours, estimate'))
    lines = [f'{name:<26}{value}' for name, value in rows]
    if self.longest_loop is not None:
      lines.append(
        f'Loops that depend on data count as {self.longest_loop} trips, the maximum.'
      )
    if self.topology.shape is None:
      lines.append('On CPUs speeds and memory are placeholders, only for comparison.')
    lines.append('Nothing was run: all figures are estimates.')
    return '\n'.join(filter(None, [*lines, self.note]))


def _size(number):
  gib = number / GIB
  return f'{gib:.2f} GiB' if gib >= 0.1 else f'{gib * 1024:.1f} MiB'


def plan(
  arguments: Mapping[str, Any],
  topology: Topology,
  kind: str = 'train',
  batch_size: int | None = None,
) -> Plan:
  """Compiles a step (see `make_step`) for a topology, whose devices the mesh has.

  Raises:
    DoesNotFitError: the step needs more memory than is available.
  """
  step = make_step(arguments, kind, batch_size)
  steps = arguments.get('relative_steps') or arguments.get('total_steps')
  logging.info(
    'Compiling the %s step of %d rows for %s.', kind, step.rows, topology.name
  )
  traced = step.function.trace(*step.arguments)
  compiled, memory = _compile(traced, topology.chip.hbm_bytes)
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
    **memory,
    useful_flops=useful / topology.devices,
    **_costs(compiled, traced.jaxpr.jaxpr, topology.chip, step.longest_loop),
  )


def _compile(traced, available):
  """Returns the compiled step and its memory by kind, or raises DoesNotFitError."""
  allocations = ''
  try:
    compiled = traced.lower().compile()
    found = compiled.memory_analysis()
    memory = {
      'arguments': found.argument_size_in_bytes,
      'temporaries': found.temp_size_in_bytes
      + found.output_size_in_bytes
      - found.alias_size_in_bytes,
      'code': found.generated_code_size_in_bytes,
    }
    needed = sum(memory.values())
  except jax.errors.JaxRuntimeError as error:
    # The compiler reports these figures only in the message.
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    size = r'([\d.]+)([KMGT]?)'
    found = re.search(rf'Used {size} of {size} hbm', str(error)) or re.search(
      rf'\({size}\) exceeds available HBM \({size}\)', str(error)
    )
    _, header, listed = str(error).partition(_ALLOCATIONS)
    allocations = '\n'.join([header, *listed.splitlines()[:_MOST_LINES]]).strip()
    needed = math.inf
    if found:
      needed, available = (
        float(number) * 1024 ** ' KMGT'.index(unit or ' ')
        for number, unit in (found.groups()[:2], found.groups()[2:])
      )
  if needed <= available:
    return compiled, memory
  raise DoesNotFitError(needed, available, allocations)


def _costs(compiled, jaxpr, chip, longest_loop):
  """Returns the costs of a compiled program, loops in full, as fields of Plan."""
  text, analysis = compiled.as_text(), compiled.cost_analysis() or {}
  program, once = read_program(text, longest_loop), read_program(text, loops_once=True)
  flops_once = matmul_flops(jaxpr, loops_once=True)
  by_flops = matmul_flops(jaxpr) / flops_once if flops_once else 1.0
  by_cycles = program.cycles / once.cycles if once.cycles else by_flops  # CPUs: none.

  def of_kernels(program, cost):
    return sum(calls * cost(*costs) for costs, calls in program.kernels.items())

  def roofline(flops, transcendentals, moved):
    return max(
      flops / chip.flops,
      transcendentals / (1024 * chip.clock),  # XLA: one per lane and cycle.
      moved / chip.hbm_bandwidth,
    )

  def without_kernels(name, cost):
    return max(analysis.get(name, 0.0) - of_kernels(once, cost), 0.0) * by_cycles

  def moved(*cost):
    return cost[2]

  flops = analysis.get('flops', 0.0) * by_flops
  moved_bytes = without_kernels('bytes accessed', moved) + of_kernels(program, moved)
  xla_s = without_kernels('optimal_seconds', roofline)
  kernel_s = of_kernels(program, roofline)
  collective_s = program.sent_bytes / chip.link_bandwidth
  cycles_s = program.cycles / chip.clock
  return {
    'flops': flops,
    'bytes_accessed': moved_bytes,
    # On CPUs XLA has no estimate.
    'xla_s': xla_s or roofline(flops, 0.0, moved_bytes),
    'kernel_s': kernel_s,
    'collective_s': collective_s,
    'cycles_s': cycles_s + kernel_s + collective_s if cycles_s else None,
    'longest_loop': longest_loop if None in program.loops.values() else None,
  }


# ---- the largest batch ---------------------------------------------------------


def find_batch(
  arguments: Mapping[str, Any], topology: Topology, kind: str = 'train'
) -> Plan:
  """Returns the plan of the largest batch that fits, within 3 % or a row per device.

  Raises:
    DoesNotFitError: not even one row per device fits.
  """
  step = make_step(arguments, kind)
  size, unit = step.rows, step.parts * step.microbatches
  available = topology.chip.hbm_bytes
  tried, best, error = {}, None, None
  while size is not None and len(tried) < 10:  # Each may take minutes.
    try:
      found = plan(arguments, topology, kind, size)
      tried[size] = found.memory
      if best is None or size > best.batch_size:
        best = found
    except DoesNotFitError as too_large:
      error = too_large
      tried[size] = max(too_large.needed, available + 1)
    fits = 'fits' if tried[size] <= available else 'does not fit'
    logging.info('%d rows: %s (%s).', size, fits, _size(tried[size]))
    size = next_batch(tried, available, unit)
  if best is None:
    raise error
  rows = best.batch_size
  note = (
    f'Largest batch that fits: {rows} rows, {rows // step.parts} per device. Adapt the '
    'settings that depend on it: TRAIN_STEPS, LOSS_NORMALIZING_FACTOR.'
  )
  return dataclasses.replace(best, note=note)


def next_batch(tried: Mapping[int, float], available: float, unit: int) -> int | None:
  """Returns the next batch size to try, a multiple of `unit`, or None at the end.

  Memory is about linear in the batch, so it follows the line through the two sizes
  nearest to the limit. `tried` maps sizes to bytes, infinite if unknown.
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
