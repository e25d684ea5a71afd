"""Trips of loops: as this machine's compiler notes them, and as TPUs' programs tell."""

import jax
import jax.numpy as jnp
import pytest

from t5x.planning import hlo_loops, hlo_text


def trips(text):
  """Trips of every loop, by name."""
  module = hlo_text.parse(text)
  return {
    instruction.name: hlo_loops.trip_count(module, computation, instruction)
    for computation in module.computations.values()
    for instruction in computation.instructions.values()
    if instruction.opcode == 'while'
  }


@pytest.mark.parametrize('length', [1, 2, 7, 100])
@pytest.mark.parametrize('reverse', [False, True])
def test_scans(length, reverse):
  def f(x):
    def body(c, y):
      return jnp.sin(c) * y, c

    return jax.lax.scan(body, x, jnp.ones((length, 4)), reverse=reverse)

  text = jax.jit(f).lower(jnp.ones(4)).compile().as_text()
  found = trips(text)
  # XLA writes a loop of one trip out.
  assert list(found.values()) == ([] if length == 1 else [length])


def test_a_loop_in_a_loop():
  def five_times(x):
    return jax.lax.fori_loop(2, 7, lambda i, c: jnp.sin(c), x)

  def f(x):
    return jax.lax.fori_loop(0, 3, lambda i, c: five_times(c), x)

  text = jax.jit(f).lower(jnp.ones(4)).compile().as_text()
  assert sorted(trips(text).values()) == [3, 5]


def test_a_loop_over_data_is_not_known():
  def f(x):
    return jax.lax.while_loop(lambda c: c.sum() < 10, lambda c: c * 2, x)

  assert list(trips(jax.jit(f).lower(jnp.ones(4)).compile().as_text()).values()) == [
    None
  ]


LOOP = """HloModule m

%step (a: s32[], b: s32[]) -> s32[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %s = s32[] {operation}(%a, %b)
}}

%body (p: (s32[], s32[], s32[])) -> (s32[], s32[], s32[]) {{
  %p = (s32[], s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %k = s32[] get-tuple-element(%p), index=2
  %by = s32[] constant({by})
  %next = s32[] fusion(%i, %by), kind=kLoop, calls=%step
  ROOT %t = (s32[], s32[], s32[]) tuple(%next, %n, %k)
}}

%test (p.1: (s32[], s32[], s32[])) -> pred[] {{
  %p.1 = (s32[], s32[], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n.1 = s32[] get-tuple-element(%p.1), index=1
  ROOT %c = pred[] compare(%i.1, %n.1), direction={direction}
}}

ENTRY %main (x: s32[]) -> s32[] {{
  %x = s32[] parameter(0)
  %from = s32[] constant({start})
  %start = s32[] copy(%from)
  %bound = s32[] constant({bound})
  %t.1 = (s32[], s32[], s32[]) tuple(%start, %bound, %x)
  %loop = (s32[], s32[], s32[]) while(%t.1), condition=%test, body=%body
  ROOT %r = s32[] get-tuple-element(%loop), index=2
}}
"""


@pytest.mark.parametrize(
  ('start', 'bound', 'direction', 'operation', 'by', 'expected'),
  [
    (0, 10, 'LT', 'add', 1, 10),
    (0, 10, 'LE', 'add', 1, 11),
    (0, 10, 'LT', 'add', 4, 3),
    (0, 8, 'LE', 'add', 4, 3),
    (9, 0, 'GE', 'add', -1, 10),
    (9, 0, 'GT', 'subtract', 3, 3),
    (5, 5, 'LT', 'add', 1, 0),
  ],
)
def test_bounds_that_are_carried_and_steps_in_fusions(
  start, bound, direction, operation, by, expected
):
  text = LOOP.format(
    start=start, bound=bound, direction=direction, operation=operation, by=by
  )
  # By the definition: run it.
  counter, count = start, 0
  holds = {
    'LT': int.__lt__, 'LE': int.__le__, 'GT': int.__gt__, 'GE': int.__ge__
  }[direction]  # fmt: skip
  while holds(counter, bound):
    counter += by if operation == 'add' else -by
    count += 1
  assert count == expected
  assert trips(text) == {'loop': expected}
