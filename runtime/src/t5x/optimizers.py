"""Optimizers with T5X's interface, and learning rate schedules.

An `OptimizerDef` is stateless; an `Optimizer` holds it with its state and its target
(the parameters) as one pytree. `OptaxWrapper` wraps any optax transformation; common
ones are available by name, with optax's parameters. State dicts (`state/step`,
`state/param_states`, `target`) have T5X's layout, so that checkpoints are exchangeable.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.core
import flax.serialization
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float, Int, PyTree

from t5x import gin_utils

Params = PyTree[Float[Array, '...']]
LearningRateCallable = Callable[[Int[Array, ''] | int], Float[Array, '']]


@flax.struct.dataclass
class OptimizerState:
  """The number of updates applied, and the algorithm's statistics."""

  step: Int[Array, '']
  param_states: Any


class OptimizerDef:
  """An update rule with its hyperparameters, a Flax struct (MultiOptimizer: a list)."""

  def __init__(self, hyper_params: Any):
    self.hyper_params = hyper_params

  def init_state(self, params: Params) -> OptimizerState:
    """Creates the state before the first update."""
    raise NotImplementedError(f'{type(self).__name__} does not define init_state.')

  def apply_gradient(
    self, hyper_params: Any, params: Params, state: OptimizerState, grads: Params
  ) -> tuple[Params, OptimizerState]:
    """Returns parameters and state after one update."""
    raise NotImplementedError(f'{type(self).__name__} does not define apply_gradient.')

  def update_hyper_params(self, **hyper_param_overrides: Any) -> Any:
    """Returns overridden hyperparameters; `hyper_params` replaces the whole set."""
    base = hyper_param_overrides.pop('hyper_params', self.hyper_params)
    return base.replace(**hyper_param_overrides) if hyper_param_overrides else base

  def create(self, target: Params) -> 'Optimizer':
    """Creates an optimizer of these parameters with a new state."""
    return Optimizer(optimizer_def=self, state=self.init_state(target), target=target)

  def state_dict(self, target: Params, state: OptimizerState) -> dict[str, Any]:
    """Nests target and state under string keys, for a checkpoint."""
    # Flattening drops states without fields (`optax.EmptyState`), which become empty
    # dicts that a checkpoint of arrays cannot hold.
    flat = flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(state))
    return {
      'target': flax.serialization.to_state_dict(target),
      'state': flax.traverse_util.unflatten_dict(flat),
    }

  def restore_state(
    self, opt_target: Params, opt_state: OptimizerState, state_dict: Mapping[str, Any]
  ) -> tuple[Params, OptimizerState]:
    """Fills the structure of a target and a state with the values of a state dict.

    Raises:
      ValueError: an entry is missing or unknown.
    """
    wanted = flax.traverse_util.flatten_dict(
      flax.serialization.to_state_dict(opt_state), keep_empty_nodes=True
    )
    saved = flax.traverse_util.flatten_dict(state_dict['state'])
    empty = {k: v for k, v in wanted.items() if v is flax.traverse_util.empty_node}
    missing = wanted.keys() - empty.keys() - saved.keys()
    unknown = saved.keys() - wanted.keys()
    if missing or unknown:

      def listing(paths):
        return ', '.join(sorted(map('/'.join, paths))) or 'nothing'

      raise ValueError(
        'The saved state does not fit this optimizer. Was it saved with another one? '
        f'Missing: {listing(missing)}. Unknown: {listing(unknown)}.'
      )
    complete = flax.traverse_util.unflatten_dict(empty | saved)
    restore = flax.serialization.from_state_dict
    return (
      restore(opt_target, state_dict['target'], name='target'),
      restore(opt_state, complete, name='state'),
    )


class Optimizer(flax.struct.PyTreeNode):
  """An optimizer definition with its state and the parameters (`target`)."""

  optimizer_def: OptimizerDef = flax.struct.field(pytree_node=False)
  state: Any = flax.struct.field(pytree_node=True)
  target: Any = flax.struct.field(pytree_node=True)

  def apply_gradient(self, grads: Params, **hyper_param_overrides: Any) -> 'Optimizer':
    """Returns the optimizer after one update."""
    rule = self.optimizer_def
    hyper_params = rule.update_hyper_params(**hyper_param_overrides)
    target, state = rule.apply_gradient(hyper_params, self.target, self.state, grads)
    return self.replace(target=target, state=state)

  def state_dict(self) -> dict[str, Any]:
    """See `OptimizerDef.state_dict`."""
    return self.optimizer_def.state_dict(self.target, self.state)

  def restore_state(self, state: Mapping[str, Any]) -> 'Optimizer':
    """See `OptimizerDef.restore_state`."""
    target, restored = self.optimizer_def.restore_state(self.target, self.state, state)
    return self.replace(target=target, state=restored)


