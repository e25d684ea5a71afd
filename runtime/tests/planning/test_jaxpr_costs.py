"""Operations of traced functions, counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec

from t5x.planning import jaxpr_costs


def test_products_in_loops_branches_and_functions():
  def f(x, w):
    def body(c, _):
      return jax.checkpoint(lambda c: jnp.tanh(c @ w))(c), None

    x, _ = jax.lax.scan(body, x, None, length=5)
    x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x, x)
    return jax.jit(lambda x: x @ w)(x)

  # 5 in the loop, 2 in the dearer branch, 1 in the function.
  assert jaxpr_costs.matmul_flops(f, jnp.ones((4, 8)), jnp.ones((8, 8))) == (
    8 * 2 * 4 * 8 * 8
  )


def test_a_custom_gradient_counts_once():
  @jax.custom_vjp
  def f(x):
    return x @ x

  f.defvjp(lambda x: (x @ x @ x, x), lambda x, g: (g @ x @ x,))
  assert jaxpr_costs.matmul_flops(f, jnp.ones((8, 8))) == 2 * 8**3


def test_batched_products_and_convolutions():
  def f(x, y, image, kernel):
    return jnp.einsum('bqhd,bkhd->bhqk', x, y), jax.lax.conv(
      image, kernel, (1, 1), 'SAME'
    )

  shapes = (2, 6, 3, 4), (2, 5, 3, 4), (1, 3, 9, 9), (7, 3, 3, 3)
  found = jaxpr_costs.matmul_flops(f, *map(jnp.ones, shapes))
  assert found == 2 * (2 * 3 * 6 * 5 * 4) + 2 * (7 * 9 * 9) * (3 * 3 * 3)


def test_a_sharded_function_counts_over_all_devices():
  mesh = Mesh(jax.devices(), ('data',))
  rows = PartitionSpec('data')
  f = jax.shard_map(
    lambda x, w: x @ w, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows
  )
  assert jaxpr_costs.matmul_flops(f, jnp.ones((16, 4)), jnp.ones((4, 4))) == (
    2 * 16 * 4 * 4
  )


def product(dtype, precision=None):
  """A kernel over a grid of 2 x 3: blocks of 16 x 64 by 64 x 64, and a negation."""

  def kernel(x, w, out):
    out[...] = -jax.lax.dot(x[...], w[...], precision=precision)

  return pl.pallas_call(
    kernel,
    grid=(2, 3),
    in_specs=[
      pl.BlockSpec((16, 64), lambda i, j: (i, 0)),
      pl.BlockSpec((64, 64), lambda i, j: (0, j)),
    ],
    out_specs=pl.BlockSpec((16, 64), lambda i, j: (i, j)),
    out_shape=jax.ShapeDtypeStruct((32, 192), dtype),
    name='product',
  )


@pytest.mark.parametrize(
  ('dtype', 'precision', 'passes'),
  [
    ('bfloat16', None, 1),
    ('float32', None, 1),
    ('float32', jax.lax.Precision.HIGHEST, 6),
  ],
)
def test_kernels(dtype, precision, passes):
  def f(x, w):
    return jax.lax.map(lambda x: product(dtype, precision)(x, w), x)

  x, w = jnp.ones((5, 32, 64), dtype), jnp.ones((64, 192), dtype)
  (found,) = jaxpr_costs.kernels(jax.make_jaxpr(f)(x, w).jaxpr)
  assert found.calls == 5
  # 64 lanes are 128 to a matrix unit.
  assert found.flops == passes * 6 * 2 * 16 * 128 * 128
  assert found.vector_operations == 6 * 16 * 128
  # x moves at each step of i, w and the result at each of i and j.
  size = jnp.dtype(dtype).itemsize
  assert found.bytes == size * 128 * (2 * 16 + 6 * 64 + 6 * 16)
  # What the model asks for is not padded.
  assert jaxpr_costs.matmul_flops(f, x, w) == 5 * 6 * 2 * 16 * 64 * 64


def test_branches_of_a_kernel_count_in_the_cells_where_they_run():
  def kernel(x, w, out):
    here = pl.program_id(1)
    out[...] = jnp.zeros_like(out)

    # As causal attention has it: each block sees as many keys as come before.
    for block in range(3):

      @pl.when(here == block)
      def body(block=block):
        out[...] = x[:, : 128 * (block + 1)] @ w[: 128 * (block + 1), :]

    @pl.when(here == pl.num_programs(1) - 1)
    def end():
      out[...] = out[...] * jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(out[...], jnp.uint32) * jnp.uint32(5), jnp.float32
      )

  call = pl.pallas_call(
    kernel,
    grid=(4, 3),
    in_specs=[
      pl.BlockSpec((8, 384), lambda i, j: (i, 0)),
      pl.BlockSpec((384, 128), lambda i, j: (0, 0)),
    ],
    out_specs=pl.BlockSpec((8, 128), lambda i, j: (i, j)),
    out_shape=jax.ShapeDtypeStruct((32, 384), 'float32'),
  )
  x, w = jnp.ones((32, 384)), jnp.ones((384, 128))
  (found,) = jaxpr_costs.kernels(jax.make_jaxpr(call)(x, w).jaxpr)
  assert found.flops == 4 * (1 + 2 + 3) * 2 * 8 * 128 * 128
  # In the last cell of each row a product of floats, and one of integers.
  assert found.vector_operations == 4 * (8 * 128) * (1 + 22)


def test_kernels_whose_results_nobody_needs_do_not_count():
  @jax.jit
  def double(x):
    def kernel(x, out):
      out[...] = x[...] * 2

    return pl.pallas_call(kernel, out_shape=x, name='double')(x)

  def f(x):
    unused = double(double(x))
    return double(x), unused.shape[0]

  (only,) = jaxpr_costs.kernels(jax.make_jaxpr(f)(jnp.ones((8, 128))).jaxpr)
  assert only.calls == 1
