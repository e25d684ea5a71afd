"""Folders that appear whole or not at all."""

import contextlib
import fcntl
import os
import pathlib
import posixpath
import shutil
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def whole_folder(
  path: str | os.PathLike,
  overwrite: bool = False,
  replaceable: Callable[[pathlib.Path], bool] = lambda folder: True,
) -> Iterator[pathlib.Path]:
  """Yields a folder to write into, which is renamed to `path` if the body succeeds.

  Until then an earlier folder at `path` is untouched. Leftovers of a killed process are
  removed by the next one.

  Args:
    path: the folder to make; may exist if it is empty.
    overwrite: replace a folder that is not empty, if it is `replaceable`.
    replaceable: whether a folder holds only files that may be removed.

  Raises:
    NotADirectoryError: `path` is a file.
    FileExistsError: `path` may not be replaced, or another process is writing it.
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
def whole_url(
  url: str, last: str, replaceable: Callable[[str], bool]
) -> Iterator[None]:
  """Lets the body write files to the URL of a folder, in a bucket for example.

  The folder is whole once it has the file named `last`, which must be written last. No
  lock keeps two processes from writing to one folder.

  Args:
    url: of any file system that `fsspec` knows.
    last: name of the file without which the folder is a leftover.
    replaceable: whether a leftover's file, given by name, may be removed.

  Raises:
    FileExistsError: the folder is not empty, nor a leftover.
  """
  import fsspec

  fs, path = fsspec.url_to_fs(url)

  def files() -> dict[str, str]:
    fs.invalidate_cache()
    found = fs.find(path) if fs.exists(path) else []
    return {posixpath.relpath(name, path): name for name in found}

  def remove(found: dict[str, str]) -> None:
    if leftovers := [full for name, full in found.items() if replaceable(name)]:
      fs.rm(leftovers)

  there = files()
  if last in there or not all(map(replaceable, there)):
    raise FileExistsError(f'{url} is not empty. Name another folder, or remove it.')
  remove(there)
  try:
    yield
  except BaseException:
    if last not in (there := files()):  # else another process was faster
      remove(there)
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
  # A full network disk may fail only here.
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
