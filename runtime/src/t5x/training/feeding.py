"""Batches on their way from a host's iterator to the devices."""

import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from t5x import partitioning
from t5x.training.trainer_types import BatchType


def _check_rows(
  batch: BatchType, partitioner: partitioning.BasePartitioner, parts_of_step: int
) -> None:
  """Raises a ValueError unless every device gets as many rows of every microbatch."""
  devices = partitioner.data_mesh_size
  for name, x in batch.items() if isinstance(batch, Mapping) else ():
    if not np.ndim(x):
      continue
    spans_hosts = isinstance(x, jax.Array) and not x.is_fully_addressable
    rows = x.shape[0] * (1 if spans_hosts else partitioner.data_shards)
    if rows % (parts_of_step * devices):
      raise ValueError(
        'A batch must divide by the number of microbatches times the number of data '
        f'partitions. Got: {rows} rows of {name!r}, {parts_of_step} microbatches, '
        f'{devices} data partitions (mesh {dict(partitioner.mesh.shape)}).'
      )


def put_on_devices(
  batch: BatchType, partitioner: partitioning.BasePartitioner, parts_of_step: int = 1
) -> BatchType:
  """Lays a batch over the devices; does not wait for that.

  Args:
    batch: arrays of [rows, ...]: this host's rows, or global arrays, which stay where
      they are. Scalars are given to all devices.
    partitioner: says how.
    parts_of_step: the number of microbatches in a step.

  Returns:
    Global arrays.

  Raises:
    ValueError: the rows do not divide among microbatches and devices.
  """
  _check_rows(batch, partitioner, parts_of_step)
  mesh = partitioner.mesh
  by_rows = NamedSharding(mesh, partitioner.data_partition_spec)
  whole = NamedSharding(mesh, PartitionSpec())

  def place(x):
    sharding = by_rows if np.ndim(x) else whole
    if jax.process_count() == 1:
      return jax.device_put(x, sharding)
    return partitioning.host_local_array_to_global_array(x, mesh, sharding)

  return jax.tree.map(place, batch)


def in_step_with_other_hosts(
  name: str, batches: Iterator[BatchType]
) -> Iterator[BatchType]:
  """Hands batches on, and checks that they end at once on all hosts.

  A host with one batch more would wait forever for the others to compute with it.

  Args:
    name: of the dataset, for the message.
    batches: this host's.

  Raises:
    ValueError: some hosts have another batch and some have not.
  """
  end = object()
  batches = iter(batches)
  while True:
    batch = next(batches, end)
    if jax.process_count() > 1:
      going_on = multihost_utils.process_allgather(np.array(batch is not end))
      count, hosts = np.count_nonzero(going_on), math.prod(going_on.shape)
      if 0 < count < hosts:
        raise ValueError(
          f'The hosts have different numbers of batches of {name!r}: {count} of '
          f'{hosts} have another one. Check for an empty or uneven shard.'
        )
    if batch is end:
      return
    yield batch
