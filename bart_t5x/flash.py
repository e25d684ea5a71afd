"""Attention in one TPU kernel: scores and weights never leave the chip.

For 32 rows of 1024 and 12 heads, the scores of one layer take 1.6 GB in float32, and
reading and writing them is most of what attention costs in XLA. Here one program holds
one block of queries of one row, the whole row's keys and values, and the heads that
fill 128 lanes (two of width 64); both passes make the scores where they are used (after
Dao et al. 2022, with whole rows of keys, which BART's lengths allow: no running maximum
is needed).

Results are those of `attention.plain_attention`, dropout included: its bits depend on
indices alone, so both passes and both implementations draw the same. Heads are adjacent
in the lanes, as the projections give them: nothing is transposed or padded in memory.
Other heads' lanes are set to zero in one factor of a product, which costs nothing: a
product takes 128 lanes anyway. Scores are [key, query]: sums over keys then run down
the sublanes, and per-query values are dense rows.

Both kernels work on some keys at a time, so that most of what happens to a score
happens in registers, and store what a second pass over the keys needs. Three things
cost more than they seem to on a v3, by its machine code: rounding float32 to bfloat16
and back, which its products do by themselves; a mask that is used twice; and arrays of
whole rows, whose every element is stored and loaded for each operation.

Not run on a TPU: compiled for v2 to v6e by libtpu, run in Pallas' interpreter.
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

# Keys whose scores with a block of queries fit into a core's on-chip memory; libtpu
# was not asked for more.
MAX_LENGTH = 1024

LANES = 128

# Queries of one program: [1024, 256] scores in float32 are 1 MB of the 16 MB on-chip
# memory of a v3 core, and the backward kernel holds two such arrays and four of half
# that size.
QUERY_BLOCK = 256

# Keys whose scores are worked on at a time. By the machine code for v3, 256 take a
# quarter longer, and all 1024 at once save 3 % for twice the code.
KEY_BLOCK = 512

# Far below every score, yet finite in every dtype: a row with no visible key then gets
# equal weights instead of NaN.
HIDDEN_SCORE = -1e9

# The logsumexp of a query that sees no key: all its weights are then 0.
UNSEEN = 1e30

# Segment of what pads rows; segment ids are never negative.
_PADDING_SEGMENT = -1

# Chips whose matrix units take bfloat16 only by way of float32.
_FLOAT32_KINDS = ('TPU v2', 'TPU v3')

# Checkpoint name of what the backward pass needs of the forward one: four bytes for
# each query and head.
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
# T5X's partitioner traces the step with its mesh and its logical axis rules in force. A
# kernel, which the compiler cannot split, runs on each device's part of its arguments.


class Device(NamedTuple):
  """Where a traced function will run."""

  platform: str  # 'cpu', 'gpu' or 'tpu'
  kind: str  # 'TPU v3'
  capability: tuple[int, int] | None = None  # CUDA's, (8, 0) for an A100


def mesh() -> Any:
  """Returns the mesh in force, or None."""
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
  """Returns the device of the mesh in force, else JAX's first."""
  found = mesh()
  if isinstance(found, jax.sharding.AbstractMesh):
    first = found.abstract_device
    if first is None:
      first = jax.devices()[0]
  else:
    first = jax.devices()[0] if found is None else found.devices.flat[0]
  platform, kind = first.platform, first.device_kind
  if platform == 'gpu':
    # A mesh's description lacks the capability. AMD's are names: gfx90a.
    for like in jax.local_devices():
      version = str(getattr(like, 'compute_capability', ''))
      if like.device_kind == kind and re.fullmatch(r'\d+\.\d+', version):
        major, minor = version.split('.')
        return Device(platform, kind, (int(major), int(minor)))
  return Device(platform, kind)


