"""Pinned checkpoints, removal, and what kind of checkpoint a file belongs to."""

import enum
import os
from typing import Any

import msgpack
from absl import logging
from etils import epath

from t5x import checkpoints_utils

_PIN = 'PINNED'
# Orbax writes it beside the arrays of every tree.
_ORBAX_TREE_FILE = '_METADATA'
# A folder about to vanish bears this name first, so that a process killed while
# it deletes leaves nothing that looks like a checkpoint.
DELETING_PREFIX = 'deleting_'


def pinned_checkpoint_filepath(ckpt_dir: str) -> str:
  """The file whose presence pins a checkpoint."""
  return os.path.join(ckpt_dir, _PIN)


def is_pinned_checkpoint(ckpt_dir: str) -> bool:
  """Whether a checkpoint must not be removed when old ones are."""
  return epath.Path(pinned_checkpoint_filepath(ckpt_dir)).exists()


def pin_checkpoint(ckpt_dir: str, txt: str = '1'):
  """Pins a checkpoint: no rule of retention removes it any more.

  Args:
    ckpt_dir: the folder of one step.
    txt: what to write into the pin, a reason for instance.

  Raises:
    ValueError: there is no such folder.
  """
  if not epath.Path(ckpt_dir).is_dir():
    raise ValueError(f"'{ckpt_dir}' cannot be pinned: there is no such checkpoint.")
  epath.Path(pinned_checkpoint_filepath(ckpt_dir)).write_text(txt)


def unpin_checkpoint(ckpt_dir: str):
  """Takes the pin away, if there is one."""
  epath.Path(pinned_checkpoint_filepath(ckpt_dir)).unlink(missing_ok=True)


def remove_checkpoint_dir(ckpt_dir: str):
  """Removes a checkpoint unless it is pinned.

  Args:
    ckpt_dir: the folder of one step.
  """
  if is_pinned_checkpoint(ckpt_dir):
    logging.info('%s is pinned and stays.', ckpt_dir)
    return
  logging.info('Removing %s.', ckpt_dir)
  folder = epath.Path(ckpt_dir)
  if checkpoints_utils.renames_at_once(folder):
    folder = folder.rename(folder.parent / (DELETING_PREFIX + folder.name))
  folder.rmtree()


def remove_dataset_checkpoint(ckpt_dir: str, train_ds_prefix: str):
  """Removes the position in the data from a checkpoint unless it is pinned.

  Args:
    ckpt_dir: the folder of one step, of either layout.
    train_ds_prefix: how the files' names begin.
  """
  if is_pinned_checkpoint(ckpt_dir):
    logging.info('%s is pinned: its data position stays.', ckpt_dir)
    return
  folder = epath.Path(ckpt_dir)
  for pattern in ('', 'dataset/', 'dataset/process_*/'):
    for file in list(folder.glob(f'{pattern}{train_ds_prefix}*')):
      file.unlink()


class CheckpointTypes(enum.Enum):
  """Layouts that are told apart."""

  ORBAX = 'ORBAX'
  T5X = 'T5X'
  T5X_TF = 'T5X_TF'


def _classify(path: epath.Path) -> tuple[CheckpointTypes, str]:
  """The layout and what tells it."""
  if (path.parent / _ORBAX_TREE_FILE).exists():
    return CheckpointTypes.ORBAX, f'{_ORBAX_TREE_FILE} lies beside it'
  head = path.open('rb')
  with head:
    if head.read(21) == b'model_checkpoint_path':
      return CheckpointTypes.T5X_TF, "it begins with 'model_checkpoint_path'"
    head.seek(0)
    try:
      keys = msgpack.Unpacker(head).read_map_header()
    except (msgpack.exceptions.UnpackException, ValueError) as error:
      raise ValueError(
        f"'{path}' is no checkpoint: it is neither an index of T5X's msgpack layout "
        f'nor one of TensorFlow ({error}).'
      ) from error
  return CheckpointTypes.T5X, f'it is a msgpack map of {keys} entries'


def detect_checkpoint_type(
  checkpoint_path: epath.PathLike, expected: CheckpointTypes | None = None
) -> CheckpointTypes:
  """Tells the layout of a checkpoint from its index.

  Args:
    checkpoint_path: the file `checkpoint` of a step, or any file in the folder of
      an Orbax tree.
    expected: logs a warning if the layout is another one.

  Returns:
    The layout.

  Raises:
    ValueError: the file is no index.
  """
  found, reason = _classify(epath.Path(checkpoint_path))
  if expected not in (None, found):
    logging.warning(
      '%s is a %s checkpoint (%s); a %s one was expected.',
      checkpoint_path,
      found.value,
      reason,
      expected.value,
    )
  return found


def whole_checkpoint(ckpt_dir: epath.PathLike) -> bool:
  """Whether a folder's name and content are those of a finished checkpoint."""
  try:
    parent, step = checkpoints_utils.get_step_from_checkpoint_dir(os.fspath(ckpt_dir))
  except ValueError:
    return False
  return step in checkpoints_utils.all_steps(parent)


def leftovers(checkpoints_dir: epath.PathLike) -> list[Any]:
  """Folders that interrupted saves and removals left behind.

  Args:
    checkpoints_dir: a model's folder.

  Returns:
    Paths that no reader takes for checkpoints.
  """
  root = epath.Path(checkpoints_dir)
  if not root.is_dir():
    return []
  prefix = checkpoints_utils.get_checkpoint_prefix() + '_'
  return [
    folder
    for folder in root.iterdir()
    if folder.name.startswith(DELETING_PREFIX + prefix)
    or (folder.name.startswith(prefix) and '.orbax-checkpoint-tmp' in folder.name)
  ]
