"""Reads and writes T5X checkpoints without building a model."""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

# The train state's folder in a checkpoint.
STATE = 'state'


def read_params(checkpoint: str | pathlib.Path) -> dict[str, Any]:
  """Reads the parameters of MODEL_DIR/checkpoint_<step> as nested NumPy arrays.

  Raises:
    FileNotFoundError: no such checkpoint, or it is unfinished.
    ValueError: it is damaged.
  """
  return _read(checkpoint, ['target'])['target']


def read_state(checkpoint: str | pathlib.Path) -> dict[str, Any]:
  """Reads the train state: `target` (parameters) and `state` (step, optimizer)."""
  return _read(checkpoint)


def _read(checkpoint, names=None):
  folder = pathlib.Path(checkpoint).absolute()
  if not (folder / STATE).is_dir():
    siblings = sorted(p.name for p in folder.parent.glob('checkpoint_*[0-9]'))
    raise FileNotFoundError(
      f'no checkpoint in {checkpoint}. '
      + (f'There are: {", ".join(siblings)}' if siblings else 'Train one first.')
    )
  try:
    metadata = ocp.PyTreeCheckpointHandler().metadata(folder / STATE).tree
    wanted = {name: metadata[name] for name in names or metadata}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    return ocp.PyTreeCheckpointer().restore(
      folder / STATE,
      args=ocp.args.PyTreeRestore(
        item=wanted, restore_args=as_numpy, partial_restore=True
      ),
    )
  except Exception as e:  # Orbax and tensorstore errors share no base class.
    reason = (str(e) or type(e).__name__).splitlines()[0][:200]
    raise ValueError(
      f'the checkpoint {checkpoint} cannot be read ({reason}). It is damaged, not of '
      'T5X, or its run removed it in the meantime; try another one.'
    ) from e


def write_state(checkpoint: pathlib.Path, state: dict[str, Any]) -> None:
  """Adds a train state to a checkpoint folder that has none."""
  ocp.PyTreeCheckpointer().save(checkpoint.absolute() / STATE, state)


def write_params(checkpoint: pathlib.Path, params: dict[str, Any]) -> None:
  """Writes parameters as the checkpoint MODEL_DIR/checkpoint_0, without optimizer."""
  tree = {'state': {'step': np.asarray(0, np.int32)}, 'target': params}
  manager = ocp.CheckpointManager(
    checkpoint.parent.absolute(),
    options=ocp.CheckpointManagerOptions(step_prefix='checkpoint', create=True),
    item_names=(STATE,),
  )
  with manager:
    manager.save(0, args=ocp.args.Composite(**{STATE: ocp.args.PyTreeSave(tree)}))
