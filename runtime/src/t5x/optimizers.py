"""Optimizers as T5X sees them: a definition, a state, and the parameters together.

An `OptimizerDef` is stateless; `Optimizer` carries it with its state and its target
(the parameters) as one pytree. Any optax transformation becomes a definition through
`OptaxWrapper`; the usual ones are here by name, with optax's own parameters. Names and
the layout of state dicts (`state/step`, `state/param_states`, `target`) are T5X's, so
that checkpoints go both ways.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.core
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import PyTree

from t5x.optimizer_base import Optimizer, OptimizerDef, OptimizerState, Params

Dtype = Any
OptimizerType = Optimizer
OptimizerStateType = OptimizerState | Mapping[str, Any]
OptimizerDefType = OptimizerDef


# ---- Logical axes of an optimizer's state ----


def _by_path(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None):
  """Maps paths, as tuples of strings, to leaves.

  Strings, because a dict and a FrozenDict, or an attribute and a key of one name, are
  the same place for our purposes.
  """
  pairs = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
  return {_path_names(path): leaf for path, leaf in pairs}


def _path_names(path: Sequence[Any]) -> tuple[str, ...]:
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _is_partition_spec(x: Any) -> bool:
  return isinstance(x, jax.sharding.PartitionSpec)


def match_axes(params: PyTree, params_axes: PyTree) -> PyTree:
  """Rearranges axes into the structure of the parameters (dict or FrozenDict).

  Raises:
    ValueError: a parameter has no axes.
  """
  axes = _by_path(params_axes, _is_partition_spec)

  def of(path, _):
    names = _path_names(path)
    if names not in axes:
      raise ValueError(
        f'The model names no logical axes for the parameter {"/".join(names)!r}. '
        'Declare it with flax.linen.partitioning.param_with_axes.'
      )
    return axes[names]

  return jax.tree_util.tree_map_with_path(of, params)


def _state_axes(
  optax_state: Any, params_axes: PyTree, shapes: Mapping[tuple[str, ...], Any]
) -> Any:
  """See `OptaxStatePartitionRules`; `shapes` are the parameters', where known."""
  axes = _by_path(params_axes, _is_partition_spec)
  longest = max(map(len, axes), default=0)

  def of(path, leaf):
    names = _path_names(path)
    # The longest ending first: 'a' must not claim what belongs to 'b/a'.
    for start in range(max(0, len(names) - longest), len(names)):
      spec = axes.get(names[start:])
      if spec is not None:
        # A statistic of another shape (a factored row, a placeholder) is not the
        # parameter's like, even where the number of axes agrees.
        alike = shapes.get(names[start:], jnp.shape(leaf)) == jnp.shape(leaf)
        return spec if alike and len(spec) == jnp.ndim(leaf) else None
    return None

  return jax.tree_util.tree_map_with_path(of, optax_state)


class OptaxStatePartitionRules:
  """Finds the logical axes of an optax state.

  No table of state types: an optimizer keeps a parameter's statistics in a copy of the
  parameters' tree, so the path of such a leaf ends with the parameter's own path, under
  whatever `chain`, `masked`, `multi_transform`, `inject_hyperparams` ... lie above. A
  leaf that ends so, and has the parameter's shape, is partitioned like it; all else
  (counts, random keys, factored statistics) is replicated.
  """

  @classmethod
  def derive_optax_logical_axes(cls, optax_state: Any, params_axes: PyTree) -> Any:
    """Replaces the leaves of an optax state by logical axes.

    Args:
      optax_state: the state, of arrays or of anything with a shape.
      params_axes: a PartitionSpec of axis names for each parameter.

    Returns:
      The same structure, each leaf a PartitionSpec, or None where it is replicated.
    """
    return _state_axes(optax_state, params_axes, shapes={})

  @classmethod
  def derive_params_axes(cls, optax_params: PyTree, params_axes: PyTree) -> PyTree:
    """The axes of a copy of the parameters' tree, which optax may have masked."""
    return cls.derive_optax_logical_axes(optax_params, params_axes)


# ---- Optax ----


@flax.struct.dataclass
class _Scheduled:
  """What the trainer may set on an optax optimizer, and optax does not look at.

  The learning rate of an optax optimizer is its own `learning_rate`, a number or a
  schedule; the trainer's `learning_rate_fn` is for the log.
  """

  learning_rate: float | None = None


