"""Train states, and inference states without an optimizer."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import flax.core
import flax.struct
import flax.traverse_util
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.core.scope import FrozenVariableDict, MutableVariableDict, VariableDict
from flax.linen import partitioning as flax_partitioning
from jaxtyping import Array, Int, PyTree

from t5x import optimizers

EMPTY_DICT = FrozenDict()


@runtime_checkable
class TrainState(Protocol):
  """The interface of a state; its methods return changed copies."""

  @property
  def step(self) -> Int[Array, '']:
    """The number of updates applied."""

  @property
  def params(self) -> FrozenVariableDict:
    """The module's parameters."""

  @property
  def param_states(self) -> FrozenVariableDict:
    """The optimizer's state of the parameters."""

  @property
  def flax_mutables(self) -> FrozenVariableDict:
    """The module's other collections."""

  def state_dict(self) -> MutableVariableDict:
    """Returns `target`, `state` (`step`, `param_states`), any `flax_mutables`."""

  def restore_state(self, state_dict: Mapping[str, Any]) -> 'TrainState':
    """Takes the values of a state dict.

    Raises:
      ValueError: the keys do not fit.
    """

  def replace_params(self, params: VariableDict) -> 'TrainState': ...

  def replace_flax_mutables(self, flax_mutables: FrozenDict) -> 'TrainState': ...

  def replace_step(self, step: Int[Array, '']) -> 'TrainState':
    """Replaces the step; counts inside an optax state do not change."""

  def apply_gradient(
    self, grads: PyTree, learning_rate: Any, flax_mutables: FrozenDict = EMPTY_DICT
  ) -> 'TrainState':
    """Makes one update.

    Args:
      grads: gradients, in the structure of the parameters.
      learning_rate: for Adafactor; optax optimizers have their own.
      flax_mutables: the collections after the forward pass.
    """

  def as_logical_axes(self) -> 'TrainState':
    """Replaces arrays by PartitionSpecs of axis names, or None: replicated.

    Raises:
      ValueError: the optimizer cannot derive axes, or the model names none.
    """


