"""The state of a training run, and its half without an optimizer for inference."""

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
_AXES = '_axes'


@runtime_checkable
class TrainState(Protocol):
  """What the runtime asks of a state."""

  @property
  def step(self) -> Int[Array, '']:
    """How many updates were applied."""

  @property
  def params(self) -> FrozenVariableDict:
    """The module's parameters."""

  @property
  def param_states(self) -> FrozenVariableDict:
    """What the optimizer keeps for the parameters."""

  @property
  def flax_mutables(self) -> FrozenVariableDict:
    """The module's other collections."""

  def state_dict(self) -> MutableVariableDict:
    """The state under string keys, for a checkpoint."""

  def restore_state(self, state_dict: Mapping[str, Any]) -> 'TrainState':
    """A copy with the values of a state dict."""

  def replace_params(self, params: VariableDict) -> 'TrainState':
    """A copy with other parameters."""

  def replace_flax_mutables(self, flax_mutables: FrozenDict) -> 'TrainState':
    """A copy with other collections."""

  def replace_step(self, step: Int[Array, '']) -> 'TrainState':
    """A copy at another step."""

  def apply_gradient(
    self, grads: PyTree, learning_rate: Any, flax_mutables: FrozenDict = EMPTY_DICT
  ) -> 'TrainState':
    """The state after one update."""

  def as_logical_axes(self) -> 'TrainState':
    """A copy whose arrays are replaced by the names of their axes."""


def _check_axes(collection: str, axes: PyTree, values: PyTree) -> None:
  """Raises a ValueError unless each value has named axes."""
  named = flax.traverse_util.flatten_dict(
    flax.core.unfreeze(flax_partitioning.get_axis_names(axes)), sep='/'
  )
  present = flax.traverse_util.flatten_dict(flax.core.unfreeze(values), sep='/')
  nameless = sorted(set(present) - set(named))
  if nameless:
    raise ValueError(
      f'{len(nameless)} of {len(present)} entries of {collection!r} have no logical '
      f'axis names: {", ".join(nameless)}. Name them in the module, with '
      'param_with_axes or variable_with_axes of flax.linen.partitioning.'
    )


def _split_variables(
  model_variables: Mapping[str, Any],
) -> tuple[Any, Any, FrozenDict, FrozenDict | None]:
  """Takes a module's variables apart.

  Returns:
    (parameters, their axes or None, the other collections, their axes or None).
  """
  if 'params' not in model_variables:
    raise ValueError(
      f"A model's variables need 'params'. Got: {', '.join(model_variables)}."
    )
  values, axes = {}, {}
  for name, tree in model_variables.items():
    if name.endswith(_AXES):
      axes[name.removesuffix(_AXES)] = tree
    else:
      values[name] = tree
  for name, tree in axes.items():
    # Axes of a collection that the module did not return name nothing.
    if name in values:
      _check_axes(name, tree, values[name])
  params, params_axes = values.pop('params'), axes.pop('params', None)
  return (
    params,
    params_axes,
    flax.core.freeze(values),
    flax.core.freeze(axes) if axes else None,
  )


def _mutables_of(state_dict: Mapping[str, Any]) -> FrozenDict:
  return flax.core.freeze(state_dict.get('flax_mutables', EMPTY_DICT))


def _axis_names(axes: PyTree | None, collection: str) -> PyTree:
  """Turns the module's axis metadata into a PartitionSpec of names for each value."""
  if axes is None:
    raise ValueError(
      f'The model names no axes for {collection!r}, and partitioning needs them. '
      'Declare its parameters with flax.linen.partitioning.param_with_axes.'
    )
  return flax_partitioning.get_axis_names(axes)


