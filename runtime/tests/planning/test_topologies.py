"""Names and sizes of TPU slices, and what the compiler says of them."""

from importlib import metadata

import jax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x.planning import topologies

needs_compiler = pytest.mark.skipif(
  not topologies.has_compiler(), reason='libtpu is not installed'
)


def test_names():
  assert topologies.find('v3-8').chip.kind == 'TPU v3'
  assert topologies.find('cpu:3').devices == 3
  for wrong in ('v3', 'v9-8', 'cpu:0', 'cpu:', 'gpu:2'):
    with pytest.raises(ValueError, match='v3-8.*Got'):
      topologies.find(wrong)


@pytest.mark.parametrize(
  ('arguments', 'name'),
  [
    (['p', '--topology=v3-8', '--gin_file=x'], 'v3-8'),
    (['p', '-topology', 'cpu:2'], 'cpu:2'),
    (['p', '--gin.topology=1'], None),
    (['p', '--topology'], ''),
  ],
)
def test_the_name_on_a_command_line(arguments, name):
  assert topologies.named_in(arguments) == name


def test_the_environment_has_as_many_devices_and_touches_no_tpu():
  environment = {'XLA_FLAGS': '--xla_dump_to=x', 'JAX_PLATFORMS': 'tpu'}
  topologies.set_environment('v5p-8', environment)
  assert environment['XLA_FLAGS'] == (
    '--xla_dump_to=x --xla_force_host_platform_device_count=4'
  )
  assert environment['JAX_PLATFORMS'] == 'cpu'
  unchanged = {}
  topologies.set_environment('v9-8', unchanged)
  assert unchanged == {}


def test_devices_of_cpus():
  assert topologies.devices('cpu:2') == jax.devices('cpu')[:2]
  with pytest.raises(ValueError, match='needs 9 CPU devices. Got: 8'):
    topologies.devices('cpu:9')


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
  monkeypatch.setattr(topologies, 'has_compiler', lambda: False)
  with pytest.raises(ValueError, match=r'pip install "jax\[tpu\]"'):
    topologies.devices('v3-8')


# What libtpu 0.0.50 (of Python 3.12) says where it differs from 0.0.42, whose figures
# the table has.
_SINCE = {'v5p-8': '95.73G', 'v6e-8': '31.24G'}


@pytest.mark.tpu
@needs_compiler
@pytest.mark.parametrize('name', topologies.TOPOLOGIES)
def test_the_compiler_agrees(name):
  topology = topologies.TOPOLOGIES[name]
  devices = topologies.devices(name)
  assert len(devices) == topology.devices
  assert {device.device_kind for device in devices} == {topology.chip.kind}
  assert {device.process_index for device in devices} == {0}
  whole = NamedSharding(Mesh(devices, ('data',)), PartitionSpec())
  total = jax.jit(lambda x: x.sum(), in_shardings=whole, out_shardings=whole)
  too_much = jax.ShapeDtypeStruct((200, 2**28), 'float32')
  there = f'{topology.chip.hbm_bytes / topologies.GIB:.2f}G'
  if not metadata.version('libtpu').startswith('0.0.42.'):
    there = _SINCE.get(name, there)
  with pytest.raises(Exception, match=rf'exceeds available HBM \({there}\)'):
    total.lower(too_much).compile()
