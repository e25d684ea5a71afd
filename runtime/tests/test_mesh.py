"""Meshes: which device stands where, on CPUs and on drawn TPU tori."""

import collections
import dataclasses
import itertools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from t5x import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class FakeDevice:
  """A TPU core, or a GPU where it has no coordinates."""

  id: int
  process_index: int
  coords: tuple[int, int, int] | None = None
  core_on_chip: int = 0
  platform: str = 'tpu'
  device_kind: str = 'TPU v3'


def torus(x, y, z, cores, host=(2, 2, 1)):
  """All cores of an x × y × z torus, with hosts of `host` chips in row-major order."""
  hosts = [-(-whole // part) for whole, part in zip((x, y, z), host)]
  devices = []
  for place in itertools.product(range(x), range(y), range(z), range(cores)):
    chip, core = place[:3], place[3]
    process = np.ravel_multi_index([c // h for c, h in zip(chip, host)], hosts)
    devices.append(FakeDevice(len(devices), int(process), chip, core))
  # Backends promise no order.
  np.random.default_rng(0).shuffle(devices)
  return devices


def gpus(hosts, per_host):
  return [FakeDevice(i, i // per_host, platform='gpu') for i in range(hosts * per_host)]


def use_devices(monkeypatch, devices):
  monkeypatch.setattr(jax, 'devices', lambda backend=None: devices)


@pytest.mark.parametrize('devices', [1, 2, 4, 8])
@pytest.mark.parametrize('partitions', [1, 2, 4, 8])
def test_num_partitions_gives_the_mesh_it_names(monkeypatch, devices, partitions):
  use_devices(monkeypatch, jax.devices()[:devices])
  if partitions > devices:
    with pytest.raises(ValueError, match=f'Got: {partitions} partitions, {devices} '):
      mesh_lib.default_mesh(partitions)
    return
  made = mesh_lib.default_mesh(partitions)
  assert dict(made.shape) == {'data': devices // partitions, 'model': partitions}
  # One copy of the model lies on neighbours.
  order = [device.id for device in made.devices.flat]
  assert order == [device.id for device in jax.devices()]


def test_a_number_that_does_not_divide_is_refused():
  with pytest.raises(ValueError, match=r'3 partitions, 8 devices.*\[1, 2, 4, 8\]'):
    mesh_lib.default_mesh(3)


def test_cpu_and_gpu_meshes():
  assert dict(mesh_lib.get_cpu_mesh().shape) == {'data': 8, 'model': 1}
  assert dict(mesh_lib.get_cpu_mesh(4).shape) == {'data': 2, 'model': 4}
  assert dict(mesh_lib.get_gpu_mesh(2).shape) == {'data': 4, 'model': 2}


@pytest.mark.parametrize('tile', [(1, 2), (1, 1, 1, 2)])
def test_submesh_without_a_torus(tile):
  # Four numbers count by their product where there are no coordinates.
  assert dict(mesh_lib.get_mesh(tile).shape) == {'data': 4, 'model': 2}


@pytest.mark.parametrize(
  ('partitions', 'model_hosts'), [(1, 1), (2, 1), (4, 1), (8, 2), (16, 4)]
)
def test_gpus_of_a_host_share_a_copy_first(monkeypatch, partitions, model_hosts):
  use_devices(monkeypatch, gpus(hosts=4, per_host=4))
  made = mesh_lib.default_mesh(partitions)
  for copy in made.devices:
    assert len({device.process_index for device in copy}) == model_hosts


def test_gpu_tile_over_hosts_by_hand(monkeypatch):
  use_devices(monkeypatch, gpus(hosts=2, per_host=2))
  made = mesh_lib.default_mesh(1, model_parallel_submesh=(2, 1))
  assert [[d.id for d in row] for row in made.devices] == [[0, 2], [1, 3]]


def test_copies_over_hosts_of_six(monkeypatch):
  use_devices(monkeypatch, gpus(hosts=2, per_host=6))
  made = mesh_lib.default_mesh(4)
  # Two devices of each host: four of one host would leave a rest of two.
  assert [d.process_index for d in made.devices[0]] == [0, 0, 1, 1]
  with pytest.raises(ValueError, match='5 partitions, 12 devices, 6 a host'):
    mesh_lib.default_mesh(5)


@pytest.mark.parametrize(
  'shape', [(2, 2, 1, 2), (4, 4, 1, 2), (4, 4, 4, 1), (8, 4, 1, 1)]
)
def test_every_torus_gives_blocks_of_hosts(monkeypatch, shape):
  devices = torus(*shape)
  use_devices(monkeypatch, devices)
  partitions = 1
  while partitions <= len(devices):
    made = mesh_lib.default_mesh(partitions)
    assert dict(made.shape) == {'data': len(devices) // partitions, 'model': partitions}
    assert {d.id for d in made.devices.flat} == {d.id for d in devices}
    for process in {device.process_index for device in devices}:
      mesh_lib.LocalChunker(made, process)  # Raises where a host is scattered.
    partitions *= 2


@pytest.mark.parametrize(
  ('partitions', 'extent'),
  [
    (1, (1, 1, 1, 1)),
    (2, (1, 1, 1, 2)),
    (4, (2, 1, 1, 2)),
    (8, (2, 2, 1, 2)),
    (16, (4, 2, 1, 2)),
    (32, (4, 4, 1, 2)),
  ],
)
def test_tiles_of_a_v3_32(monkeypatch, partitions, extent):
  # By hand: cores of a chip first, then the chips of a host, then neighbouring hosts.
  use_devices(monkeypatch, torus(4, 4, 1, 2))
  for copy in mesh_lib.default_mesh(partitions).devices:
    places = np.array([(*device.coords, device.core_on_chip) for device in copy])
    assert tuple(places.max(axis=0) - places.min(axis=0) + 1) == extent


def test_v3_32_by_four_host_zero(monkeypatch):
  use_devices(monkeypatch, torus(4, 4, 1, 2))
  made = mesh_lib.default_mesh(4)
  rows = [[(*d.coords, d.core_on_chip) for d in row] for row in made.devices[:2]]
  assert rows == [
    [(0, 0, 0, 0), (0, 0, 0, 1), (1, 0, 0, 0), (1, 0, 0, 1)],
    [(0, 1, 0, 0), (0, 1, 0, 1), (1, 1, 0, 0), (1, 1, 0, 1)],
  ]
  assert {d.process_index for d in made.devices[:2].flat} == {0}


def test_tiling_by_host_can_be_forbidden():
  devices = torus(4, 4, 1, 2)
  made = mesh_lib.get_mesh((1, 1, 1, 1), devices)
  assert dict(made.shape) == {'data': 32, 'model': 1}
  with pytest.raises(ValueError, match='scatters the devices of one host'):
    mesh_lib.get_mesh((1, 1, 1, 1), devices, tile_by_host_if_needed=False)


def test_a_tile_that_does_not_fit_is_refused():
  with pytest.raises(ValueError, match=r'\(3, 1, 1, 2\) for the grid \(4, 4, 1, 2\)'):
    mesh_lib.get_mesh((3, 1, 1, 2), torus(4, 4, 1, 2))


def test_a_torus_with_holes_goes_by_hosts():
  devices = [d for d in torus(2, 2, 1, 2) if d.coords != (1, 1, 0)]
  made = mesh_lib.get_mesh((1, 1, 1, 2), devices)
  assert dict(made.shape) == {'data': 3, 'model': 2}


def test_hosts_of_different_sizes_are_refused():
  devices = [*gpus(1, 4), FakeDevice(9, 1, platform='gpu')]
  with pytest.raises(ValueError, match=r'same number of devices. Got: \[4, 1\]'):
    mesh_lib.get_mesh((1, 1), devices)


def test_slices():
  made = mesh_lib.default_mesh(1, ici_mesh_shape=(1, 2, 2), dcn_mesh_shape=(2, 1, 1))
  assert dict(made.shape) == {'replica': 2, 'data': 2, 'model': 2}
  assert [d.id for d in made.devices.flat] == list(range(8))
  made = mesh_lib.default_mesh(1, ici_mesh_shape=(1, 2, 2), dcn_mesh_shape=(1, 2, 1))
  ids = np.vectorize(lambda d: d.id)(made.devices)
  np.testing.assert_array_equal(ids[0], [[0, 1], [2, 3], [4, 5], [6, 7]])


def test_slices_that_do_not_fill_the_devices_are_refused():
  with pytest.raises(ValueError, match=r'dcn_mesh_shape=\(3, 1, 1\), 8 devices'):
    mesh_lib.default_mesh(1, ici_mesh_shape=(1, 2, 2), dcn_mesh_shape=(3, 1, 1))


def test_coordinates():
  tpu = FakeDevice(5, 0, coords=(3, 2, 1), core_on_chip=1)
  assert mesh_lib.bounds_from_last_device(tpu) == (4, 3, 2, 2)
  assert mesh_lib.get_coords(tpu) == (3, 2, 1, 1)
  assert mesh_lib.bounds_from_last_device(jax.devices()[-1]) == (1, 8)
  assert mesh_lib.get_coords(jax.devices()[5]) == (0, 5)


def test_local_chunks_by_hand():
  # Four hosts of four devices; a copy of the model spans two hosts:
  #   data 0-3: hosts 0 and 1 side by side, data 4-7: hosts 2 and 3.
  rows = [[0, 1]] * 4 + [[2, 3]] * 4
  devices = np.array(
    [
      [FakeDevice(10 * i + j, p) for j, p in enumerate(row)]
      for i, row in enumerate(rows)
    ]
  )
  made = jax.sharding.Mesh(devices, ('data', 'model'))
  chunker = mesh_lib.LocalChunker(made, process_index=3)
  assert chunker.num_chunks == {'data': 2, 'model': 2}
  assert chunker.chunk_ids == {'data': 1, 'model': 1}
  assert chunker.get_shard_id('data') == 1
  assert chunker.get_shard_id(('data', 'model')) == 3
  assert chunker.get_replica_id('data') == 1
  assert chunker.get_replica_id(('data', 'model')) == 0

  both = chunker.get_local_chunk_info((128, 16), ('data', 'model'))
  assert both == mesh_lib.LocalChunkInfo((slice(64, 128), slice(8, 16)), 0)
  columns = chunker.get_local_chunk_info((128, 16), (None, 'model'))
  assert columns == mesh_lib.LocalChunkInfo((slice(None), slice(8, 16)), 1)
  joined = chunker.get_local_chunk_info((128,), (('data', 'model'),))
  assert joined == mesh_lib.LocalChunkInfo((slice(96, 128),), 0)
  with pytest.raises(ValueError, match='Got: 127 of shape'):
    chunker.get_local_chunk_info((127, 16), ('data', None))


def test_chunks_cover_an_array_once(monkeypatch):
  use_devices(monkeypatch, torus(4, 4, 1, 2))
  for partitions in (1, 4, 16):
    made = mesh_lib.default_mesh(partitions)
    seen = collections.Counter()
    for process in range(4):
      info = mesh_lib.LocalChunker(made, process).get_local_chunk_info(
        (32, 32), ('data', 'model')
      )
      if info.replica_id == 0:
        seen.update(itertools.product(*(range(32)[part] for part in info.slice)))
    assert set(seen.values()) == {1} and len(seen) == 32 * 32


def test_scattered_hosts_and_unknown_hosts_are_refused():
  devices = np.array([FakeDevice(i, p) for i, p in enumerate([0, 1, 0, 1])])
  scattered = jax.sharding.Mesh(devices.reshape(4, 1), ('data', 'model'))
  with pytest.raises(ValueError, match='must form one block of the mesh'):
    mesh_lib.LocalChunker(scattered, 0)
  with pytest.raises(ValueError, match=r'hosts \[0\]. Got: 7'):
    mesh_lib.LocalChunker(mesh_lib.get_cpu_mesh(), 7)


# Prints a line for each mesh of the generations' topologies, from libtpu alone.
_EVERY_GENERATION = """
import jax
from jax.experimental import topologies
from t5x import mesh

for name in {names}:
  devices = topologies.get_topology_desc(platform='tpu', topology_name=name).devices
  jax.devices = lambda backend=None: devices
  partitions = 1
  while partitions <= len(devices):
    made = mesh.default_mesh(partitions)
    for process in {{d.process_index for d in devices}}:
      mesh.LocalChunker(made, process)
    print(name, len(devices), partitions, *made.shape.values())
    partitions *= 2
"""


@pytest.mark.tpu
@pytest.mark.slow
def test_every_tpu_generation():
  pytest.importorskip('libtpu')
  names = ['v2:2x2', 'v3:4x4', 'v4:2x2x2', 'v5e:4x4', 'v5p:2x2x2', 'v6e:4x4']
  done = subprocess.run(
    [sys.executable, '-c', _EVERY_GENERATION.format(names=names)],
    env={
      **os.environ,
      'TPU_SKIP_MDS_QUERY': '1',
      'TPU_WORKER_HOSTNAMES': 'localhost',
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    },
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert done.returncode == 0, done.stderr
  lines = [line.split() for line in done.stdout.splitlines()]
  assert {name for name, *_ in lines} == set(names)
  for _, *numbers in lines:
    devices, partitions, data, model = map(int, numbers)
    assert model == partitions and data * model == devices
