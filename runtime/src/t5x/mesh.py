"""Which device does what: meshes of devices, and the part of one that a host holds.

A mesh has the axes 'data' (copies of the model, each on its own examples) and 'model'
(the devices that share one copy). On several slices joined by a slow network there is
'replica' before them. Every mesh made here keeps the devices of one host in one block,
which is what lets a host feed its own part of a batch and nobody else's.

All platforms go one way. The devices are laid out on their *hardware grid*, which is
the torus [x, y, z, core] of a TPU, or [host, device] elsewhere; a *tile* of that grid
is one copy of the model; tiles are laid along 'data'.
"""

import contextlib
import contextvars
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import Mesh

JaxDevice = jax.Device
TpuMesh = tuple[int, int, int, int]  # x, y, z, cores of a chip.
OtherMesh = tuple[int, int]  # hosts, devices of a host.
HardwareMesh = TpuMesh | OtherMesh

# By increasing traffic: ICI and DCN shapes are given in this order.
_SLICED_AXES = ('replica', 'data', 'model')

# Devices to compile for in place of this machine's own.
_absent_devices: contextvars.ContextVar[tuple[JaxDevice, ...]] = contextvars.ContextVar(
  'absent_devices', default=()
)


@contextlib.contextmanager
def meshes_of(devices: Sequence[JaxDevice]) -> Iterator[None]:
  """Lets `default_mesh` take these devices, which need not be there."""
  token = _absent_devices.set(tuple(devices))
  try:
    yield
  finally:
    _absent_devices.reset(token)


def bounds_from_last_device(last_device: JaxDevice) -> HardwareMesh:
  """The size of the hardware grid whose highest corner is `last_device`.

  Args:
    last_device: the device with the highest coordinates.

  Returns:
    (x, y, z, cores) where devices have coordinates (TPU), else (hosts, devices a host).
  """
  if len(getattr(last_device, 'coords', ())) == 3:
    return (*(c + 1 for c in last_device.coords), last_device.core_on_chip + 1)
  return jax.process_count(), jax.local_device_count()


def get_coords(device: JaxDevice) -> HardwareMesh:
  """The place of a device on the hardware grid: (x, y, z, core) or (host, device)."""
  if hasattr(device, 'coords'):
    return (*device.coords, device.core_on_chip)
  return device.process_index, device.id % jax.local_device_count()


def get_mesh(
  model_parallel_submesh: HardwareMesh,
  input_devices: Sequence[JaxDevice] = (),
  input_local_devices: Sequence[JaxDevice] = (),
  tile_by_host_if_needed: bool = True,
  backend: str | None = None,
) -> Mesh:
  """The mesh whose copies of the model are tiles of the given shape.

  Args:
    model_parallel_submesh: the tile. (x, y, z, cores) on a TPU torus, each a divisor
      of the torus; cores of one chip are closest, so raise the last number first.
      Elsewhere (hosts, devices); there a tile of four numbers counts by its product
      alone, so that one configuration runs on any machine.
    input_devices: the devices; all of `backend` by default.
    input_local_devices: those of `input_devices` on one host, as an example of a host's
      block; found from `input_devices` by default.
    tile_by_host_if_needed: whether tiles may be reordered by host where the plain
      order would scatter a host's devices over the mesh (collectives are then a little
      slower).
    backend: the platform to take devices from; JAX's default where None.

  Returns:
    A mesh with the axes ('data', 'model').

  Raises:
    ValueError: the tile does not divide the grid, or would scatter a host.
  """
  devices = list(input_devices) or jax.devices(backend)
  grid = _hardware_grid(devices)
  host = _host_bounds(grid, list(input_local_devices))
  tile = tuple(model_parallel_submesh)
  if grid.ndim == 2 and len(tile) == 4:
    tile = _default_tile(grid.shape, host, math.prod(tile))
  if len(tile) != grid.ndim or any(t < 1 or g % t for t, g in zip(tile, grid.shape)):
    raise ValueError(
      'model_parallel_submesh must have one number for each dimension of the device '
      f'grid, and each must divide it. Got: {tuple(model_parallel_submesh)} for the '
      f'grid {grid.shape}.'
    )
  arranged = _plain_order(grid, tile)
  if not _hosts_are_blocks(arranged):
    if not tile_by_host_if_needed:
      raise ValueError(
        f'The tile {tile} of the device grid {grid.shape} scatters the devices of '
        f'one host, which hold {host}. Choose another model_parallel_submesh, or '
        'allow tile_by_host_if_needed.'
      )
    arranged = _host_order(grid, tile, host)
  return _named_mesh(arranged, _SLICED_AXES[1:])


