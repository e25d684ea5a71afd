"""Plans of steps: costs and memory counted by hand, programs compared with a run's."""

import dataclasses
import functools
import importlib.util
import math
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x import data, planning, restore

GIB = planning.GIB
CPUS = planning.find_topology('cpu:8')


@pytest.fixture
def arguments(tmp_path):
  defaults = {
    'random_seed': 0,
    'use_hardware_rng': False,
    'train_state_initializer_cls': restore.TrainStateInitializer,
  }
  return {**defaults, **tiny.train_arguments(tmp_path, total_steps=500)}


# ---- topologies ----------------------------------------------------------------


def test_topology_names():
  assert planning.find_topology('v3-8').chip.kind == 'TPU v3'
  assert planning.find_topology('cpu:3').devices == 3
  for wrong in ('v3', 'v9-8', 'cpu:0', 'cpu:', 'gpu:2', '', None):
    with pytest.raises(ValueError, match=f'v3-8.*Got: {wrong}'):
      planning.find_topology(wrong)


# Memory in libtpu 0.0.50 (Python 3.12) where it differs from 0.0.42.
_SINCE = {'v5p-8': '95.73G', 'v6e-8': '31.24G'}


@pytest.mark.tpu
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='needs libtpu')
@pytest.mark.parametrize('name', planning.TOPOLOGIES)
def test_chips_are_as_libtpu_reports_them(name, monkeypatch):
  monkeypatch.setattr(jax.config, 'update', lambda *_: None)  # Devices exist.
  topology = planning.TOPOLOGIES[name]
  devices = planning.devices_of(topology)
  assert len(devices) == topology.devices
  assert {device.device_kind for device in devices} == {topology.chip.kind}
  assert {device.process_index for device in devices} == {0}
  whole = NamedSharding(Mesh(devices, ('data',)), PartitionSpec())
  total = jax.jit(lambda x: x.sum(), in_shardings=whole, out_shardings=whole)
  too_much = jax.ShapeDtypeStruct((200, 2**28), 'float32')
  available = f'{topology.chip.hbm_bytes / GIB:.2f}G'
  if not metadata.version('libtpu').startswith('0.0.42.'):
    available = _SINCE.get(name, available)
  with pytest.raises(Exception, match=rf'exceeds available HBM \({available}\)'):
    total.lower(too_much).compile()


# ---- a run's steps -------------------------------------------------------------


@pytest.mark.parametrize('pack', [False, True])
def test_batch_spec_has_the_shapes_of_the_data(arguments, pack):
  cfg = dataclasses.replace(arguments['train_dataset_cfg'], pack=pack)
  converter = arguments['model'].FEATURE_CONVERTER_CLS
  real = data.get_dataset(cfg, 0, 1, converter).element_spec
  planned = planning.batch_spec(cfg, converter)
  assert {k: (v.shape, v.dtype) for k, v in planned.items()} == {
    k: (tuple(v.shape), v.dtype.as_numpy_dtype) for k, v in real.items()
  }


@pytest.mark.parametrize('kind', ['train', 'eval'])
def test_planned_program_is_the_trainers(arguments, kind):
  step = planning.make_step(arguments, kind)
  planned = step.function.trace(*step.arguments).lower().as_text()

  # As in a run: real data, a real state, a Trainer.
  cfg, partitioner = arguments['train_dataset_cfg'], arguments['partitioner']
  model = arguments['model']
  rows = data.get_dataset(cfg, 0, 1, model.FEATURE_CONVERTER_CLS)
  batch = next(rows.as_numpy_iterator())
  initializer = restore.TrainStateInitializer(
    model.optimizer_def,
    model.get_initial_variables,
    {name: x.shape for name, x in batch.items()},
    partitioner,
    {name: x.dtype for name, x in batch.items()},
  )
  init_key, train_key = jax.random.split(jax.random.PRNGKey(0))
  with arguments['trainer_cls'](
    model=model,
    train_state=initializer.from_scratch(init_key),
    partitioner=partitioner,
    train_state_axes=initializer.train_state_axes,
    eval_names=(),
    summary_dir=None,
    rng=train_key,
  ) as real:
    function = (
      real._partitioned_train_step if kind == 'train' else real._partitioned_eval_step
    )
    batch = real._on_devices(batch)
    assert function.lower(real.train_state, batch).as_text() == planned