OptimizerType = Optimizer
OptimizerStateType = OptimizerState | Mapping[str, Any]
OptimizerDefType = OptimizerDef


def match_axes(params: PyTree, params_axes: PyTree) -> PyTree:
  """Converts axes to the structure of the parameters (dict or FrozenDict)."""
  return flax.serialization.from_state_dict(params, params_axes, name='params_axes')


# ---- Optax ----


@flax.struct.dataclass
class _NoHyperParams:
  """Accepts the trainer's learning rate, which optax optimizers ignore."""

  learning_rate: float | None = None


class OptaxWrapper(OptimizerDef):
  """An optax transformation as an optimizer definition."""

  def __init__(self, optax_optimizer: optax.GradientTransformation):
    if not hasattr(optax_optimizer, 'update'):
      raise ValueError(
        'OptaxWrapper needs an optax.GradientTransformation. Got: '
        f'{optax_optimizer!r}. In gin, call the constructor: @optax.adam().'
      )
    super().__init__(hyper_params=_NoHyperParams())
    self.optax_optimizer = optax_optimizer

  def init_state(self, params: Params) -> OptimizerState:
    return OptimizerState(
      step=jnp.zeros((), jnp.int32), param_states=self.optax_optimizer.init(params)
    )

  def apply_gradient(
    self, hyper_params: Any, params: Params, state: OptimizerState, grads: Params
  ) -> tuple[Params, OptimizerState]:
    """Makes one update; `hyper_params` are ignored."""
    updates, inner = self.optax_optimizer.update(grads, state.param_states, params)
    advanced = OptimizerState(step=state.step + 1, param_states=inner)
    return optax.apply_updates(params, updates), advanced

  def derive_logical_axes(
    self, optimizer: Optimizer, param_logical_axes: PyTree
  ) -> Optimizer:
    """Replaces arrays by PartitionSpecs of axis names, or None: replicated.

    Statistics with the shape of their parameter get its axes. Everything else (counts,
    random keys, factored statistics) is replicated.
    """
    axes = match_axes(optimizer.target, param_logical_axes)

    def is_masked(x):
      return isinstance(x, optax.MaskedNode)

    def derive(leaf, param, spec):
      if is_masked(leaf):
        return leaf
      return spec if leaf.shape == param.shape else None

    inner = optax.tree_map_params(
      self.optax_optimizer,
      derive,
      optimizer.state.param_states,
      optimizer.target,
      axes,
      transform_non_params=lambda _: None,
      is_leaf=is_masked,
    )
    state = optimizer.state.replace(step=None, param_states=inner)
    return optimizer.replace(state=state, target=axes)


def wrap_optax_optimizer(
  optax_optimizer: Callable[..., optax.GradientTransformation],
) -> Callable[..., OptimizerDef]:
  """Makes an optax constructor return an OptimizerDef, with the same signature."""

  @functools.wraps(optax_optimizer)
  def construct(*args, **kwargs) -> OptimizerDef:
    return OptaxWrapper(optax_optimizer(*args, **kwargs))

  # Gin checks parameter names against it.
  construct.__signature__ = inspect.signature(optax_optimizer)
  construct.__module__ = __name__
  return construct


def _chain(
  transformations: Sequence[optax.GradientTransformation],
) -> optax.GradientTransformation:
  if any(isinstance(t, OptimizerDef) for t in transformations):
    raise ValueError(
      'optimizers.chain takes optax transformations, not wrapped optimizers. Use, for '
      'example, optax.adamw instead of optimizers.adamw.'
    )
  return optax.chain(*transformations)


_chain.__name__ = _chain.__qualname__ = 'chain'
chain = wrap_optax_optimizer(_chain)

adabelief = wrap_optax_optimizer(optax.adabelief)
adagrad = wrap_optax_optimizer(optax.adagrad)
adam = wrap_optax_optimizer(optax.adam)
adamw = wrap_optax_optimizer(optax.adamw)
dpsgd = wrap_optax_optimizer(optax.contrib.dpsgd)
fromage = wrap_optax_optimizer(optax.fromage)
lamb = wrap_optax_optimizer(optax.lamb)
lars = wrap_optax_optimizer(optax.lars)
lion = wrap_optax_optimizer(optax.lion)
noisy_sgd = wrap_optax_optimizer(optax.noisy_sgd)
radam = wrap_optax_optimizer(optax.radam)
rmsprop = wrap_optax_optimizer(optax.rmsprop)
sgd = wrap_optax_optimizer(optax.sgd)
yogi = wrap_optax_optimizer(optax.yogi)


