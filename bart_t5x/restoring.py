"""What a run may do without when it starts from another run's checkpoint."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util


def require_parameters(
  state_dict: Mapping[str, Any],
  target_state_dict: Mapping[str, Any],
  *,
  is_resuming: bool = False,
) -> Mapping[str, Any]:
  """Rejects a checkpoint that lacks a parameter of the model.

  For `RestoreCheckpointConfig.state_transformation_fns`. A new optimizer needs
  `fallback_to_scratch`, with which T5X also initializes missing parameters, silently.

  Args:
    state_dict: of the checkpoint; `target` has the parameters.
    target_state_dict: of the model.
    is_resuming: not used.

  Returns:
    `state_dict` as it is.

  Raises:
    ValueError: parameters are missing.
  """
  del is_resuming
  held, needed = (
    traverse_util.flatten_dict(dict(tree.get('target', {})), sep='/')
    for tree in (state_dict, target_state_dict)
  )
  missing = sorted(needed.keys() - held.keys())
  if missing:
    more = ', …' if len(missing) > 5 else ''
    raise ValueError(
      f'The checkpoint lacks {len(missing)} of the {len(needed)} parameters of the '
      f'model: {", ".join(missing[:5])}{more}. Include the gin/models file of the '
      'model that wrote it.'
    )
  return state_dict
