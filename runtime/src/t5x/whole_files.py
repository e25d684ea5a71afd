"""Atomic writes of files, and folders to write them to."""

import contextlib
import uuid
from collections.abc import Iterator
from typing import IO, Any

import jax
from etils import epath


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
