"""TPUs to compile for without having one: their names, sizes and speeds.

The compiler comes with the package libtpu and needs no device. Figures of a chip are
the maker's; the HBM that a program may use is what that compiler says (libtpu 0.0.42)
when it refuses one.
"""

import dataclasses
import importlib.util
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one JAX device of a kind can do.

  A device is a core on v2 and v3 and a chip later on.

  Attributes:
    kind: as JAX calls it.
    flops: bfloat16 operations a second.
    hbm_bytes: memory that a program may use.
    hbm_bandwidth: bytes a second.
    link_bandwidth: bytes a second that a device can send to its neighbours, all links
      of a chip together, shared by its devices.
    clock: cycles a second.
    vector_operations: of single elements a second.
  """

  kind: str
  flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  link_bandwidth: float
  clock: float
  vector_operations: float


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice as Google Cloud names it.

  Attributes:
    chip: its devices.
    shape: the compiler's name of the slice; None for CPUs.
    devices: JAX devices in it.
    options: what the compiler wants to know besides.
  """

  chip: Chip
  shape: str | None
  devices: int
  options: tuple[tuple[str, object], ...] = ()


# Peak, HBM and its bandwidth: https://cloud.google.com/tpu/docs/system-architecture and
# the pages of each version; a device of v2 and v3 is half a chip. Clocks and links of
# v2 and v3: Jouppi et al., A Domain-Specific Supercomputer for Training Deep Neural
# Networks, CACM 63(7), 2020 (496 and 656 Gbit/s a link, of which a 2x2 slice connects
# two); of v4: Jouppi et al., ISCA 2023 (six links of 50 GB/s, three connected). Later
# clocks follow from the peak and the size of the matrix units. Vector units: registers
# of 8 x 128, two operations a cycle and core up to v4, four later on (the compiler's
# listings for v3; https://jax-ml.github.io/scaling-book/tpus for v5p).
_V2 = Chip('TPU v2', 22.9e12, 7.48 * GIB, 350e9, 62e9, 700e6, 1.43e12)
_V3 = Chip('TPU v3', 61.6e12, 15.48 * GIB, 450e9, 82e9, 940e6, 1.93e12)
_V4 = Chip('TPU v4', 275e12, 30.75 * GIB, 1228e9, 150e9, 1050e6, 4.3e12)
_V5E = Chip('TPU v5 lite', 197e12, 15.75 * GIB, 819e9, 100e9, 1500e6, 6.1e12)
_V5P = Chip('TPU v5', 459e12, 95.74 * GIB, 2765e9, 300e9, 1750e6, 14.3e12)
_V6E = Chip('TPU v6 lite', 918e12, 31.25 * GIB, 1640e9, 224e9, 1750e6, 7.2e12)
# Two cores of a server; only there to have figures of some size.
_CPU = Chip('cpu', 0.4e12, 16 * GIB, 20e9, 10e9, 3e9, 0.05e12)

_ONE_HOST_OF_EIGHT = (('chips_per_host_bounds', (2, 4, 1)),)

TOPOLOGIES = {
  'v2-8': Topology(_V2, 'v2:2x2', 8),
  'v3-8': Topology(_V3, 'v3:2x2', 8),
  'v4-8': Topology(_V4, 'v4:2x2x1', 4, (('chip_config_name', 'megacore'),)),
  'v5e-8': Topology(_V5E, 'v5e:2x4', 8, _ONE_HOST_OF_EIGHT),
  'v5p-8': Topology(_V5P, 'v5p:2x2x1', 4),
  'v6e-8': Topology(_V6E, 'v6e:2x4', 8, _ONE_HOST_OF_EIGHT),
}


def find(name: str) -> Topology:
  """The topology of that name; `cpu:N` is N CPU devices.

  Raises:
    ValueError: there is none.
  """
  kind, _, count = name.partition(':')
  if kind == 'cpu' and count.isdigit() and int(count):
    return Topology(_CPU, None, int(count))
  if name not in TOPOLOGIES:
    raise ValueError(
      f'--topology must be one of {", ".join(TOPOLOGIES)}, or cpu:N. Got: {name!r}.'
    )
  return TOPOLOGIES[name]


def named_in(argv: Sequence[str]) -> str | None:
  """The value of `--topology` on a command line, None where there is none."""
  for place, argument in enumerate(argv):
    flag, _, value = argument.partition('=')
    if flag.lstrip('-') == 'topology' and flag.startswith('-'):
      return value or ''.join(argv[place + 1 : place + 2])
  return None


def set_environment(name: str | None, environment: MutableMapping[str, str]) -> None:
  """Lets JAX compile for the topology and touch no device; before JAX is imported.

  JAX then has as many CPU devices as the topology has devices, since a program may ask
  for their number.

  Args:
    name: see `find`; nothing is set for a name that is unknown, which is told later.
    environment: `os.environ`.
  """
  try:
    count = find(name or '').devices
  except ValueError:
    return
  environment['JAX_PLATFORMS'] = 'cpu'
  # The compiler asks the metadata server of a TPU VM, which is not there, nor wanted.
  environment['TPU_SKIP_MDS_QUERY'] = '1'
  environment['TPU_WORKER_HOSTNAMES'] = 'localhost'
  environment['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  if name in TOPOLOGIES:
    environment['TPU_ACCELERATOR_TYPE'] = name
  flag = f'--xla_force_host_platform_device_count={count}'
  environment['XLA_FLAGS'] = f'{environment.get("XLA_FLAGS", "")} {flag}'.strip()


def has_compiler() -> bool:
  """Whether libtpu is installed."""
  return importlib.util.find_spec('libtpu') is not None


def devices(name: str) -> 'Sequence[jax.Device]':
  """The devices of a topology, to compile for; only `cpu:N` can also run.

  Args:
    name: see `find`.

  Raises:
    ValueError: the name is unknown, or libtpu is not installed.
  """
  import jax
  from jax.experimental import topologies

  topology = find(name)
  if topology.shape is None:
    found = jax.devices('cpu')
    if len(found) < topology.devices:
      raise ValueError(
        f'{name} needs {topology.devices} CPU devices. Got: {len(found)}. Set '
        f'XLA_FLAGS=--xla_force_host_platform_device_count={topology.devices}.'
      )
    return found[: topology.devices]
  if not has_compiler():
    raise ValueError(
      f'Compiling for {name} needs the package libtpu: pip install "jax[tpu]" (or '
      'pip install -r requirements-tpu.txt). No TPU is needed. --topology=cpu:8 works '
      'without it.'
    )
  return topologies.get_topology_desc(
    platform='tpu', topology_name=topology.shape, **dict(topology.options)
  ).devices