# Logical names of arrays' axes, None for an axis that is not split.
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
  """Makes a function run on each device's part of its arguments.

  Args:
    function: takes an int32 [2], the first row and head of this device's part, and
      then its parts of the arguments; returns a list of arrays.
    names: of each argument's axes: 'batch', 'heads' or None.
    output_names: of each result's axes.
    batch: rows; not split where the devices do not divide them.
    heads: in all; not split where the devices do not divide them.

  Returns:
    A function of whole arguments; without a mesh in force they are one part.
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
  """Mesh axes of a logical axis, () if it is not split: no rule, or no even split."""
  (axes,) = partitioning.logical_to_mesh_axes((name,))
  axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
  axes = tuple(axis for axis in axes if axis in found.shape)
  parts = math.prod(found.shape[axis] for axis in axes)
  return () if size % parts else axes


# ---- the kernels: what one program computes ------------------------------------


class Settings(NamedTuple):
  """The constants of a kernel."""

  causal: bool  # Queries see the keys at their index and before.
  dropout_rate: float  # On the weights, 0 for none.
  heads: int  # Of the whole model, by which dropout's rows are numbered.
  head_dim: int
  group: int  # Heads adjacent in the lanes of one program.
  queries: int  # Of a row, padding not counted.
  float32: bool  # Products take float32.
  interpret: bool


def query_block(queries: int) -> int:
  """Queries of one program: divides them, and fills lanes unless it is them all."""
  if queries <= LANES:
    return queries
  return LANES if queries % QUERY_BLOCK else QUERY_BLOCK


def key_limits(queries: int, keys: int, causal: bool) -> list[int]:
  """How many keys each block of queries may see."""
  size = query_block(queries)
  return [
    min(keys, first + size) if causal else keys for first in range(0, queries, size)
  ]


def key_block(keys: int) -> int:
  """Keys of one iteration: an even part of them, in rows that fill registers."""
  parts = -(-keys // KEY_BLOCK)
  return keys // parts if keys % (16 * parts) == 0 else keys


def _for_own_block(body, queries, keys, causal):
  """Runs body(first query, keys seen) for this program's block of queries.

  Where the number of keys differs, each block has code of its own: shapes are static,
  and what a causal query cannot see is then never computed.
  """
  here, size = pl.program_id(2), query_block(queries)
  if not causal:
    body(here * size, keys)
    return
  for index, limit in enumerate(key_limits(queries, keys, causal)):
    pl.when(here == index)(functools.partial(body, index * size, limit))


def _for_key_blocks(body, limit, start):
  """Folds body(rows of keys, carry) over the blocks of the keys seen.

  A loop, not code for each block: within a block the compiler keeps scores in registers
  where it would store and load them again, and it overlaps products with the rest.
  """
  size = key_block(limit)
  if size == limit:
    return body(pl.ds(0, size), start)

  def step(index, carry):
    return body(pl.ds(pl.multiple_of(index * size, size), size), carry)

  return jax.lax.fori_loop(0, limit // size, step, start)


def _product(left, right, left_axis, right_axis):
  """A matrix product summed in float32, contracted over the given axes."""
  dimensions = (((left_axis,), (right_axis,)), ((), ()))
  return jax.lax.dot_general(
    left, right, dimensions, preferred_element_type=jnp.float32
  )


def _factor(x, dtype, settings):
  """Casts a factor of a product; one that takes float32 rounds by itself."""
  return x.astype(jnp.float32 if settings.float32 else dtype)


def _own_lanes(head, settings):
  """[1, lanes]: those of one head of the block."""
  lanes = settings.group * settings.head_dim
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
  return lane // settings.head_dim == head


def _scores(settings, query_segments, key_segments, keys, query, *, rows, first):
  """[key, query] scores of some keys; those of invisible keys are HIDDEN_SCORE."""
  scores = _product(keys, query, 1, 1)
  mask = key_segments[rows, :] == query_segments[...]
  if settings.causal:
    queries = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    place = rows.start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    mask &= place <= queries
  return jnp.where(mask, scores, HIDDEN_SCORE)


def _as_factors(key, value, float32_copies):
  """Keys and values as products take them, cast once for all blocks of queries."""
  if not float32_copies:
    return key, value

  @pl.when(pl.program_id(2) == 0)
  def cast():
    for ref, copy in zip((key, value), float32_copies, strict=True):
      copy[...] = ref[...].astype(jnp.float32)

  return float32_copies


def _first_row(scalars, settings):
  """Dropout's row number of this program's row and first head."""
  row = scalars[1] + pl.program_id(0)
  return row * settings.heads + scalars[2] + pl.program_id(1) * settings.group


def _dropper(scalars, key_bits, row, first, size, settings):
  """Returns a function of rows of keys that returns dropout, without its scale."""
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

  Args:
    settings: constants.
    scalars: int32 [3]: dropout's seed, this part's first row and first head.
    query_segments: [1, queries].
    key_segments: [keys, 1].
    key_bits: [keys, 1], what each key adds to dropout's bits.
    query: [queries, lanes].
    key: [keys, lanes].
    value: [keys, lanes].
    out: [queries, lanes], written.
    logsumexp: [heads of the block, queries], written; UNSEEN where a query sees no key.
    scores: float32 scratch [keys, queries].
    attended: float32 scratch [queries, lanes].
    *float32_copies: where products take float32, two scratch arrays [keys, lanes].
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
  """Computes gradients for one block of queries; after the last, of keys and values.

  Args:
    settings: constants.
    scalars: see `forward_kernel`, as for the next three.
    query_segments: [1, queries].
    key_segments: [keys, 1].
    key_bits: [keys, 1].
    *refs: query, key, value; gradient of the attention output [queries, lanes];
      logsumexp; the three gradients, written; float32 scratch: sums of the gradients of
      key, value [keys, lanes] and query [queries, lanes], two arrays [keys, queries],
      and copies as in `forward_kernel`.
  """
  query, key, value, d_out, logsumexp, d_query, d_key, d_value, *scratch = refs
  key_sums, value_sums, query_sum, weights, d_weights, *float32_copies = scratch
  key, value = _as_factors(key, value, float32_copies)
  first_row, size = _first_row(scalars, settings), query.shape[0]
  scale = 1 / (1 - settings.dropout_rate)  # Of the gradients, not of each weight.
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
        # From the weights, not from the output, as flash attention usually has it:
        # rounded to bfloat16, that more than doubles the gradients' error.
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


# ---- layout: heads in the lanes, lengths padded --------------------------------


def _heads_per_block(heads, head_dim):
  return max(1, min(heads, LANES // head_dim))


def _rounded(length):
  """A length that a kernel takes: one block of 8, or blocks of queries."""
  multiple = 8 if length <= LANES else LANES
  return -(-length // multiple) * multiple


def _padded(x, axis, size, value=0):
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, padding, constant_values=value) if any(padding[axis]) else x


def _to_lanes(x):
  """[b, l, h, d] -> [b, rounded l, h · d], zero heads added to fill blocks."""
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
  """Runs a kernel on one device: forward, or given logsumexp backward.

  Args:
    settings: constants of the kernel.
    starts: first row and head of this part.
    activations: query, key, value and, backward, the output's gradient [b, l, h, d].
    segments: of the queries and of the keys.
    seeds: of dropout.
    logsumexp: [b, h, q].

  Returns:
    Forward the output and logsumexp; backward the gradients of query, key and value.
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
  # The same for every row, head and query: not computed again in each program.
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
  """Tells XLA what a kernel costs: its cost analysis and scheduler cannot look inside.

  Vector operations for a score, as counted in the kernels' machine code, go into
  `transcendentals`, which XLA takes to be one per lane and cycle: the vector units do
  two operations per cycle up to v3, and four later.
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
  """Says what the kernel needs that heads or rows of these sizes lack, or None."""
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
  """`attention.plain_attention` as a kernel; takes its arguments.

  A query that sees no key gets some finite value, and no gradient through it.

  Raises:
    ValueError: on a platform without the kernel, and for shapes it does not take.
  """
  where = device()
  if where.platform != 'tpu' and not _interpreted.get():
    raise ValueError(
      "BartConfig.attention_impl = 'flash' is a kernel for TPUs. Got: "
      f"{where.platform}. 'auto' takes what the platform has; 'plain' and 'chunked' "
      'run everywhere.'
    )
  why = unsupported(query.shape[3], max(query.shape[1], key.shape[1]))
  if why:
    raise ValueError(f"BartConfig.attention_impl = 'flash' takes {why}")
  settings = Settings(
    causal=causal,
    dropout_rate=0.0 if dropout_key is None else dropout_rate,
    heads=query.shape[2],
    head_dim=query.shape[3],
    group=1,  # Each device's own, see _call.
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
