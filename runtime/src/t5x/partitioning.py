"""Partitions arrays and computations over devices.

A model names the axes of its parameters and activations ('embed', 'mlp', 'heads' ...);
*logical axis rules* map those names to the axes of a mesh: 'data' (model replicas with
different examples) and 'model' (the devices that share one replica), preceded by
'replica' where several slices are joined by a slow network. The partitioner owns the
mesh and the rules, and compiles functions with `jax.jit` and `NamedSharding`. Mesh and
rules are in context while such a function is traced, so that
`flax.linen.partitioning.with_sharding_constraint` works in a model on every platform.
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
  """Makes `default_mesh` use these devices, which may be absent from this machine."""
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
  """Makes a mesh with the axes 'data' and 'model', for slices preceded by 'replica'.

  Args:
    num_partitions: devices along 'model', ignored if a shape below is given. On a
      single device a larger number is reduced to 1, with a warning.
    model_parallel_submesh: the shape of one model replica on the device grid:
      (x, y, z, cores) of a TPU torus or (hosts, devices). On other platforms only the
      product of four numbers counts, so that a configuration runs on any machine.
    backend: the platform of the devices; by default JAX's.
    ici_mesh_shape: (replica, data, model) within one slice.
    dcn_mesh_shape: (replica, data, model) over slices; the mesh is the product of the
      two, axis by axis.

  Raises:
    ValueError: the numbers do not fit the devices.
  """
  devices = sorted(
    _planned_devices.get() or jax.devices(backend),
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
  """Arranges devices [data, model], with those of one model replica close together."""
  if len(devices) == 1 and num_partitions > 1:
    logging.warning(
      'num_partitions is %d, but there is only 1 device: using 1.',
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
  """Arranges devices by location: [x, y, z, core] of a torus or [host, device]."""
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
  """Arranges devices [data, model]; a model replica is a tile of the device grid."""
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
  """Arranges devices [replica, data, model]: `dcn` between slices, `ici` within."""
  if len(ici) != 3 or len(dcn) != 3 or math.prod(ici + dcn) != len(devices):
    raise ValueError(
      'ici_mesh_shape and dcn_mesh_shape must each have three numbers (replica, data, '
      'model), whose total product is the number of devices. Got: '
      f'ici_mesh_shape={ici}, dcn_mesh_shape={dcn}, {len(devices)} devices.'
    )
  if devices[0].platform == 'tpu':
    return mesh_utils.create_hybrid_device_mesh(ici, dcn, devices=devices)
  # Other platforms have no slices: divide the hosts equally, in order.
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

  Batches are split along 'data', the wide dimension of every parameter along 'model'.
  Of several rules for a name, the first whose mesh axis is still free in the array
  counts.

  Args:
    activation_partitioning_dims: 2 shards 'embed' along 'model' where that is free.
    parameter_partitioning_dims: 2 shards 'embed' along 'data' where that is free, which
      spreads parameters and optimizer states over all devices.
    additional_rules: rules with the lowest priority.

  Returns:
    (logical name, mesh axis or None) pairs in descending priority.
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
        'The additional rule (%r, None) has no effect: a previous rule maps %r to %r.',
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
  """Replaces or adds axis names of parameters; public as a name of `utils`.

  Args:
    model_variables: all variables of a model, with `params` and `params_axes`.
    params_axes_names_override: (pattern, axis names) pairs. The first pattern that
      matches a parameter's whole '/'-joined path counts.

  Returns:
    The variables with the new names in `params_axes`, frozen.

  Raises:
    ValueError: `params_axes` is missing, or a parameter needs more or fewer names.
  """
  if 'params_axes' not in model_variables:
    raise ValueError(
      "Overriding axis names needs the collection 'params_axes'. The model has only: "
      f'{", ".join(model_variables)}.'
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
        f'Parameter {name} needs {param.ndim} axis names, one per dimension. '
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
  """Returns whether a mesh is in context (a partitioned function or `set_mesh`)."""
  return not jax.sharding.get_abstract_mesh().empty


def with_sharding_constraint(x: PyTree, axis_resources: PyTree) -> PyTree:
  """Applies `jax.lax.with_sharding_constraint` if a mesh is in context."""
  if not global_mesh_defined():
    return x
  return jax.lax.with_sharding_constraint(x, axis_resources)


class PjittedFnWithContext:
  """A jitted function that is traced with a mesh and logical axis rules in context."""

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
  def _context(self) -> Iterator[None]:
    try:
      mesh_context = jax.set_mesh(self._mesh)
    except ValueError:
      # Raised while another function is traced, where the abstract mesh is enough.
      mesh_context = jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh)
    with mesh_context, flax_partitioning.axis_rules(self._rules):
      yield

  def __call__(self, *args, **kwargs):
    with self._context():
      return self._jitted(*args, **kwargs)

  def lower(self, *args, **kwargs) -> jax.stages.Lowered:
    """Lowers the function, as `jax.jit(...).lower`."""
    with self._context():
      return self._jitted.lower(*args, **kwargs)

  def trace(self, *args, **kwargs) -> jax.stages.Traced:
    """Traces the function, as `jax.jit(...).trace`."""
    with self._context():
      return self._jitted.trace(*args, **kwargs)


def is_spec(x: Any) -> bool:
  """Returns whether `x` is a leaf in a tree of axis resources."""
  return x is None or isinstance(x, PartitionSpec | jax.sharding.Sharding)


def shardings_on(mesh: Mesh, resources: PyTree) -> PyTree:
  """Converts PartitionSpecs (None: replicated) to shardings on `mesh`."""

  def convert(spec):
    if isinstance(spec, jax.sharding.Sharding):
      return spec
    return NamedSharding(mesh, PartitionSpec() if spec is None else spec)

  return jax.tree.map(convert, resources, is_leaf=is_spec)


def map_prefix(fn: Callable[[Any, Any], Any], prefix: PyTree, tree: PyTree) -> PyTree:
  """Maps fn(spec, leaf) over `tree`; a spec applies to its whole subtree."""
  return jax.tree.map(
    lambda spec, below: jax.tree.map(functools.partial(fn, spec), below),
    prefix,
    tree,
    is_leaf=is_spec,
  )


def host_local_array_to_global_array(
  arr_tree: PyTree, mesh: Mesh, pspecs: PyTree
) -> PyTree:
  """Joins host-local arrays into global arrays.

  Args:
    arr_tree: this host's parts; dimensions that are not split between hosts are whole.
      Arrays that already span hosts are returned unchanged.
    mesh: the mesh of all hosts.
    pspecs: PartitionSpecs (None: replicated) of arrays or of whole subtrees.
  """

  def join(sharding, array):
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
      return array
    return jax.make_array_from_process_local_data(sharding, np.asarray(array))

  return map_prefix(join, shardings_on(mesh, pspecs), arr_tree)


# ---- Partitioners ----


@dataclasses.dataclass
class DataLayout:
  """The division of a global batch among hosts."""

  batch_size: int  # Of the global batch.
  shard_id: int  # The shard that this host reads.
  num_shards: int
  # Whether this host writes the results of its shard, which others may also read.
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
    """Takes the size of one model replica in one of three ways.

    Args:
      num_partitions: the number of devices that share one model replica.
      model_parallel_submesh: the same as a tile of the hardware, see `default_mesh`.
        Then `num_partitions` is None, 1 (the run files' default) or the tile's size.
      params_on_devices: has no effect: parameters are always on devices.
      backend: the platform of the devices; by default JAX's.
      ici_mesh_shape: with `dcn_mesh_shape`, see `default_mesh`.
      dcn_mesh_shape: with `ici_mesh_shape`, see `default_mesh`.

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
        'Set the number of devices that share one model replica in one way: '
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
    """The number of parts into which a batch is split over all devices."""
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
        'Any two hosts must read the same or disjoint parts of a batch, of equal size. '
        f'The mesh {dict(mesh.shape)} does not allow that: choose another '
        'num_partitions or model_parallel_submesh.'
      )
    return parts

  @property
  def data_shards(self) -> int:
    """The number of parts into which a batch is split between hosts."""
    return len(set(self._parts_of_hosts.values()))

  @property
  def data_shard_id(self) -> int:
    """The index of this host's part."""
    return self.get_data_layout().shard_id

  def get_data_layout(
    self, batch_size: int | None = None, host_index: int | None = None
  ) -> DataLayout:
    """Returns the part of each batch that a host feeds.

    Args:
      batch_size: size of the global batch; one example per data partition by default.
      host_index: the process; this one by default.

    Raises:
      ValueError: the batch size is not a multiple of the number of data partitions.
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
    """Shards a state over the devices.

    Args:
      train_state: a state of NumPy arrays (on several hosts: each host's own part) or
        of arrays on devices.
      train_state_axes: its mesh axes, from `get_mesh_axes`.
    """
    if jax.process_count() > 1:
      return host_local_array_to_global_array(train_state, self.mesh, train_state_axes)
    shardings = shardings_on(self.mesh, train_state_axes)
    return map_prefix(lambda s, x: jax.device_put(x, s), shardings, train_state)

  def get_logical_axes(self, train_state: TrainState) -> TrainState:
    """Returns a state whose leaves are PartitionSpecs of axis names, or None."""
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
      in_axis_resources: a tuple with a tree of PartitionSpecs or None (replicated) for
        each argument that is not static. A leaf applies to its whole subtree.
      out_axis_resources: the same for the results.
      static_argnums: indices of arguments that are compiled in.
      donate_argnums: indices of arguments that the call may overwrite.
    """

  @abc.abstractmethod
  def compile(
    self, partitioned_fn: PartitionedCallable, *args
  ) -> CompiledPartitionedCallable:
    """Compiles a partitioned function for the shapes and types of these arguments."""


class BasePjitPartitioner(BasePartitioner):
  """A partitioner over `jax.jit`, without logical axis names."""

  _logical_axis_rules: LogicalAxisRules = ()

  @functools.cached_property
  def mesh(self) -> Mesh:
    """The mesh of all devices, made on first use."""
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
    return partitioned_fn.lower(*args).compile()


class PjitPartitioner(BasePjitPartitioner):
  """The partitioner of T5X models, which maps logical axis names to a mesh by rules."""

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
    """See `BasePartitioner`.

    `logical_axis_rules` are (logical name, mesh axis, axes or None) pairs in descending
    priority; by default `standard_logical_axis_rules()`. With slices, 'batch' is always
    split along ('replica', 'data').
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
    """The rules in descending priority."""
    return self._logical_axis_rules

  def get_logical_axes(self, train_state: TrainState) -> TrainState:
    return train_state.as_logical_axes()

  def get_mesh_axes(self, train_state: TrainState) -> TrainState:
    """Applies the rules to a state of arrays or shapes.

    Returns:
      A state whose leaves are PartitionSpecs of mesh axes, or None: replicated.

    Raises:
      ValueError: the rules cannot map the names, or a dimension is not divisible by the
        number of devices along its mesh axis.
    """
    rules = self._logical_axis_rules
    known = self.mesh.axis_names
    for name, axes in rules:
      for axis in (axes,) if isinstance(axes, str) else axes or ():
        if axis not in known:
          raise ValueError(
            f'Logical axis rules must map to the mesh axes {known}. Got: ({name!r}, '
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
            'A sharded dimension must be divisible by the number of devices along its '
            f'mesh axis. Got: {size} of {where} {array.shape} over {parts} devices '
            f'({spec}). Pad it, or change num_partitions or the logical axis rules.'
          )
      return spec

    return jax.tree_util.tree_map_with_path(
      to_mesh, logical, train_state, is_leaf=is_spec
    )
