"""Other logical axis names for parameters than their model gave them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.core
from absl import logging
from flax import traverse_util
from flax.linen import partitioning as flax_partitioning


def override_params_axes_names(
  model_variables: Mapping[str, Any],
  params_axes_names_override: Sequence[tuple[str, tuple[str, ...]]] = (),
) -> flax.core.FrozenDict:
  """Replaces or adds axis names of parameters.

  Args:
    model_variables: all variables of a model, with `params` and `params_axes`. Not
      changed.
    params_axes_names_override: (pattern, axis names) pairs. The first pattern that
      matches the whole '/'-joined name of a parameter counts.

  Returns:
    The variables with the new names in `params_axes`, frozen.

  Raises:
    ValueError: there is no `params_axes`, or the names are not as many as the
      parameter's dimensions.
  """
  if 'params_axes' not in model_variables:
    raise ValueError(
      "The model's variables have no collection 'params_axes' whose names could be "
      f'overridden. They have: {", ".join(model_variables)}.'
    )
  variables = flax.core.unfreeze(model_variables)
  params = traverse_util.flatten_dict(variables['params'])
  axes = traverse_util.flatten_dict(variables['params_axes'])
  unmatched = {pattern for pattern, _ in params_axes_names_override}
  for path, param in params.items():
    name = '/'.join(path)
    matching = [
      (pattern, names)
      for pattern, names in params_axes_names_override
      if re.fullmatch(pattern, name)
    ]
    unmatched -= {pattern for pattern, _ in matching}
    if not matching:
      continue
    names = matching[0][1]
    if len(names) != param.ndim:
      raise ValueError(
        f'Parameter {name} has {param.ndim} dimensions and needs as many axis names. '
        f'Got: {names}.'
      )
    axes[(*path[:-1], f'{path[-1]}_axes')] = flax_partitioning.AxisMetadata(
      names=tuple(names)
    )
  for pattern in sorted(unmatched):
    logging.warning('No parameter is called %r: its axis names do nothing.', pattern)
  return flax.core.freeze(
    {**variables, 'params_axes': traverse_util.unflatten_dict(axes)}
  )
