"""Adafactor (Shazeer and Stern 2018, arXiv:1804.04235), with rules for each axis.

The paper factors the second moments of a matrix into row and column means. Parameters
with more than two axes (attention kernels [embed, heads, kv], layers stacked by a scan)
need rules that make each axis a row, a column, or a batch of separate matrices: by axis
name (`logical_factor_rules`) or by parameter path (`factor_map`).

State, names and defaults are those of T5X, so that its checkpoints load.
"""

import dataclasses
import enum
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.core
import flax.serialization
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from t5x.optimizers import Optimizer, OptimizerDef, OptimizerState, Params, match_axes

Dtype = Any


# ---- Rules ----


class FactorDim(enum.Enum):
  """The role of a parameter's axis in the factored second moments."""

  NONE = None  # Not factored.
  BATCH = 1  # Stacked separate parameters, never averaged over.
  ROW = 2
  COLUMN = 3


class HeuristicRule(enum.Enum):
  """The default rule: factors matrices by size."""

  token = 1


HEURISTIC_RULE = HeuristicRule.token
FactorRule = HeuristicRule | tuple[FactorDim, ...]

_FACTOR_NAMES = {
  'row': FactorDim.ROW,
  'col': FactorDim.COLUMN,
  'column': FactorDim.COLUMN,
  'batch': FactorDim.BATCH,
  'none': FactorDim.NONE,
  'unfactorized': FactorDim.NONE,
}


def factor_name_to_factordim(name: str | FactorDim | None) -> FactorDim | None:
  """Parses 'row', 'column', 'batch' or 'none'; other types are returned unchanged."""
  if not isinstance(name, str):
    return name
  if name.lower() not in _FACTOR_NAMES:
    raise ValueError(
      f'A factor rule must be one of {", ".join(_FACTOR_NAMES)}. Got: {name!r}.'
    )
  return _FACTOR_NAMES[name.lower()]