def test_decode_step_runs(arguments):
  step = planning.make_step(arguments, 'decode')
  state, batch, key, _, mutables = step.arguments

  def zeros(tree):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)

  found, (predictions, aux) = step.function(
    zeros(state), zeros(batch), zeros(key), np.arange(step.rows, dtype=np.int32),
    mutables,
  )  # fmt: skip
  assert found.tolist() == list(range(step.rows))
  assert predictions.shape == (step.rows, tiny.LENGTHS['targets'])
  assert 'scores' in aux
  assert step.longest_loop == tiny.LENGTHS['targets']


# ---- operations ----------------------------------------------------------------


def flops(function, *arguments, **kwargs):
  return planning.matmul_flops(jax.make_jaxpr(function)(*arguments).jaxpr, **kwargs)


def test_flops_of_loops_branches_and_functions():
  def f(x, w):
    def body(c, _):
      return jax.checkpoint(lambda c: jnp.tanh(c @ w))(c), None

    x, _ = jax.lax.scan(body, x, None, length=5)
    x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x, x)
    return jax.jit(lambda x: x @ w)(x)

  # 5 in the loop, 2 in the costlier branch, 1 in the function.
  arrays, product = (jnp.ones((4, 8)), jnp.ones((8, 8))), 2 * 4 * 8 * 8
  assert flops(f, *arrays) == 8 * product
  assert flops(f, *arrays, loops_once=True) == 4 * product


def test_custom_gradient_counts_once():
  @jax.custom_vjp
  def f(x):
    return x @ x

  f.defvjp(lambda x: (x @ x @ x, x), lambda x, g: (g @ x @ x,))
  assert flops(f, jnp.ones((8, 8))) == 2 * 8**3


def test_flops_of_batched_products():
  x, y = jnp.ones((2, 6, 3, 4)), jnp.ones((2, 5, 3, 4))
  found = flops(lambda x, y: jnp.einsum('bqhd,bkhd->bhqk', x, y), x, y)
  assert found == 2 * (2 * 3 * 6 * 5 * 4)


def test_sharded_function_counts_over_all_devices():
  mesh, rows = Mesh(jax.devices(), ('data',)), PartitionSpec('data')
  f = jax.shard_map(
    lambda x, w: x @ w, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows
  )
  assert flops(f, jnp.ones((16, 4)), jnp.ones((4, 4))) == 2 * 16 * 4 * 4


@pytest.mark.parametrize('declared', [77, None])
def test_kernels_count_what_they_declare(declared):
  def kernel(x, out):
    out[...] = -x[...]

  cost = declared and pl.CostEstimate(declared, transcendentals=0, bytes_accessed=0)

  def negated(x):
    return pl.pallas_call(kernel, x, cost_estimate=cost)(x)

  assert flops(negated, jnp.ones((8, 128))) == (declared or 0)


# ---- compiled programs ---------------------------------------------------------


def loops(function, *arguments):
  text = jax.jit(function).lower(*arguments).compile().as_text()
  return sorted(planning.read_program(text).loops.values(), key=str)


def test_trips_of_loops():
  def repeated(x, times):
    return jax.lax.fori_loop(0, times, lambda i, c: jnp.sin(c), x)

  def nested(x):
    return jax.lax.fori_loop(0, 3, lambda i, c: repeated(c, 5), x)

  def until(x):
    return jax.lax.while_loop(lambda c: c.sum() < 10, lambda c: c * 2, x)

  assert loops(lambda x: repeated(x, 7), jnp.ones(4)) == [7]
  assert loops(nested, jnp.ones(4)) == [3, 5]
  assert loops(until, jnp.ones(4)) == [None]


