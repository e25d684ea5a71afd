"""Adafactor (Shazeer and Stern 2018, arXiv:1804.04235), with rules for each axis.

The paper factors the second moments of a matrix into row and column means. Parameters
of more than two axes (attention kernels of [embed, heads, kv], layers stacked by a
scan) need to be told which axes are rows, which are columns, and which are a batch of
separate matrices: by name, through `logical_factor_rules`, or by path, `factor_map`.

State, names and defaults are those of T5X, so that its checkpoints load.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.core
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from t5x import state_utils
from t5x.factor_rules import (
  HEURISTIC_RULE,
  FactorDim,
  FactorRule,
  HeuristicRule,
  HParamMap,
  Layout,
  factor_name_to_factordim,
  layout_of,
  rule_of_axes,
  standard_logical_factor_rules,
)
from t5x.optimizer_base import Optimizer, OptimizerDef, OptimizerState, Params
from t5x.optimizers import match_axes

Dtype = Any

__all__ = [
  'HEURISTIC_RULE',
  'Adafactor',
  'FactorDim',
  'FactorRule',
  'HParamMap',
  'HeuristicRule',
  'factor_name_to_factordim',
  'standard_logical_factor_rules',
]


@flax.struct.dataclass
class _HyperParams:
  """See `Adafactor`."""

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
  factor_map: HParamMap | Mapping[str, FactorRule] | None = None
  logical_factor_rules: Mapping[str, FactorDim] | None = None
  weight_decay_rate_lr_exponent: float | None = None
  global_norm_clip_threshold: float | None = None
  max_parameter_scale: float | None = None
  skip_nan_updates: bool | None = False


@flax.struct.dataclass
class _ParamState:
  """Second moments and momentum; what a parameter does not use is a zero of shape (1,).

  Attributes:
    v_row: means over the column axes.
    v_col: means over the row axes.
    v: the second moments, where they are not factored.
    m: the momentum.
  """

  v_row: Float[Array, '...']
  v_col: Float[Array, '...']
  v: Float[Array, '...']
  m: Float[Array, '...']


def _without(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
  return tuple(size for axis, size in enumerate(shape) if axis not in axes)


class Adafactor(OptimizerDef):
  """The optimizer definition: one state entry a parameter. Sections are the paper's.

  Args:
    learning_rate: step size, relative to a parameter's own scale; the trainer's
      schedule replaces it at each step.
    factored: whether second moments are factored at all.
    multiply_by_parameter_scale: whether the learning rate is relative to the root
      mean square of the parameter (section 8), for all or by path.
    beta1: momentum, if any.
    decay_rate: the exponent c of the second moments' decay, 1 - t**-c (section 7.2).
    step_offset: the step that counts as 0 for that decay.
    clipping_threshold: largest root mean square of an update, before it is scaled
      (section 6); None for no limit.
    weight_decay_rate: share of a parameter that is lost a step.
    min_dim_size_to_factor: a matrix is factored if both its axes are as long.
    epsilon1: added to squared gradients.
    epsilon2: least scale of a parameter.
    dtype_momentum: in which momentum is kept.
    factor_map: rules by path.
    logical_factor_rules: what an axis is, by name (see `FactorDim`, or the names of
      `factor_name_to_factordim`). Once `set_param_axes` is called they replace
      `factor_map`.
    weight_decay_rate_lr_exponent: if given, the weight decay is (weight_decay_rate or
      1) times learning_rate to this power.
    global_norm_clip_threshold: largest norm of all gradients together, before
      anything else.
    max_parameter_scale: largest scale of a parameter.
    skip_nan_updates: whether entries that would become NaN keep their value.

  Raises:
    ValueError: rules for factoring without factoring, or no `HParamMap`.
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
      raise ValueError('factor_map has no effect with factored = False. Drop one.')
    for name, value, types in (
      ('multiply_by_parameter_scale', multiply_by_parameter_scale, (bool, HParamMap)),
      ('factor_map', factor_map, (HParamMap, type(None))),
    ):
      if not isinstance(value, types):
        raise ValueError(f'{name} must be one of {types}. Got: {value!r}.')
    super().__init__(
      _HyperParams(
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

  # Two definitions that say the same are equal, so that states made with either (one
  # traced for its shapes, one real) are trees of one structure.
  def __eq__(self, other: Any) -> bool:
    return (
      type(self) is type(other)
      and self.hyper_params == other.hyper_params
      and self.dtype_momentum == other.dtype_momentum
    )

  def __hash__(self) -> int:
    hyper = self.hyper_params
    return hash(
      (
        type(self).__name__,
        str(self.dtype_momentum),
        hyper.beta1,
        hyper.decay_rate,
        hyper.factored,
      )
    )

  def _layout_of(self, path: str, shape: Sequence[int]) -> Layout:
    hyper = self.hyper_params
    rule = None
    if hyper.factored:
      rule = hyper.factor_map[path] if hyper.factor_map else HEURISTIC_RULE
    return layout_of(rule, shape, path, hyper.min_dim_size_to_factor)

  def init_param_state(self, param: Float[Array, '...'], path: str) -> _ParamState:
    """Makes the state of one parameter: zeros."""
    shape, factors = param.shape, self._layout_of(path, param.shape).factors
    shapes = dict.fromkeys(('v_row', 'v_col', 'v', 'm'), (1,))
    if factors is None:
      shapes['v'] = shape
    else:
      rows, columns = factors
      shapes.update(v_row=_without(shape, columns), v_col=_without(shape, rows))
    moments = {name: jnp.zeros(s, jnp.float32) for name, s in shapes.items()}
    if self.hyper_params.beta1 is not None:
      moments['m'] = jnp.zeros(shape, self.dtype_momentum)
    return _ParamState(**moments)

  def init_state(self, params: Params) -> OptimizerState:
    """Makes the state of all parameters."""
    flat = state_utils.flatten_dict_string_keys(params)
    states = {path: self.init_param_state(p, path) for path, p in flat.items()}
    return OptimizerState(
      step=jnp.zeros((), jnp.int32), param_states=_nest(states, params)
    )

  def apply_param_gradient(
    self,
    step: Int[Array, ''],
    hyper_params: _HyperParams,
    param: Float[Array, '*d'],
    state: _ParamState,
    grad: Float[Array, '*d'],
    path: str,
  ) -> tuple[Float[Array, '*d'], _ParamState]:
    """Updates one parameter (algorithms 4 and 5, and the scale of section 8).

    Args:
      step: updates made before this one.
      hyper_params: of this update, with a learning rate.
      param: its value.
      state: its state.
      grad: its gradient.
      path: its path, joined by '/'.

    Returns:
      The new value and the new state.

    Raises:
      ValueError: there is no learning rate.
    """
    hyper = hyper_params
    if hyper.learning_rate is None:
      raise ValueError(
        'Adafactor needs a learning rate: its own `learning_rate`, or the '
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

    scaled = hyper.learning_rate * self._scale(hyper, param, layout, path) * direction
    if hyper.beta1 is not None:
      scaled = hyper.beta1 * state.m + (1.0 - hyper.beta1) * scaled
      moments = moments.replace(m=scaled.astype(self.dtype_momentum))
    updated = (_share_kept(hyper) * param - scaled).astype(param.dtype)

    if hyper.skip_nan_updates:
      updated, moments = jax.tree.map(
        lambda new, old: jnp.where(jnp.isnan(new), old, new),
        (updated, moments),
        (param, state),
      )
    return updated, moments

  def _scale(
    self, hyper: _HyperParams, param: Float[Array, '*d'], layout: Layout, path: str
  ) -> Float[Array, '...'] | float:
    """The parameter's own scale, by which the learning rate is multiplied."""
    relative = hyper.multiply_by_parameter_scale
    if isinstance(relative, HParamMap):
      relative = relative[path]
    if not relative:
      return 1.0
    scale = _root_mean_square(param, layout.averaged)
    return jnp.clip(scale, hyper.epsilon2, hyper.max_parameter_scale)

  def apply_gradient(
    self,
    hyper_params: _HyperParams,
    params: Params,
    state: OptimizerState,
    grads: Params,
  ) -> tuple[Params, OptimizerState]:
    """Updates all parameters."""
    flatten = state_utils.flatten_dict_string_keys
    flat_params, flat_grads = flatten(params), flatten(grads)
    flat_states = flatten(state.param_states)
    if hyper_params.global_norm_clip_threshold:
      flat_grads = _clip_together(flat_grads, hyper_params.global_norm_clip_threshold)
    new_params, new_states = {}, {}
    for path, param in flat_params.items():
      new_params[path], new_states[path] = self.apply_param_gradient(
        state.step, hyper_params, param, flat_states[path], flat_grads[path], path
      )
    return _nest(new_params, params), OptimizerState(
      step=state.step + 1, param_states=_nest(new_states, params)
    )

  def set_param_axes(self, param_logical_axes: PyTree) -> None:
    """Makes a rule for each parameter of the names of its axes.

    A parameter without a row or without a column axis is not factored; its batch axes
    stay.

    Args:
      param_logical_axes: a PartitionSpec of axis names for each parameter.

    Raises:
      ValueError: an axis has no rule, or some axes of a factored parameter are NONE.
    """
    rules = self.hyper_params.logical_factor_rules
    if rules is None:
      return
    flat = state_utils.flatten_dict_string_keys(param_logical_axes)
    factor_map = {path: rule_of_axes(path, axes, rules) for path, axes in flat.items()}
    self.hyper_params = self.hyper_params.replace(factor_map=factor_map)

  def derive_logical_axes(
    self, optimizer_state: Optimizer, param_logical_axes: PyTree
  ) -> Optimizer:
    """Replaces arrays by logical axes.

    Args:
      optimizer_state: an optimizer of this definition.
      param_logical_axes: a PartitionSpec of axis names for each parameter.

    Returns:
      The same structure. What has a parameter's shape has its axes; the rest, None:
      factored moments are small, and so replicated.
    """
    axes = match_axes(optimizer_state.target, param_logical_axes)
    flat_axes = state_utils.flatten_dict_string_keys(axes)
    states = state_utils.flatten_dict_string_keys(optimizer_state.state.param_states)
    derived = {
      path: _ParamState(
        v_row=None,
        v_col=None,
        v=flat_axes[path] if entry.v.shape != (1,) else None,
        m=flat_axes[path] if self.hyper_params.beta1 is not None else None,
      )
      for path, entry in states.items()
    }
    return optimizer_state.replace(
      target=axes,
      state=optimizer_state.state.replace(
        step=None, param_states=_nest(derived, optimizer_state.target)
      ),
    )


def _nest(flat: Mapping[str, Any], like: Mapping[str, Any]) -> Any:
  tree = flax.traverse_util.unflatten_dict(dict(flat), sep='/')
  return flax.core.freeze(tree) if isinstance(like, flax.core.FrozenDict) else tree


def _root_mean_square(
  x: Float[Array, '*d'], axes: tuple[int, ...]
) -> Float[Array, '...']:
  return jnp.sqrt(jnp.mean(x * x, axis=axes, keepdims=True))


def _share_kept(hyper: _HyperParams) -> Float[Array, ''] | float:
  """1 minus the weight decay."""
  lost = hyper.weight_decay_rate
  if hyper.weight_decay_rate_lr_exponent:
    lost = (lost or 1.0) * hyper.learning_rate**hyper.weight_decay_rate_lr_exponent
  return 1.0 if lost is None else 1.0 - lost


def _normalize(
  grad: Float[Array, '*d'],
  state: _ParamState,
  layout: Layout,
  kept: Float[Array, ''],
  epsilon: float,
) -> tuple[Float[Array, '*d'], _ParamState]:
  """Divides a gradient by the root of its second moments, after updating those."""
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
  # Kept axes of size 1 broadcast against the gradient again.
  over_rows = v_row.reshape(mean_of_rows.shape)
  over_columns = v_col.reshape(mean_of_columns.shape)
  relative = over_rows / jnp.mean(over_rows, axis=rows, keepdims=True)
  direction = grad * relative**-0.5 * over_columns**-0.5
  return direction, state.replace(v_row=v_row, v_col=v_col)


def _clip_together(
  grads: Mapping[str, Float[Array, '...']], threshold: float
) -> dict[str, Float[Array, '...']]:
  squares = (jnp.sum(jnp.square(g.astype(jnp.float32))) for g in grads.values())
  norm = jnp.sqrt(sum(squares))
  shrink = jnp.minimum(1.0, threshold / norm)
  return {path: g * shrink for path, g in grads.items()}
