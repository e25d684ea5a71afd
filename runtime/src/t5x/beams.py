"""The beam dimension: adding it, flattening it, gathering along it.

Decoders run a model on `batch * beam` rows at once. The rows of one example
lie side by side, so `[batch * beam, ...]` and `[batch, beam, ...]` are the same
memory seen twice. Under scanned layers a cache has one leading layer axis; the
parameter `offset` (0 or 1) says how many axes come before the batch.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

PyTree = Any

# Cache leaves that are the same for every beam, whatever the batch is.
_SHARED_LEAVES = frozenset({'cached_bias', 'position_embedder_index'})

# Width of a TPU vector register, the unit in which top-k is split.
_LANES = 128


@flax.struct.dataclass
class DecodingState:
  """What a model is told in order to predict one token.

  The rows of one example are neighbours: row `b * num_decodes + d` is decode
  `d` of example `b`.

  Attributes:
    cur_index: int32 [batch * num_decodes], position of `cur_token`.
    sequences: int32 [batch * num_decodes, length], tokens so far; position 0
      is the start token (id 0).
    cur_token: int32 [batch * num_decodes, 1], the token to feed.
    cache: the model's cache, a tree of arrays.
  """

  cur_index: jax.Array
  sequences: jax.Array
  cur_token: jax.Array
  cache: Mapping[str, Any]


# From a state to logits [batch * num_decodes, vocabulary] and the new cache.
TokensToLogits = Callable[[DecodingState], tuple[jax.Array, Mapping[str, Any]]]


def _leaf_name(path: tuple[Any, ...]) -> str | None:
  """The last dictionary key on the way to a leaf."""
  keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
  return keys[-1] if keys else None


def cache_map(
  fn: Callable[[jax.Array], jax.Array],
  cache: PyTree,
  apply_to_index: bool = False,
) -> PyTree:
  """Applies `fn` to those leaves of a cache that have a batch axis.

  Args:
    fn: the function on one array.
    cache: nested mappings of arrays; a FrozenDict stays one.
    apply_to_index: whether `cache_index` counts as having a batch axis. It does
      in a cache filled from prompts of various lengths, and is a scalar else.

  Returns:
    The new cache. Relative biases and the index of absolute positions
    (`cached_bias`, `position_embedder_index`) are passed through.
  """
  untouched = _SHARED_LEAVES if apply_to_index else _SHARED_LEAVES | {'cache_index'}
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf if _leaf_name(path) in untouched else fn(leaf), cache
  )


def add_beam_dim(
  x: Shaped[Array, '...'], beam_size: int, offset: int = 0
) -> Shaped[Array, '...']:
  """Repeats every example: [batch, ...] to [batch, beam_size, ...]."""
  x = jnp.expand_dims(x, offset + 1)
  shape = x.shape[: offset + 1] + (beam_size,) + x.shape[offset + 2 :]
  return jnp.broadcast_to(x, shape)


def flatten_beam_dim(x: Shaped[Array, '...'], offset: int = 0) -> Shaped[Array, '...']:
  """Joins batch and beam: [batch, beam, ...] to [batch * beam, ...]."""
  rows = x.shape[offset] * x.shape[offset + 1]
  return x.reshape(x.shape[:offset] + (rows,) + x.shape[offset + 2 :])


def unflatten_beam_dim(
  x: Shaped[Array, '...'], batch_size: int, beam_size: int, offset: int = 0
) -> Shaped[Array, '...']:
  """Splits rows again: [batch * beam, ...] to [batch, beam, ...].

  Raises:
    ValueError: if axis `offset` is not batch_size * beam_size long.
  """
  if x.shape[offset] != batch_size * beam_size:
    raise ValueError(
      f'Axis {offset} must be batch size times beam size. Got: shape {x.shape},'
      f' batch size {batch_size}, beam size {beam_size}.'
    )
  return x.reshape(x.shape[:offset] + (batch_size, beam_size) + x.shape[offset + 1 :])


def flat_batch_beam_expand(
  x: Shaped[Array, '...'], beam_size: int, offset: int = 0
) -> Shaped[Array, '...']:
  """Repeats every example in place: [batch, ...] to [batch * beam_size, ...]."""
  return flatten_beam_dim(add_beam_dim(x, beam_size, offset), offset)


def expand_position_indices(
  cache: PyTree, batch_size: int, beam_size: int, offset: int = 0
) -> PyTree:
  """Repeats the position of every example for its beams.

  A cache filled from prompts has one position an example; `cache_map` never
  touches that leaf, so it is expanded once, before decoding starts.

  Args:
    cache: a cache that was filled from prompts.
    batch_size: number of examples.
    beam_size: number of beams an example.
    offset: axes before the batch axis in this cache.

  Returns:
    The cache, its `position_embedder_index` with batch_size * beam_size rows
    where it had batch_size.
  """

  def expand(path, leaf):
    if _leaf_name(path) != 'position_embedder_index':
      return leaf
    # A model outside the layer scan has no layer axis, whatever the offset is.
    axis = next(
      (a for a in (0, offset) if leaf.ndim > a and leaf.shape[a] == batch_size), None
    )
    return leaf if axis is None else flat_batch_beam_expand(leaf, beam_size, axis)

  return jax.tree_util.tree_map_with_path(expand, cache)


def _take_beams(
  x: jax.Array, beam_indices: jax.Array, one_hot: bool, offset: int
) -> jax.Array:
  """Takes beams of one array by index or by a contraction."""
  if not one_hot:
    # vmap makes the batch a batching dimension of the gather, which the
    # partitioner keeps local to each device.
    take = functools.partial(jnp.take, axis=offset, mode='clip')
    return jax.vmap(take, in_axes=(offset, 0), out_axes=offset)(x, beam_indices)
  selector = jax.nn.one_hot(beam_indices, x.shape[offset + 1], dtype=jnp.int32)
  equation = 'ijk,ik...->ij...' if offset == 0 else 'ijk,lik...->lij...'
  # Full precision: a product with 0 or 1 must not round the cache.
  picked = jnp.einsum(equation, selector, x, precision=lax.Precision.HIGHEST)
  return picked.astype(x.dtype)


def gather_beams(
  nested: PyTree,
  beam_indices: Int[Array, 'batch new_beam'],
  batch_size: int,
  old_beam_size: int,
  new_beam_size: int,
  one_hot: bool = True,
) -> PyTree:
  """Picks beams of every array in a tree.

  Args:
    nested: arrays [batch, old_beam, ...].
    beam_indices: which of the old beams each new beam is.
    batch_size: size of the batch.
    old_beam_size: number of beams in `nested`.
    new_beam_size: number of beams in the result.
    one_hot: contract with a one-hot matrix in place of a gather. The result is
      the same; infinities must not occur (0 * inf is not a number).

  Returns:
    The same tree with arrays [batch, new_beam, ...].

  Raises:
    ValueError: if a size does not match the arrays.
  """
  _check_beams(beam_indices, batch_size, new_beam_size)

  def pick(x):
    if x.shape[:2] != (batch_size, old_beam_size):
      raise ValueError(
        f'Arrays must begin with axes ({batch_size}, {old_beam_size}), batch and'
        f' beams. Got: shape {x.shape}.'
      )
    return _take_beams(x, beam_indices, one_hot, offset=0)

  return jax.tree.map(pick, nested)


def cache_gather_beams(
  nested: PyTree,
  beam_indices: Int[Array, 'batch new_beam'],
  batch_size: int,
  old_beam_size: int,
  new_beam_size: int,
  one_hot: bool = True,
  offset: int = 0,
) -> PyTree:
  """Picks beams of a cache; leaves without a batch axis stay as they are.

  Args:
    nested: the cache; arrays [batch, old_beam, ...] after `offset` axes.
    beam_indices: which of the old beams each new beam is.
    batch_size: size of the batch.
    old_beam_size: number of beams in the cache.
    new_beam_size: number of beams in the result.
    one_hot: contract with a one-hot matrix in place of a gather.
    offset: axes before the batch axis, 0 or 1.

  Returns:
    The cache of the new beams.

  Raises:
    ValueError: if `offset` or a size is out of range.
  """
  if offset not in (0, 1):
    raise ValueError(f'A cache has 0 or 1 axes before its batch axis. Got: {offset}.')
  _check_beams(beam_indices, batch_size, new_beam_size)

  def pick(x):
    if x.shape[offset : offset + 2] != (batch_size, old_beam_size):
      raise ValueError(
        f'Cache arrays must have batch and beams ({batch_size}, {old_beam_size}) at'
        f' axis {offset}. Got: shape {x.shape}.'
      )
    return _take_beams(x, beam_indices, one_hot, offset)

  return cache_map(pick, nested)


def _check_beams(beam_indices: jax.Array, batch_size: int, beam_size: int) -> None:
  if beam_indices.shape != (batch_size, beam_size):
    raise ValueError(
      f'Beam indices must be [batch, new beams] = ({batch_size}, {beam_size}).'
      f' Got: {beam_indices.shape}.'
    )


def gather_topk_beams(
  nested: PyTree,
  score_or_log_prob: Float[Array, 'batch old_beam'],
  batch_size: int,
  new_beam_size: int,
) -> PyTree:
  """Keeps the best beams, the best one last.

  Args:
    nested: arrays [batch, old_beam, ...].
    score_or_log_prob: what to rank the beams by.
    batch_size: size of the batch.
    new_beam_size: how many beams to keep.

  Returns:
    The same tree with arrays [batch, new_beam_size, ...], sorted by rising
    score.
  """
  _, best = lax.top_k(score_or_log_prob, new_beam_size)
  return gather_beams(
    nested,
    best[:, ::-1],
    batch_size,
    score_or_log_prob.shape[1],
    new_beam_size,
    one_hot=False,
  )


def top_k_two_stage(
  x: Float[Array, 'batch samples'], k: int
) -> tuple[Float[Array, 'batch k'], Int[Array, 'batch k']]:
  """`lax.top_k` by rows, faster on TPU for few long rows.

  A row is cut into 128 pieces, the best k of each are found side by side, and
  the best k of those are the row's.

  Args:
    x: the values.
    k: how many to find.

  Returns:
    The k largest values a row, falling, and where they are.
  """
  batch, samples = x.shape
  if batch > 8 or samples <= 8 * _LANES * k:
    return tuple(lax.top_k(x, k))
  piece = -(-samples // _LANES)
  padding = ((0, 0), (0, piece * _LANES - samples))
  pieces = jnp.pad(x, padding, constant_values=-np.inf).reshape(batch, _LANES, piece)
  values, where = lax.top_k(pieces, k)  # [batch, lanes, k]
  where = where + piece * jnp.arange(_LANES, dtype=where.dtype)[:, None]
  values, winner = lax.top_k(values.reshape(batch, -1), k)
  return values, jnp.take_along_axis(where.reshape(batch, -1), winner, axis=1)
