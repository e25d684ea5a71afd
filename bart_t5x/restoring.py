"""Checks the checkpoint that a new run starts from."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util


def require_parameters(
  state_dict: Mapping[str, Any],
  target_state_dict: Mapping[str, Any],
  *,
  is_resuming: bool = False,
) -> Mapping[str, Any]:
  """Raises ValueError if a checkpoint lacks parameters of the model.

  For `RestoreCheckpointConfig.state_transformation_fns`; returns `state_dict` as is. A
  new optimizer needs `fallback_to_scratch`, with which T5X would silently initialize
  missing parameters too.
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
