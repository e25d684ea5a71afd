"""What functions hold at their fullest moment, worked out by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from t5x.planning import live_arrays

WIDTH = 16
SQUARE = WIDTH * WIDTH * 4


def held(function, *arguments, size_of=live_arrays.size_on_one_device):
  jaxpr = jax.jit(function).trace(*arguments).jaxpr.jaxpr
  return live_arrays.fullest_moment(jaxpr, size_of)


def made(arrays):
  """(shape, dtype, count) of all but arguments."""
  return {(a.shape, a.dtype, a.count) for a in arrays if a.where}


x = jnp.ones((WIDTH, WIDTH))


def test_arguments_are_always_there():
  (only,) = held(lambda x, y: (x * y).sum() * 0 + 1, x, x)[:1]
  assert (only.shape, only.count, only.where, only.total) == (
    (WIDTH, WIDTH), 2, '', 2 * SQUARE
  )  # fmt: skip


def test_what_is_needed_later_is_held_and_what_is_not_is_let_go():
  def chain(x):
    for _ in range(5):
      x = x @ x
    return x

  def kept(x):
    products = [x]
    for _ in range(5):
      products.append(products[-1] @ x)
    return sum(p @ q for p, q in zip(products, reversed(products), strict=True))

  # A product and what it is made of.
  assert made(held(chain, x)) == {((WIDTH, WIDTH), 'float32', 2)}
  # Six more products are summed one by one; the fifth of the chain is there for both.
  ((_, _, count),) = made(held(kept, x))
  assert 6 <= count <= 11


def test_elementwise_results_are_computed_again_from_their_sources():
  def f(x):
    for _ in range(4):
      x = jnp.tanh(x @ x)
    return x.sum()

  # By layer what the next product reads, of which tanh's slope is made too; and the
  # gradient on its way from one layer to the one before.
  ((shape, dtype, count),) = made(held(jax.grad(f), x))
  assert (shape, dtype) == ((WIDTH, WIDTH), 'float32')
  assert count == 6
  # Dropout's bits are nowhere.
  bits = held(lambda x: jnp.where(jnp.arange(WIDTH) % 3 > 1, x @ x, 0) @ x, x)
  assert {a.dtype for a in bits} == {'float32'}


def test_recomputation_holds_less():
  def f(x, wrap):
    for _ in range(20):
      x = wrap(lambda x: jnp.tanh(jnp.tanh(x @ x) @ x))(x)
    return x.sum()

  def total(wrap):
    return sum(a.total for a in held(jax.grad(lambda x: f(x, wrap)), x))

  plain, again = total(lambda layer: layer), total(jax.checkpoint)
  # What each product reads, two a layer, against one a layer and the insides of one;
  # the argument among them. Beside it what flows back.
  assert 40 * SQUARE <= plain <= 44 * SQUARE
  assert 20 * SQUARE <= again <= 27 * SQUARE


def test_loops_hold_what_they_stack():
  def f(x):
    return jax.lax.scan(lambda c, _: (c @ x, c), x, None, length=7)[1]

  assert ((7, WIDTH, WIDTH), 'float32', 1) in made(held(f, x))


def test_the_largest_come_first_and_say_where_they_are_made():
  def f(x):
    with jax.named_scope('outer'):
      scores = jnp.einsum('ij,kl->ijkl', x, x)
    return jnp.einsum('ijkl,kl->ij', scores, x @ x)

  arrays = held(f, x)
  assert arrays[0].shape == (WIDTH,) * 4
  assert arrays[0].where.startswith('outer/')
  totals = [a.total for a in arrays]
  assert totals == sorted(totals, reverse=True)


def test_sizes_are_those_of_one_device():
  """A part of what is split; where each device has its part already, all of that."""
  mesh = jax.make_mesh((8,), ('data',), (jax.sharding.AxisType.Auto,))
  rows = PartitionSpec('data')

  def local(x):
    return (x @ x.T) @ x

  f = jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows)

  def size_of(shape, dtype):
    return live_arrays.size_on_one_device(shape, dtype) / 8

  found = {a.shape: a.bytes for a in held(f, jnp.ones((512, WIDTH)), size_of=size_of)}
  assert found[512, WIDTH] == 512 * WIDTH * 4 / 8
  assert found[64, 64] == 64 * 64 * 4


@pytest.mark.parametrize('argument', [jnp.zeros(3, 'int32'), jax.random.key(0)])
def test_keys_and_gradients_of_integers_take_no_room(argument):
  def f(x, argument):
    if argument.dtype == jnp.int32:
      return x[argument].sum()
    return (x * jax.random.uniform(argument, x.shape)).sum()

  differentiated = 0 if argument.dtype != jnp.int32 else (0, 1)
  gradient = jax.grad(f, argnums=differentiated, allow_int=True)
  assert all(a.bytes > 0 for a in held(gradient, x, argument))
