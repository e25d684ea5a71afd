"""What each axis of a parameter is to Adafactor: row, column, batch or neither.

Seen from outside through `t5x.adafactor`, which has the public names too.
"""

import dataclasses
import enum
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.core
import flax.serialization
import flax.traverse_util
import numpy as np
from jaxtyping import PyTree


class FactorDim(enum.Enum):
  """What an axis of a parameter is to the factored second moments."""

  NONE = None  # Not factored.
  BATCH = 1  # Separate parameters, stacked: nothing is averaged over it.
  ROW = 2
  COLUMN = 3


class HeuristicRule(enum.Enum):
  """The rule for parameters without one of their own: by size, for matrices only."""

  token = 1


HEURISTIC_RULE = HeuristicRule.token
FactorRule = HeuristicRule | tuple[FactorDim, ...]

_NAMES_OF_FACTORS = {
  FactorDim.ROW: ('row',),
  FactorDim.COLUMN: ('col', 'column'),
  FactorDim.BATCH: ('batch',),
  FactorDim.NONE: ('none', 'unfactorized'),
}
_FACTOR_NAMES = {
  name: factor for factor, names in _NAMES_OF_FACTORS.items() for name in names
}


def factor_name_to_factordim(name: str | FactorDim | None) -> FactorDim | None:
  """Reads 'row', 'column', 'batch' or 'none', as gin files spell them.

  Raises:
    ValueError: it is none of them.
  """
  if not isinstance(name, str):
    return name
  if name.lower() not in _FACTOR_NAMES:
    raise ValueError(
      f'An axis is one of {", ".join(_FACTOR_NAMES)} to Adafactor. Got: {name!r}.'
    )
  return _FACTOR_NAMES[name.lower()]


def standard_logical_factor_rules() -> flax.core.FrozenDict:
  """What the axes of T5X's standard models are."""
  kinds = {
    FactorDim.ROW: ['embed'],
    FactorDim.COLUMN: [
      'vocab',
      'mlp',
      'heads',
      'kv',
      'joined_kv',
      'q_wi_fused',
      'o_wo_fused',
      'multiquery_heads',
      'kv_fused',
      'mlp_activations',
    ],
    FactorDim.BATCH: ['layers', 'stack'],
    FactorDim.NONE: ['relpos_buckets', 'layer_norm_scale'],
  }
  return flax.core.freeze({axis: kind for kind, axes in kinds.items() for axis in axes})


class HParamMap:
  """Values by a parameter's path: the first regular expression found in it decides."""

  def __init__(self, rules: Iterable[tuple[str, Any]]):
    self._rules = [(re.compile(pattern), value) for pattern, value in rules]

  def __getitem__(self, key: str) -> Any:
    for pattern, value in self._rules:
      if pattern.search(key):
        return value
    raise KeyError(
      f'No rule for the parameter {key!r}. A last rule of ".*" would catch the rest.'
    )

  def __call__(self, params: PyTree) -> PyTree:
    """Returns the parameters' tree with the value of each in its place."""
    names = flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(params))
    values = {path: self['/'.join(path)] for path in names}
    return flax.serialization.from_state_dict(
      params, flax.traverse_util.unflatten_dict(values)
    )


@dataclasses.dataclass(frozen=True)
class Layout:
  """Which axes of one parameter do what.

  Attributes:
    averaged: the axes over which root mean squares are taken.
    factors: (rows, columns), or None where the second moments are not factored.
  """

  averaged: tuple[int, ...]
  factors: tuple[tuple[int, ...], tuple[int, ...]] | None


def _largest_two(
  shape: Sequence[int], least: int
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
  """The next to largest axis as row, the largest as column; None if too small."""
  if len(shape) < 2:
    return None
  *_, row, column = np.argsort(shape, kind='stable').tolist()
  return ((row,), (column,)) if shape[row] >= least else None


def layout_of(
  rule: FactorRule | None, shape: Sequence[int], path: str, least: int
) -> Layout:
  """Reads a rule.

  Args:
    rule: what each axis is; HEURISTIC_RULE to go by sizes; None to factor nothing.
    shape: the parameter's.
    path: the parameter's, for messages.
    least: sizes below it are not factored by the heuristic.

  Raises:
    ValueError: the rule does not fit the number of axes, or none is given and there are
      more than two.
  """
  every_axis = tuple(range(len(shape)))
  if rule is None:
    return Layout(every_axis, None)
  if rule is HEURISTIC_RULE:
    if len(shape) > 2:
      raise ValueError(
        f'Adafactor needs a rule for {path!r} of shape {tuple(shape)}: with more '
        'than two axes their sizes do not tell rows from columns. Give '
        'logical_factor_rules or factor_map.'
      )
    return Layout(every_axis, _largest_two(shape, least))
  if len(rule) != len(shape):
    raise ValueError(
      f'The rule {rule} for {path!r} has {len(rule)} axes, the parameter '
      f'{len(shape)}: {tuple(shape)}.'
    )

  def axes_that_are(kind):
    return tuple(axis for axis, k in enumerate(rule) if k is kind)

  batch = axes_that_are(FactorDim.BATCH)
  if len(shape) <= 2 and not batch:
    # Plain matrices go by size even under a rule: T5X's checkpoints are made so.
    return Layout(every_axis, _largest_two(shape, least))
  rows, columns = axes_that_are(FactorDim.ROW), axes_that_are(FactorDim.COLUMN)
  averaged = tuple(axis for axis in every_axis if axis not in batch)
  return Layout(averaged, (rows, columns) if rows or columns else None)


def rule_of_axes(
  path: str, axes: Sequence[str], rules: Mapping[str, FactorDim | str]
) -> tuple[FactorDim, ...]:
  """Makes the rule of a parameter from the names of its axes.

  Without a row or without a column axis it is not factored; batch axes stay.

  Raises:
    ValueError: an axis has no rule, or some axes of a factored parameter are NONE.
  """
  unknown = [axis for axis in axes if axis not in rules]
  if unknown:
    raise ValueError(
      f'logical_factor_rules has no rule for {", ".join(map(repr, unknown))}, of '
      f'{path!r} with axes {tuple(axes)}.'
    )
  kinds = tuple(factor_name_to_factordim(rules[axis]) for axis in axes)
  factored = {FactorDim.ROW, FactorDim.COLUMN}
  if factored <= set(kinds):
    if FactorDim.NONE in kinds:
      raise ValueError(
        f'{path!r} with axes {tuple(axes)} has rows and columns, so every other axis '
        f'must be one too or BATCH. logical_factor_rules make it {kinds}.'
      )
    return kinds
  return tuple(FactorDim.NONE if kind in factored else kind for kind in kinds)
