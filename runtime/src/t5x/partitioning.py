"""How arrays and computations are spread over devices.

A model names the axes of its parameters and activations ('embed', 'mlp', 'heads' …);
*logical axis rules* map those names to the axes of a mesh ('data', 'model'). The
partitioner owns the mesh and the rules, and compiles functions for them with `jax.jit`
and `NamedSharding`. While such a function is traced, mesh and rules are in force, so
`flax.linen.partitioning.with_sharding_constraint` in a model acts, on every platform
alike.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import logging
from flax.linen import partitioning as flax_partitioning
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PyTree

from t5x import mesh as mesh_lib
from t5x import train_state as train_state_lib
from t5x.mesh import (
  HardwareMesh,
  JaxDevice,
  LocalChunker,
  LocalChunkInfo,
  OtherMesh,
  TpuMesh,
  bounds_from_last_device,
  default_mesh,
  get_coords,
  get_cpu_mesh,
  get_gpu_mesh,
  get_mesh,
)
from t5x.sharding import (
  AxisNames,
  LogicalAxisRules,
  PjittedFnWithContext,
  global_mesh_defined,
  host_local_array_to_global_array,
  is_spec,
  map_prefix,
  readable_path,
  shardings_on,
  standard_logical_axis_rules,
  with_sharding_constraint,
)

__all__ = [
  'AxisNames',
  'BasePartitioner',
  'BasePjitPartitioner',
  'CompiledPartitionedCallable',
  'DataLayout',
  'HardwareMesh',
  'JaxDevice',
  'LocalChunkInfo',
  'LocalChunker',
  'LogicalAxisRules',
  'Mesh',
  'OtherMesh',
  'PartitionSpec',
  'PartitionedCallable',
  'PjitPartitioner',
  'PjittedFnWithContext',
  'TpuMesh',
  'TrainState',
  'bounds_from_last_device',
  'default_mesh',
  'get_coords',
  'get_cpu_mesh',
  'get_gpu_mesh',
  'get_mesh',
  'global_mesh_defined',
  'host_local_array_to_global_array',
  'standard_logical_axis_rules',
  'with_sharding_constraint',
]

TrainState = train_state_lib.TrainState
PartitionedCallable = Callable[..., Any]
CompiledPartitionedCallable = Callable[..., Any]


@dataclasses.dataclass
class DataLayout:
  """How a global batch is shared out among hosts.

  Attributes:
    batch_size: examples in the global batch.
    shard_id: which part of the data this host reads.
    num_shards: how many parts there are.
    is_first_host_in_replica_set: whether this host is the first of those that read the
      same part: the one to write results.
  """

  batch_size: int
  shard_id: int
  num_shards: int
  is_first_host_in_replica_set: bool


def _model_size(
  num_partitions: int | None,
  model_parallel_submesh: HardwareMesh | None,
  shapes: tuple[HardwareMesh | None, HardwareMesh | None],
) -> int:
  """The devices along 'model'; ValueError unless just one argument names them."""
  ici_mesh_shape, dcn_mesh_shape = shapes
  if (ici_mesh_shape is None) != (dcn_mesh_shape is None):
    raise ValueError(
      'ici_mesh_shape and dcn_mesh_shape go together: give both or neither. Got: '
      f'ici_mesh_shape={ici_mesh_shape}, dcn_mesh_shape={dcn_mesh_shape}.'
    )
  sliced = ici_mesh_shape is not None
  if not (num_partitions or model_parallel_submesh or sliced):
    raise ValueError(
      'Say how many devices share one copy of the model: num_partitions=1 for pure '
      f'data parallelism. Got: num_partitions={num_partitions}, '
      f'model_parallel_submesh={model_parallel_submesh}.'
    )
  if sliced and model_parallel_submesh:
    raise ValueError(
      'model_parallel_submesh excludes ici_mesh_shape and dcn_mesh_shape. '
      f'Got: {model_parallel_submesh} and {shapes}.'
    )
  size = num_partitions
  if sliced:
    size = math.prod(shape[-1] for shape in shapes)
  elif model_parallel_submesh:
    size = math.prod(model_parallel_submesh)
  if num_partitions not in (None, 0, 1, size):
    raise ValueError(
      'num_partitions contradicts the mesh shape, which puts '
      f'{size} devices along "model". Got: num_partitions={num_partitions}; leave '
      'it out.'
    )
  return size


class BasePartitioner(metaclass=abc.ABCMeta):
  """What the runtime asks of a partitioner."""

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
      model_parallel_submesh: the same as a tile of the hardware: (x, y, z, cores) on a
        TPU, (hosts, devices) elsewhere. Then `num_partitions` is None, 1 (what the run
        files say if nobody says more) or the size of the tile.
      params_on_devices: kept for its callers: restored parameters go to the devices at
        once, whatever it says.
      backend: the platform to take devices from; JAX's default where None.
      ici_mesh_shape: (replica, data, model) within a slice; with `dcn_mesh_shape`.
      dcn_mesh_shape: (replica, data, model) over slices; with `ici_mesh_shape`.

    Raises:
      ValueError: none of the three is given, only one of the two shapes is, or two of
        them contradict each other.
    """
    shapes = (ici_mesh_shape, dcn_mesh_shape)
    sliced = ici_mesh_shape is not None
    self._num_partitions = _model_size(num_partitions, model_parallel_submesh, shapes)
    self._model_parallel_submesh = model_parallel_submesh
    self._params_on_devices = params_on_devices
    self._backend = backend
    self._ici_mesh_shape, self._dcn_mesh_shape = shapes
    self._data_axes = ('replica', 'data') if sliced else ('data',)

  @property
  def use_shardy_partitioner(self) -> bool:
    """Whether JAX compiles with the Shardy partitioner (its default)."""
    return bool(jax.config.jax_use_shardy_partitioner)

  @property
  @abc.abstractmethod
  def mesh(self) -> Mesh:
    """The mesh of all devices."""

  @functools.cached_property
  def _chunker(self) -> LocalChunker:
    return LocalChunker(self.mesh)

  @property
  def data_partition_spec(self) -> PartitionSpec:
    """How the first dimension of a batch is split."""
    axes = self._data_axes
    return PartitionSpec(axes if len(axes) > 1 else axes[0] if axes else None)

  @property
  def data_mesh_size(self) -> int:
    """The number of parts a batch is split into, over all devices."""
    return math.prod(self.mesh.shape[axis] for axis in self._data_axes)

  @property
  def data_shards(self) -> int:
    """The number of parts a batch is split into between hosts."""
    return math.prod(self._chunker.num_chunks[axis] for axis in self._data_axes)

  @property
  def data_shard_id(self) -> int:
    """Which of the `data_shards` parts this host feeds."""
    return self._chunker.get_shard_id(self._data_axes)

  def get_data_layout(
    self, batch_size: int | None = None, host_index: int | None = None
  ) -> DataLayout:
    """Says what part of each batch a host feeds.

    Args:
      batch_size: examples in the global batch; one a data partition by default.
      host_index: the host (process) asked about; this one by default.

    Raises:
      ValueError: the batch does not divide among the data partitions.
    """
    parts = self.data_mesh_size
    batch_size = parts if batch_size is None else batch_size
    if batch_size < 1 or batch_size % parts:
      raise ValueError(
        'The batch size must be a positive multiple of the number of data '
        f'partitions. Got: a batch of {batch_size} over {parts} data partitions '
        f'(mesh {dict(self.mesh.shape)}).'
      )
    chunker = self._chunker
    if host_index is not None:
      chunker = LocalChunker(self.mesh, host_index)
    return DataLayout(
      batch_size=int(batch_size),
      shard_id=chunker.get_shard_id(self._data_axes),
      num_shards=self.data_shards,
      is_first_host_in_replica_set=chunker.get_replica_id(self._data_axes) == 0,
    )

  def get_local_chunk_info(
    self, global_shape: tuple[int, ...], mesh_axes: Sequence[str | None]
  ) -> LocalChunkInfo:
    """This host's part of an array that is split over the given mesh axes."""
    return self._chunker.get_local_chunk_info(global_shape, mesh_axes)

  @property
  def params_on_devices(self) -> bool:
    """What the constructor was told; nothing here looks at it."""
    return self._params_on_devices

  @params_on_devices.setter
  def params_on_devices(self, value: bool):
    self._params_on_devices = value

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
    """A state whose leaves are the names of axes, or None: unnamed."""
    unnamed = jax.tree.map(lambda _: None, train_state.state_dict())
    return train_state.restore_state(unnamed)

  def get_mesh_axes(self, train_state: TrainState) -> TrainState:
    """A state whose leaves are PartitionSpecs, or None: replicated."""
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
      out_axis_resources: the same for what is returned.
      static_argnums: positions of arguments that are compiled in.
      donate_argnums: positions of arguments whose memory the function may reuse; they
        are gone after the call.
    """

  @abc.abstractmethod
  def compile(
    self, partitioned_fn: PartitionedCallable, *args
  ) -> CompiledPartitionedCallable:
    """Compiles a partitioned function for arguments of these shapes and types."""


class BasePjitPartitioner(BasePartitioner):
  """A partitioner over `jax.jit`, without logical axis names."""

  @functools.cached_property
  def mesh(self) -> Mesh:
    """The mesh that the constructor's numbers name, made when first asked for."""
    return mesh_lib.default_mesh(
      self._num_partitions,
      self._model_parallel_submesh,
      self._backend,
      self._ici_mesh_shape,
      self._dcn_mesh_shape,
    )

  @property
  def _rules_in_force(self) -> LogicalAxisRules:
    return ()

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
    return PjittedFnWithContext(jitted, self.mesh, self._rules_in_force)

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

    Args:
      num_partitions: the number of devices that share one copy of the model.
      model_parallel_submesh: the same as a tile of the hardware.
      params_on_devices: kept for its callers.
      backend: the platform to take devices from.
      ici_mesh_shape: (replica, data, model) within a slice.
      dcn_mesh_shape: (replica, data, model) over slices.
      logical_axis_rules: (logical name, mesh axis, axes or None) pairs by falling
        priority; `standard_logical_axis_rules()` by default. With slices, 'batch' lies
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
    given = logical_axis_rules
    rules = standard_logical_axis_rules() if given is None else given
    rules = tuple((name, axis) for name, axis in rules)
    if ici_mesh_shape is not None:
      batch_axes = ('replica', 'data')
      rules = tuple((n, batch_axes if n == 'batch' else axis) for n, axis in rules)
    self._logical_axis_rules = rules
    (batch,) = flax_partitioning.logical_to_mesh_axes(('batch',), rules)
    self._data_axes = (batch,) if isinstance(batch, str) else tuple(batch or ())

  @property
  def logical_axis_rules(self) -> LogicalAxisRules:
    """The rules, by falling priority."""
    return self._logical_axis_rules

  @property
  def _rules_in_force(self) -> LogicalAxisRules:
    known = self.mesh.axis_names
    for name, axes in self._logical_axis_rules:
      for axis in (axes,) if isinstance(axes, str) else axes or ():
        if axis not in known:
          raise ValueError(
            f'A logical axis rule names a mesh axis that is none of {known}. Got: '
            f'({name!r}, {axes!r}).'
          )
    return self._logical_axis_rules

  def get_logical_axes(self, train_state: TrainState) -> TrainState:
    """A state whose leaves are PartitionSpecs of axis names, or None."""
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
    rules = self._rules_in_force
    logical = self.get_logical_axes(train_state)
    names = {n for spec in jax.tree.leaves(logical) for n in spec if n is not None}
    if unruled := sorted(names - {name for name, _ in rules}):
      logging.warning('No logical axis rule for %s: replicated.', ', '.join(unruled))

    def to_mesh(path, names):
      if names is None:
        return None
      try:
        return flax_partitioning.logical_to_mesh_axes(tuple(names), rules)
      except ValueError as e:
        raise ValueError(
          f'The axes {tuple(names)} of {readable_path(path)} cannot be mapped: {e}'
        ) from e

    axes = jax.tree_util.tree_map_with_path(to_mesh, logical, is_leaf=is_spec)
    jax.tree_util.tree_map_with_path(
      self._check_divides, axes, train_state, is_leaf=is_spec
    )
    return axes

  def _check_divides(self, path, spec: PartitionSpec | None, array: Any) -> None:
    for size, axes in zip(getattr(array, 'shape', ()), spec or ()):
      axes = (axes,) if isinstance(axes, str) else axes or ()
      parts = math.prod(self.mesh.shape[axis] for axis in axes)
      if size % parts:
        raise ValueError(
          'A sharded dimension must divide by the devices along its mesh axis. Got: '
          f'{size} of {readable_path(path)} {array.shape} over {parts} devices '
          f'({spec}). Pad it, change num_partitions, or give a rule that leaves it '
          'whole.'
        )
