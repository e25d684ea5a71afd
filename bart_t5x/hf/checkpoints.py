"""The parameters of a T5X checkpoint, read and written without building a model."""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

# Of T5X's checkpoints: the folder with the train state, and its two halves.
_STATE = 'state'


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
  folder = pathlib.Path(checkpoint).absolute()
  if not (folder / _STATE).is_dir():
    siblings = sorted(p.name for p in folder.parent.glob('checkpoint_*'))
    raise FileNotFoundError(
      f'no checkpoint in {checkpoint}. '
      + (f'There are: {", ".join(siblings)}' if siblings else 'Train one first.')
    )
  handler = ocp.PyTreeCheckpointer()
  try:
    metadata = ocp.PyTreeCheckpointHandler().metadata(folder / _STATE)
    target = metadata.tree['target']
    restored = handler.restore(
      folder / _STATE,
      args=ocp.args.PyTreeRestore(
        item={'target': target},
        restore_args={
          'target': jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target
          )
        },
        partial_restore=True,
      ),
    )
  except Exception as e:  # of Orbax, tensorstore or JSON: there is no common class
    reason = (str(e) or type(e).__name__).splitlines()[0]
    raise ValueError(
      f'the checkpoint {checkpoint} cannot be read ({reason}). It is damaged or no '
      'checkpoint of T5X; try the one before it.'
    ) from e
  return restored['target']


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
    item_names=(_STATE,),
  )
  with manager:
    manager.save(0, args=ocp.args.Composite(**{_STATE: ocp.args.PyTreeSave(tree)}))