class OptaxWrapper(OptimizerDef):
  """An optax transformation as an optimizer definition.

  Attributes:
    optax_optimizer: the transformation.
  """

  def __init__(self, optax_optimizer: optax.GradientTransformation):
    if not (hasattr(optax_optimizer, 'init') and hasattr(optax_optimizer, 'update')):
      raise ValueError(
        'OptaxWrapper takes an optax.GradientTransformation. Got: '
        f'{optax_optimizer!r}. In gin, call the constructor: @optax.adam().'
      )
    super().__init__(hyper_params=_Scheduled())
    self.optax_optimizer = optax_optimizer

  def init_state(self, params: Params) -> OptimizerState:
    """Makes the state: a step of 0 and the transformation's own."""
    return OptimizerState(
      step=jnp.zeros((), jnp.int32), param_states=self.optax_optimizer.init(params)
    )

  def apply_gradient(
    self, hyper_params: Any, params: Params, state: OptimizerState, grads: Params
  ) -> tuple[Params, OptimizerState]:
    """Makes one update; `hyper_params` does not reach optax."""
    del hyper_params
    updates, inner = self.optax_optimizer.update(grads, state.param_states, params)
    advanced = OptimizerState(step=state.step + 1, param_states=inner)
    return optax.apply_updates(params, updates), advanced

  def derive_logical_axes(
    self, optimizer: Optimizer, param_logical_axes: PyTree
  ) -> Optimizer:
    """Replaces arrays by logical axes.

    Args:
      optimizer: an optimizer of this definition.
      param_logical_axes: a PartitionSpec of axis names for each parameter.

    Returns:
      The same structure, each leaf a PartitionSpec, or None where it is replicated.
    """
    axes = match_axes(optimizer.target, param_logical_axes)
    shapes = {path: jnp.shape(p) for path, p in _by_path(optimizer.target).items()}
    inner = _state_axes(optimizer.state.param_states, axes, shapes)
    state = optimizer.state.replace(step=None, param_states=inner)
    return optimizer.replace(state=state, target=axes)


def wrap_optax_optimizer(
  optax_optimizer: Callable[..., optax.GradientTransformation],
) -> Callable[..., OptimizerDef]:
  """Makes of an optax constructor one that returns an optimizer definition.

  Args:
    optax_optimizer: a function that returns a transformation.

  Returns:
    A function with the same signature (gin checks parameter names against it).
  """

  @functools.wraps(optax_optimizer)
  def construct(*args, **kwargs) -> OptimizerDef:
    return OptaxWrapper(optax_optimizer(*args, **kwargs))

  construct.__signature__ = inspect.signature(optax_optimizer)
  construct.__module__ = __name__
  return construct


def _chain(
  transformations: Sequence[optax.GradientTransformation],
) -> optax.GradientTransformation:
  for transformation in transformations:
    if isinstance(transformation, OptimizerDef):
      raise ValueError(
        'optimizers.chain takes optax transformations, not wrapped optimizers. Put '
        'optax.adamw (not optimizers.adamw) and the like into `transformations`.'
      )
  return optax.chain(*transformations)


_chain.__name__ = _chain.__qualname__ = 'chain'
chain = wrap_optax_optimizer(_chain)

# By family: what an update is divided by, or that it is a sign, or scaled by layer.
adam, adamw, adabelief, radam, yogi = map(
  wrap_optax_optimizer,
  (optax.adam, optax.adamw, optax.adabelief, optax.radam, optax.yogi),
)
adagrad, rmsprop = map(wrap_optax_optimizer, (optax.adagrad, optax.rmsprop))
sgd, noisy_sgd, dpsgd = map(
  wrap_optax_optimizer, (optax.sgd, optax.noisy_sgd, optax.contrib.dpsgd)
)
lion = wrap_optax_optimizer(optax.lion)
lamb, lars, fromage = map(wrap_optax_optimizer, (optax.lamb, optax.lars, optax.fromage))


# ---- Several optimizers ----

_Path = tuple[str, ...]


def _flatten(tree: Mapping[str, Any]) -> dict[_Path, Any]:
  return flax.traverse_util.flatten_dict(flax.core.unfreeze(tree))


def _unflatten(flat: Mapping[_Path, Any], like: Mapping[str, Any]) -> Any:
  tree = flax.traverse_util.unflatten_dict(dict(flat))
  return flax.core.freeze(tree) if isinstance(like, flax.core.FrozenDict) else tree


def _pick(flat: Mapping[_Path, Any], paths: Iterable[_Path]) -> dict[str, Any]:
  return flax.traverse_util.unflatten_dict({path: flat[path] for path in paths})


