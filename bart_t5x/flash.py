"""Attention in one TPU kernel: scores and weights never leave the chip.

For 32 rows of 1024 and 12 heads, the scores of one layer take 1.6 GB in float32, and
reading and writing them is most of what attention costs in XLA. Here one program
holds a whole row's queries, keys and values of the heads that fill 128 lanes (two of
width 64), and both passes make the scores where they are used (after Dao et al. 2022,
with whole rows of keys, which BART's lengths allow: no running maximum is needed).

Everything is `attention.plain_attention`'s, dropout included: its bits depend on
indices alone, so both passes and both implementations draw the same. Heads lie side
by side in the lanes, as the projections give them: no copy turns them round, and
nothing is padded in memory. What a program computes is in `flash_kernels`.

Not run on a TPU: compiled for v2 to v6e by libtpu, run in Pallas' interpreter.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from bart_t5x import dropout, placement
from bart_t5x import flash_kernels as kernels

# Keys whose scores with a block of queries fit into a core's working memory; libtpu
# was not asked for more.
MAX_LENGTH = 1024

# Chips whose matrix units take bfloat16 only by way of float32.
_FLOAT32_KINDS = ('TPU v2', 'TPU v3')

# What the backward pass needs of the forward one, by the name that recomputation knows
# it by: four bytes for each query and head.
LOG_SUMS = 'attention_log_sums'

# A segment of its own for what is added at the end of rows; -1 is never visible.
_FILL_SEGMENT = -1

_interpreted = contextvars.ContextVar('interpreted', default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
  """Runs the kernel in Pallas' interpreter, on any platform: for tests."""
  token = _interpreted.set(True)
  try:
    yield
  finally:
    _interpreted.reset(token)


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
  device = placement.device()
  _check(query, key, device)
  settings = kernels.Settings(
    causal=causal,
    dropout_rate=0.0 if dropout_key is None else dropout_rate,
    heads=query.shape[2],
    head_dim=query.shape[3],
    group=1,  # each device's own, see _call
    queries=query.shape[1],
    widened=device.kind.startswith(_FLOAT32_KINDS),
    interpret=_interpreted.get(),
  )
  seeds = jnp.zeros(2, jnp.uint32)
  if settings.dropout_rate:
    seeds = jnp.stack(dropout.seeds(dropout_key))
  if query_segments is None:
    query_segments = jnp.ones(query.shape[:2], jnp.int32)
    key_segments = jnp.ones(key.shape[:2], jnp.int32)
  return _attend(settings, query, key, value, query_segments, key_segments, seeds)


def refusal(head_dim: int, length: int) -> str | None:
  """Why the kernel does not take heads of that width and rows of that length."""
  if kernels.LANES % head_dim and head_dim % kernels.LANES:
    return (
      f'heads whose width divides {kernels.LANES}, or is a multiple of it. '
      f"Got: {head_dim}. Change num_heads, or use 'chunked'."
    )
  if length > MAX_LENGTH:
    return f"rows of at most {MAX_LENGTH}. Got: {length}. Use 'chunked'."
  return None


def _check(query, key, device):
  """Refuses what the kernel does not take, in the words of the config."""
  if device.platform != 'tpu' and not _interpreted.get():
    raise ValueError(
      "BartConfig.attention_impl = 'flash' is a kernel for TPUs. Got: "
      f"{device.platform}. 'auto' takes what the platform has; 'plain' and 'chunked' "
      'run everywhere.'
    )
  why = refusal(query.shape[3], max(query.shape[1], key.shape[1]))
  if why:
    raise ValueError(f"BartConfig.attention_impl = 'flash' takes {why}")


# ---- layout: heads side by side, lengths filled up -----------------------------