def get_cpu_mesh(num_partitions: int = 1) -> Mesh:
  """The mesh of all CPU devices: ('data', 'model') with `num_partitions` along 'model'.

  T5X's function has no argument and puts all devices of a host along 'model'.
  """
  return _mesh_by_size(jax.devices('cpu'), num_partitions)


def get_gpu_mesh(num_partitions: int) -> Mesh:
  """The mesh of all devices, the GPUs of one host close together along 'model'.

  Raises:
    ValueError: `num_partitions` does not divide the number of devices.
  """
  return _mesh_by_size(jax.devices(), num_partitions)


def default_mesh(
  num_partitions: int,
  model_parallel_submesh: HardwareMesh | None = None,
  backend: str | None = None,
  ici_mesh_shape: HardwareMesh | None = None,
  dcn_mesh_shape: HardwareMesh | None = None,
) -> Mesh:
  """The mesh for a number of devices that share one copy of the model.

  Args:
    num_partitions: devices along 'model'. On a TPU torus the tile is chosen: as few
      hosts as possible, then both cores of a chip, then the most compact, then x before
      y before z. Not read where a shape below is given.
    model_parallel_submesh: the tile, to choose it by hand (see `get_mesh`).
    backend: the platform to take devices from; JAX's default where None.
    ici_mesh_shape: (replica, data, model) within one slice.
    dcn_mesh_shape: (replica, data, model) over slices; the mesh is the product of the
      two, axis by axis.

  Returns:
    A mesh with the axes ('data', 'model'), or ('replica', 'data', 'model') for slices.

  Raises:
    ValueError: the numbers do not fit the devices.
  """
  devices = _absent_devices.get() or jax.devices(backend)
  if ici_mesh_shape is not None and dcn_mesh_shape is not None:
    return _sliced_mesh(devices, tuple(ici_mesh_shape), tuple(dcn_mesh_shape))
  if model_parallel_submesh:
    return get_mesh(model_parallel_submesh, devices)
  return _mesh_by_size(devices, num_partitions)


def _mesh_by_size(devices: Sequence[JaxDevice], num_partitions: int) -> Mesh:
  grid = _hardware_grid(devices)
  return get_mesh(
    _default_tile(grid.shape, _host_bounds(grid), num_partitions), devices
  )


def _named_mesh(devices: np.ndarray, axis_names: Sequence[str]) -> Mesh:
  made = Mesh(devices, tuple(axis_names))
  shape = ', '.join(f'{name} {size}' for name, size in made.shape.items())
  noun = 'device' if made.size == 1 else 'devices'
  platform = devices.flat[0].platform
  logging.info('Mesh of %d %s %s: %s.', made.size, platform, noun, shape)
  return made


def _hardware_grid(devices: Sequence[JaxDevice]) -> np.ndarray:
  """Devices at their places: [x, y, z, core] of a whole torus, else [host, device]."""
  if all(len(getattr(device, 'coords', None) or ()) == 3 for device in devices):
    places = np.array([(*d.coords, d.core_on_chip) for d in devices])
    places -= places.min(axis=0)
    bounds = tuple(places.max(axis=0) + 1)
    # A slice with holes (a subset of the devices) has no torus to speak of.
    if len(set(map(tuple, places))) == len(devices) == math.prod(bounds):
      grid = np.empty(bounds, dtype=object)
      for place, device in zip(places, devices):
        grid[tuple(place)] = device
      return grid
  by_host = sorted(devices, key=lambda device: (device.process_index, device.id))
  hosts = [list(g) for _, g in itertools.groupby(by_host, lambda d: d.process_index)]
  if len({len(host) for host in hosts}) > 1:
    raise ValueError(
      'Every host must bring the same number of devices. Got: '
      f'{[len(host) for host in hosts]}.'
    )
  grid = np.empty((len(hosts), len(hosts[0])), dtype=object)
  grid[:] = hosts
  return grid


def _host_bounds(
  grid: np.ndarray, local_devices: Sequence[JaxDevice] = ()
) -> tuple[int, ...]:
  """The size of one host's block on the grid."""
  one_host = (local_devices or grid.flat)[0].process_index
  return tuple(high - low for low, high in _blocks(grid)[one_host])


