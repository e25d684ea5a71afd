"""What a run needs before its first step: a folder, random numbers, a last step."""

import time
from typing import Any

import jax
from absl import logging
from etils import epath

from t5x import multihost, whole_files
from t5x.training import run_schedule


def set_hardware_rng_ops() -> None:
  """Makes new keys use XLA's RngBitGenerator, which is fast on TPU.

  Its numbers depend on how an array is sharded, and on the hardware.
  """
  jax.config.update('jax_default_prng_impl', 'unsafe_rbg')


def open_folder(parameter: str, path: str) -> None:
  """Makes a folder and tries to write there, before any work is done.

  Args:
    parameter: what the user calls it, for the message.
    path: the folder.

  Raises:
    OSError: it cannot be written to.
  """
  folder = epath.Path(path)
  try:
    if jax.process_index() == 0:
      whole_files.make_writable(folder)
    else:
      folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    reason = error.strerror or error
    if folder.exists() and not folder.is_dir():
      reason = 'it is a file, and must be a folder'
    raise OSError(f'{parameter} {path} cannot be written to: {reason}') from error


def random_keys(seed: int | None, use_hardware_rng: bool) -> tuple[Any, Any]:
  """Makes the keys for initialisation and for training.

  Args:
    seed: None takes the clock, the same on all processes, and hardware numbers.
    use_hardware_rng: fast generator; its numbers depend on the sharding.

  Returns:
    (key of the initial parameters, key of dropout).
  """
  if use_hardware_rng or seed is None:
    set_hardware_rng_ops()
  if seed is None:
    seed = multihost.broadcast_int(int(time.time()))
    logging.info('random_seed is None; this run takes %d.', seed)
  init_key, train_key = jax.random.split(jax.random.PRNGKey(seed))
  return init_key, train_key


def last_step(
  model_dir: str, first_step: int, total_steps: int, relative_steps: int | None
) -> int:
  """Says at which absolute step the run ends.

  `relative_steps` count from where the run began, also when it is started again; that
  step is noted in a file of the run's folder.

  Raises:
    ValueError: the checkpoint lies behind the end, or a number is not whole.
  """
  if relative_steps:
    note = epath.Path(model_dir) / 'first_step.txt'
    began = int(note.read_text()) if note.exists() else first_step
    multihost.sync('first_step_read')
    if jax.process_index() == 0 and not note.exists():
      with whole_files.whole_file(note) as file:
        file.write(str(began))
    total_steps = began + run_schedule.whole_steps('relative_steps', relative_steps)
  total_steps = run_schedule.whole_steps('total_steps', total_steps)
  if first_step > total_steps:
    raise ValueError(
      f'The run is to end at step {total_steps}, but its checkpoint is at step '
      f'{first_step} already. Raise TRAIN_STEPS, or set TRAIN_STEPS_RELATIVE.'
    )
  return total_steps
