"""The text of XLA's programs, by hand-written lines and programs compiled here."""

import jax
import jax.numpy as jnp
import pytest

from t5x.planning import hlo_text

MODULE = """HloModule jit_f, is_scheduled=true

%fused (p.0: f32[4,200]) -> f32[4,200] {
  %p.0 = f32[4,200]{1,0:T(8,128)} parameter(0)
  ROOT %neg = f32[4,200]{1,0:T(8,128)S(1)} negate(%p.0)
}

ENTRY %main (x: f32[4,200]) -> (f32[4,200], /*index=1*/s32[]) {
  %x = f32[4,200]{1,0:T(8,128)} parameter(0), metadata={op_name="x"}
  %one = s32[]{:T(256)} constant(1)
  %f = f32[4,200]{1,0:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%fused, \
metadata={op_name="jit(f)/neg" stack_frame_id=1}, \
backend_config={"window_config":{"estimated_cycles":"77"}}
  ROOT %out = (f32[4,200]{1,0:T(8,128)S(1)}, /*index=1*/s32[]{:T(256)}) tuple(%f, %one)
}
"""


def test_reads_a_module():
  module = hlo_text.parse(MODULE)
  assert sorted(module.computations) == ['fused', 'main']
  assert module.entry.name == 'main'
  assert list(module.entry.instructions) == ['x', 'one', 'f', 'out']
  root = module.entry.root
  assert (root.opcode, root.operands) == ('tuple', ('f', 'one'))
  assert [shape.dtype for shape in root.shapes] == ['f32', 's32']
  fusion = module.entry.instructions['f']
  assert fusion.called('calls') == 'fused'
  assert fusion.op_name == 'jit(f)/neg'
  assert fusion.config == {'window_config': {'estimated_cycles': '77'}}
  assert module.entry.instructions['one'].config == {}


def test_shapes_are_padded_to_their_tiles():
  instructions = hlo_text.parse(MODULE).entry.instructions
  array, scalar = instructions['x'].shapes[0], instructions['one'].shapes[0]
  assert (array.dims, array.order, array.tile) == ((4, 200), (1, 0), (8, 128))
  assert array.elements == 800
  assert array.bytes == 8 * 256 * 4  # 4 rows in tiles of 8, 200 lanes in tiles of 128
  assert (scalar.dims, scalar.elements, scalar.bytes) == ((), 1, 4)
  assert array.space == 0
  assert instructions['f'].shapes[0].space == 1


def test_the_order_says_which_dimension_is_padded():
  turned = hlo_text.Shape('bf16', (200, 4), order=(0, 1), tile=(8, 128))
  assert turned.bytes == 256 * 8 * 2
  assert hlo_text.Shape('bf16', (200, 4), order=(1, 0), tile=(8, 128)).bytes == (
    200 * 128 * 2
  )


def test_reads_what_this_machine_compiles():
  def f(x):
    return jax.lax.fori_loop(0, 5, lambda i, c: jnp.sin(c @ c), x).sum()

  text = jax.jit(f).lower(jnp.ones((16, 16))).compile().as_text()
  module = hlo_text.parse(text)
  opcodes = [
    i.opcode for c in module.computations.values() for i in c.instructions.values()
  ]
  # Nothing that looks like an instruction was passed over.
  assert len(opcodes) == sum(
    ' = ' in line and line[0] == ' ' for line in text.split('\n') if line
  )
  assert opcodes.count('while') == 1
  for computation in module.computations.values():
    assert computation.root.is_root
    for instruction in computation.instructions.values():
      assert set(instruction.operands) <= set(computation.instructions)


def test_refuses_what_is_no_module():
  with pytest.raises(ValueError, match='no HLO module'):
    hlo_text.parse('module @jit_f { func.func public @main() }')
