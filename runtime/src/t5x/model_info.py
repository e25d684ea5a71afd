"""The list of a model's variables: `model-info.txt`."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from t5x import state_utils


def _lookup(tree: Any, name: str) -> Any:
  for key in name.split('/'):
    tree = tree.get(key) if isinstance(tree, Mapping) else None
  return tree


def _lines(
  section: str, state_dict: Any, logical_axes: Any, mesh_axes: Any
) -> Iterator[str]:
  """A line a variable of 'target' or 'state'."""
  for name, leaf in state_utils.flatten_state_dict(state_dict[section]).items():
    if leaf is None:
      yield f'Variable {name:80} None'
      continue
    names = _lookup(logical_axes[section], name)
    spec = _lookup(mesh_axes[section], name)
    if names is not None and len(names) == len(leaf.shape):
      axes = ', '.join(f'{axis}={size}' for axis, size in zip(names, leaf.shape))
      shape = f'({axes})'
    else:
      shape = str(tuple(leaf.shape))
    yield (
      f'Variable {name:80} size {math.prod(leaf.shape):<12} shape {shape:40} '
      f'partition spec {None if spec is None else tuple(spec)}'
    )


def log_model_info(log_file: str | None, full_train_state: Any, partitioner: Any):
  """Writes names, sizes, shapes and shardings of a state; the first host does.

  Args:
    log_file: where to; None only logs the number of parameters.
    full_train_state: state of arrays or of their shapes.
    partitioner: has `get_logical_axes` and `get_mesh_axes`.
  """
  if jax.process_index() != 0:
    return
  state_dict = full_train_state.state_dict()
  parameters = state_utils.flatten_state_dict(state_dict['target'])
  total = sum(math.prod(leaf.shape) for leaf in parameters.values() if leaf is not None)
  logging.info('The model has %s parameters.', f'{total:,}')
  if log_file is None:
    return
  axes = (
    partitioner.get_logical_axes(full_train_state).state_dict(),
    partitioner.get_mesh_axes(full_train_state).state_dict(),
  )
  text = [
    *_lines('target', state_dict, *axes),
    f'Total number of parameters: {total}',
    '',
    *_lines('state', state_dict, *axes),
    '',
  ]
  epath.Path(log_file).write_text('\n'.join(text))
