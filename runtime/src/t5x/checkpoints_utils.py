"""Which checkpoints a folder holds, by their names alone.

Nothing here reads a checkpoint or imports JAX: a job that only watches a run's
folder needs no more than this.
"""

import os
import re
from collections.abc import Sequence

import gin
from etils import epath

# Files of the data position, `<prefix>-<shard>-of-<shards>` as upstream names them.
DATASET_FILE_PREFIX = 'train_ds'
# Where a folder cannot be renamed in one go, this file says that it is whole.
_COMMITTED = 'commit_success.txt'
# Present in an index of the previous layout, which was moved when it was whole.
_LEGACY_INDEX = 'checkpoint'


@gin.configurable
def get_checkpoint_prefix(prefix: str = 'checkpoint') -> str:
  """The name of step folders before `_<step>`; gin can change it."""
  return prefix


def _step_of(name: str) -> int | None:
  """The step that a folder's name ends in: 'checkpoint_7' -> 7, all else None."""
  match = re.fullmatch(re.escape(get_checkpoint_prefix()) + r'_(\d+)', name)
  return int(match.group(1)) if match else None


def is_checkpoint_name(name: str) -> bool:
  """Whether a folder's name is that of a checkpoint."""
  return _step_of(name) is not None


def renames_at_once(path: epath.PathLike) -> bool:
  """Whether a folder can be renamed there; Google Cloud Storage has to copy it."""
  return not os.fspath(path).startswith('gs://')


def absolute(path: epath.PathLike) -> epath.Path:
  """The path, from the working folder where it is relative: Orbax asks for that."""
  text = os.fspath(path)
  return epath.Path(text if '://' in text else os.path.abspath(text))


def _is_committed(folder: epath.Path) -> bool:
  """Whether a folder of a whole checkpoint's name is whole.

  Where it was renamed when it was whole, the name itself says so.
  """
  if renames_at_once(folder):
    return True
  return (folder / _COMMITTED).exists() or (folder / _LEGACY_INDEX).exists()


def all_steps(checkpoints_dir: epath.PathLike) -> Sequence[int]:
  """Steps of the whole checkpoints in a folder.

  Args:
    checkpoints_dir: a model's folder; need not exist.

  Returns:
    The steps in ascending order; step 0 is one like any other.
  """
  root = epath.Path(checkpoints_dir)
  if not root.is_dir():
    return []
  found = ((_step_of(folder.name), folder) for folder in root.iterdir())
  return sorted(
    step for step, folder in found if step is not None and _is_committed(folder)
  )


def all_dataset_checkpoint_steps(checkpoints_dir: epath.PathLike) -> Sequence[int]:
  """Steps of the checkpoints that also hold the position in the data.

  Args:
    checkpoints_dir: a model's folder.

  Returns:
    The steps in ascending order.
  """
  with_position = []
  for step in all_steps(checkpoints_dir):
    folder = epath.Path(get_checkpoint_dir(checkpoints_dir, step))
    # Beside the arrays in the previous layout; under `dataset/` in Orbax's, one
    # folder deeper where several processes wrote.
    patterns = (
      f'{DATASET_FILE_PREFIX}-*',
      f'dataset/{DATASET_FILE_PREFIX}-*',
      f'dataset/process_*/{DATASET_FILE_PREFIX}-*',
    )
    if any(any(folder.glob(pattern)) for pattern in patterns):
      with_position.append(step)
  return with_position


def latest_step(checkpoints_dir: epath.PathLike) -> int | None:
  """The newest whole checkpoint's step, or None where there is none."""
  return max(all_steps(checkpoints_dir), default=None)


def get_checkpoint_dir(
  checkpoints_dir: epath.PathLike,
  step: int,
  step_format_fixed_length: int | None = None,
) -> epath.PathLike:
  """The folder of a step's checkpoint.

  Args:
    checkpoints_dir: a model's folder.
    step: the step.
    step_format_fixed_length: digits to fill up with zeros to.

  Returns:
    `<checkpoints_dir>/checkpoint_<step>`.
  """
  digits = f'{step:0{step_format_fixed_length or 0}d}'
  return os.path.join(checkpoints_dir, f'{get_checkpoint_prefix()}_{digits}')


def get_step_from_checkpoint_dir(checkpoints_dir: str) -> tuple[str, int]:
  """Takes a checkpoint's path apart.

  Args:
    checkpoints_dir: `<model folder>/checkpoint_<step>`.

  Returns:
    (model folder, step).

  Raises:
    ValueError: the path ends in something else.
  """
  parent, name = os.path.split(os.fspath(checkpoints_dir).rstrip('/'))
  step = _step_of(name)
  if step is None:
    raise ValueError(
      f"'{checkpoints_dir}' is no checkpoint: its name must be "
      f"'{get_checkpoint_prefix()}_<step>'."
    )
  return parent, step
