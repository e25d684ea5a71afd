"""Files that are either whole or not there, and folders that take them."""

import contextlib
import uuid
from collections.abc import Iterator
from typing import IO, Any

from etils import epath


def make_writable(folder: epath.PathLike) -> None:
  """Makes a folder, if it is not there, and tries to write in it.

  Raises:
    OSError: it cannot be made or written to.
  """
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  # Of a name of its own: several programs may share the folder.
  trial = folder / f'.writable-{uuid.uuid4().hex[:8]}'
  trial.write_text('')
  trial.unlink()


@contextlib.contextmanager
def whole_file(path: epath.PathLike, mode: str = 'w') -> Iterator[IO[Any]]:
  """Opens a file for writing, which appears under its name once the body has ended.

  Until then it is `<path>.<random>.part`, which goes if the body raises: two programs
  that write the same file do not meet.

  Args:
    path: the file; one that is there is replaced.
    mode: 'w' or 'wb'.

  Yields:
    The open file.
  """
  target = epath.Path(path)
  unfinished = target.parent / f'{target.name}.{uuid.uuid4().hex[:8]}.part'
  try:
    with unfinished.open(mode) as file:
      file.write(b'' if 'b' in mode else '')  # A remote file of no write is no file.
      yield file
    unfinished.replace(target)
  except BaseException:
    unfinished.unlink(missing_ok=True)
    raise