PROGRAM = """HloModule m

%fused (a.1: f32[8,4]) -> f32[8,4] {
  %a.1 = f32[8,4]{1,0:T(8,128)} parameter(0)
  ROOT %s = f32[8,4]{1,0:T(8,128)} sine(%a.1), backend_config={"estimated_cycles":"9"}
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[]{:T(256)}, /*index=1*/f32[8,4]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,4]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %f = f32[8,4]{1,0} fusion(%x), calls=%fused, backend_config={"estimated_cycles":"100"}
  %flash.3 = f32[8,4]{1,0} custom-call(%f), custom_call_target="tpu_custom_call", \
backend_config={"cost_estimate":{"flops":"5","transcendentals":"6","bytes_accessed":"7"}}
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %flash.3)
}

%bound (q: s32[]) -> pred[] {
  %q = s32[]{:T(256)} parameter(0)
  %c = s32[]{:T(256)} constant(32)
  ROOT %lt = pred[]{:T(1024)} compare(%q, %c), direction=LT, metadata={op_name="lt"}
}

%test (p.1: (s32[], f32[8,4])) -> pred[] {
  %p.1 = (s32[]{:T(256)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(256)} get-tuple-element(%p.1), index=0
  ROOT %r = pred[]{:T(1024)} fusion(%i.1), kind=kLoop, calls=%bound
}

ENTRY %main (x.1: f32[8,4]) -> f32[8,4] {
  %x.1 = f32[8,4]{1,0:T(8,128)} parameter(0), backend_config={"estimated_cycles":"1"}
  %t.1 = (s32[], f32[8,4]{1,0}) tuple(%zero, %x.1)
  %loop = (s32[], f32[8,4]{1,0}) while(%t.1), condition=%test, body=%body
  %sum = (f32[8,4]{1,0}, bf16[8]{0}) all-reduce(%y, %z), to_apply=%fused
  ROOT %g = f32[64,4]{1,0} all-gather(%sum), dimensions={0}
}
"""


@pytest.mark.parametrize(('loops_once', 'times'), [(False, 32), (True, 1)])
def test_costs_of_a_tpu_program(loops_once, times):
  found = planning.read_program(PROGRAM, loops_once=loops_once)
  assert found.loops == {'loop': 32}
  assert found.cycles == 1 + times * 100
  assert found.kernels == {(5, 6, 7): times}
  assert found.sent_bytes == 2 * (8 * 4 * 4 + 8 * 2) + 64 * 4 * 4


def test_loops_over_data_count_as_the_longest():
  text = PROGRAM.replace('constant(32)', 'parameter(1)')
  found = planning.read_program(text, longest_loop=10)
  assert found.loops == {'loop': None}
  assert found.cycles == 1001


# ---- plans ---------------------------------------------------------------------


class Jitted:
  """A function with the interface of a partitioned one."""

  def __init__(self, function):
    self.trace = jax.jit(function).trace


def plan_function(monkeypatch, function, *shapes, forward=None, topology=CPUS):
  given = tuple(jax.ShapeDtypeStruct(shape, 'float32') for shape in shapes)
  batch = {'targets': jax.ShapeDtypeStruct((8, 1), 'int32')}
  made = planning.Step(
    'train', Jitted(function), given, batch, forward and (forward, given), 8
  )
  monkeypatch.setattr(planning, 'make_step', lambda *_: made)
  return planning.plan({}, topology)


def test_recomputation_counts_but_is_not_useful(monkeypatch):
  def forward(x, w):
    def layer(c, _):
      return jnp.tanh(c @ w), None

    return jax.lax.scan(jax.checkpoint(layer), x, None, length=4)[0].sum()

  step = jax.value_and_grad(forward, argnums=(0, 1))
  found = plan_function(monkeypatch, step, (64, 64), (64, 64), forward=forward)
  product = 2 * 64**3
  assert found.useful_flops * 8 == 3 * 4 * product
  # Four forward, four recomputed, eight backward; XLA counts elementwise ones too.
  assert 16 * product <= found.flops < 16.5 * product
  assert found.longest_loop is None
  assert found.flops / CPUS.chip.flops <= found.estimate_s
  assert found.arguments == 2 * 64 * 64 * 4
  assert found.cycles_s is None


