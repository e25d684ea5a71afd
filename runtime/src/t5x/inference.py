"""Runs a model over a dataset and returns the results in the dataset's order."""

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

# Batches whose results may be on the devices: one that is computed, one that is copied.
_IN_FLIGHT = 2
# Index of the rows that only fill up a batch.
_FILLER = -1

# A function of parameters and batch, and of `rng` and `flax_mutables` if it has
# parameters of these names; returns a tree of arrays, one row per example.
InferStepCallable = Callable[..., PyTree]
# A function of (dataset of (index, features), train state, rng).
InferFnCallable = Callable[..., Any]


def get_infer_fn(
  infer_step: InferStepCallable,
  batch_size: int,
  train_state_axes: train_state_lib.TrainState,
  partitioner: partitioning.BasePartitioner,
  keep_aux_as_numpy: bool = False,
) -> InferFnCallable:
  """Makes a function that runs `infer_step` over a dataset.

  The dataset yields (index, features) and is the same on every host; each host
  computes its part, and each gets all results. The last batch is filled up with
  copies, which are dropped.

  Args:
    infer_step: from parameters and a batch to results. A pair whose second part is a
      mapping is results and auxiliary values (`predict_batch_with_aux`).
    batch_size: examples in a batch, over all hosts.
    train_state_axes: the state's mesh axes.
    partitioner: distributes the step.
    keep_aux_as_numpy: leave auxiliary values as lists of arrays; by default
      they become lists of numbers.

  Returns:
    A function of (dataset, train state, rng=None) that returns (index, result) by
    rising index, or these and the auxiliary values. Results are numbers and
    nested lists, in trees like those that the step returns.
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
  """Distributes a step, which then also returns the indices it is given.

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
  """Number of examples of a dataset, which must be the same on every host."""
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
  """This host's part of every batch, all of them `rows` long.

  Every host goes through equally many batches, whatever is left for it in the
  last one.
  """
  batches = ds.shard(layout.num_shards, layout.shard_id).batch(rows).as_numpy_iterator()
  for _ in range(-(-size // batch_size)):
    indices, features = next(batches, (np.empty((0,), np.int64), None))
    missing = rows - len(indices)
    if missing:
      # Any example will do; one that the model can handle, unlike zeros.
      example = next(ds.take(1).as_numpy_iterator())[1]
      filler = jax.tree.map(lambda x, n=missing: np.stack([x] * n), example)
      indices = np.pad(indices, (0, missing), constant_values=_FILLER)
      if features is None:
        features = filler
      else:
        features = jax.tree.map(lambda *parts: np.concatenate(parts), features, filler)
    yield indices.astype(np.int32), features


def _on_host(results: PyTree) -> PyTree:
  """Copies results, which every device holds, to NumPy arrays."""
  return jax.tree.map(
    lambda x: np.asarray(x.addressable_data(0) if isinstance(x, jax.Array) else x),
    results,
  )


def _in_order(
  indices: np.ndarray, outputs: PyTree, size: int
) -> tuple[np.ndarray, PyTree]:
  """Drops what filled up batches and sorts by index."""
  order = np.argsort(indices, kind='stable')
  order = order[np.count_nonzero(indices == _FILLER) :]
  indices = indices[order]
  if len(indices) != size or np.any(np.diff(indices) == 0):
    raise ValueError(
      'Every example must come back once; are the hosts reading the same dataset in'
      f' the same order? Got: {len(np.unique(indices))} of {size} examples in'
      f' {len(indices)} results.'
    )
  return indices, jax.tree.map(lambda x: x[order], outputs)


def _as_lists(indices: np.ndarray, outputs: PyTree, keep_aux_as_numpy: bool) -> Any:
  """Splits results by example, and auxiliary values off."""
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