class FlaxOptimTrainState(flax.struct.PyTreeNode):
  """Parameters, optimizer state, step, and the module's other collections.

  Attributes:
    params_axes: axis metadata of the parameters, where the module names axes.
    flax_mutables: collections other than the parameters (batch statistics, say).
    flax_mutables_axes: their axis metadata.
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
    """Starts training from a module's initial variables.

    Args:
      optimizer_def: the optimizer. One with `set_param_axes` is told the axis names.
      model_variables: what the module's `init` returned: `params`, `params_axes`, and
        any other collections with or without `<name>_axes`.

    Raises:
      ValueError: no parameters; parameters without axis names where others have them,
        or where the optimizer needs them.
    """
    params, params_axes, mutables, mutables_axes = _split_variables(model_variables)
    if hasattr(optimizer_def, 'set_param_axes'):
      if params_axes is None:
        raise ValueError(
          f'{type(optimizer_def).__name__} works by the names of axes, and the model '
          'names none. Declare its parameters with '
          'flax.linen.partitioning.param_with_axes.'
        )
      optimizer_def.set_param_axes(flax_partitioning.get_axis_names(params_axes))
    return cls(
      optimizer_def.create(params),
      params_axes=params_axes,
      flax_mutables=mutables,
      flax_mutables_axes=mutables_axes,
    )

  @property
  def step(self) -> Int[Array, '']:
    """How many updates were applied."""
    return self._optimizer.state.step

  @property
  def params(self) -> FrozenVariableDict:
    """The module's parameters."""
    return self._optimizer.target

  @property
  def param_states(self) -> FrozenVariableDict:
    """What the optimizer keeps for the parameters."""
    return self._optimizer.state.param_states

  def state_dict(self) -> MutableVariableDict:
    """`target`, `state` (`step`, `param_states`) and, if any, `flax_mutables`."""
    tree = dict(self._optimizer.state_dict())
    if self.flax_mutables:
      tree['flax_mutables'] = flax.core.unfreeze(self.flax_mutables)
    return tree

  def restore_state(self, state_dict: VariableDict) -> 'FlaxOptimTrainState':
    """A copy with the values of a state dict; ValueError where the keys do not fit."""
    return self.replace(
      _optimizer=self._optimizer.restore_state(state_dict),
      flax_mutables=_mutables_of(state_dict),
    )

  def replace_params(self, params: VariableDict) -> 'FlaxOptimTrainState':
    """A copy with other parameters."""
    return self.replace(_optimizer=self._optimizer.replace(target=params))

  def replace_flax_mutables(self, flax_mutables: FrozenDict) -> 'FlaxOptimTrainState':
    """A copy with other collections."""
    return self.replace(flax_mutables=flax_mutables)

  def replace_step(self, step: Int[Array, '']) -> 'FlaxOptimTrainState':
    """A copy at another step (counts inside an optax state stay as they are)."""
    tree = self.state_dict()
    return self.restore_state({**tree, 'state': {**tree['state'], 'step': step}})

  def apply_gradient(
    self, grads: PyTree, learning_rate: Any, flax_mutables: FrozenDict = EMPTY_DICT
  ) -> 'FlaxOptimTrainState':
    """The state after one update.

    Args:
      grads: gradients, in the structure of the parameters.
      learning_rate: for optimizers that take it from outside (Adafactor); optax ones
        have their own.
      flax_mutables: the collections as the forward pass left them.
    """
    updated = self._optimizer.apply_gradient(grads, learning_rate=learning_rate)
    return self.replace(_optimizer=updated, flax_mutables=flax_mutables)

  def as_logical_axes(self) -> 'FlaxOptimTrainState':
    """A copy whose arrays are PartitionSpecs of axis names, or None: replicated.

    Raises:
      ValueError: the optimizer cannot derive axes, or the model names none.
    """
    rule = self._optimizer.optimizer_def
    if not hasattr(rule, 'derive_logical_axes'):
      raise ValueError(
        f'{type(rule).__name__} cannot be partitioned by named axes: it has no '
        'derive_logical_axes.'
      )
    names = _axis_names(self.params_axes, 'params')
    mutables = flax_partitioning.get_axis_names(self.flax_mutables_axes or EMPTY_DICT)
    return FlaxOptimTrainState(
      rule.derive_logical_axes(self._optimizer, names), flax_mutables=mutables
    )


class InferenceState(flax.struct.PyTreeNode):
  """A `FlaxOptimTrainState` without its optimizer.

  Attributes:
    step: the step of training that the parameters come from.
    params: the module's parameters.
    params_axes: their axis metadata, where the module names axes.
    flax_mutables: the module's other collections.
    flax_mutables_axes: their axis metadata.
  """

  step: Int[Array, ''] | None
  params: FrozenVariableDict
  params_axes: FrozenVariableDict | None = None
  flax_mutables: FrozenDict = EMPTY_DICT
  flax_mutables_axes: FrozenVariableDict | None = None

  @classmethod
  def create(cls, model_variables: FrozenVariableDict) -> 'InferenceState':
    """Takes a module's variables at step 0; see `FlaxOptimTrainState.create`."""
    params, params_axes, mutables, mutables_axes = _split_variables(model_variables)
    return cls(
      step=jnp.zeros((), jnp.int32),
      params=params,
      params_axes=params_axes,
      flax_mutables=mutables,
      flax_mutables_axes=mutables_axes,
    )

  @property
  def param_states(self) -> FrozenVariableDict:
    """Raises NotImplementedError: there is no optimizer."""
    raise NotImplementedError('An InferenceState has no optimizer, so no param_states.')

  def apply_gradient(self, *args: Any, **kwargs: Any) -> 'InferenceState':
    """Raises NotImplementedError: there is no optimizer."""
    raise NotImplementedError('An InferenceState has no optimizer to apply gradients.')

  def state_dict(self) -> MutableVariableDict:
    """`target`, `state/step` and, if any, `flax_mutables`."""
    tree = {'target': flax.core.unfreeze(self.params), 'state': {'step': self.step}}
    if self.flax_mutables:
      tree['flax_mutables'] = flax.core.unfreeze(self.flax_mutables)
    return tree

  def restore_state(self, state_dict: Mapping[str, Any]) -> 'InferenceState':
    """A copy with the values of a state dict."""
    return self.replace(
      step=state_dict['state']['step'],
      params=flax.core.freeze(state_dict['target']),
      flax_mutables=_mutables_of(state_dict),
    )

  def replace_step(self, step: Int[Array, '']) -> 'InferenceState':
    """A copy at another step."""
    return self.replace(step=step)

  def replace_params(self, params: FrozenVariableDict) -> 'InferenceState':
    """A copy with other parameters."""
    return self.replace(params=params)

  def replace_flax_mutables(self, flax_mutables: FrozenDict) -> 'InferenceState':
    """A copy with other collections."""
    return self.replace(flax_mutables=flax_mutables)

  def as_logical_axes(self) -> 'InferenceState':
    """A copy whose arrays are PartitionSpecs of axis names, and whose step is None."""
    mutables = flax_partitioning.get_axis_names(self.flax_mutables_axes or EMPTY_DICT)
    return InferenceState(
      step=None,
      params=_axis_names(self.params_axes, 'params'),
      flax_mutables=mutables,
    )
