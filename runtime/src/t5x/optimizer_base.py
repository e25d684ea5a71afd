"""What an optimizer is: a definition, a state, and the parameters, joined as a pytree.

Seen from outside through `t5x.optimizers`, which has these names too.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import flax.serialization
import flax.struct
import flax.traverse_util
from jaxtyping import Array, Float, Int, PyTree

Params = PyTree[Float[Array, '...']]


def _with_empty_dicts(state: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
  """Puts back the empty dicts of `state` that a saved state dict leaves out."""
  flatten = flax.traverse_util.flatten_dict
  wanted = flatten(flax.serialization.to_state_dict(state), keep_empty_nodes=True)
  given = flatten(saved)
  empty = {k: v for k, v in wanted.items() if v is flax.traverse_util.empty_node}
  missing = wanted.keys() - empty.keys() - given.keys()
  unknown = given.keys() - wanted.keys()
  if missing or unknown:
    raise ValueError(
      'The saved state does not fit this optimizer; was it written by another one? '
      f'Missing: {_listing(missing)}. Unknown: {_listing(unknown)}.'
    )
  return flax.traverse_util.unflatten_dict(empty | given)


def _listing(paths: Iterable[tuple[str, ...]]) -> str:
  return ', '.join(sorted(map('/'.join, paths))) or 'nothing'


@flax.struct.dataclass
class OptimizerState:
  """How many updates were applied, and what the algorithm keeps for the parameters."""

  step: Int[Array, '']
  param_states: Any


class OptimizerDef:
  """An update rule with its hyperparameters.

  Attributes:
    hyper_params: a struct with `replace`, or (MultiOptimizer) a list of such.
  """

  def __init__(self, hyper_params: Any):
    self.hyper_params = hyper_params

  def init_state(self, params: Params) -> OptimizerState:
    """Makes the state before the first update."""
    raise NotImplementedError(f'{type(self).__name__} does not define init_state.')

  def apply_gradient(
    self, hyper_params: Any, params: Params, state: OptimizerState, grads: Params
  ) -> tuple[Params, OptimizerState]:
    """Makes one update; returns the new parameters and the new state."""
    raise NotImplementedError(f'{type(self).__name__} does not define apply_gradient.')

  def update_hyper_params(self, **hyper_param_overrides: Any) -> Any:
    """Returns the hyperparameters of one update.

    Args:
      **hyper_param_overrides: values by name. `hyper_params`, if among them, replaces
        the whole set first.
    """
    base = hyper_param_overrides.pop('hyper_params', self.hyper_params)
    return base.replace(**hyper_param_overrides) if hyper_param_overrides else base

  def create(self, target: Params) -> 'Optimizer':
    """Joins this definition, a fresh state and the parameters."""
    return Optimizer(optimizer_def=self, state=self.init_state(target), target=target)

  def state_dict(self, target: Params, state: OptimizerState) -> dict[str, Any]:
    """Nests target and state under string keys, for a checkpoint.

    States without fields (`optax.EmptyState`, masked nodes) would become empty dicts,
    which have no place in a checkpoint of arrays: they are left out.
    """
    flat = flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(state))
    return {
      'target': flax.serialization.to_state_dict(target),
      'state': flax.traverse_util.unflatten_dict(flat),
    }

  def restore_state(
    self, opt_target: Params, opt_state: OptimizerState, state_dict: Mapping[str, Any]
  ) -> tuple[Params, OptimizerState]:
    """Puts a state dict's values into the structure of a target and a state.

    Args:
      opt_target: parameters of the wanted structure.
      opt_state: a state of the wanted structure.
      state_dict: what `state_dict` returned.

    Returns:
      The restored (target, state).

    Raises:
      ValueError: an entry is missing or unknown.
    """
    restore = flax.serialization.from_state_dict
    complete = _with_empty_dicts(opt_state, state_dict['state'])
    return (
      restore(opt_target, state_dict['target'], name='target'),
      restore(opt_state, complete, name='state'),
    )


class Optimizer(flax.struct.PyTreeNode):
  """A definition with its state and the parameters that it updates.

  Attributes:
    optimizer_def: the update rule (static in the pytree).
    state: the rule's state.
    target: the parameters.
  """

  optimizer_def: OptimizerDef = flax.struct.field(pytree_node=False)
  state: Any = flax.struct.field(pytree_node=True)
  target: Any = flax.struct.field(pytree_node=True)

  def apply_gradient(self, grads: Params, **hyper_param_overrides: Any) -> 'Optimizer':
    """Returns the optimizer after one update.

    Args:
      grads: gradients, in the structure of the target.
      **hyper_param_overrides: as for `OptimizerDef.update_hyper_params`.
    """
    rule = self.optimizer_def
    target, state = rule.apply_gradient(
      rule.update_hyper_params(**hyper_param_overrides),
      self.target,
      self.state,
      grads,
    )
    return self.replace(target=target, state=state)

  def state_dict(self) -> dict[str, Any]:
    """The state dict of the definition, for this target and state."""
    return self.optimizer_def.state_dict(self.target, self.state)

  def restore_state(self, state: Mapping[str, Any]) -> 'Optimizer':
    """Returns the optimizer with the values of a state dict."""
    target, restored = self.optimizer_def.restore_state(self.target, self.state, state)
    return self.replace(target=target, state=restored)
