"""What a function being traced can know of the devices it will run on.

T5X's partitioner traces the step with its mesh and its logical axis rules in force.
A kernel that the compiler cannot split needs both: it runs on each device's part.
"""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen import partitioning
from jax.sharding import PartitionSpec

# Logical names of an array's axes, None for one that stays whole.
Names = tuple[str | None, ...]


class Device(NamedTuple):
  """Where a traced function will run.

  Attributes:
    platform: 'cpu', 'gpu' or 'tpu'.
    kind: the model, 'TPU v3'.
    capability: CUDA's compute capability, (8, 0) for an A100; None where there is none.
  """

  platform: str
  kind: str
  capability: tuple[int, int] | None = None


def mesh() -> Any:
  """The mesh in force, or None."""
  found = jax.sharding.get_abstract_mesh()
  if not found.empty:
    return found
  # google-research/t5x still enters its mesh the old way, which JAX lets go of.
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', DeprecationWarning)
    resources = getattr(jax.interpreters.pxla, 'thread_resources', None)
  if resources is None or resources.env.physical_mesh.empty:
    return None
  return resources.env.physical_mesh


def device() -> Device:
  """The device of the mesh in force, else JAX's first."""
  found = mesh()
  if isinstance(found, jax.sharding.AbstractMesh):
    described = found.abstract_device
    if described is not None:
      return _described(described.platform, described.device_kind)
    found = None
  first = jax.devices()[0] if found is None else found.devices.flat[0]
  return _described(first.platform, first.device_kind)


def _described(platform, kind):
  """The device; its capability, which a mesh's description lacks, by one like it."""
  if platform != 'gpu':
    return Device(platform, kind)
  for like in jax.local_devices():
    if (like.platform, like.device_kind) == (platform, kind):
      version = str(getattr(like, 'compute_capability', ''))
      # AMD's are names: gfx90a.
      if re.fullmatch(r'\d+\.\d+', version):
        major, minor = version.split('.')
        return Device(platform, kind, (int(major), int(minor)))
  return Device(platform, kind)


def _mesh_axes(name, size, found):
  """Mesh axes of a logical axis, () if it stays whole: no rule, or no even split."""
  (axes,) = partitioning.logical_to_mesh_axes((name,)) if name else (None,)
  axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
  axes = tuple(axis for axis in axes if axis in found.shape)
  parts = math.prod(found.shape[axis] for axis in axes)
  return () if size % parts else axes


def _starts(offsets, axes, sizes):
  """Where this device's part begins along each axis of `offsets`, int32."""
  found = []
  for name in offsets:
    start = jnp.int32(0)
    if axes.get(name):
      parts = jax.lax.axis_size(axes[name])
      start = jax.lax.axis_index(axes[name]) * (sizes[name] // parts)
    found.append(start.astype(jnp.int32))
  return jnp.stack(found)


def split(
  function: Callable[..., Any],
  names: Sequence[Names],
  output_names: Any,
  sizes: dict[str, int],
  offsets: Sequence[str],
) -> Callable[..., Any]:
  """Makes a function run on each device's part of its arguments.

  Args:
    function: takes an int32 [len(offsets)], where this device's part begins along
      each of those axes, and then its parts of the arguments.
    names: logical names of each argument's axes.
    output_names: the same of what it returns, in the same structure.
    sizes: size of each axis that is named. What does not divide by the devices is
      not split.
    offsets: names of axes.

  Returns:
    A function of whole arguments; where no mesh is in force, all is one part.
  """
  found = mesh()
  if found is None:
    return lambda *arrays: function(_starts(offsets, {}, sizes), *arrays)
  axes = {name: _mesh_axes(name, size, found) for name, size in sizes.items()}

  def spec(array_names):
    return PartitionSpec(*(axes.get(name) or None for name in array_names))

  def local(*arrays):
    return function(_starts(offsets, axes, sizes), *arrays)

  return jax.shard_map(
    local,
    mesh=found,
    in_specs=tuple(spec(array_names) for array_names in names),
    out_specs=jax.tree.map(spec, output_names, is_leaf=_is_names),
    check_vma=False,
  )


def _is_names(x):
  return isinstance(x, tuple) and all(n is None or isinstance(n, str) for n in x)
