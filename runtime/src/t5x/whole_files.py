"""Atomic writes of files, and folders to write them to."""

import contextlib
import fcntl
import functools
import inspect
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from typing import IO, Any

import jax
from absl import logging
from etils import epath


def only_writer(parameter: str) -> Callable[..., Any]:
  """Makes a function with keyword arguments the only writer to a folder.

  It creates the folder named by `parameter`, and holds `lock` until it returns.
  """

  def decorate(function):
    @functools.wraps(function)
    def locked(**kwargs):
      folder = kwargs[parameter]
      open_folder(parameter, folder)
      with lock(parameter, folder):
        return function(**kwargs)

    locked.__signature__ = inspect.signature(function)  # Gin does not unwrap.
    return locked

  return decorate


@contextlib.contextmanager
def lock(parameter: str, folder: str, name: str = '.lock') -> Iterator[None]:
  """Locks a file of a run's folder in process 0, except in remote folders (gs://).

  The kernel releases the lock when the process ends, however it ends.

  Raises:
    BlockingIOError: another run holds the lock.
  """
  if jax.process_index() != 0 or '://' in folder:
    yield
    return
  with open(os.path.join(folder, name), 'a+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise BlockingIOError(
        f'{parameter} {folder} is in use by {file.read() or "another run"}. Wait until '
        f'it ends, or choose another {parameter}.'
      ) from error
    except OSError as error:  # Some network file systems have no locks.
      logging.warning('%s cannot be locked: %s', folder, error)
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}')
    file.flush()
    yield


def open_folder(parameter: str, path: str) -> None:
  """Creates a run's folder; OSError naming `parameter` if it cannot be written to."""
  if not path:
    raise ValueError(f'{parameter} must name a folder. Got: {path!r}.')
  folder = epath.Path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
      probe = folder / f'.writable-{uuid.uuid4().hex[:8]}'
      probe.write_text('')
      probe.unlink()
  except OSError as error:
    reason = error.strerror or error
    if folder.exists() and not folder.is_dir():
      reason = 'it is a file, not a folder'
    raise OSError(f'{parameter} {path} cannot be written to: {reason}') from error


@contextlib.contextmanager
def whole_file(path: epath.PathLike, mode: str = 'w') -> Iterator[IO[Any]]:
  """Opens a file for writing that replaces `path` when the body ends.

  Until then it is `<path>.<random>.part`, which is removed if the body raises.
  """
  target = epath.Path(path)
  unfinished = target.parent / f'{target.name}.{uuid.uuid4().hex[:8]}.part'
  try:
    with unfinished.open(mode) as file:
      file.write(b'' if 'b' in mode else '')  # Remote files exist after a write only.
      yield file
    unfinished.replace(target)
  except BaseException:
    unfinished.unlink(missing_ok=True)
    raise
