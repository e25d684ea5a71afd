"""Spreads arrays and computations over devices.

A model names the axes of its parameters and activations ('embed', 'mlp', 'heads' ...);
*logical axis rules* map those names to the axes of a mesh: 'data' (copies of the model,
each on its own examples) and 'model' (the devices that share one copy). On several
slices joined by a slow network 'replica' comes before them. The partitioner owns the
mesh and the rules, and compiles functions for them with `jax.jit` and `NamedSharding`.
While such a function is traced, mesh and rules are in force, so
`flax.linen.partitioning.with_sharding_constraint` in a model has its effect, on every
platform alike.
"""

import abc
import contextlib
import contextvars
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.core
import flax.traverse_util
import jax
import numpy as np
from absl import logging
from flax.linen import partitioning as flax_partitioning
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from t5x import train_state as train_state_lib

TrainState = train_state_lib.TrainState
JaxDevice = jax.Device
# (x, y, z, cores of a chip) on a TPU, (hosts, devices per host) elsewhere.
HardwareMesh = tuple[int, int, int, int] | tuple[int, int]
LogicalAxisRules = Sequence[tuple[str, str | tuple[str, ...] | None]]
PartitionedCallable = Callable[..., Any]
CompiledPartitionedCallable = Callable[..., Any]


# ---- Meshes ----

# Devices to compile for in place of this machine's own.
_planned_devices: contextvars.ContextVar[tuple[JaxDevice, ...]] = (
  contextvars.ContextVar('planned_devices', default=())
)


@contextlib.contextmanager
def meshes_of(devices: Sequence[JaxDevice]) -> Iterator[None]:
  """Makes `default_mesh` use these devices, which need not exist on this machine."""
  token = _planned_devices.set(tuple(devices))
  try:
    yield
  finally:
    _planned_devices.reset(token)


def default_mesh(
  num_partitions: int,
  model_parallel_submesh: HardwareMesh | None = None,
  backend: str | None = None,
  ici_mesh_shape: HardwareMesh | None = None,
  dcn_mesh_shape: HardwareMesh | None = None,
) -> Mesh:
  """Makes the mesh for a number of devices that share one copy of the model.

  Args:
    num_partitions: devices along 'model'. Ignored where a shape below is given. On a
      single device a larger number is reduced to 1, with a warning.
    model_parallel_submesh: the shape of one copy of the model on the device grid:
      (x, y, z, cores) of a TPU torus or (hosts, devices). Elsewhere four numbers count
      by their product, so that one configuration runs on any machine.
    backend: the platform to take devices from; JAX's default where None.
    ici_mesh_shape: (replica, data, model) within one slice.
    dcn_mesh_shape: (replica, data, model) over slices; the mesh is the product of the
      two, axis by axis.

  Returns:
    A mesh with the axes ('data', 'model'), or ('replica', 'data', 'model') for slices.

  Raises:
    ValueError: the numbers do not fit the devices.
  """
  devices = sorted(
    _planned_devices.get() or jax.devices(backend),
    # Neighbours in this order are neighbours in the mesh, where there is no torus.
    key=lambda device: (device.process_index, device.id),
  )
  axes = ('data', 'model')
  if ici_mesh_shape is not None and dcn_mesh_shape is not None:
    axes = ('replica', *axes)
    arranged = _sliced(devices, tuple(ici_mesh_shape), tuple(dcn_mesh_shape))
  elif model_parallel_submesh:
    arranged = _tiled(devices, tuple(model_parallel_submesh))
  else:
    arranged = _by_number(devices, num_partitions)
  mesh = Mesh(arranged, axes)
  logging.info(
    'Mesh of %d %s devices: %s.', mesh.size, devices[0].platform, dict(mesh.shape)
  )
  return mesh