def _divisors(number: int) -> list[int]:
  return [d for d in range(1, number + 1) if number % d == 0]


def _default_tile(
  bounds: Sequence[int], host: Sequence[int], size: int
) -> tuple[int, ...]:
  """The tile of `size` devices; the order of preference is in `default_mesh`."""
  tiles = [
    tile
    for tile in itertools.product(*map(_divisors, bounds))
    if math.prod(tile) == size
    and all(t % h == 0 or h % t == 0 for t, h in zip(tile, host))
  ]
  if not tiles:
    total = math.prod(bounds)
    raise ValueError(
      'The number of partitions must divide the number of devices, in a shape that '
      f'fits their hosts. Got: {size} partitions, {total} devices, '
      f'{math.prod(host)} a host. Choose one of {_divisors(total)}.'
    )

  def cost(tile: tuple[int, ...]) -> tuple:
    hosts = math.prod(max(t // h, 1) for t, h in zip(tile, host))
    return hosts, -tile[-1], sum(tile), [-t for t in tile]

  return min(tiles, key=cost)


def _plain_order(grid: np.ndarray, tile: Sequence[int]) -> np.ndarray:
  """[data, model]: tiles in the order of the grid, devices in the order of the tile."""
  split = [part for g, t in zip(grid.shape, tile) for part in (g // t, t)]
  axes = [*range(0, 2 * grid.ndim, 2), *range(1, 2 * grid.ndim, 2)]
  return grid.reshape(split).transpose(axes).reshape(-1, math.prod(tile))


def _host_order(
  grid: np.ndarray, tile: Sequence[int], host: Sequence[int]
) -> np.ndarray:
  """[data, model]: as `_plain_order`, but hosts first, so that each is one block."""
  if any(t % h and h % t for t, h in zip(tile, host)):
    raise ValueError(
      'Each number of model_parallel_submesh must be a factor or a multiple of the '
      f"host's own part of the grid. Got: {tuple(tile)} for hosts of {tuple(host)}."
    )
  split = []
  for whole, t, h in zip(grid.shape, tile, host):
    tiles_in_host, hosts_in_tile, part = max(h // t, 1), max(t // h, 1), min(h, t)
    between_hosts = whole // (tiles_in_host * hosts_in_tile * part)
    split += [between_hosts, tiles_in_host, hosts_in_tile, part]
  axes = [4 * axis + kind for kind in range(4) for axis in range(grid.ndim)]
  return grid.reshape(split).transpose(axes).reshape(-1, math.prod(tile))


def _sliced_mesh(
  devices: Sequence[JaxDevice], ici: tuple[int, ...], dcn: tuple[int, ...]
) -> Mesh:
  """['replica', 'data', 'model']: `dcn` between slices, `ici` within each."""
  fits = len(ici) == len(dcn) == len(_SLICED_AXES)
  if not fits or math.prod(ici) * math.prod(dcn) != len(devices):
    raise ValueError(
      'ici_mesh_shape and dcn_mesh_shape each need three numbers (replica, data, '
      'model), whose product over both is the number of devices. Got: '
      f'ici_mesh_shape={ici}, dcn_mesh_shape={dcn}, {len(devices)} devices.'
    )
  if devices[0].platform == 'tpu':
    arranged = mesh_utils.create_hybrid_device_mesh(ici, dcn, devices=devices)
  else:
    # No slices to read off: the hosts in their order are cut into equal runs.
    in_order = _hardware_grid(devices).reshape(*dcn, *ici)
    interleaved = in_order.transpose(0, 3, 1, 4, 2, 5)
    arranged = interleaved.reshape([d * i for d, i in zip(dcn, ici)])
  return _named_mesh(arranged, _SLICED_AXES)


def _blocks(devices: np.ndarray) -> dict[int, list[tuple[int, int]]]:
  """For each host the (low, high) bounds of its devices along every axis."""
  owners = np.vectorize(lambda device: device.process_index, otypes=[int])(devices)
  blocks = {}
  for owner in np.unique(owners).tolist():
    places = np.argwhere(owners == owner)
    highs = places.max(axis=0) + 1
    blocks[owner] = list(zip(places.min(axis=0).tolist(), highs.tolist()))
  return blocks


def _hosts_are_blocks(devices: np.ndarray) -> bool:
  """Whether each host's devices fill one block, all of the same shape."""
  shapes = [[high - low for low, high in b] for b in _blocks(devices).values()]
  # The blocks cover the mesh, so equal shapes of the right volume cannot overlap.
  whole = math.prod(shapes[0]) * len(shapes) == devices.size
  return whole and all(shape == shapes[0] for shape in shapes)


@dataclasses.dataclass
class LocalChunkInfo:
  """The part of an array on this host's devices.

  Attributes:
    slice: that part, a slice for each dimension.
    replica_id: counts the hosts that hold the same part; 0 is the one to write it.
  """

  slice: tuple[slice, ...]
  replica_id: int


class LocalChunker:
  """Which part of sharded arrays a host holds.

  Attributes:
    global_mesh: the mesh of all hosts' devices.
    mesh_axes: its axis names, in order.
    num_chunks: for each axis, the number of hosts along it.
    chunk_ids: for each axis, this host's place along it.
  """

  def __init__(self, global_mesh: Mesh, process_index: int | None = None):
    """Finds the host's block.

    Args:
      global_mesh: a mesh in which each host's devices form one block.
      process_index: the host; this one by default.

    Raises:
      ValueError: the devices of a host are scattered, or the host has none.
    """
    self.global_mesh = global_mesh
    self.mesh_axes = list(global_mesh.axis_names)
    if not _hosts_are_blocks(global_mesh.devices):
      raise ValueError(
        'The devices of each host must form one block of the mesh, all of one shape. '
        f'Got a mesh {dict(global_mesh.shape)} where they do not: choose another '
        'number of partitions or another submesh.'
      )
    blocks = _blocks(global_mesh.devices)
    process_index = jax.process_index() if process_index is None else process_index
    if process_index not in blocks:
      raise ValueError(
        f'The mesh has devices of the hosts {sorted(blocks)}. Got: {process_index}.'
      )
    self.num_chunks, self.chunk_ids = {}, {}
    for axis, (low, high) in zip(self.mesh_axes, blocks[process_index]):
      self.num_chunks[axis] = global_mesh.shape[axis] // (high - low)
      self.chunk_ids[axis] = low // (high - low)

  def _position(self, axes: Iterable[str]) -> int:
    """The host's row-major number along `axes`."""
    position = 0
    for axis in axes:
      position = position * self.num_chunks[axis] + self.chunk_ids[axis]
    return position

  def get_shard_id(self, sharded_mesh_axes: str | Iterable[str]) -> int:
    """This host's number among those that hold different parts along these axes."""
    return self._position(_as_axes(sharded_mesh_axes))

  def get_replica_id(self, sharded_mesh_axes: str | Iterable[str]) -> int:
    """This host's number among those that hold the same part along these axes."""
    sharded = _as_axes(sharded_mesh_axes)
    return self._position(axis for axis in self.mesh_axes if axis not in sharded)

  def get_local_chunk_info(
    self,
    global_shape: tuple[int, ...],
    mesh_axes: Sequence[str | tuple[str, ...] | None],
  ) -> LocalChunkInfo:
    """This host's part of an array.

    Args:
      global_shape: the shape of the whole array.
      mesh_axes: for each dimension the mesh axis (or axes) it is split over, or None.

    Returns:
      The slices and the replica number.

    Raises:
      ValueError: a dimension does not divide by the number of hosts along its axes.
    """
    slices, used = [], []
    for size, axes in itertools.zip_longest(global_shape, mesh_axes):
      axes = _as_axes(axes)
      hosts = math.prod(self.num_chunks[axis] for axis in axes)
      if size % hosts:
        raise ValueError(
          'A sharded dimension must divide by the number of hosts along its mesh '
          f'axes. Got: {size} of shape {global_shape} over {hosts} hosts ({axes}).'
        )
      start, length = self.get_shard_id(axes) * (size // hosts), size // hosts
      slices.append(slice(start, start + length) if axes else slice(None))
      used.extend(axes)
    return LocalChunkInfo(tuple(slices), self.get_replica_id(used))


def _as_axes(axes: str | Iterable[str] | None) -> tuple[str, ...]:
  """One name, several or none, as a tuple of names."""
  if axes is None:
    return ()
  return (axes,) if isinstance(axes, str) else tuple(a for a in axes if a is not None)