def _heads_a_block(heads, head_dim):
  """Heads that share the lanes of one program; all of them where they fit."""
  return max(1, min(heads, kernels.LANES // head_dim))


def _rounded(length):
  """A length that a kernel takes: one block of 8, or blocks of queries."""
  multiple = 8 if length <= kernels.LANES else kernels.LANES
  return -(-length // multiple) * multiple


def _filled(x, axis, size, value=0):
  """x with its axis filled up to a size."""
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, padding, constant_values=value) if any(padding[axis]) else x


def _to_lanes(x):
  """[b, l, h, d] -> [b, rounded l, h · d], zero heads added to fill blocks."""
  group = _heads_a_block(*x.shape[2:])
  x = _filled(x, 2, -(-x.shape[2] // group) * group)
  return _filled(x.reshape(*x.shape[:2], -1), 1, _rounded(x.shape[1]))


def _from_lanes(x, like):
  """The inverse of `_to_lanes`."""
  batch, length, heads, head_dim = like.shape
  split = x.reshape(batch, x.shape[1], -1, head_dim)
  return split[:, :length, :heads].astype(like.dtype)


# ---- both passes, on every device's part ---------------------------------------

_ACTIVATION = ('batch', None, 'heads', None)
_SEGMENTS = ('batch', None)
_SUMS = ('batch', 'heads', None)


class _Blocks(NamedTuple):
  """What one program of a kernel sees of the arrays.

  Attributes:
    size: queries.
    keys: keys, all of a row's.
    lanes: heads side by side, all their widths together.
    group: how many heads.
  """

  size: int
  keys: int
  lanes: int
  group: int

  def of_queries(self):
    """Of activations [b, q, h · d]."""
    shape = None, self.size, self.lanes
    return pl.BlockSpec(shape, lambda row, head, part: (row, part, head))

  def of_keys(self):
    """Of activations [b, k, h · d]."""
    shape = None, self.keys, self.lanes
    return pl.BlockSpec(shape, lambda row, head, _: (row, 0, head))

  def of_sums(self):
    """Of an array [b, blocks of heads, heads of a block, q]."""
    shape = None, None, self.group, self.size
    return pl.BlockSpec(shape, lambda row, head, part: (row, head, 0, part))

  def work(self, backward, widened):
    """Shapes of what a program works in, see `flash_kernels`."""
    weights, mixed = (self.keys, self.size), (self.size, self.lanes)
    keys = [(self.keys, self.lanes)] * 2
    own = [*keys, mixed, weights, weights] if backward else [weights, mixed]
    return own + keys if widened else own


def _call(settings, activations, segments, seeds, starts, log_sums=None):
  """Runs a kernel for each row and each block of heads: forward, or with sums backward.

  Args:
    settings: its constants.
    activations: this device's part of arrays [b, l, h, d].
    segments: of the queries and of the keys.
    seeds: two uint32.
    starts: the first row and head of this part.
    log_sums: what the forward kernel gave.

  Returns:
    Forward what is mixed and log_sums [b, h, q]; backward three gradients.
  """
  laid = [_to_lanes(x) for x in activations]
  (batch, filled, width), (heads, head_dim) = laid[0].shape, activations[0].shape[2:]
  settings = settings._replace(group=_heads_a_block(heads, head_dim))
  queries, keys = (_filled(s, 1, _rounded(s.shape[1]), _FILL_SEGMENT) for s in segments)
  lanes = settings.group * head_dim
  size = kernels.query_block(filled)
  blocks = _Blocks(size, keys.shape[1], lanes, settings.group)
  of_heads = batch, width // lanes, settings.group, filled
  ours, theirs = blocks.of_queries(), blocks.of_keys()
  if log_sums is None:
    kernel, in_specs, extra = kernels.forward_kernel, [ours, theirs, theirs], []
    results = [laid[0], jax.ShapeDtypeStruct(of_heads, jnp.float32)]
    out_specs = [ours, blocks.of_sums()]
  else:
    kernel, in_specs = kernels.backward_kernel, [ours, theirs, theirs, ours]
    in_specs.append(blocks.of_sums())
    sums = _filled(log_sums, 1, width // head_dim, kernels.UNSEEN)
    extra = [_filled(sums, 2, filled, kernels.UNSEEN).reshape(of_heads)]
    results, out_specs = laid[:3], [ours, theirs, theirs]
  out = pl.pallas_call(
    functools.partial(kernel, settings),
    grid=(batch, width // lanes, filled // size),
    in_specs=[*_shared_specs(blocks), *in_specs],
    out_specs=out_specs,
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
    scratch_shapes=[
      pltpu.VMEM(shape, jnp.float32)
      for shape in blocks.work(log_sums is not None, settings.widened)
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
    ),
    cost_estimate=_cost(laid, results, settings),
    interpret=settings.interpret,
    name=f'flash_attention_{kernel.__name__}',
  )(*_shared(queries, keys, seeds, starts), *laid, *extra)
  if log_sums is None:
    sums = out[1].reshape(batch, -1, filled)[:, :heads, : activations[0].shape[1]]
    return [_from_lanes(out[0], activations[0]), sums]
  return [_from_lanes(x, like) for x, like in zip(out, activations[:3], strict=True)]


def _shared(queries, keys, seeds, starts):
  """Arguments of both kernels: scalars, segments, the keys' bits."""
  row_seed = jax.lax.bitcast_convert_type(seeds[:1], jnp.int32)
  scalars = jnp.concatenate([row_seed, starts])
  # The same for every row, head and query: not worked out again in each program.
  key_bits = dropout.column_bits(jnp.arange(keys.shape[1], dtype=jnp.uint32), seeds[1])
  return scalars, queries[:, None], keys[:, :, None], key_bits[:, None]


def _shared_specs(blocks):
  """Blocks of `_shared`."""
  return [
    pl.BlockSpec(memory_space=pltpu.SMEM),
    pl.BlockSpec((None, 1, blocks.size), lambda row, _, part: (row, 0, part)),
    pl.BlockSpec((None, blocks.keys, 1), lambda row, *_: (row, 0, 0)),
    pl.BlockSpec((blocks.keys, 1), lambda *_: (0, 0)),
  ]


def _cost(inputs, results, settings):
  """What the kernel does, for XLA's accounts: products at full lanes."""
  (batch, queries, width), keys = inputs[0].shape, inputs[1].shape[1]
  heads = batch * width // settings.head_dim
  block = kernels.query_block(queries)
  scores = heads * block * sum(kernels.key_limits(queries, keys, settings.causal))
  products = 2 if len(inputs) == 3 else 5  # forward, backward
  return pl.CostEstimate(
    flops=2 * scores * max(kernels.LANES, settings.head_dim) * products,
    transcendentals=scores,
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *results)),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings, query, key, value, query_segments, key_segments, seeds):
  return _forward(settings, query, key, value, query_segments, key_segments, seeds)[0]


def _sizes(query):
  return {'batch': query.shape[0], 'heads': query.shape[2]}


def _forward(settings, query, key, value, query_segments, key_segments, seeds):
  def part(starts, query, key, value, query_segments, key_segments, seeds):
    segments = query_segments, key_segments
    return _call(settings, (query, key, value), segments, seeds, starts)

  names = (_ACTIVATION,) * 3 + (_SEGMENTS,) * 2 + ((None,),)
  outputs = [_ACTIVATION, _SUMS]
  run = placement.split(part, names, outputs, _sizes(query), ('batch', 'heads'))
  arrays = query, key, value, query_segments, key_segments, seeds
  mixed, log_sums = run(*arrays)
  return mixed, (*arrays, checkpoint_name(log_sums, LOG_SUMS))


def _backward(settings, residuals, by_mixed):
  def part(starts, queries, keys, seeds, log_sums, *activations):
    return _call(settings, activations, (queries, keys), seeds, starts, log_sums)

  query, key, value, query_segments, key_segments, seeds, log_sums = residuals
  names = (_SEGMENTS,) * 2 + ((None,), _SUMS) + (_ACTIVATION,) * 4
  outputs = [_ACTIVATION] * 3
  run = placement.split(part, names, outputs, _sizes(query), ('batch', 'heads'))
  activations = query, key, value, by_mixed
  gradients = run(query_segments, key_segments, seeds, log_sums, *activations)
  return *gradients, None, None, None


_attend.defvjp(_forward, _backward)
