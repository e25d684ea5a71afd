"""Joins the processes of a run and synchronises them."""

import os
import pathlib
from importlib import util as importlib_util
from typing import TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import PyTree

T = TypeVar('T')


def is_host_0() -> bool:
  """Returns whether this process writes logs, metrics and indices."""
  return jax.process_index() == 0


def sync(name: str) -> None:
  """Waits until every process calls this with the same name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def broadcast(value: T) -> T:
  """Returns process 0's tree of numbers or arrays."""
  return multihost_utils.broadcast_one_to_all(value)


def broadcast_int(value: int) -> int:
  """Returns process 0's 32-bit integer."""
  return int(broadcast(np.int32(value)))


def everywhere(condition: bool) -> bool:
  """Returns whether a condition holds in every process."""
  if jax.process_count() == 1:
    return condition
  return bool(multihost_utils.process_allgather(np.asarray(condition)).all())


def assert_same(tree: PyTree, what: str) -> None:
  """Checks that all processes passed equal values.

  Raises:
    ValueError: the values differ.
  """
  if jax.process_count() == 1:
    return
  try:
    multihost_utils.assert_equal(tree)
  except AssertionError as error:
    raise ValueError(f'{what} must be the same in every process: {error}') from error


# ---- Joining ----


def initialize(
  coordinator_address: str | None = None,
  process_count: int | None = None,
  process_index: int | None = None,
  multiprocess_gpu: bool = False,
  initialization_timeout: int | None = None,
) -> None:
  """Joins this process to the others of its run, if any. Call it before using JAX.

  In order of precedence:
  1. `process_count` is 1: the process runs alone.
  2. Any other argument is given: they are used, and the cluster supplies the rest.
  3. Slurm or Open MPI started it as one of several tasks, or it is on a TPU VM: the
     cluster supplies everything.
  4. The process runs alone.

  Args:
    coordinator_address: 'host:port' of process 0.
    process_count: number of processes.
    process_index: from 0.
    multiprocess_gpu: joins even if no other argument is given (T5X's flag).
    initialization_timeout: seconds to wait for the others; None for JAX's default.

  Raises:
    ValueError: the arguments contradict each other, or do not suffice to join.
  """
  count = process_count
  if count is not None and count < 1:
    raise ValueError(f'process_count must be at least 1. Got: {count}.')
  if process_index is not None and not 0 <= process_index < (count or np.inf):
    raise ValueError(
      'process_index must be at least 0 and below process_count. Got: '
      f'{process_index} of {count}.'
    )
  if coordinator_address is not None and ':' not in coordinator_address:
    raise ValueError(
      f'coordinator_address must be HOST:PORT. Got: {coordinator_address!r}.'
    )
  if count == 1 or jax.distributed.is_initialized():
    return
  given = {
    'coordinator_address': coordinator_address,
    'num_processes': count,
    'process_id': process_index,
  }
  given = {name: value for name, value in given.items() if value is not None}
  cluster = detect_cluster()
  if not given and not multiprocess_gpu and cluster is None:
    return
  if initialization_timeout is not None:
    given['initialization_timeout'] = initialization_timeout
  try:
    jax.distributed.initialize(**given)
  except (ValueError, RuntimeError) as error:
    raise ValueError(
      f'Could not join the other processes (cluster: {cluster or "none"}; arguments: '
      f'{given or "none"}). Give --coordinator_address=HOST:PORT, --process_count and '
      f'--process_index, or --process_count=1 to run alone. JAX: {error}'
    ) from error
  logging.info('Process %d of %d.', jax.process_index(), jax.process_count())


def detect_cluster() -> str | None:
  """Returns the cluster that started this process as one of several, or None."""
  # Asking a metadata server would take seconds to fail on other machines.
  for name, size in (
    ('Slurm', 'SLURM_STEP_NUM_TASKS'),  # Set by srun, not by sbatch alone.
    ('Open MPI', 'OMPI_COMM_WORLD_SIZE'),
  ):
    if int(os.environ.get(size, '1')) > 1:
      return name
  return 'TPU VM' if _on_tpu_vm() else None


def _on_tpu_vm() -> bool:
  platforms = os.environ.get('JAX_PLATFORMS', '')
  if platforms and 'tpu' not in platforms.split(','):
    return False
  if os.environ.get('TPU_SKIP_MDS_QUERY'):
    return False  # Set on machines whose TPU metadata must not be queried.
  if importlib_util.find_spec('libtpu') is None:
    return False
  devices = pathlib.Path('/dev')
  return any(devices.glob('accel[0-9]*')) or any(devices.glob('vfio/[0-9]*'))