@pytest.mark.parametrize(
  ('message', 'expected'),
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
      'temporaries (40.50G) exceeds available HBM (15.48G).',
      (40.5 * 2**30, 15.48 * 2**30),
    ),
    (
      'RESOURCE_EXHAUSTED: Used 16.00G of 512.0M hbm. Exceeded\n\n'
      '  Largest program allocations in hbm:\n\n  1. Size: 4.00G\n',
      (2**34, 2**29),
    ),
    ('RESOURCE_EXHAUSTED: no more', (math.inf, CPUS.chip.hbm_bytes)),
  ],
)
def test_memory_errors_of_the_compiler(monkeypatch, message, expected):
  def fail(self, *_, **__):
    raise jax.errors.JaxRuntimeError(message)

  monkeypatch.setattr(jax.stages.Lowered, 'compile', fail)
  with pytest.raises(planning.DoesNotFitError) as caught:
    plan_function(monkeypatch, jnp.sin, (4,))
  assert (caught.value.needed, caught.value.available) == expected
  assert ('Size: 4.00G' in str(caught.value)) == ('Size: 4.00G' in message)


PLAN = planning.Plan(
  planning.find_topology('v3-8'), 'train', 256, 262144, 9000, 2 * GIB, 5 * GIB, GIB / 2,
  30e12, 24.64e12, 45e9, 0.5, 0.25, 0.05, 0.9, 3,
)  # fmt: skip


def test_numbers_and_table():
  found = PLAN.as_numbers()
  assert found['hbm_gib'] == 7.5
  assert found['estimate_s'] == pytest.approx(0.8)
  assert found['mfu'] == pytest.approx(24.64 / 0.8 / 61.6)
  assert found['tokens_per_s'] == pytest.approx(262144 / 0.8)
  assert found['hours'] == pytest.approx(9000 * 0.8 / 3600)
  text = PLAN.table()
  for part in ('7.50 GiB of 15.48 GiB', '0.8 s', '50.0%', '2.00 hours, estimate'):
    assert part in text, text
  assert 'count as 3 trips' in text


# ---- the largest batch ---------------------------------------------------------


@pytest.fixture
def memory_of_rows(monkeypatch):
  """Steps take a GiB and 0.1 GiB per row; returns the sizes tried."""
  tried = []

  def plan(arguments, topology, kind, rows):
    tried.append(rows)
    needed = (1 + 0.1 * rows) * GIB
    if needed > topology.chip.hbm_bytes:
      raise planning.DoesNotFitError(needed, topology.chip.hbm_bytes)
    return dataclasses.replace(
      PLAN, batch_size=rows, arguments=GIB, temporaries=needed - GIB, code=0
    )

  monkeypatch.setattr(planning, 'plan', plan)
  return tried


def test_largest_batch(arguments, memory_of_rows):
  best = planning.find_batch(arguments, CPUS)
  # 16 GiB hold 150 rows, and eight devices take multiples of eight.
  assert best.batch_size == 144
  assert len(memory_of_rows) <= 5
  assert '144 rows, 18 per device' in best.table()


def test_largest_batch_divides_by_its_microbatches(arguments, memory_of_rows):
  cut = functools.partial(arguments['trainer_cls'], num_microbatches=5)
  own = tiny.dataset_config('train', batch_size=40)
  changed = {**arguments, 'trainer_cls': cut, 'train_dataset_cfg': own}
  assert planning.find_batch(changed, CPUS).batch_size == 120
  assert all(rows % 40 == 0 for rows in memory_of_rows)


def test_no_batch_fits(arguments, memory_of_rows):
  chip = dataclasses.replace(CPUS.chip, hbm_bytes=GIB)
  with pytest.raises(planning.DoesNotFitError, match='0.80 GiB too much'):
    planning.find_batch(arguments, dataclasses.replace(CPUS, chip=chip))


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
@pytest.mark.parametrize('reported', [False, True])
def test_search_ends_at_the_largest_batch(
  per_row, fixed, available, start, unit, reported
):
  def needed(size):
    # Not quite linear, like programs with padding.
    total = fixed + per_row * size + (size > 40) * 13
    return total if total <= available or reported else math.inf

  tried, size = {}, start
  while size is not None:
    assert size % unit == 0 and size > 0 and size not in tried
    tried[size] = needed(size)
    size = planning.next_batch(tried, available, unit)
  fits = [s for s, n in tried.items() if n <= available]
  sizes = range(unit, 20_000, unit)
  largest = max((s for s in sizes if needed(s) <= available), default=0)
  assert max(fits, default=0) >= 0.97 * largest - unit
  assert len(tried) <= 12