def _split_variables(model_variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of a state."""
  if 'params' not in model_variables:
    raise ValueError(
      f"A model's variables must include 'params'. Got: {', '.join(model_variables)}."
    )
  values, axes = {}, {}
  for name, tree in model_variables.items():
    if name.endswith('_axes'):
      axes[name.removesuffix('_axes')] = tree
    else:
      values[name] = tree

  def paths(tree):
    return set(flax.traverse_util.flatten_dict(flax.core.unfreeze(tree), sep='/'))

  for name in axes.keys() & values.keys():
    named = paths(flax_partitioning.get_axis_names(axes[name]))
    nameless = sorted(paths(values[name]) - named)
    if nameless:
      raise ValueError(
        f'{len(nameless)} entries of {name!r} have no logical axis names: '
        f'{", ".join(nameless)}. Declare them in the module with param_with_axes or '
        'variable_with_axes of flax.linen.partitioning.'
      )
  return {
    'params': values.pop('params'),
    'params_axes': axes.pop('params', None),
    'flax_mutables': flax.core.freeze(values),
    'flax_mutables_axes': flax.core.freeze(axes) if axes else None,
  }


def _mutables_of(state_dict: Mapping[str, Any]) -> FrozenDict:
  return flax.core.freeze(state_dict.get('flax_mutables', EMPTY_DICT))


def _params_axis_names(params_axes: PyTree | None) -> PyTree:
  if params_axes is None:
    raise ValueError(
      'Partitioning needs logical axis names for the parameters, but the model has '
      'none. Declare them with flax.linen.partitioning.param_with_axes.'
    )
  return flax_partitioning.get_axis_names(params_axes)


class FlaxOptimTrainState(flax.struct.PyTreeNode):
  """Parameters, optimizer state, step, and the module's other collections.

  `params_axes` and `flax_mutables_axes` are Flax's axis metadata, if the module names
  its axes.
  """

  _optimizer: optimizers.OptimizerType
  params_axes: FrozenVariableDict | None = None
  flax_mutables: FrozenDict = EMPTY_DICT
  flax_mutables_axes: FrozenVariableDict | None = None

  @classmethod
  def create(
    cls,
    optimizer_def: optimizers.OptimizerDefType,
    model_variables: FrozenVariableDict,
  ) -> 'FlaxOptimTrainState':
    """Creates the state at step 0 from the output of the module's `init`.

    Args:
      optimizer_def: the optimizer; `set_param_axes` is called if it has one.
      model_variables: `params`, `params_axes`, and any other collections with or
        without `<name>_axes`.

    Raises:
      ValueError: no parameters; parameters without axis names where others have them,
        or where the optimizer needs them.
    """
    fields = _split_variables(model_variables)
    if hasattr(optimizer_def, 'set_param_axes'):
      optimizer_def.set_param_axes(_params_axis_names(fields['params_axes']))
    return cls(optimizer_def.create(fields.pop('params')), **fields)

  @property
  def step(self) -> Int[Array, '']:
    return self._optimizer.state.step

  @property
  def params(self) -> FrozenVariableDict:
    return self._optimizer.target

  @property
  def param_states(self) -> FrozenVariableDict:
    return self._optimizer.state.param_states

  def state_dict(self) -> MutableVariableDict:
    tree = self._optimizer.state_dict()
    if self.flax_mutables:
      tree['flax_mutables'] = flax.core.unfreeze(self.flax_mutables)
    return tree

  def restore_state(self, state_dict: VariableDict) -> 'FlaxOptimTrainState':
    return self.replace(
      _optimizer=self._optimizer.restore_state(state_dict),
      flax_mutables=_mutables_of(state_dict),
    )

  def replace_params(self, params: VariableDict) -> 'FlaxOptimTrainState':
    return self.replace(_optimizer=self._optimizer.replace(target=params))

  def replace_flax_mutables(self, flax_mutables: FrozenDict) -> 'FlaxOptimTrainState':
    return self.replace(flax_mutables=flax_mutables)

  def replace_step(self, step: Int[Array, '']) -> 'FlaxOptimTrainState':
    state = self._optimizer.state.replace(step=step)
    return self.replace(_optimizer=self._optimizer.replace(state=state))

  def apply_gradient(
    self, grads: PyTree, learning_rate: Any, flax_mutables: FrozenDict = EMPTY_DICT
  ) -> 'FlaxOptimTrainState':
    updated = self._optimizer.apply_gradient(grads, learning_rate=learning_rate)
    return self.replace(_optimizer=updated, flax_mutables=flax_mutables)

  def as_logical_axes(self) -> 'FlaxOptimTrainState':
    rule = self._optimizer.optimizer_def
    if not hasattr(rule, 'derive_logical_axes'):
      raise ValueError(
        f'{type(rule).__name__} cannot be partitioned by logical axes: it has no '
        'derive_logical_axes method.'
      )
    names = _params_axis_names(self.params_axes)
    mutables = flax_partitioning.get_axis_names(self.flax_mutables_axes or EMPTY_DICT)
    return FlaxOptimTrainState(
      rule.derive_logical_axes(self._optimizer, names), flax_mutables=mutables
    )


class InferenceState(flax.struct.PyTreeNode):
  """A `FlaxOptimTrainState` without its optimizer."""

  step: Int[Array, ''] | None
  params: FrozenVariableDict
  params_axes: FrozenVariableDict | None = None
  flax_mutables: FrozenDict = EMPTY_DICT
  flax_mutables_axes: FrozenVariableDict | None = None

  @classmethod
  def create(cls, model_variables: FrozenVariableDict) -> 'InferenceState':
    """Creates the state at step 0; see `FlaxOptimTrainState.create`."""
    return cls(step=jnp.zeros((), jnp.int32), **_split_variables(model_variables))

  @property
  def param_states(self) -> FrozenVariableDict:
    raise NotImplementedError('An InferenceState has no optimizer, so no param_states.')

  def apply_gradient(self, *args: Any, **kwargs: Any) -> 'InferenceState':
    raise NotImplementedError('An InferenceState has no optimizer to apply gradients.')

  def state_dict(self) -> MutableVariableDict:
    tree = {'target': flax.core.unfreeze(self.params), 'state': {'step': self.step}}
    if self.flax_mutables:
      tree['flax_mutables'] = flax.core.unfreeze(self.flax_mutables)
    return tree

  def restore_state(self, state_dict: Mapping[str, Any]) -> 'InferenceState':
    return self.replace(
      step=state_dict['state']['step'],
      params=flax.core.freeze(state_dict['target']),
      flax_mutables=_mutables_of(state_dict),
    )

  def replace_step(self, step: Int[Array, '']) -> 'InferenceState':
    return self.replace(step=step)

  def replace_params(self, params: FrozenVariableDict) -> 'InferenceState':
    return self.replace(params=params)

  def replace_flax_mutables(self, flax_mutables: FrozenDict) -> 'InferenceState':
    return self.replace(flax_mutables=flax_mutables)

  def as_logical_axes(self) -> 'InferenceState':
    mutables = flax_partitioning.get_axis_names(self.flax_mutables_axes or EMPTY_DICT)
    return InferenceState(
      step=None,
      params=_params_axis_names(self.params_axes),
      flax_mutables=mutables,
    )