# ---- Several optimizers ----

_Path = tuple[str, ...]


def _flatten(tree: Mapping[str, Any]) -> dict[_Path, Any]:
  return flax.traverse_util.flatten_dict(flax.core.unfreeze(tree))


def _unflatten(flat: Mapping[_Path, Any], like: Mapping[str, Any]) -> Any:
  tree = flax.traverse_util.unflatten_dict(dict(flat))
  return flax.core.freeze(tree) if isinstance(like, flax.core.FrozenDict) else tree


def _pick(tree: Mapping[str, Any], paths: Iterable[_Path]) -> dict[str, Any]:
  return flax.traverse_util.unflatten_dict(
    # Not flattened: an entry may be a subtree of any kind.
    {path: functools.reduce(lambda t, k: t[k], path, tree) for path in paths}
  )


class MultiOptimizer(OptimizerDef):
  """Different optimizers for different parameters; unselected parameters stay fixed.

  Parameters are selected by `flax.traverse_util.ModelParamTraversal(lambda path, value:
  ...)`, with paths such as '/encoder/layers_0/mlp/wi/kernel'.

  If every optimizer keeps one entry per parameter (Adafactor), the states share one
  tree shaped as the parameters, None where no optimizer applies: T5X's layout.
  Otherwise (optax) they form a tuple.
  """

  def __init__(
    self,
    traversals_and_optimizers: Sequence[
      tuple[flax.traverse_util.Traversal, OptimizerDef]
    ],
  ):
    self.traversals, self.sub_optimizers = zip(*traversals_and_optimizers)
    super().__init__(hyper_params=[rule.hyper_params for rule in self.sub_optimizers])

  def _selections(self, params: Mapping[str, Any]) -> list[list[_Path]]:
    chosen, owners = object(), {}
    selections = []
    for i, traversal in enumerate(self.traversals):
      marked = _flatten(traversal.update(lambda _: chosen, params))
      selections.append([path for path, leaf in marked.items() if leaf is chosen])
      for path in selections[-1]:
        owners.setdefault('/'.join(path), []).append(i)
    contested = {name: by for name, by in owners.items() if len(by) > 1}
    if contested:
      raise ValueError(
        'In a MultiOptimizer each parameter can have only one optimizer. Got '
        f'parameters selected by several (indices): {contested}'
      )
    return selections

  def _join(self, states: Sequence[Any], selections: Any, params: Any) -> Any:
    """Joins the optimizers' states into one tree or a tuple."""
    flat_states = [
      _flatten(state) if isinstance(state, Mapping) else {} for state in states
    ]
    if any(set(f) != set(p) for f, p in zip(flat_states, selections, strict=True)):
      return tuple(states)
    shared = dict.fromkeys(_flatten(params))
    for flat in flat_states:
      shared.update(flat)
    return _unflatten(shared, params)

  def _split(self, states: Any, selections: list[list[_Path]]) -> Sequence[Any]:
    """Undoes `_join`."""
    if isinstance(states, tuple):
      return states
    return [_pick(states, paths) for paths in selections]

  def init_state(self, params: Params) -> OptimizerState:
    """Creates the state; ValueError if two optimizers select one parameter."""
    selections = self._selections(params)
    states = [
      rule.init_state(_pick(params, paths)).param_states
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
    """Makes one update; `hyper_params` are a list with one entry per optimizer."""
    selections = self._selections(params)
    inner_states = self._split(state.param_states, selections)
    updated, new_states = _flatten(params), []
    for rule, hyper, paths, inner in zip(
      self.sub_optimizers, hyper_params, selections, inner_states, strict=True
    ):
      new_params, new_state = rule.apply_gradient(
        hyper,
        _pick(params, paths),
        state.replace(param_states=inner),
        _pick(grads, paths),
      )
      updated.update(_flatten(new_params))
      new_states.append(new_state.param_states)
    return _unflatten(updated, params), OptimizerState(
      step=state.step + 1,
      param_states=self._join(new_states, selections, params),
    )

  def update_hyper_params(self, **hyper_param_overrides: Any) -> list[Any]:
    """Applies the overrides to every optimizer; `hyper_params` is a list."""
    base = hyper_param_overrides.pop('hyper_params', self.hyper_params)
    return [hyper.replace(**hyper_param_overrides) for hyper in base]

  def set_param_axes(self, param_logical_axes: Mapping[str, Any]) -> None:
    """Passes the axis names to the optimizers that need them."""
    selections = self._selections(param_logical_axes)
    for rule, paths in zip(self.sub_optimizers, selections, strict=True):
      if hasattr(rule, 'set_param_axes'):
        rule.set_param_axes(_pick(param_logical_axes, paths))

  def derive_logical_axes(
    self, optimizer: Optimizer, param_logical_axes: PyTree
  ) -> Optimizer:
    """See `OptaxWrapper`; states of optimizers without this method are replicated."""
    axes = match_axes(optimizer.target, param_logical_axes)
    selections = self._selections(optimizer.target)
    inner_states = self._split(optimizer.state.param_states, selections)
    derived = []
    for rule, paths, inner in zip(
      self.sub_optimizers, selections, inner_states, strict=True
    ):
      if hasattr(rule, 'derive_logical_axes'):
        part = Optimizer(
          optimizer_def=rule,
          state=optimizer.state.replace(param_states=inner),
          target=_pick(optimizer.target, paths),
        )
        part = rule.derive_logical_axes(part, _pick(axes, paths))
        derived.append(part.state.param_states)
      else:
        derived.append(jax.tree.map(lambda _: None, inner))
    joined = self._join(derived, selections, optimizer.target)
    state = optimizer.state.replace(step=None, param_states=joined)
    return optimizer.replace(state=state, target=axes)


# ---- Learning rate schedules ----


def create_learning_rate_scheduler(
  factors: str = 'constant * linear_warmup * rsqrt_decay',
  base_learning_rate: float = 0.5,
  warmup_steps: int = 1000,
  decay_factor: float = 0.5,
  steps_per_decay: int = 20000,
  steps_per_cycle: int = 100000,
  step_offset: int = 0,
  min_learning_rate: float = 1e-8,
) -> LearningRateCallable:
  """Makes a schedule that is a product of factors; public as a name of `utils`.

  With s = max(0, step - step_offset) and w = warmup_steps, the factors are

  - constant: base_learning_rate
  - linear_warmup: min(1, s / w)
  - linear_decay: base_learning_rate * min(s / w, 1 + decay_factor * (w - s)), which
    includes the constant and the warm-up; decay_factor is the fraction of the peak
    lost per step
  - rsqrt_decay: 1 / sqrt(max(s, w))
  - rsqrt_normalized_decay: sqrt(w / max(s, w)), 1 until w
  - decay_every: decay_factor ** floor(s / steps_per_decay)
  - cosine_decay: 1 until w, then (1 + cos(pi * ((s - w) / steps_per_cycle mod 1))) / 2

  `factors` are names joined by '*'. The schedule never returns less than
  `min_learning_rate`.

  Returns:
    A function from the step to a float32 scalar.

  Raises:
    ValueError: a factor is unknown or would divide by 0 steps.
  """

  def cosine(step):
    cycles = jnp.maximum(0.0, (step - warmup_steps) / steps_per_cycle)
    return jnp.maximum(0.0, 0.5 + 0.5 * jnp.cos(jnp.pi * (cycles % 1.0)))

  def linear_decay(step):
    fall = 1 + decay_factor * (warmup_steps - step)
    return base_learning_rate * jnp.minimum(step / warmup_steps, fall)

  known = {
    'constant': lambda step: base_learning_rate,
    'linear_warmup': lambda step: jnp.minimum(1.0, step / warmup_steps),
    'linear_decay': linear_decay,
    'rsqrt_decay': lambda step: 1 / jnp.sqrt(jnp.maximum(step, warmup_steps)),
    'rsqrt_normalized_decay': lambda step: jnp.sqrt(
      warmup_steps / jnp.maximum(step, warmup_steps)
    ),
    'decay_every': lambda step: decay_factor ** (step // steps_per_decay),
    'cosine_decay': cosine,
  }
  chosen = [name.strip() for name in factors.split('*')]
  for name in chosen:
    if name not in known:
      raise ValueError(
        f'Unknown learning rate factor {name!r}. The factors are '
        f'{", ".join(known)}.{gin_utils.nearest(name, known)}'
      )
    divisors = {
      'constant': 1,
      'decay_every': steps_per_decay,
      'cosine_decay': steps_per_cycle,
    }
    if divisors.get(name, warmup_steps) <= 0:
      raise ValueError(
        f'The factor {name!r} divides by a number of steps, which must be positive. '
        f'Got: warmup_steps={warmup_steps}, steps_per_decay={steps_per_decay}, '
        f'steps_per_cycle={steps_per_cycle}.'
      )

  def learning_rate(step: Int[Array, ''] | int) -> Float[Array, '']:
    since = jnp.maximum(0, step - step_offset)
    product = jnp.float32(1.0)
    for name in chosen:
      product = product * known[name](since)
    return jnp.asarray(jnp.maximum(product, min_learning_rate), jnp.float32)

  return learning_rate