def _by_number(devices: Sequence[JaxDevice], num_partitions: int) -> np.ndarray:
  """Returns devices [data, model], those of a copy of the model close together."""
  if len(devices) == 1 and num_partitions > 1:
    logging.warning(
      'num_partitions is %d, but there is 1 device: it holds the whole model.',
      num_partitions,
    )
    num_partitions = 1
  copies, rest = divmod(len(devices), num_partitions)
  if rest or not copies:
    raise ValueError(
      'num_partitions must divide the number of devices. Got: '
      f'{num_partitions} partitions, {len(devices)} devices.'
    )
  return mesh_utils.create_device_mesh(
    (copies, num_partitions), devices, allow_split_physical_axes=True
  )


def _device_grid(devices: Sequence[JaxDevice]) -> np.ndarray:
  """Returns devices at their places: [x, y, z, core] of a torus or [host, device]."""
  if all(len(getattr(device, 'coords', None) or ()) == 3 for device in devices):
    places = np.array([(*d.coords, d.core_on_chip) for d in devices])
    places -= places.min(axis=0)
    bounds = tuple(places.max(axis=0) + 1)
    if math.prod(bounds) == len(devices):
      grid = np.empty(bounds, dtype=object)
      grid[tuple(places.T)] = devices
      return grid
  hosts = [list(g) for _, g in itertools.groupby(devices, lambda d: d.process_index)]
  if len({len(host) for host in hosts}) > 1:
    raise ValueError(
      'Every host must have the same number of devices. Got: '
      f'{[len(host) for host in hosts]}.'
    )
  return np.array(hosts, dtype=object)


