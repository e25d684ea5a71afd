"""Flash attention as a TPU kernel: scores and weights never leave the chip.

For 32 rows of 1024 and 12 heads, the scores of one layer take 1.6 GB in float32;
reading and writing them is most of the cost of attention in XLA. Here one program
holds a block of queries of one row, all of that row's keys and values, and as many
heads as fill 128 lanes (two of width 64). Both passes compute the scores where they are
used (after Dao et al. 2022, but with whole rows of keys, which BART's lengths allow, so
that no running maximum is needed).

Results equal `attention.plain_attention`'s, dropout included: its bits depend on
indices alone. Heads are adjacent in the lanes, as the projections produce them, so
nothing is transposed or padded in memory; the lanes of other heads are zeroed in one
factor of each product, which is free because a product takes 128 lanes anyway. Scores
are [key, query]: sums over keys run down the sublanes, and per-query values are dense
rows.

Both kernels process a block of keys at a time, so that most operations on a score stay
in registers, and store what a second pass over the keys needs. According to v3 machine
code, three things are expensive: rounding float32 to bfloat16 and back, which products
do by themselves; using a mask twice; and arrays of whole rows, whose elements are
stored and loaded for each operation.

Not run on a TPU: compiled for v2 to v6e by libtpu and run in Pallas' interpreter.
"""

import contextlib
import contextvars
import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen import partitioning
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from bart_t5x import dropout

# Longest rows whose scores with a block of queries were compiled for each TPU.
MAX_LENGTH = 1024

LANES = 128

# Queries per program: [1024, 256] scores in float32 take 1 MB of the 16 MB on-chip
# memory of a v3 core; the backward kernel holds two such arrays and four half as large.
QUERY_BLOCK = 256

# Keys per iteration. By v3 machine code, 256 take a quarter longer, and 1024 save 3 %
# for twice the code.
KEY_BLOCK = 512

# Finite, so that a row without visible keys gets equal weights instead of NaN.
HIDDEN_SCORE = -1e9

# The logsumexp of a query that sees no key: all its weights are then 0.
UNSEEN = 1e30

# Segment of padding added here; segment ids are never negative.
_PADDING_SEGMENT = -1

# Chips whose kernels cannot multiply bfloat16 and take float32 factors instead.
_FLOAT32_KINDS = ('TPU v2', 'TPU v3')

# Checkpoint name of what the backward pass needs besides its arguments.
LOGSUMEXP = 'attention_logsumexp'

