"""Files that appear complete or not at all, and folders to write them to."""

import contextlib
import uuid
from collections.abc import Iterator
from typing import IO, Any

import jax
from etils import epath


def make_writable(folder: epath.PathLike) -> None:
  """Makes a folder if needed and tries to write to it.

  Raises:
    OSError: it cannot be made or written to.
  """
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  probe = folder / f'.writable-{uuid.uuid4().hex[:8]}'  # others may share the folder
  probe.write_text('')
  probe.unlink()


def open_folder(parameter: str, path: str) -> None:
  """Makes a folder and tries to write there, before any work is done.

  Args:
    parameter: the user's name for it, for the message.
    path: the folder; every process of a run calls this, the first one tries.

  Raises:
    OSError: it cannot be written to.
  """
  folder = epath.Path(path)
  try:
    if jax.process_index() == 0:
      make_writable(folder)
    else:
      folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    reason = error.strerror or error
    if folder.exists() and not folder.is_dir():
      reason = 'it is a file, and must be a folder'
    raise OSError(f'{parameter} {path} cannot be written to: {reason}') from error


@contextlib.contextmanager
def whole_file(path: epath.PathLike, mode: str = 'w') -> Iterator[IO[Any]]:
  """Opens a file for writing that appears under its name when the body has ended.

  Until then it is `<path>.<random>.part`, which is removed if the body raises. An
  existing file is replaced.
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
