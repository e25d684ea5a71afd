"""An output folder that appears whole or not at all."""

import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


def _may_go(folder: pathlib.Path) -> bool:
  """Whether a folder is empty, or has the look of an exported or imported model.

  Such a one has no folders but an import's one checkpoint. Runs and folders of several
  models have others.
  """
  inside = list(folder.iterdir())
  names = {path.name for path in inside}
  folders = {path.name for path in inside if path.is_dir()}
  is_model = 'config.json' in names or {'config.gin', 'checkpoint_0'} <= names
  return not names or (is_model and folders <= {'checkpoint_0'})


@contextmanager
def new_folder(target: pathlib.Path, overwrite: bool) -> Iterator[pathlib.Path]:
  """A temporary folder that becomes `target` when all has gone well.

  Args:
    target: the folder to make; may exist if it is empty.
    overwrite: whether a folder with something in it is replaced.

  Yields:
    The folder to write into, beside the target.

  Raises:
    FileExistsError: the target is not empty and is not to be replaced, or is none of
      those that the bridge makes.
    NotADirectoryError: the target is a file.
  """
  if target.exists() and not target.is_dir():
    raise NotADirectoryError(f'{target} is a file; name a folder')
  if target.is_dir() and any(target.iterdir()) and not overwrite:
    raise FileExistsError(f'{target} is not empty; add --overwrite to replace it')
  if target.is_dir() and not _may_go(target):
    raise FileExistsError(
      f'{target} holds other things than an earlier export or import (a run, say, or '
      'several models), so --overwrite does not replace it: name another --output_dir, '
      'or remove it yourself'
    )
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