_interpreted = contextvars.ContextVar('interpreted', default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
  """Runs the kernel in Pallas' interpreter, on any platform: for tests."""
  token = _interpreted.set(True)
  try:
    yield
  finally:
    _interpreted.reset(token)


# ---- devices -------------------------------------------------------------------
#
# T5X's partitioner traces the step under its mesh and logical axis rules. The compiler
# cannot partition a kernel, so it runs on each device's part of its arguments.


class Device(NamedTuple):
  """The device that a function is traced for."""

  platform: str  # 'cpu', 'gpu' or 'tpu'
  kind: str  # 'TPU v3'
  capability: tuple[int, int] | None = None  # CUDA's, (8, 0) for an A100


def mesh() -> Any:
  """Returns the current mesh, or None."""
  found = jax.sharding.get_abstract_mesh()
  if not found.empty:
    return found
  # google-research/t5x still enters its mesh by a context manager that JAX deprecated.
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', DeprecationWarning)
    resources = getattr(jax.interpreters.pxla, 'thread_resources', None)
  if resources is None or resources.env.physical_mesh.empty:
    return None
  return resources.env.physical_mesh


def device() -> Device:
  """Returns the device of the current mesh, else JAX's first."""
  found = mesh()
  first = None
  if isinstance(found, jax.sharding.AbstractMesh):
    first = found.abstract_device
  elif found is not None:
    first = found.devices.flat[0]
  first = jax.devices()[0] if first is None else first
  platform, kind = first.platform, first.device_kind
  if platform == 'gpu':
    # An abstract mesh does not have the capability. AMD's are names: gfx90a.
    for like in jax.local_devices():
      version = str(getattr(like, 'compute_capability', ''))
      if like.device_kind == kind and re.fullmatch(r'\d+\.\d+', version):
        major, minor = version.split('.')
        return Device(platform, kind, (int(major), int(minor)))
  return Device(platform, kind)


# Logical axis names of arrays; None for an axis that is not split.
_ACTIVATION = ('batch', None, 'heads', None)
_SEGMENTS = ('batch', None)
_LOGSUMEXP = ('batch', 'heads', None)
_SEEDS = (None,)


def on_each_device(
  function: Callable[..., Any],
  names: Sequence[tuple[str | None, ...]],
  output_names: Sequence[tuple[str | None, ...]],
  batch: int,
  heads: int,
) -> Callable[..., Any]:
  """Makes `function` run on each device's part of its arguments.

  Args:
    function: takes an int32 [2], the first row and head of this device's part, and
      then its parts of the arguments; returns a list of arrays.
    names: the axes of each argument: 'batch', 'heads' or None.
    output_names: the axes of each result.
    batch: total rows; not split if the devices do not divide them.
    heads: total heads; not split if the devices do not divide them.
  """
  found, sizes = mesh(), {'batch': batch, 'heads': heads}
  axes = {} if found is None else {n: _mesh_axes(n, sizes[n], found) for n in sizes}

  def local(*arrays):
    starts = []
    for name, size in sizes.items():
      start = jnp.int32(0)
      if axes.get(name):
        parts = jax.lax.axis_size(axes[name])
        start = jax.lax.axis_index(axes[name]) * (size // parts)
      starts.append(start.astype(jnp.int32))
    return function(jnp.stack(starts), *arrays)

  if found is None:
    return local

  def spec(array_names):
    return PartitionSpec(*(axes.get(name) or None for name in array_names))

  return jax.shard_map(
    local,
    mesh=found,
    in_specs=tuple(map(spec, names)),
    out_specs=list(map(spec, output_names)),
    check_vma=False,
  )


def _mesh_axes(name, size, found):
  """Returns the mesh axes of a logical axis; () without a rule or an even split."""
  (axes,) = partitioning.logical_to_mesh_axes((name,))
  axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
  axes = tuple(axis for axis in axes if axis in found.shape)
  parts = math.prod(found.shape[axis] for axis in axes)
  return () if size % parts else axes


# ---- the kernels ---------------------------------------------------------------


class Settings(NamedTuple):
  """Static settings of a kernel."""

  causal: bool
  dropout_rate: float
  heads: int  # Over all devices; numbers the rows of dropout.
  head_dim: int
  group: int  # Heads per program, adjacent in the lanes.
  queries: int  # Per row, without padding.
  float32: bool  # Products take float32 factors.
  interpret: bool


def query_block(queries: int) -> int:
  """Returns the queries per program, a divisor of all."""
  if queries <= LANES:
    return queries
  return LANES if queries % QUERY_BLOCK else QUERY_BLOCK


def key_limits(queries: int, keys: int, causal: bool) -> list[int]:
  """Returns the number of keys that each block of queries may see."""
  size = query_block(queries)
  return [
    min(keys, first + size) if causal else keys for first in range(0, queries, size)
  ]


def key_block(keys: int) -> int:
  """Returns the keys per iteration: an even part of all, a multiple of 16, or all."""
  parts = -(-keys // KEY_BLOCK)
  return keys // parts if keys % (16 * parts) == 0 else keys


def _for_own_block(body, queries, keys, causal):
  """Runs body(first query, visible keys) for this program's block of queries."""
  # Shapes are static: with causal masks each block has its own code, which skips the
  # keys that the block cannot see.
  here, size = pl.program_id(2), query_block(queries)
  if not causal:
    body(here * size, keys)
    return
  for index, limit in enumerate(key_limits(queries, keys, causal)):
    pl.when(here == index)(functools.partial(body, index * size, limit))


def _for_key_blocks(body, limit, start):
  """Folds body(rows of keys, carry) over blocks of the visible keys."""
  # In a loop, the compiler keeps a block's scores in registers and overlaps products
  # with other instructions; in unrolled code it stores and loads the scores.
  size = key_block(limit)
  if size == limit:
    return body(pl.ds(0, size), start)

  def step(index, carry):
    return body(pl.ds(pl.multiple_of(index * size, size), size), carry)

  return jax.lax.fori_loop(0, limit // size, step, start)


def _product(left, right, left_axis, right_axis):
  """Multiplies matrices over the given axes, accumulating in float32."""
  dimensions = (((left_axis,), (right_axis,)), ((), ()))
  return jax.lax.dot_general(
    left, right, dimensions, preferred_element_type=jnp.float32
  )


def _factor(x, dtype, settings):
  """Casts a factor of a product; products of float32 round by themselves."""
  return x.astype(jnp.float32 if settings.float32 else dtype)


def _own_lanes(head, settings):
  """Returns the mask [1, lanes] of one head of the block."""
  lanes = settings.group * settings.head_dim
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
  return lane // settings.head_dim == head


def _scores(settings, query_segments, key_segments, keys, query, *, rows, first):
  """Returns the scores [key, query] of some keys, HIDDEN_SCORE where masked."""
  scores = _product(keys, query, 1, 1)
  mask = key_segments[rows, :] == query_segments[...]
  if settings.causal:
    queries = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    place = rows.start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    mask &= place <= queries
  return jnp.where(mask, scores, HIDDEN_SCORE)


def _as_factors(key, value, float32_copies):
  """Returns keys and values as factors, cast once for all blocks of queries."""
  if not float32_copies:
    return key, value

  @pl.when(pl.program_id(2) == 0)
  def cast():
    for ref, copy in zip((key, value), float32_copies, strict=True):
      copy[...] = ref[...].astype(jnp.float32)

  return float32_copies


def _first_row(scalars, settings):
  """Returns dropout's row number of this program's row and first head."""
  row = scalars[1] + pl.program_id(0)
  return row * settings.heads + scalars[2] + pl.program_id(1) * settings.group


def _dropper(scalars, key_bits, row, first, size, settings):
  """Returns a function from rows of keys to their unscaled dropout."""
  rate = settings.dropout_rate
  if not rate:
    return lambda rows: lambda weights: weights
  seed = jax.lax.bitcast_convert_type(scalars[0], jnp.uint32)
  numbers = row * settings.queries + first
  numbers = numbers + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
  row_bits = dropout.row_bits(numbers.astype(jnp.uint32), seed)

  def of_keys(rows):
    bits = dropout.joined_bits(row_bits, key_bits[rows, :])
    kept = bits >= jnp.uint32(dropout.threshold(rate))
    return lambda weights: jnp.where(kept, weights, 0)

  return of_keys


def forward_kernel(
  settings, scalars, query_segments, key_segments, key_bits, query, key, value, out,
  logsumexp, scores, attended, *float32_copies
):  # fmt: skip
  """Computes the attention output of one block of queries.

  `scalars` are dropout's seed and this part's first row and head. Query and output are
  [queries, lanes], key and value [keys, lanes], query segments [1, queries], key
  segments and bits of dropout [keys, 1], logsumexp [heads of the block, queries].
  Scratch: scores [keys, queries], attended [queries, lanes] and, for float32 products,
  copies of key and value.
  """
  first_row, size = _first_row(scalars, settings), query.shape[0]
  key, value = _as_factors(key, value, float32_copies)
  score = functools.partial(_scores, settings, query_segments, key_segments)

  def block(first, limit):
    result = jnp.zeros(query.shape, jnp.float32)
    for head in range(settings.group):
      drop = _dropper(scalars, key_bits, first_row + head, first, size, settings)
      own = _own_lanes(head, settings)
      own_query = jnp.where(own, _factor(query[...], query.dtype, settings), 0)

      def find_top(rows, top, own_query=own_query):
        found = score(key[rows, :], own_query, rows=rows, first=first)
        scores[rows, :] = found
        return jnp.maximum(top, jnp.max(found, axis=0, keepdims=True))

      least = jnp.full((1, size), HIDDEN_SCORE, jnp.float32)
      top = _for_key_blocks(find_top, limit, least)
      attended[...] = jnp.zeros_like(attended)

      def accumulate(rows, total, top=top, drop=drop):
        exps = jnp.exp(scores[rows, :] - top)
        dropped = _factor(drop(rows)(exps), value.dtype, settings)
        attended[...] += _product(dropped, value[rows, :], 0, 0)
        return total + jnp.sum(exps, axis=0, keepdims=True)

      total = _for_key_blocks(accumulate, limit, jnp.zeros((1, size), jnp.float32))
      scale = 1 / (total * (1 - settings.dropout_rate))
      seen = top > HIDDEN_SCORE
      logsumexp[head : head + 1, :] = jnp.where(seen, top + jnp.log(total), UNSEEN)
      scale_column = jnp.broadcast_to(scale, (query.shape[1], size)).T
      result = jnp.where(own, attended[...] * scale_column, result)
    out[...] = result.astype(out.dtype)

  queries = size * pl.num_programs(2)
  _for_own_block(block, queries, key.shape[0], settings.causal)


def backward_kernel(settings, scalars, query_segments, key_segments, key_bits, *refs):
  """Computes d_query for one block of queries; after the last, d_key and d_value.

  Shapes are those of `forward_kernel`; `weights` and `d_weights` are [keys, queries].
  """
  query, key, value, d_out, logsumexp, d_query, d_key, d_value, *scratch = refs
  key_sums, value_sums, query_sum, weights, d_weights, *float32_copies = scratch
  key, value = _as_factors(key, value, float32_copies)
  first_row, size = _first_row(scalars, settings), query.shape[0]
  scale = 1 / (1 - settings.dropout_rate)  # Applied to the gradients, once.
  score = functools.partial(_scores, settings, query_segments, key_segments)

  @pl.when(pl.program_id(2) == 0)
  def start_sums():
    for one in (key_sums, value_sums):
      one[...] = jnp.zeros_like(one)

  def block(first, limit):
    result = jnp.zeros(query.shape, jnp.float32)
    for head in range(settings.group):
      drop = _dropper(scalars, key_bits, first_row + head, first, size, settings)
      own = _own_lanes(head, settings)
      own_query = jnp.where(own, _factor(query[...], query.dtype, settings), 0)
      own_d_out = jnp.where(own, _factor(d_out[...], query.dtype, settings), 0)
      own_logsumexp = logsumexp[head : head + 1, :]

      def weigh(
        rows, inner, own_query=own_query, own_d_out=own_d_out, drop=drop,
        own_logsumexp=own_logsumexp
      ):  # fmt: skip
        found = score(key[rows, :], own_query, rows=rows, first=first)
        own_weights = jnp.exp(found - own_logsumexp)
        dropped = drop(rows)(own_weights)
        weighted = dropped * _product(value[rows, :], own_d_out, 1, 1)
        dropped = _factor(dropped, query.dtype, settings)
        value_sums[rows, :] += _product(dropped, own_d_out, 1, 0)
        weights[rows, :], d_weights[rows, :] = own_weights, weighted
        # Flash attention usually takes this sum from the output, which is rounded to
        # bfloat16 and would more than double the gradients' error.
        return inner + jnp.sum(weighted, axis=0, keepdims=True)

      inner = _for_key_blocks(weigh, limit, jnp.zeros((1, size), jnp.float32))
      query_sum[...] = jnp.zeros_like(query_sum)

      def through_scores(rows, carry, own_query=own_query, inner=inner):
        exact = d_weights[rows, :] - weights[rows, :] * inner
        d_scores = _factor(exact, query.dtype, settings)
        key_sums[rows, :] += _product(d_scores, own_query, 1, 0)
        query_sum[...] += _product(d_scores, key[rows, :], 0, 0)
        return carry

      _for_key_blocks(through_scores, limit, 0)
      result = jnp.where(own, query_sum[...], result)
    d_query[...] = (result * scale).astype(d_query.dtype)

  queries = size * pl.num_programs(2)
  _for_own_block(block, queries, key.shape[0], settings.causal)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def write_sums():
    for out, one in zip((d_key, d_value), (key_sums, value_sums), strict=True):
      out[...] = (one[...] * scale).astype(out.dtype)


# ---- layout: heads in the lanes, padded lengths --------------------------------


def _heads_per_block(heads, head_dim):
  return max(1, min(heads, LANES // head_dim))


def _rounded(length):
  """Rounds a length up to what a kernel supports."""
  multiple = 8 if length <= LANES else LANES
  return -(-length // multiple) * multiple


def _padded(x, axis, size, value=0):
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, padding, constant_values=value) if any(padding[axis]) else x


def _to_lanes(x):
  """[b, l, h, d] -> [b, rounded l, h · d], with zero heads that fill blocks."""
  group = _heads_per_block(*x.shape[2:])
  x = _padded(x, 2, -(-x.shape[2] // group) * group)
  return _padded(x.reshape(*x.shape[:2], -1), 1, _rounded(x.shape[1]))


def _from_lanes(x, like):
  """The inverse of `_to_lanes`."""
  batch, length, heads, head_dim = like.shape
  split = x.reshape(batch, x.shape[1], -1, head_dim)
  return split[:, :length, :heads].astype(like.dtype)


# ---- both passes ---------------------------------------------------------------


def _call(settings, starts, activations, segments, seeds, logsumexp=None):
  """Runs a kernel on one device's part, whose first row and head are `starts`.

  Without `logsumexp` [b, h, q] it is the forward one: activations are query, key and
  value [b, l, h, d], results the output and logsumexp. With it, the output's gradient
  is the fourth activation, and results are d_query, d_key and d_value.
  """
  laid = [_to_lanes(x) for x in activations]
  (batch, length, width), (heads, head_dim) = laid[0].shape, activations[0].shape[2:]
  group = _heads_per_block(heads, head_dim)
  settings = settings._replace(group=group)
  queries, keys = (
    _padded(x, 1, _rounded(x.shape[1]), _PADDING_SEGMENT) for x in segments
  )
  key_length, lanes, size = keys.shape[1], group * head_dim, query_block(length)

  # The grid is (row, block of heads, block of queries).
  of_query = pl.BlockSpec(
    (None, size, lanes), lambda row, head, part: (row, part, head)
  )
  of_key = pl.BlockSpec((None, key_length, lanes), lambda row, head, _: (row, 0, head))
  of_sums = pl.BlockSpec(
    (None, None, group, size), lambda row, head, part: (row, head, 0, part)
  )
  sums_shape = batch, width // lanes, group, length
  if logsumexp is None:
    kernel, in_specs, extra = forward_kernel, [of_query, of_key, of_key], []
    results = [laid[0], jax.ShapeDtypeStruct(sums_shape, jnp.float32)]
    out_specs = [of_query, of_sums]
    scratch = [(key_length, size), (size, lanes)]
  else:
    kernel, in_specs = backward_kernel, [of_query, of_key, of_key, of_query, of_sums]
    sums = _padded(logsumexp, 1, width // head_dim, UNSEEN)
    extra = [_padded(sums, 2, length, UNSEEN).reshape(sums_shape)]
    results, out_specs = laid[:3], [of_query, of_key, of_key]
    scratch = [(key_length, lanes)] * 2 + [(size, lanes)] + [(key_length, size)] * 2
  if settings.float32:
    scratch += [(key_length, lanes)] * 2

  row_seed = jax.lax.bitcast_convert_type(seeds[:1], jnp.int32)
  # Computed once for all programs.
  key_bits = dropout.column_bits(jnp.arange(key_length, dtype=jnp.uint32), seeds[1])
  out = pl.pallas_call(
    functools.partial(kernel, settings),
    grid=(batch, width // lanes, length // size),
    in_specs=[
      pl.BlockSpec(memory_space=pltpu.SMEM),
      pl.BlockSpec((None, 1, size), lambda row, _, part: (row, 0, part)),
      pl.BlockSpec((None, key_length, 1), lambda row, *_: (row, 0, 0)),
      pl.BlockSpec((key_length, 1), lambda *_: (0, 0)),
      *in_specs,
    ],
    out_specs=out_specs,
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
    scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
    ),
    cost_estimate=_cost(laid, results, settings),
    interpret=settings.interpret,
    name=f'flash_attention_{kernel.__name__}',
  )(
      jnp.concatenate([row_seed, starts]), queries[:, None], keys[:, :, None],
      key_bits[:, None], *laid, *extra,
  )  # fmt: skip
  if logsumexp is None:
    sums = out[1].reshape(batch, -1, length)[:, :heads, : activations[0].shape[1]]
    return [_from_lanes(out[0], activations[0]), sums]
  return [_from_lanes(x, like) for x, like in zip(out, activations[:3], strict=True)]


def _cost(inputs, results, settings):
  """Returns the costs of a kernel, which XLA's cost analysis cannot derive.

  `transcendentals` counts vector operations per score, as found in the machine code:
  XLA assumes one transcendental per lane and cycle, and vector units execute two
  operations per cycle up to v3 and four later.
  """
  (batch, queries, width), keys = inputs[0].shape, inputs[1].shape[1]
  scores = (
    batch * width // settings.head_dim
    * query_block(queries) * sum(key_limits(queries, keys, settings.causal))
  )  # fmt: skip
  products, operations = (2, 10) if len(inputs) == 3 else (5, 15)
  operations += 12 * bool(settings.dropout_rate) + 4 * settings.causal
  return pl.CostEstimate(
    flops=2 * scores * max(LANES, settings.head_dim) * products,
    transcendentals=scores * operations // (2 if settings.float32 else 4),
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *results)),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings, query, key, value, query_segments, key_segments, seeds):
  return _forward(settings, query, key, value, query_segments, key_segments, seeds)[0]


def _forward(settings, *arrays):
  def part(starts, query, key, value, query_segments, key_segments, seeds):
    segments = query_segments, key_segments
    return _call(settings, starts, (query, key, value), segments, seeds)

  names = (_ACTIVATION,) * 3 + (_SEGMENTS,) * 2 + (_SEEDS,)
  batch, _, heads, _ = arrays[0].shape
  run = on_each_device(part, names, [_ACTIVATION, _LOGSUMEXP], batch, heads)
  attended, logsumexp = run(*arrays)
  return attended, (*arrays, checkpoint_name(logsumexp, LOGSUMEXP))


def _backward(settings, residuals, d_attended):
  def part(starts, queries, keys, seeds, logsumexp, *activations):
    return _call(settings, starts, activations, (queries, keys), seeds, logsumexp)

  query, key, value, query_segments, key_segments, seeds, logsumexp = residuals
  names = (_SEGMENTS,) * 2 + (_SEEDS, _LOGSUMEXP) + (_ACTIVATION,) * 4
  batch, _, heads, _ = query.shape
  run = on_each_device(part, names, [_ACTIVATION] * 3, batch, heads)
  gradients = run(
    query_segments, key_segments, seeds, logsumexp, query, key, value, d_attended
  )
  return *gradients, None, None, None


_attend.defvjp(_forward, _backward)


def unsupported(head_dim: int, length: int) -> str | None:
  """Returns which requirement of the kernel these sizes violate, or None."""
  if LANES % head_dim and head_dim % LANES:
    return (
      f'heads whose width divides {LANES}, or is a multiple of it. '
      f"Got: {head_dim}. Change num_heads, or use 'chunked'."
    )
  if length > MAX_LENGTH:
    return f"rows of at most {MAX_LENGTH}. Got: {length}. Use 'chunked'."
  return None


def flash_attention(
  query: Float[Array, 'b q h d'],
  key: Float[Array, 'b k h d'],
  value: Float[Array, 'b k h d'],
  query_segments: Int[Array, 'b q'] | None = None,
  key_segments: Int[Array, 'b k'] | None = None,
  *,
  causal: bool = False,
  dropout_rate: float = 0.0,
  dropout_key: jax.Array | None = None,
) -> Float[Array, 'b q h d']:
  """`attention.plain_attention` as a kernel.

  A query that sees no key gets a finite output and no gradient.

  Raises:
    ValueError: the platform is not TPU, or the kernel does not support the shapes.
  """
  where = device()
  if where.platform != 'tpu' and not _interpreted.get():
    raise ValueError(
      "BartConfig.attention_impl = 'flash' is a kernel for TPUs. Got: "
      f"{where.platform}. Use 'auto', or 'plain' or 'chunked', which run everywhere."
    )
  why = unsupported(query.shape[3], max(query.shape[1], key.shape[1]))
  if why:
    raise ValueError(f"BartConfig.attention_impl = 'flash' takes {why}")
  settings = Settings(
    causal=causal,
    dropout_rate=0.0 if dropout_key is None else dropout_rate,
    heads=query.shape[2],
    head_dim=query.shape[3],
    group=1,  # Set by `_call`, for the heads of one device.
    queries=query.shape[1],
    float32=where.kind.startswith(_FLOAT32_KINDS),
    interpret=_interpreted.get(),
  )
  seeds = jnp.zeros(2, jnp.uint32)
  if settings.dropout_rate:
    seeds = jnp.stack(dropout.seeds(dropout_key))
  if query_segments is None:
    query_segments = jnp.ones(query.shape[:2], jnp.int32)
    key_segments = jnp.ones(key.shape[:2], jnp.int32)
  return _attend(settings, query, key, value, query_segments, key_segments, seeds)
