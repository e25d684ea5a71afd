"""What a run may do without when it starts from a checkpoint of another."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util

_SHOWN = 5


def require_parameters(
  state_dict: Mapping[str, Any],
  target_state_dict: Mapping[str, Any],
  *,
  is_resuming: bool = False,
) -> Mapping[str, Any]:
  """Refuses a checkpoint that lacks a parameter of the model.

  A transformation for `RestoreCheckpointConfig.state_transformation_fns`. A new
  optimizer needs `fallback_to_scratch`, under which T5X would also begin a missing
  parameter from random numbers and say nothing of it.

  Args:
    state_dict: what the checkpoint holds: `target` has the parameters.
    target_state_dict: what the model needs, likewise.
    is_resuming: whether it is the run's own checkpoint; checked all the same.

  Returns:
    `state_dict` as it is.

  Raises:
    ValueError: parameters are missing; the first of them are named.
  """
  del is_resuming
  held, needed = (
    traverse_util.flatten_dict(dict(tree.get('target', {})), sep='/')
    for tree in (state_dict, target_state_dict)
  )
  missing = sorted(needed.keys() - held.keys())
  if missing:
    more = ', …' if len(missing) > _SHOWN else ''
    raise ValueError(
      f'The checkpoint lacks {len(missing)} of the {len(needed)} parameters of the '
      f'model: {", ".join(missing[:_SHOWN])}{more}. Include the gin/models file of '
      'the model that wrote it.'
    )
  return state_dict
