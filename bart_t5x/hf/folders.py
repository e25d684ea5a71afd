"""An output folder that appears whole or not at all."""

import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def new_folder(target: pathlib.Path, overwrite: bool) -> Iterator[pathlib.Path]:
  """A temporary folder that becomes `target` when all has gone well.

  Args:
    target: the folder to make; may exist if it is empty.
    overwrite: whether a folder with something in it is replaced.

  Yields:
    The folder to write into, beside the target.

  Raises:
    FileExistsError: the target is not empty and is not to be replaced.
    NotADirectoryError: the target is a file.
  """
  if target.exists() and not target.is_dir():
    raise NotADirectoryError(f'{target} is a file; name a folder')
  if target.is_dir() and any(target.iterdir()) and not overwrite:
    raise FileExistsError(f'{target} is not empty; add --overwrite to replace it')
  target.parent.mkdir(parents=True, exist_ok=True)
  work = pathlib.Path(tempfile.mkdtemp(prefix=f'.{target.name}.', dir=target.parent))
  try:
    work.chmod(0o755)
    yield work
    if target.exists():
      shutil.rmtree(target)
    work.rename(target)
  finally:
    shutil.rmtree(work, ignore_errors=True)