def standard_logical_factor_rules() -> flax.core.FrozenDict:
  """Returns the roles of the axis names that T5X models use."""
  axes = {
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
  return flax.core.freeze({name: kind for kind in axes for name in axes[kind]})


class HParamMap:
  """Maps parameter paths to values; the first matching regular expression counts."""

  def __init__(self, rules: Iterable[tuple[str, Any]]):
    self._rules = [(re.compile(pattern), value) for pattern, value in rules]

  def __getitem__(self, key: str) -> Any:
    for pattern, value in self._rules:
      if pattern.search(key):
        return value
    raise KeyError(
      f'No rule matches the parameter {key!r}. Add a last rule ".*" for the rest.'
    )

  def __call__(self, params: PyTree) -> PyTree:
    """Returns the tree of values for a tree of parameters."""
    flat = _flatten(flax.serialization.to_state_dict(params))
    values = flax.traverse_util.unflatten_dict({k: self[k] for k in flat}, sep='/')
    return flax.serialization.from_state_dict(params, values)


@dataclasses.dataclass(frozen=True)
class _Layout:
  """The roles of one parameter's axes."""

  averaged: tuple[int, ...]  # Axes of root mean squares.
  factors: tuple[tuple[int, ...], tuple[int, ...]] | None  # Rows, columns.


def _largest_two(shape: Sequence[int], least: int) -> Any:
  """Makes the second largest axis the row, the largest the column; None if small."""
  if len(shape) < 2:
    return None
  *_, row, column = np.argsort(shape, kind='stable').tolist()
  return ((row,), (column,)) if shape[row] >= least else None


def _layout(
  rule: FactorRule | None, shape: Sequence[int], path: str, least: int
) -> _Layout:
  """Applies a rule (None: not factored); `least` is the shortest axis it factors."""
  every_axis = tuple(range(len(shape)))
  if rule is None:
    return _Layout(every_axis, None)
  if rule is HEURISTIC_RULE:
    if len(shape) > 2:
      raise ValueError(
        f'Adafactor needs a rule for {path!r}, which has more than two axes: '
        f'{tuple(shape)}. Set logical_factor_rules or factor_map.'
      )
    return _Layout(every_axis, _largest_two(shape, least))
  if len(rule) != len(shape):
    raise ValueError(
      f'The rule {rule} for {path!r} has {len(rule)} axes, but the parameter has '
      f'{len(shape)}: {tuple(shape)}.'
    )

  def axes_of(kind):
    return tuple(axis for axis, k in enumerate(rule) if k is kind)

  batch = axes_of(FactorDim.BATCH)
  if len(shape) <= 2 and not batch:
    # As in T5X's checkpoints, plain matrices are factored by size despite a rule.
    return _Layout(every_axis, _largest_two(shape, least))
  rows, columns = axes_of(FactorDim.ROW), axes_of(FactorDim.COLUMN)
  averaged = tuple(axis for axis in every_axis if axis not in batch)
  return _Layout(averaged, (rows, columns) if rows or columns else None)


def _rule_of_axes(
  path: str, axes: Sequence[str], rules: Mapping[str, FactorDim | str]
) -> tuple[FactorDim, ...]:
  unknown = [axis for axis in axes if axis not in rules]
  if unknown:
    raise ValueError(
      f'logical_factor_rules has no rule for {", ".join(map(repr, unknown))}, '
      f'used by {path!r} with axes {tuple(axes)}.'
    )
  kinds = tuple(factor_name_to_factordim(rules[axis]) for axis in axes)
  factored = {FactorDim.ROW, FactorDim.COLUMN}
  if not factored <= set(kinds):
    return tuple(FactorDim.NONE if kind in factored else kind for kind in kinds)
  if FactorDim.NONE in kinds:
    raise ValueError(
      f'{path!r} with axes {tuple(axes)} has rows and columns, so no axis may be '
      f'NONE. logical_factor_rules make it {kinds}.'
    )
  return kinds


# ---- The optimizer ----


@flax.struct.dataclass
class _AdafactorHyperParams:
  learning_rate: float | None
  factored: bool
  multiply_by_parameter_scale: bool | HParamMap
  beta1: float | None
  decay_rate: float
  step_offset: int
  clipping_threshold: float | None
  weight_decay_rate: float | None
  min_dim_size_to_factor: int
  epsilon1: float
  epsilon2: float
  factor_map: HParamMap | Mapping[str, FactorRule] | None
  logical_factor_rules: Mapping[str, FactorDim] | None
  weight_decay_rate_lr_exponent: float | None
  global_norm_clip_threshold: float | None
  max_parameter_scale: float | None
  skip_nan_updates: bool | None


@flax.struct.dataclass
class _AdafactorParamState:
  """Second moments and momentum; unused ones are zeros of shape (1,)."""

  v_row: Float[Array, '...']  # Means over the column axes.
  v_col: Float[Array, '...']  # Means over the row axes.
  v: Float[Array, '...']  # Unfactored second moments.
  m: Float[Array, '...']  # Momentum.


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(tree, sep='/')


def _nest(flat: Mapping[str, Any], like: Mapping[str, Any]) -> Any:
  tree = flax.traverse_util.unflatten_dict(dict(flat), sep='/')
  return flax.core.freeze(tree) if isinstance(like, flax.core.FrozenDict) else tree


class Adafactor(OptimizerDef):
  """The optimizer definition, with one state entry per parameter.

  Args (sections are the paper's):
    learning_rate: step size; the trainer's schedule replaces it at each step.
    factored: whether second moments are factored at all.
    multiply_by_parameter_scale: whether the learning rate is relative to the root
      mean square of the parameter (section 8), for all or by path.
    beta1: momentum, if any.
    decay_rate: exponent c of the second moments' decay, 1 - t**-c (section 7.2).
    step_offset: the step that counts as 0 for that decay.
    clipping_threshold: largest root mean square of an update before it is scaled
      (section 6); None for no limit.
    weight_decay_rate: fraction of a parameter that is subtracted per step.
    min_dim_size_to_factor: minimum length of both axes of a factored matrix.
    epsilon1: added to squared gradients.
    epsilon2: smallest scale of a parameter.
    dtype_momentum: dtype of the momentum.
    factor_map: rules by path.
    logical_factor_rules: `FactorDim` or its name, by axis name. `set_param_axes`
      turns them into `factor_map`.
    weight_decay_rate_lr_exponent: if given, the weight decay is (weight_decay_rate or
      1) times learning_rate to this power.
    global_norm_clip_threshold: largest norm of all gradients together; clipped first.
    max_parameter_scale: largest scale of a parameter.
    skip_nan_updates: whether entries that would become NaN keep their value.
  """

  def __init__(
    self,
    learning_rate: float | None = None,
    factored: bool = True,
    multiply_by_parameter_scale: bool | HParamMap = True,
    beta1: float | None = None,
    decay_rate: float = 0.8,
    step_offset: int = 0,
    clipping_threshold: float | None = 1.0,
    weight_decay_rate: float | None = None,
    min_dim_size_to_factor: int = 128,
    epsilon1: float = 1e-30,
    epsilon2: float = 1e-3,
    dtype_momentum: Dtype = jnp.float32,
    factor_map: HParamMap | None = None,
    logical_factor_rules: Mapping[str, FactorDim] | None = None,
    weight_decay_rate_lr_exponent: float | None = None,
    global_norm_clip_threshold: float | None = None,
    max_parameter_scale: float | None = None,
    skip_nan_updates: bool | None = False,
  ):
    if factor_map is not None and not factored:
      raise ValueError('factor_map needs factored = True.')
    for name, value, types in (
      ('multiply_by_parameter_scale', multiply_by_parameter_scale, (bool, HParamMap)),
      ('factor_map', factor_map, (HParamMap, type(None))),
    ):
      if not isinstance(value, types):
        raise ValueError(f'{name} must be one of {types}. Got: {value!r}.')
    super().__init__(
      _AdafactorHyperParams(
        learning_rate=learning_rate,
        factored=factored,
        multiply_by_parameter_scale=multiply_by_parameter_scale,
        beta1=beta1,
        decay_rate=decay_rate,
        step_offset=step_offset,
        clipping_threshold=clipping_threshold,
        weight_decay_rate=weight_decay_rate,
        min_dim_size_to_factor=min_dim_size_to_factor,
        epsilon1=epsilon1,
        epsilon2=epsilon2,
        factor_map=factor_map,
        logical_factor_rules=logical_factor_rules,
        weight_decay_rate_lr_exponent=weight_decay_rate_lr_exponent,
        global_norm_clip_threshold=global_norm_clip_threshold,
        max_parameter_scale=max_parameter_scale,
        skip_nan_updates=skip_nan_updates,
      )
    )
    self.dtype_momentum = jnp.dtype(dtype_momentum)

  # States made by equal definitions (one real, one for its shapes) must have the same
  # tree structure.
  def __eq__(self, other: Any) -> bool:
    return (
      type(self) is type(other)
      and self.hyper_params == other.hyper_params
      and self.dtype_momentum == other.dtype_momentum
    )

  def __hash__(self) -> int:
    hyper = self.hyper_params
    return hash((str(self.dtype_momentum), hyper.beta1, hyper.decay_rate))

  def _layout_of(self, path: str, shape: Sequence[int]) -> _Layout:
    hyper = self.hyper_params
    rule = None
    if hyper.factored:
      rule = hyper.factor_map[path] if hyper.factor_map else HEURISTIC_RULE
    return _layout(rule, shape, path, hyper.min_dim_size_to_factor)

  def init_param_state(
    self, param: Float[Array, '...'], path: str
  ) -> _AdafactorParamState:
    shape, factors = param.shape, self._layout_of(path, param.shape).factors
    shapes = dict.fromkeys(('v_row', 'v_col', 'v', 'm'), (1,))
    if factors is None:
      shapes['v'] = shape
    else:
      for name, averaged in zip(('v_col', 'v_row'), factors):
        shapes[name] = tuple(s for axis, s in enumerate(shape) if axis not in averaged)
    moments = {name: jnp.zeros(s, jnp.float32) for name, s in shapes.items()}
    if self.hyper_params.beta1 is not None:
      moments['m'] = jnp.zeros(shape, self.dtype_momentum)
    return _AdafactorParamState(**moments)

  def init_state(self, params: Params) -> OptimizerState:
    states = {p: self.init_param_state(x, p) for p, x in _flatten(params).items()}
    return OptimizerState(
      step=jnp.zeros((), jnp.int32), param_states=_nest(states, params)
    )

  def apply_param_gradient(
    self,
    step: Int[Array, ''],
    hyper_params: _AdafactorHyperParams,
    param: Float[Array, '*d'],
    state: _AdafactorParamState,
    grad: Float[Array, '*d'],
    path: str,
  ) -> tuple[Float[Array, '*d'], _AdafactorParamState]:
    """Updates one parameter (algorithms 4 and 5, and the scale of section 8).

    Args:
      step: updates made before this one.
      hyper_params: those of this update, with a learning rate.
      param: the value.
      state: its state.
      grad: its gradient.
      path: its path, joined by '/'.
    """
    hyper = hyper_params
    if hyper.learning_rate is None:
      raise ValueError(
        'Adafactor needs a learning rate. Set its `learning_rate` or the '
        "trainer's learning_rate_fn."
      )
    layout = self._layout_of(path, param.shape)
    grad = grad.astype(jnp.float32)
    age = jnp.asarray(step - hyper.step_offset, jnp.float32) + 1.0
    kept = 1.0 - age**-hyper.decay_rate
    direction, moments = _normalize(grad, state, layout, kept, hyper.epsilon1)
    if hyper.clipping_threshold is not None:
      size = _root_mean_square(direction, layout.averaged)
      direction = direction / jnp.maximum(1.0, size / hyper.clipping_threshold)

    relative = hyper.multiply_by_parameter_scale
    if isinstance(relative, HParamMap):
      relative = relative[path]
    scale = 1.0
    if relative:
      scale = _root_mean_square(param, layout.averaged)
      scale = jnp.clip(scale, hyper.epsilon2, hyper.max_parameter_scale)
    scaled = hyper.learning_rate * scale * direction
    if hyper.beta1 is not None:
      scaled = hyper.beta1 * state.m + (1.0 - hyper.beta1) * scaled
      moments = moments.replace(m=scaled.astype(self.dtype_momentum))

    decay = hyper.weight_decay_rate
    if hyper.weight_decay_rate_lr_exponent:
      decay = (decay or 1.0) * hyper.learning_rate**hyper.weight_decay_rate_lr_exponent
    share_kept = 1.0 if decay is None else 1.0 - decay
    updated = (share_kept * param - scaled).astype(param.dtype)

    if hyper.skip_nan_updates:
      updated, moments = jax.tree.map(
        lambda new, old: jnp.where(jnp.isnan(new), old, new),
        (updated, moments),
        (param, state),
      )
    return updated, moments

  def apply_gradient(
    self,
    hyper_params: _AdafactorHyperParams,
    params: Params,
    state: OptimizerState,
    grads: Params,
  ) -> tuple[Params, OptimizerState]:
    flat_grads, flat_states = _flatten(grads), _flatten(state.param_states)
    if hyper_params.global_norm_clip_threshold:
      norm = optax.tree.norm([grad.astype(jnp.float32) for grad in flat_grads.values()])
      shrink = jnp.minimum(1.0, hyper_params.global_norm_clip_threshold / norm)
      flat_grads = {path: grad * shrink for path, grad in flat_grads.items()}
    new_params, new_states = {}, {}
    for path, param in _flatten(params).items():
      new_params[path], new_states[path] = self.apply_param_gradient(
        state.step, hyper_params, param, flat_states[path], flat_grads[path], path
      )
    return _nest(new_params, params), OptimizerState(
      step=state.step + 1, param_states=_nest(new_states, params)
    )

  def set_param_axes(self, param_logical_axes: PyTree) -> None:
    """Derives a rule for each parameter from its PartitionSpec of axis names.

    A parameter without a row or without a column axis is not factored; its batch axes
    stay.

    Raises:
      ValueError: an axis has no rule, or some axes of a factored parameter are NONE.
    """
    rules = self.hyper_params.logical_factor_rules
    if rules is None:
      return
    flat = _flatten(param_logical_axes)
    factor_map = {path: _rule_of_axes(path, axes, rules) for path, axes in flat.items()}
    self.hyper_params = self.hyper_params.replace(factor_map=factor_map)

  def derive_logical_axes(
    self, optimizer_state: Optimizer, param_logical_axes: PyTree
  ) -> Optimizer:
    """Replaces arrays by PartitionSpecs of axis names.

    Factored moments are small and get None: replicated.
    """
    axes = match_axes(optimizer_state.target, param_logical_axes)
    flat_axes = _flatten(axes)
    derived = {
      path: _AdafactorParamState(
        v_row=None,
        v_col=None,
        v=flat_axes[path] if entry.v.shape != (1,) else None,
        m=flat_axes[path] if self.hyper_params.beta1 is not None else None,
      )
      for path, entry in _flatten(optimizer_state.state.param_states).items()
    }
    return optimizer_state.replace(
      target=axes,
      state=optimizer_state.state.replace(
        step=None, param_states=_nest(derived, optimizer_state.target)
      ),
    )


def _root_mean_square(
  x: Float[Array, '*d'], axes: tuple[int, ...]
) -> Float[Array, '...']:
  return jnp.sqrt(jnp.mean(x * x, axis=axes, keepdims=True))


def _normalize(
  grad: Float[Array, '*d'],
  state: _AdafactorParamState,
  layout: _Layout,
  kept: Float[Array, ''],
  epsilon: float,
) -> tuple[Float[Array, '*d'], _AdafactorParamState]:
  """Updates the second moments and divides the gradient by their root."""
  squared = grad * grad + epsilon

  def blend(old, new):
    return kept * old + (1.0 - kept) * new

  if layout.factors is None:
    v = blend(state.v, squared)
    return grad * v**-0.5, state.replace(v=v)
  rows, columns = layout.factors
  mean_of_rows = jnp.mean(squared, axis=columns, keepdims=True)
  mean_of_columns = jnp.mean(squared, axis=rows, keepdims=True)
  v_row = blend(state.v_row, jnp.squeeze(mean_of_rows, columns))
  v_col = blend(state.v_col, jnp.squeeze(mean_of_columns, rows))
  # Restore the averaged axes, to broadcast against the gradient.
  over_rows = v_row.reshape(mean_of_rows.shape)
  over_columns = v_col.reshape(mean_of_columns.shape)
  relative = over_rows / jnp.mean(over_rows, axis=rows, keepdims=True)
  direction = grad * relative**-0.5 * over_columns**-0.5
  return direction, state.replace(v_row=v_row, v_col=v_col)
