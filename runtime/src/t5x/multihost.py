"""Joins the processes of a run, and keeps them in step."""

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
  """Whether this process is the one that writes logs, metrics and indices."""
  return jax.process_index() == 0


def sync(name: str) -> None:
  """Waits until every process calls this with the same name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def broadcast(value: T) -> T:
  """Returns the tree of numbers or arrays that process 0 passed."""
  return multihost_utils.broadcast_one_to_all(value)


def broadcast_int(value: int) -> int:
  """Returns the integer (of 32 bits) that process 0 passed."""
  return int(broadcast(np.int32(value)))


def assert_same(tree: PyTree, what: str) -> None:
  """Checks that all processes passed equal values.

  Raises:
    ValueError: they did not.
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
  """Joins this process to the others of its run, if there are others.

  Decides in this order, before anything else touches JAX:
  1. `process_count` 1: alone, whatever the machine looks like;
  2. any other argument given: as given, the cluster filling in the rest;
  3. started by Slurm or Open MPI as one of several tasks, or on a TPU VM: as the
     cluster says;
  4. alone.

  Args:
    coordinator_address: 'host:port' of process 0.
    process_count: number of processes.
    process_index: this process's number, from 0.
    multiprocess_gpu: join even if nothing else is given (T5X's flag).
    initialization_timeout: seconds to wait for the others; None for JAX's default.

  Raises:
    ValueError: the arguments contradict each other, or the cluster does not know what
      they leave out.
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
      f'Could not join the other processes (found: {cluster or "no cluster"}; given: '
      f'{given or "nothing"}). Give --coordinator_address=HOST:PORT, --process_count '
      f'and --process_index, or --process_count=1 to run alone. JAX: {error}'
    ) from error
  logging.info('Process %d of %d.', jax.process_index(), jax.process_count())


def detect_cluster() -> str | None:
  """Names the cluster that started this process as one of several, else None."""
  # No query to a metadata server, which takes seconds to fail where there is none.
  for name, size in (
    ('Slurm', 'SLURM_STEP_NUM_TASKS'),  # Of this `srun`; an sbatch alone has none.
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
    return False  # Set where the TPU's own metadata are not to be asked.
  if importlib_util.find_spec('libtpu') is None:
    return False
  devices = pathlib.Path('/dev')
  return any(devices.glob('accel[0-9]*')) or any(devices.glob('vfio/[0-9]*'))
