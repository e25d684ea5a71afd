"""Several processes, one program: joining them, and what they must agree on."""

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
  """Waits until every process has come here.

  Args:
    name: what they wait for; the same in all of them.
  """
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def broadcast(value: T) -> T:
  """Returns what process 0 passed.

  Args:
    value: a tree of numbers or arrays, of one structure and shape in all processes.
  """
  return multihost_utils.broadcast_one_to_all(value)


def broadcast_int(value: int) -> int:
  """Returns the integer (of 32 bits) that process 0 passed: a seed, a time."""
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
  2. any other argument given: as told, the cluster filling in what is not;
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
    ValueError: the arguments contradict each other, or the cluster cannot tell what
      they leave out.
  """
  _check_arguments(coordinator_address, process_count, process_index)
  if process_count == 1 or jax.distributed.is_initialized():
    return
  given = {
    'coordinator_address': coordinator_address,
    'num_processes': process_count,
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
      'and --process_index, or --process_count=1 to run alone. JAX says: '
      f'{error}'
    ) from error
  logging.info('Process %d of %d.', jax.process_index(), jax.process_count())


def _check_arguments(
  coordinator_address: str | None,
  process_count: int | None,
  process_index: int | None,
) -> None:
  if process_count is not None and process_count < 1:
    raise ValueError(f'process_count must be at least 1. Got: {process_count}.')
  if process_index is not None and process_index < 0:
    raise ValueError(f'process_index must be at least 0. Got: {process_index}.')
  if process_index is not None and process_index >= (process_count or np.inf):
    raise ValueError(
      'process_index counts from 0 and must be below process_count. Got: '
      f'{process_index} of {process_count}.'
    )
  if coordinator_address is not None and ':' not in coordinator_address:
    raise ValueError(
      f'coordinator_address must be HOST:PORT. Got: {coordinator_address!r}.'
    )


def detect_cluster() -> str | None:
  """Names the cluster that started this process as one of several, else None.

  Reads the environment and the device files only: no import of a backend, no query to
  a metadata server, which takes seconds to fail on a machine that has none.
  """
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
