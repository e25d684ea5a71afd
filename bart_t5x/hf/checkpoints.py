"""The parameters of a T5X checkpoint, read and written without building a model."""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

# Of T5X's checkpoints: the folder with the train state.
STATE = 'state'


def read_params(checkpoint: str | pathlib.Path) -> dict[str, Any]:
  """Reads the parameters, and only them, from a checkpoint.

  Args:
    checkpoint: MODEL_DIR/checkpoint_<step>.

  Returns:
    Nested parameters, NumPy arrays in the dtype in which they were saved.

  Raises:
    FileNotFoundError: there is no such checkpoint, or it was not finished.
    ValueError: it is damaged.
  """
  return _read(checkpoint, ('target',))['target']


def read_state(checkpoint: str | pathlib.Path) -> dict[str, Any]:
  """Reads the whole train state; see `read_params`.

  Returns:
    `target`, the parameters, and `state`, the step and what the optimizer keeps.
  """
  return _read(checkpoint, None)


def _read(checkpoint, names):
  """The parts of the state that are named, or all of them."""
  folder = pathlib.Path(checkpoint).absolute()
  if not (folder / STATE).is_dir():
    siblings = sorted(p.name for p in folder.parent.glob('checkpoint_*'))
    raise FileNotFoundError(
      f'no checkpoint in {checkpoint}. '
      + (f'There are: {", ".join(siblings)}' if siblings else 'Train one first.')
    )
  handler = ocp.PyTreeCheckpointer()
  try:
    metadata = ocp.PyTreeCheckpointHandler().metadata(folder / STATE).tree
    wanted = {name: metadata[name] for name in names or metadata}
    return handler.restore(
      folder / STATE,
      args=ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=jax.tree.map(
          lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted
        ),
        partial_restore=True,
      ),
    )
  except Exception as e:  # of Orbax, tensorstore or JSON: there is no common class
    reason = (str(e) or type(e).__name__).splitlines()[0]
    raise ValueError(
      f'the checkpoint {checkpoint} cannot be read ({reason}). It is damaged or no '
      'checkpoint of T5X; try the one before it.'
    ) from e


def write_state(checkpoint: pathlib.Path, state: dict[str, Any]) -> None:
  """Writes a train state into a checkpoint's folder that has none yet.

  Args:
    checkpoint: MODEL_DIR/checkpoint_<step>.
    state: nested, as `read_state` returns it.
  """
  ocp.PyTreeCheckpointer().save(checkpoint.absolute() / STATE, state)


def write_params(checkpoint: pathlib.Path, params: dict[str, Any]) -> None:
  """Writes parameters as a checkpoint of step 0 with no optimizer state.

  Args:
    checkpoint: MODEL_DIR/checkpoint_0, which must not exist.
    params: nested parameters.
  """
  tree = {'state': {'step': np.asarray(0, np.int32)}, 'target': params}
  manager = ocp.CheckpointManager(
    checkpoint.parent.absolute(),
    options=ocp.CheckpointManagerOptions(step_prefix='checkpoint', create=True),
    item_names=(STATE,),
  )
  with manager:
    manager.save(0, args=ocp.args.Composite(**{STATE: ocp.args.PyTreeSave(tree)}))
