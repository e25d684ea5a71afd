"""Costs of programs, against XLA's own analysis and against counting by hand."""

import jax
import jax.numpy as jnp
import pytest

from t5x.planning import hlo_costs, hlo_text


def compiled(function, *shapes):
  return (
    jax.jit(function)
    .lower(*(jax.ShapeDtypeStruct(s, 'float32') for s in shapes))
    .compile()
  )


def account(program, **options):
  return hlo_costs.account(hlo_text.parse(program.as_text()), **options)


def test_products_count_as_xla_counts_them():
  def f(x, w, y):
    return jnp.einsum('bid,df->bif', x, w), jnp.einsum('bid,bjd->bij', x, y)

  program = compiled(f, (4, 16, 32), (32, 48), (4, 8, 32))
  expected = 2 * 4 * 16 * 32 * 48 + 2 * 4 * 16 * 8 * 32
  assert account(program).total('flops') == expected
  assert program.cost_analysis()['flops'] == pytest.approx(expected, rel=0.02)


def test_loops_count_in_full():
  def body(c, w):
    return jnp.tanh(c @ w), None

  def looped(x, w):
    return jax.lax.scan(body, x, w)[0]

  def unrolled(x, w):
    return jax.lax.scan(body, x, w, unroll=True)[0]

  shapes = (64, 64), (6, 64, 64)
  loop, flat = account(compiled(looped, *shapes)), account(compiled(unrolled, *shapes))
  assert list(loop.loops.values()) == [6]
  assert not flat.loops
  assert loop.total('flops') == flat.total('flops') == 6 * 2 * 64**3
  assert loop.total('flops', once=True) == 2 * 64**3
  # What XLA says counts the body once.
  assert compiled(looped, *shapes).cost_analysis()['flops'] < 2.2 * 2 * 64**3
  # Each trip reads its own w of the six, not all of them.
  assert loop.total('bytes') < 2 * flat.total('bytes')


def test_a_loop_of_unknown_length_counts_as_told():
  def f(x):
    return jax.lax.while_loop(lambda c: c[0, 0] < 10, lambda c: c @ c, x)

  program = compiled(f, (8, 8))
  assert list(account(program).loops.values()) == [None]
  assert account(program).total('flops') == 2 * 8**3
  assert account(program, unknown_trips=5).total('flops') == 5 * 2 * 8**3


# A batched product as the TPU's compiler writes it: batch dimensions are windows that
# are nearly all padding. From a program for v3.
CONVOLUTION = """HloModule m

ENTRY %main (q: bf16[2,16,8,3], k: bf16[2,16,8,3]) -> f32[2,3,16,16] {
  %q = bf16[2,3,16,8]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[2,3,16,8]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = f32[2,3,16,16]{3,2,1,0:T(8,128)} convolution(%q, %k), \
window={size=2x3 stride=1x2 lhs_dilate=2x3}, dim_labels=01bf_01oi->01bf, \
backend_config={"window_config":{"estimated_cycles":"120"}}
}
"""


def test_padding_of_windows_does_not_count():
  found = hlo_costs.account(hlo_text.parse(CONVOLUTION))
  assert found.total('flops') == 2 * (2 * 3) * 16 * 16 * 8
  assert found.total('cycles') == 120
  # Lanes are padded to 128.
  assert found.total('bytes') == 2 * (2 * 3 * 16 * 128 * 2) + 2 * 3 * 16 * 128 * 4


KERNEL = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %k = f32[8,128]{1,0:T(8,128)} custom-call(%x), custom_call_target="tpu_custom_call"
  %b = f32[8,128]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %r = f32[8,128]{1,0:T(8,128)} all-reduce(%k), to_apply=%add
}
"""


def test_kernels_and_traffic_are_told_apart():
  items = hlo_costs.account(hlo_text.parse(KERNEL)).items
  assert [i.instruction.name for i in items if i.is_kernel] == ['k']
  assert [i.instruction.name for i in items if i.is_collective] == ['r']
  assert [i.instruction.name for i in items] == ['k', 'r']