class MultiOptimizer(OptimizerDef):
  """Different optimizers for different parameters; parameters of none stay as they are.

  The states of optimizers that keep one entry a parameter (Adafactor) share one tree in
  the shape of the parameters, None where no optimizer applies: T5X's layout. If any
  keeps something else (those of optax), the states stand side by side, as a tuple.

  Attributes:
    traversals: which parameters; `flax.traverse_util.ModelParamTraversal(lambda path,
      value: ...)`, where a path looks like '/encoder/layers_0/mlp/wi/kernel'.
    sub_optimizers: the optimizer of each traversal's parameters.
  """

  def __init__(
    self,
    traversals_and_optimizers: Sequence[
      tuple[flax.traverse_util.Traversal, OptimizerDef]
    ],
  ):
    self.traversals = tuple(traversal for traversal, _ in traversals_and_optimizers)
    self.sub_optimizers = tuple(rule for _, rule in traversals_and_optimizers)
    super().__init__(hyper_params=[rule.hyper_params for rule in self.sub_optimizers])

  def _selections(self, params: Mapping[str, Any]) -> list[list[_Path]]:
    """The paths of each optimizer's parameters; ValueError where two take the same."""
    chosen, owners = object(), {}
    selections = []
    for traversal in self.traversals:
      # `update` shows the traversal the real values and leaves their places marked.
      marked = _flatten(traversal.update(lambda _: chosen, params))
      selections.append([path for path, leaf in marked.items() if leaf is chosen])
      for path in selections[-1]:
        owners.setdefault('/'.join(path), []).append(len(selections) - 1)
    contested = {name: by for name, by in owners.items() if len(by) > 1}
    if contested:
      raise ValueError(
        'MultiOptimizer: a parameter can have one optimizer. These have several (by '
        f'their numbers): {contested}'
      )
    return selections

  def _join(self, states: Sequence[Any], selections: Any, params: Any) -> Any:
    """Lays the optimizers' states out as the class describes."""
    flat_states = [
      _flatten(state) if isinstance(state, Mapping) else {} for state in states
    ]
    a_parameter_each = all(
      set(flat) == set(paths)
      for flat, paths in zip(flat_states, selections, strict=True)
    )
    if not a_parameter_each:
      return tuple(states)
    shared = dict.fromkeys(_flatten(params))
    for flat in flat_states:
      shared.update(flat)
    return _unflatten(shared, params)

  def _split(self, states: Any, selections: list[list[_Path]]) -> list[Any]:
    """Undoes `_join`."""
    if isinstance(states, tuple):
      return list(states)
    # Not flattened: what a parameter's entry is made of is its optimizer's business.
    return [
      flax.traverse_util.unflatten_dict(
        {path: functools.reduce(lambda t, k: t[k], path, states) for path in paths}
      )
      for paths in selections
    ]

  def init_state(self, params: Params) -> OptimizerState:
    """Makes the state of every optimizer; ValueError where two take one parameter."""
    selections, flat = self._selections(params), _flatten(params)
    states = [
      rule.init_state(_pick(flat, paths)).param_states
      for rule, paths in zip(self.sub_optimizers, selections, strict=True)
    ]
    return OptimizerState(
      step=jnp.zeros((), jnp.int32),
      param_states=self._join(states, selections, params),
    )

  def apply_gradient(
    self,
    hyper_params: Sequence[Any],
    params: Params,
    state: OptimizerState,
    grads: Params,
  ) -> tuple[Params, OptimizerState]:
    """Makes one update with every optimizer, each with its own hyperparameters."""
    selections = self._selections(params)
    flat_params, flat_grads = _flatten(params), _flatten(grads)
    updated, new_states = dict(flat_params), []
    for rule, hyper, paths, inner in zip(
      self.sub_optimizers,
      hyper_params,
      selections,
      self._split(state.param_states, selections),
      strict=True,
    ):
      new_params, new_state = rule.apply_gradient(
        hyper,
        _pick(flat_params, paths),
        state.replace(param_states=inner),
        _pick(flat_grads, paths),
      )
      updated.update(_flatten(new_params))
      new_states.append(new_state.param_states)
    return _unflatten(updated, params), OptimizerState(
      step=state.step + 1,
      param_states=self._join(new_states, selections, params),
    )

  def update_hyper_params(self, **hyper_param_overrides: Any) -> list[Any]:
    """As the base class, each override for all optimizers.

    Args:
      **hyper_param_overrides: values by name. `hyper_params`, if among them, is a list
        that replaces the optimizers' own first.
    """
    base = hyper_param_overrides.pop('hyper_params', self.hyper_params)
    return [hyper.replace(**hyper_param_overrides) for hyper in base]

  def set_param_axes(self, param_logical_axes: Mapping[str, Any]) -> None:
    """Tells the axis names to those optimizers that work by them."""
    flat = _flatten(param_logical_axes)
    selections = self._selections(param_logical_axes)
    for rule, paths in zip(self.sub_optimizers, selections, strict=True):
      if hasattr(rule, 'set_param_axes'):
        rule.set_param_axes(_pick(flat, paths))

  def derive_logical_axes(
    self, optimizer: Optimizer, param_logical_axes: PyTree
  ) -> Optimizer:
    """As `OptaxWrapper` does; the state of a rule that cannot is replicated."""
    axes = match_axes(optimizer.target, param_logical_axes)
    selections = self._selections(optimizer.target)
    flat_params, flat_axes = _flatten(optimizer.target), _flatten(axes)
    derived = []
    for rule, paths, inner in zip(
      self.sub_optimizers,
      selections,
      self._split(optimizer.state.param_states, selections),
      strict=True,
    ):
      if hasattr(rule, 'derive_logical_axes'):
        part = Optimizer(
          optimizer_def=rule,
          state=optimizer.state.replace(param_states=inner),
          target=_pick(flat_params, paths),
        )
        part = rule.derive_logical_axes(part, _pick(flat_axes, paths))
        derived.append(part.state.param_states)
      else:
        derived.append(jax.tree.map(lambda _: None, inner))
    joined = self._join(derived, selections, optimizer.target)
    state = optimizer.state.replace(step=None, param_states=joined)
    return optimizer.replace(state=state, target=axes)