def _tiled(devices: Sequence[JaxDevice], tile: tuple[int, ...]) -> np.ndarray:
  """Returns devices [data, model]; a copy of the model is a tile of the device grid."""
  grid = _device_grid(devices)
  if grid.ndim == 2 and len(tile) == 4:
    return _by_number(devices, math.prod(tile))
  if len(tile) != grid.ndim or any(t < 1 or g % t for t, g in zip(tile, grid.shape)):
    raise ValueError(
      'model_parallel_submesh must have one number for each dimension of the device '
      f'grid, and each must divide it. Got: {tile} for the grid {grid.shape}.'
    )
  split = [part for g, t in zip(grid.shape, tile) for part in (g // t, t)]
  tiles_first = [*range(0, 2 * grid.ndim, 2), *range(1, 2 * grid.ndim, 2)]
  return grid.reshape(split).transpose(tiles_first).reshape(-1, math.prod(tile))


def _sliced(
  devices: Sequence[JaxDevice], ici: tuple[int, ...], dcn: tuple[int, ...]
) -> np.ndarray:
  """Returns devices [replica, data, model]: `dcn` between slices, `ici` within each."""
  if len(ici) != 3 or len(dcn) != 3 or math.prod(ici + dcn) != len(devices):
    raise ValueError(
      'ici_mesh_shape and dcn_mesh_shape each need three numbers (replica, data, '
      'model), whose product over both is the number of devices. Got: '
      f'ici_mesh_shape={ici}, dcn_mesh_shape={dcn}, {len(devices)} devices.'
    )
  if devices[0].platform == 'tpu':
    return mesh_utils.create_hybrid_device_mesh(ici, dcn, devices=devices)
  # Other platforms have no slices: the hosts in their order are divided equally.
  in_order = _device_grid(devices).reshape(*dcn, *ici)
  interleaved = in_order.transpose(0, 3, 1, 4, 2, 5)
  return interleaved.reshape([d * i for d, i in zip(dcn, ici)])


# ---- Logical axes ----


def standard_logical_axis_rules(
  activation_partitioning_dims: int = 1,
  parameter_partitioning_dims: int = 1,
  additional_rules: LogicalAxisRules | None = None,
) -> LogicalAxisRules:
  """Returns rules for the axis names that T5X models use.

  Batches are split along 'data'; the wide dimension of every parameter along 'model'.
  For a name with several rules, the first whose mesh axis is still free in the array
  counts.

  Args:
    activation_partitioning_dims: 2 shards 'embed' along 'model' wherever that is free.
    parameter_partitioning_dims: 2 shards 'embed' along 'data' wherever that is free, so
      that parameters and optimizer states are spread over all devices.
    additional_rules: (logical name, mesh axis or None) pairs with the lowest priority.

  Returns:
    (logical name, mesh axis or None) pairs in descending priority.

  Raises:
    ValueError: a number of dimensions is neither 1 nor 2.
  """
  for dims in (activation_partitioning_dims, parameter_partitioning_dims):
    if dims not in (1, 2):
      raise ValueError(
        'activation_partitioning_dims and parameter_partitioning_dims must be 1 or 2. '
        f'Got: {activation_partitioning_dims} and {parameter_partitioning_dims}.'
      )
  rules = [('batch', 'data')]
  rules += [(name, 'model') for name in ('vocab', 'mlp', 'heads', 'joined_kv')]
  if activation_partitioning_dims == 2:
    rules.append(('embed', 'model'))
  if parameter_partitioning_dims == 2:
    rules.append(('embed', 'data'))
  replicated = ['embed', 'kv', 'relpos_buckets', 'abspos_buckets', 'length', 'layers']
  replicated += ['stack', 'mlp_activations']
  rules += [(name, None) for name in replicated if name not in dict(rules)]
  ruled = dict(rules)
  for name, axis in additional_rules or ():
    if name in ruled and axis is None:
      logging.warning(
        'The additional rule (%r, None) has no effect: an earlier rule maps %r to %r.',
        name,
        name,
        ruled[name],
      )
    rules.append((name, axis))
  return rules


def override_params_axes_names(
  model_variables: Mapping[str, Any],
  params_axes_names_override: Sequence[tuple[str, tuple[str, ...]]] = (),
) -> flax.core.FrozenDict:
  """Replaces or adds axis names of parameters; reached as a name of `utils`.

  Args:
    model_variables: all variables of a model, with `params` and `params_axes`. Not
      changed.
    params_axes_names_override: (pattern, axis names) pairs. The first pattern that
      matches the whole '/'-joined name of a parameter counts.

  Returns:
    The variables with the new names in `params_axes`, frozen.

  Raises:
    ValueError: there is no `params_axes`, or the number of names is not the parameter's
      number of dimensions.
  """
  if 'params_axes' not in model_variables:
    raise ValueError(
      "The model's variables have no collection 'params_axes' whose names could be "
      f'overridden. They have: {", ".join(model_variables)}.'
    )
  variables = flax.core.unfreeze(model_variables)
  params = flax.traverse_util.flatten_dict(variables['params'])
  axes = flax.traverse_util.flatten_dict(variables['params_axes'])
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
    logging.warning('No parameter matches %r; its axis names have no effect.', pattern)
  variables['params_axes'] = flax.traverse_util.unflatten_dict(axes)
  return flax.core.freeze(variables)


# ---- Functions and arrays over a mesh ----


def global_mesh_defined() -> bool:
  """Returns whether a mesh is in force (in a partitioned function, or `set_mesh`)."""
  return not jax.sharding.get_abstract_mesh().empty


def with_sharding_constraint(x: PyTree, axis_resources: PyTree) -> PyTree:
  """Does `jax.lax.with_sharding_constraint` where a mesh is in force.

  Unlike T5X's, it has its effect on CPUs too.
  """
  if not global_mesh_defined():
    return x
  return jax.lax.with_sharding_constraint(x, axis_resources)


class PjittedFnWithContext:
  """A jitted function that is traced with a mesh and logical axis rules in force."""

  def __init__(
    self,
    pjitted_fn: Callable[..., Any],
    partition_mesh: Mesh,
    logical_axis_rules: LogicalAxisRules = (),
  ):
    self._jitted = pjitted_fn
    self._mesh = partition_mesh
    self._rules = tuple(logical_axis_rules)

  @contextlib.contextmanager
  def _in_force(self) -> Iterator[None]:
    try:
      mesh_context = jax.set_mesh(self._mesh)
    except ValueError:
      # Refused while another function is traced, where the abstract mesh is enough.
      mesh_context = jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh)
    with mesh_context, flax_partitioning.axis_rules(self._rules):
      yield

  def __call__(self, *args, **kwargs):
    with self._in_force():
      return self._jitted(*args, **kwargs)

  def lower(self, *args, **kwargs) -> jax.stages.Lowered:
    """Does `jax.jit(...).lower` in the same context."""
    with self._in_force():
      return self._jitted.lower(*args, **kwargs)

  def trace(self, *args, **kwargs) -> jax.stages.Traced:
    """Does `jax.jit(...).trace` in the same context."""
    with self._in_force():
      return self._jitted.trace(*args, **kwargs)


def is_spec(x: Any) -> bool:
  """Returns True for a leaf in a tree of axis resources."""
  return x is None or isinstance(x, PartitionSpec | jax.sharding.Sharding)


def shardings_on(mesh: Mesh, resources: PyTree) -> PyTree:
  """Converts PartitionSpecs (None: replicated) to shardings on `mesh`."""

  def convert(spec):
    if isinstance(spec, jax.sharding.Sharding):
      return spec
    return NamedSharding(mesh, PartitionSpec() if spec is None else spec)

  return jax.tree.map(convert, resources, is_leaf=is_spec)


def map_prefix(fn: Callable[[Any, Any], Any], prefix: PyTree, tree: PyTree) -> PyTree:
  """Maps fn(spec, leaf) over `tree`; a spec may stand for a subtree."""
  return jax.tree.map(
    lambda spec, below: jax.tree.map(functools.partial(fn, spec), below),
    prefix,
    tree,
    is_leaf=is_spec,
  )


def host_local_array_to_global_array(
  arr_tree: PyTree, mesh: Mesh, pspecs: PyTree
) -> PyTree:
  """Joins the parts of all hosts into arrays over all hosts.

  Args:
    arr_tree: this host's parts, as NumPy arrays or arrays on local devices. Arrays that
      already span hosts are returned as they are.
    mesh: the mesh of all hosts.
    pspecs: a PartitionSpec (None: replicated) for each array, or for whole subtrees.
      Along dimensions that are not split between hosts, each host gives the whole.

  Returns:
    Global arrays in the structure of `arr_tree`.
  """

  def join(sharding, array):
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
      return array
    return jax.make_array_from_process_local_data(sharding, np.asarray(array))

  return map_prefix(join, shardings_on(mesh, pspecs), arr_tree)


# ---- Partitioners ----


@dataclasses.dataclass
class DataLayout:
  """The division of a global batch among hosts.

  Attributes:
    batch_size: examples in the global batch.
    shard_id: the part of the data that this host reads.
    num_shards: the number of parts.
    is_first_host_in_replica_set: whether this host is the first of those that read the
      same part: the one to write results.
  """

  batch_size: int
  shard_id: int
  num_shards: int
  is_first_host_in_replica_set: bool


class BasePartitioner(metaclass=abc.ABCMeta):
  """The interface of a partitioner."""

  def __init__(
    self,
    num_partitions: int | None = None,
    model_parallel_submesh: HardwareMesh | None = None,
    params_on_devices: bool = True,
    backend: str | None = None,
    ici_mesh_shape: HardwareMesh | None = None,
    dcn_mesh_shape: HardwareMesh | None = None,
  ):
    """Takes the size of one copy of the model in one of three ways.

    Args:
      num_partitions: the number of devices that share one copy of the model.
      model_parallel_submesh: the same as a tile of the hardware, see `default_mesh`.
        Then `num_partitions` is None, 1 (the run files' default) or the tile's size.
      params_on_devices: has no effect: restored parameters go to the devices at once.
      backend: the platform to take devices from; JAX's default where None.
      ici_mesh_shape: (replica, data, model) within a slice; with `dcn_mesh_shape`.
      dcn_mesh_shape: (replica, data, model) over slices; with `ici_mesh_shape`.

    Raises:
      ValueError: none of the three is given, or two contradict each other.
    """
    sliced = ici_mesh_shape is not None and dcn_mesh_shape is not None
    size = num_partitions
    if sliced:
      size = ici_mesh_shape[-1] * dcn_mesh_shape[-1]
    elif model_parallel_submesh:
      size = math.prod(model_parallel_submesh)
    if (
      not size
      or num_partitions not in (None, 0, 1, size)
      or (sliced and model_parallel_submesh)
      or (ici_mesh_shape is None) != (dcn_mesh_shape is None)
    ):
      raise ValueError(
        'Give the number of devices that share one copy of the model in one way: '
        'num_partitions (1 for pure data parallelism), model_parallel_submesh, or '
        'ici_mesh_shape together with dcn_mesh_shape. Got: '
        f'num_partitions={num_partitions}, '
        f'model_parallel_submesh={model_parallel_submesh}, '
        f'ici_mesh_shape={ici_mesh_shape}, dcn_mesh_shape={dcn_mesh_shape}.'
      )
    self._num_partitions = size
    self._model_parallel_submesh = model_parallel_submesh
    self.params_on_devices = params_on_devices
    self._backend = backend
    self._ici_mesh_shape = ici_mesh_shape
    self._dcn_mesh_shape = dcn_mesh_shape
    self._data_axes = ('replica', 'data') if sliced else ('data',)

  @property
  @abc.abstractmethod
  def mesh(self) -> Mesh:
    """The mesh of all devices."""

  @property
  def data_partition_spec(self) -> PartitionSpec:
    """The sharding of a batch's first dimension."""
    axes = self._data_axes
    return PartitionSpec(axes if len(axes) > 1 else axes[0] if axes else None)

  @property
  def data_mesh_size(self) -> int:
    """The number of parts a batch is split into, over all devices."""
    return math.prod(self.mesh.shape[axis] for axis in self._data_axes)

  @functools.cached_property
  def _parts_of_hosts(self) -> dict[int, tuple[int, ...]]:
    """The parts of a batch that each host's devices hold."""
    mesh, axes = self.mesh, self._data_axes
    data_first = np.moveaxis(
      mesh.devices, [mesh.axis_names.index(axis) for axis in axes], range(len(axes))
    )
    parts = {}
    for part, devices in enumerate(data_first.reshape(self.data_mesh_size, -1)):
      for host in sorted({device.process_index for device in devices}):
        parts.setdefault(host, []).append(part)
    parts = {host: tuple(own) for host, own in parts.items()}
    distinct = set(parts.values())
    equal = len(set(map(len, distinct))) == 1
    if not equal or sum(map(len, distinct)) != self.data_mesh_size:
      raise ValueError(
        'Hosts must read equal, disjoint parts of a batch, or the same. Got the mesh '
        f'{dict(mesh.shape)}, where they do not: choose another num_partitions or '
        'model_parallel_submesh.'
      )
    return parts

  @property
  def data_shards(self) -> int:
    """The number of parts a batch is split into between hosts."""
    return len(set(self._parts_of_hosts.values()))

  @property
  def data_shard_id(self) -> int:
    """The index of this host's part, of `data_shards`."""
    return self.get_data_layout().shard_id

  def get_data_layout(
    self, batch_size: int | None = None, host_index: int | None = None
  ) -> DataLayout:
    """Returns the part of each batch that a host feeds.

    Args:
      batch_size: examples in the global batch; one per data partition by default.
      host_index: the host (process); this one by default.

    Raises:
      ValueError: the batch does not divide among the data partitions.
    """
    size = self.data_mesh_size
    batch_size = size if batch_size is None else batch_size
    if batch_size < 1 or batch_size % size:
      raise ValueError(
        'The batch size must be a positive multiple of the number of data '
        f'partitions. Got: a batch of {batch_size} over {size} data partitions '
        f'(mesh {dict(self.mesh.shape)}).'
      )
    parts = self._parts_of_hosts
    host = jax.process_index() if host_index is None else host_index
    return DataLayout(
      batch_size=int(batch_size),
      shard_id=sorted(set(parts.values())).index(parts[host]),
      num_shards=self.data_shards,
      is_first_host_in_replica_set=host
      == min(other for other, own in parts.items() if own == parts[host]),
    )

  def move_params_to_devices(
    self, train_state: TrainState, train_state_axes: TrainState
  ) -> TrainState:
    """Puts a state on the devices, sharded.

    Args:
      train_state: a state of NumPy arrays (on several hosts: each its own part) or of
        arrays that are on devices already.
      train_state_axes: its mesh axes, from `get_mesh_axes`.
    """
    if jax.process_count() > 1:
      return host_local_array_to_global_array(train_state, self.mesh, train_state_axes)
    shardings = shardings_on(self.mesh, train_state_axes)
    return map_prefix(lambda s, x: jax.device_put(x, s), shardings, train_state)

  def get_logical_axes(self, train_state: TrainState) -> TrainState:
    """Returns a state whose leaves are the names of axes, or None: unnamed."""
    unnamed = jax.tree.map(lambda _: None, train_state.state_dict())
    return train_state.restore_state(unnamed)

  def get_mesh_axes(self, train_state: TrainState) -> TrainState:
    """Returns a state whose leaves are PartitionSpecs, or None: replicated."""
    raise NotImplementedError(f'{type(self).__name__} does not map axes to a mesh.')

  @abc.abstractmethod
  def partition(
    self,
    fn: Callable[..., Any],
    in_axis_resources: PyTree,
    out_axis_resources: PyTree,
    static_argnums: int | Sequence[int] = (),
    donate_argnums: int | Sequence[int] = (),
  ) -> PartitionedCallable:
    """Makes `fn` run over the mesh.

    Args:
      fn: a function of positional arguments.
      in_axis_resources: a tuple with a tree for each argument that is not static, whose
        leaves are PartitionSpecs or None (replicated). A leaf may stand for a subtree.
      out_axis_resources: the same for the results.
      static_argnums: positions of arguments that are compiled in.
      donate_argnums: positions of arguments whose memory the function may reuse; they
        are deleted by the call.
    """

  @abc.abstractmethod
  def compile(
    self, partitioned_fn: PartitionedCallable, *args
  ) -> CompiledPartitionedCallable:
    """Compiles a partitioned function for arguments of these shapes and types."""


class BasePjitPartitioner(BasePartitioner):
  """A partitioner over `jax.jit`, without logical axis names."""

  _logical_axis_rules: LogicalAxisRules = ()

  @functools.cached_property
  def mesh(self) -> Mesh:
    """The mesh of the constructor's numbers, made on first use."""
    return default_mesh(
      self._num_partitions,
      self._model_parallel_submesh,
      self._backend,
      self._ici_mesh_shape,
      self._dcn_mesh_shape,
    )

  def partition(
    self,
    fn: Callable[..., Any],
    in_axis_resources: PyTree,
    out_axis_resources: PyTree,
    static_argnums: int | Sequence[int] = (),
    donate_argnums: int | Sequence[int] = (),
  ) -> PjittedFnWithContext:
    """See `BasePartitioner.partition`."""
    jitted = jax.jit(
      fn,
      in_shardings=shardings_on(self.mesh, in_axis_resources),
      out_shardings=shardings_on(self.mesh, out_axis_resources),
      static_argnums=static_argnums,
      donate_argnums=donate_argnums,
    )
    return PjittedFnWithContext(jitted, self.mesh, self._logical_axis_rules)

  def compile(
    self, partitioned_fn: PjittedFnWithContext, *args
  ) -> CompiledPartitionedCallable:
    """See `BasePartitioner.compile`."""
    return partitioned_fn.lower(*args).compile()


class PjitPartitioner(BasePjitPartitioner):
  """The partitioner of T5X models: logical axis names, mapped to a mesh by rules."""

  def __init__(
    self,
    num_partitions: int | None = None,
    model_parallel_submesh: HardwareMesh | None = None,
    params_on_devices: bool = True,
    backend: str | None = None,
    ici_mesh_shape: HardwareMesh | None = None,
    dcn_mesh_shape: HardwareMesh | None = None,
    logical_axis_rules: LogicalAxisRules | None = None,
  ):
    """See `BasePartitioner` for all but the last.

    `logical_axis_rules` are (logical name, mesh axis, axes or None) pairs in descending
    priority; `standard_logical_axis_rules()` by default. With slices, 'batch' is split
    along ('replica', 'data') whatever its rule says.
    """
    super().__init__(
      num_partitions=num_partitions,
      model_parallel_submesh=model_parallel_submesh,
      params_on_devices=params_on_devices,
      backend=backend,
      ici_mesh_shape=ici_mesh_shape,
      dcn_mesh_shape=dcn_mesh_shape,
    )
    rules = logical_axis_rules
    rules = standard_logical_axis_rules() if rules is None else rules
    sliced = ici_mesh_shape is not None
    self._logical_axis_rules = tuple(
      (name, ('replica', 'data') if sliced and name == 'batch' else axes)
      for name, axes in rules
    )
    (batch,) = flax_partitioning.logical_to_mesh_axes(
      ('batch',), self._logical_axis_rules
    )
    self._data_axes = (batch,) if isinstance(batch, str) else tuple(batch or ())

  @property
  def logical_axis_rules(self) -> LogicalAxisRules:
    """The rules, in descending priority."""
    return self._logical_axis_rules

  def get_logical_axes(self, train_state: TrainState) -> TrainState:
    """Returns a state whose leaves are PartitionSpecs of axis names, or None."""
    return train_state.as_logical_axes()

  def get_mesh_axes(self, train_state: TrainState) -> TrainState:
    """Applies the rules to a state's logical axes.

    Args:
      train_state: a state of arrays or of their shapes.

    Returns:
      A state whose leaves are PartitionSpecs of mesh axes, or None: replicated.

    Raises:
      ValueError: names that the rules cannot map, or a dimension that does not divide
        by the devices along its mesh axis.
    """
    rules = self._logical_axis_rules
    known = self.mesh.axis_names
    for name, axes in rules:
      for axis in (axes,) if isinstance(axes, str) else axes or ():
        if axis not in known:
          raise ValueError(
            f'Logical axis rules map to the mesh axes {known}. Got: ({name!r}, '
            f'{axes!r}).'
          )
    logical = self.get_logical_axes(train_state)
    names = {n for spec in jax.tree.leaves(logical) for n in spec if n is not None}
    if unruled := sorted(names - {name for name, _ in rules}):
      logging.warning('No logical axis rule for %s: replicated.', ', '.join(unruled))

    def to_mesh(path, names, array):
      if names is None:
        return None
      where = jax.tree_util.keystr(path, simple=True, separator='/')
      try:
        spec = flax_partitioning.logical_to_mesh_axes(tuple(names), rules)
      except ValueError as e:
        raise ValueError(
          f'The axes {tuple(names)} of {where} cannot be mapped: {e}'
        ) from e
      for size, axes in zip(array.shape, spec):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(self.mesh.shape[axis] for axis in axes)
        if size % parts:
          raise ValueError(
            'A sharded dimension must divide by the devices along its mesh axis. Got: '
            f'{size} of {where} {array.shape} over {parts} devices ({spec}). Pad it, '
            'change num_partitions, or give a rule that leaves it whole.'
          )
      return spec

    return jax.tree_util.tree_map_with_path(
      to_mesh, logical, train_state, is_leaf=is_spec
    )
