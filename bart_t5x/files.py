"""Files and folders that appear whole or not at all."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import IO, Any


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, mode: str = 'w') -> Iterator[IO[Any]]:
  """Opens a file for writing; it gets its name when the body has ended well.

  Args:
    path: the file; an earlier one of that name stays until then.
    mode: 'w' (UTF-8) or 'wb'.
  """
  path = pathlib.Path(path)
  unfinished = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}.unfinished')
  try:
    with open(unfinished, mode, encoding=None if 'b' in mode else 'utf-8') as file:
      yield file
    _sync(unfinished)
    unfinished.replace(path)
  finally:
    unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(
  path: str | os.PathLike,
  overwrite: bool = False,
  replaceable: Callable[[pathlib.Path], bool] = lambda folder: True,
) -> Iterator[pathlib.Path]:
  """Yields a folder to write into, which becomes `path` when the body has ended well.

  Until then an earlier folder of that name stays as it is. The folder that a killed
  process was writing is removed by the next one.

  Args:
    path: the folder to make. It may exist if it is empty.
    overwrite: whether a folder with files in it is replaced.
    replaceable: whether a folder holds only what may be removed.

  Raises:
    NotADirectoryError: `path` is a file.
    FileExistsError: `path` is not empty and may not be replaced, or another process is
      writing it.
  """
  target = pathlib.Path(os.path.realpath(path))
  if target.exists() and not target.is_dir():
    raise NotADirectoryError(f'{path} is a file. Name a folder.')
  if os.path.ismount(target):
    raise FileExistsError(f'{path} is a mount point. Name a folder inside it.')
  if target.is_dir() and any(target.iterdir()):
    if not overwrite:
      raise FileExistsError(
        f'{path} is not empty. Name another folder, or replace it with --overwrite.'
      )
    if not replaceable(target):
      raise FileExistsError(
        f'{path} also holds other files, so --overwrite does not replace it. Name '
        'another folder, or remove it yourself.'
      )
  unfinished = target.with_name(f'.{target.name}.unfinished')
  unfinished.mkdir(parents=True, exist_ok=True)
  with _lock(unfinished, path):
    try:
      _remove(*unfinished.iterdir())
      yield unfinished
      for file in unfinished.rglob('*'):
        _sync(file)
      replaced = target.with_name(f'.{target.name}.replaced')
      _remove(replaced)
      if target.exists():
        target.rename(replaced)
      unfinished.rename(target)
      _remove(replaced)
    except BaseException:
      shutil.rmtree(unfinished, ignore_errors=True)
      raise


@contextlib.contextmanager
def _lock(folder: pathlib.Path, path: str | os.PathLike) -> Iterator[None]:
  # The system releases the lock when the process ends, however it ends.
  handle = os.open(folder, os.O_RDONLY)
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise FileExistsError(f'Another process is writing {path}.') from e
    yield
  finally:
    os.close(handle)


def _sync(path: pathlib.Path) -> None:
  # A full disk on the network may fail only here.
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def _remove(*paths: pathlib.Path) -> None:
  for path in paths:
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path)
    else:
      path.unlink(missing_ok=True)
