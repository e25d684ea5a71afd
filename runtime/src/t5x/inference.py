"""Runs a model over a dataset; returns results in the dataset's order."""

import collections
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from t5x import multihost, partitioning
from t5x import train_state as train_state_lib

# Batches whose results may be on the devices: one being computed, one being copied.
_IN_FLIGHT = 2
# Index of padding rows.
_FILLER = -1

# (params, batch) -> tree of arrays, one row per example. Also gets `rng` and
# `flax_mutables` if it has parameters of these names.
InferStepCallable = Callable[..., PyTree]
# (dataset of (index, features), train state, rng) -> results.
InferFnCallable = Callable[..., Any]


def get_infer_fn(
  infer_step: InferStepCallable,
  batch_size: int,
  train_state_axes: train_state_lib.TrainState,
  partitioner: partitioning.BasePartitioner,
  keep_aux_as_numpy: bool = False,
) -> InferFnCallable:
  """Makes a function that runs `infer_step` over a dataset.

  The dataset yields (index, features), the same on every host. Each host computes its
  share and gets all results.

  Args:
    infer_step: if it returns a pair whose second item is a mapping, these are results
      and auxiliary values (`predict_batch_with_aux`).
    batch_size: examples per batch, over all hosts.
    keep_aux_as_numpy: return auxiliary values as lists of arrays, not of numbers.

  Returns:
    A function of (dataset, train state, rng=None) that returns [(index, result), ...]
    sorted by index, or a pair of this and the auxiliary values. Results are trees, as
    `infer_step` returns them, of numbers and nested lists.
  """
  layout = partitioner.get_data_layout(batch_size)
  step = partition_step(infer_step, partitioner, train_state_axes)

  def infer_fn(
    ds: Any, train_state: train_state_lib.TrainState, rng: jax.Array | None = None
  ) -> Any:
    size = _checked_length(ds)
    rows = batch_size // layout.num_shards
    pending = collections.deque()
    results = []
    for indices, features in _padded_batches(ds, size, batch_size, rows, layout):
      key = None
      if rng is not None:
        key, rng = jax.random.split(rng)
      pending.append(
        step(train_state.params, features, key, indices, train_state.flax_mutables)
      )
      if len(pending) > _IN_FLIGHT:
        results.append(_on_host(pending.popleft()))
    results.extend(map(_on_host, pending))
    indices, outputs = jax.tree.map(lambda *parts: np.concatenate(parts), *results)
    return _as_lists(*_in_order(indices, outputs, size), keep_aux_as_numpy)

  return infer_fn


def partition_step(
  infer_step: InferStepCallable,
  partitioner: partitioning.BasePartitioner,
  axes: train_state_lib.TrainState,
) -> Callable[..., tuple[jax.Array, PyTree]]:
  """Partitions a step, which then also returns the indices it was given.

  Inputs are this host's rows; outputs are all rows, on every host.
  """
  parameters = inspect.signature(infer_step).parameters

  def step(params, batch, rng, indices, flax_mutables):
    optional = {'rng': rng, 'flax_mutables': flax_mutables}
    chosen = {name: x for name, x in optional.items() if name in parameters}
    return indices, infer_step(params, batch, **chosen)

  data = partitioner.data_partition_spec
  run = partitioner.partition(
    step,
    in_axis_resources=(axes.params, data, None, data, axes.flax_mutables),
    out_axis_resources=(None, None),
  )
  if jax.process_count() == 1:
    return run

  def run_on_all_hosts(params, batch, rng, indices, flax_mutables):
    batch, rng, indices = partitioning.host_local_array_to_global_array(
      (batch, rng, indices), partitioner.mesh, (data, PartitionSpec(), data)
    )
    return run(params, batch, rng, indices, flax_mutables)

  return run_on_all_hosts


def _checked_length(ds: Any) -> int:
  """Returns the dataset's size, after checking that all hosts have the same data."""
  size = int(ds.cardinality())
  if size <= 0:
    raise ValueError(
      'Inference needs a dataset of known, finite length above 0 (see '
      f'tf.data.experimental.assert_cardinality). Got: {size}.'
    )
  shapes = jax.tree.map(lambda spec: spec.shape.as_list(), ds.element_spec)
  multihost.assert_same(
    (size, [-1 if n is None else n for n in jax.tree.leaves(shapes)]),
    'the size and the shapes of the dataset to infer',
  )
  return size


def _padded_batches(
  ds: Any,
  size: int,
  batch_size: int,
  rows: int,
  layout: partitioning.DataLayout,
) -> Iterator[tuple[np.ndarray, PyTree]]:
  """Yields this host's `rows` rows of every batch, padded on every host alike."""
  batches = ds.shard(layout.num_shards, layout.shard_id).batch(rows).as_numpy_iterator()
  for _ in range(-(-size // batch_size)):
    indices, features = next(batches, (np.empty((0,), np.int64), None))
    missing = rows - len(indices)
    if missing:
      # Copies of an example: the model may fail on zeros.
      example = next(ds.take(1).as_numpy_iterator())[1]
      filler = jax.tree.map(lambda x, n=missing: np.stack([x] * n), example)
      indices = np.pad(indices, (0, missing), constant_values=_FILLER)
      if features is None:
        features = filler
      else:
        features = jax.tree.map(lambda *parts: np.concatenate(parts), features, filler)
    yield indices.astype(np.int32), features


def _on_host(results: PyTree) -> PyTree:
  """Copies replicated results to NumPy arrays."""
  return jax.tree.map(
    lambda x: np.asarray(x.addressable_data(0) if isinstance(x, jax.Array) else x),
    results,
  )


def _in_order(
  indices: np.ndarray, outputs: PyTree, size: int
) -> tuple[np.ndarray, PyTree]:
  """Drops padding rows and sorts by index."""
  order = np.argsort(indices, kind='stable')
  order = order[np.count_nonzero(indices == _FILLER) :]
  indices = indices[order]
  if len(indices) != size or np.any(np.diff(indices) == 0):
    raise ValueError(
      'Every example must have one result; do all hosts read the same dataset in the '
      f'same order? Got: {len(np.unique(indices))} of {size} examples in '
      f'{len(indices)} results.'
    )
  return indices, jax.tree.map(lambda x: x[order], outputs)


def _as_lists(indices: np.ndarray, outputs: PyTree, keep_aux_as_numpy: bool) -> Any:
  """Splits results by example and separates auxiliary values."""
  aux = None
  if isinstance(outputs, tuple) and len(outputs) == 2:
    if isinstance(outputs[1], Mapping):
      outputs, aux = outputs
  leaves, structure = jax.tree.flatten(outputs)
  rows = zip(*(leaf.tolist() for leaf in leaves), strict=True)
  rebuild = functools.partial(jax.tree.unflatten, structure)
  results = list(zip(indices.tolist(), map(rebuild, rows), strict=True))
  if aux is None:
    return results
  to_list = list if keep_aux_as_numpy else np.ndarray.tolist
  return results, jax.tree.map(to_list, aux)
