"""Functions and arrays over a mesh: names of axes, rules, shardings, and their context.

The mesh and the logical axis rules are in force while a partitioned function is traced.
Nothing here asks which platform it runs on.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from flax.linen import partitioning as flax_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

LogicalAxisRules = Sequence[tuple[str, str | tuple[str, ...] | None]]


class AxisNames(tuple):
  """Names of an array's axes, made as `AxisNames('embed', 'mlp')`.

  A class of its own, because JAX takes a plain tuple for a tree and not for a leaf.
  """

  def __new__(cls, *names):
    return super().__new__(cls, names)

  def __repr__(self):
    return f'{type(self).__name__}({", ".join(map(repr, self))})'


def standard_logical_axis_rules(
  activation_partitioning_dims: int = 1,
  parameter_partitioning_dims: int = 1,
  additional_rules: LogicalAxisRules | None = None,
) -> LogicalAxisRules:
  """Rules for the axis names that T5X models use.

  Batches lie along 'data'; the wide dimension of every parameter along 'model'. For a
  name with several rules, the first whose mesh axis is still free in the array counts.

  Args:
    activation_partitioning_dims: 2 shards 'embed' along 'model' wherever that is free.
    parameter_partitioning_dims: 2 shards 'embed' along 'data' wherever that is free, so
      that parameters and optimizer states are spread over all devices.
    additional_rules: (logical name, mesh axis or None) pairs with the lowest priority.

  Returns:
    (logical name, mesh axis or None) pairs by falling priority.

  Raises:
    ValueError: a number of dimensions is neither 1 nor 2.
  """
  for name, dims in (
    ('activation_partitioning_dims', activation_partitioning_dims),
    ('parameter_partitioning_dims', parameter_partitioning_dims),
  ):
    if dims not in (1, 2):
      raise ValueError(f'{name} must be 1 or 2. Got: {dims}.')
  rules = [('batch', 'data')]
  rules += [(name, 'model') for name in ('vocab', 'mlp', 'heads', 'joined_kv')]
  if activation_partitioning_dims == 2:
    rules.append(('embed', 'model'))
  if parameter_partitioning_dims == 2:
    rules.append(('embed', 'data'))
  ruled = dict(rules)
  whole = ['embed', 'kv', 'relpos_buckets', 'abspos_buckets', 'length', 'layers']
  whole += ['stack', 'mlp_activations']
  rules += [(name, None) for name in whole if name not in ruled]
  ruled = dict(rules)
  for name, axis in additional_rules or ():
    if name in ruled and axis is None:
      logging.warning(
          'The additional rule (%r, None) has no effect: %r goes to %r before. Give '
          'logical_axis_rules without that rule instead.',
          name, name, ruled[name],
      )  # fmt: skip
    rules.append((name, axis))
  return rules


def global_mesh_defined() -> bool:
  """Whether a mesh is in force here (inside a partitioned function, or `set_mesh`)."""
  return not jax.sharding.get_abstract_mesh().empty


def with_sharding_constraint(x: PyTree, axis_resources: PyTree) -> PyTree:
  """`jax.lax.with_sharding_constraint` where a mesh is in force; else `x` as it is.

  T5X does nothing on CPUs; here the constraint holds there too.
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
    with _enter_mesh(self._mesh), flax_partitioning.axis_rules(self._rules):
      yield

  def __call__(self, *args, **kwargs):
    with self._in_force():
      return self._jitted(*args, **kwargs)

  def lower(self, *args, **kwargs) -> jax.stages.Lowered:
    """`jax.jit(...).lower` in the same context."""
    with self._in_force():
      return self._jitted.lower(*args, **kwargs)

  def trace(self, *args, **kwargs) -> jax.stages.Traced:
    """`jax.jit(...).trace` in the same context."""
    with self._in_force():
      return self._jitted.trace(*args, **kwargs)


def _enter_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
  try:
    return jax.set_mesh(mesh)
  except ValueError:
    # Refused while another function is traced, where the abstract mesh is enough.
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def is_spec(x: Any) -> bool:
  """Whether `x` is a leaf in a tree of axis resources."""
  return x is None or isinstance(x, PartitionSpec | AxisNames | jax.sharding.Sharding)


def shardings_on(mesh: Mesh, resources: PyTree) -> PyTree:
  """PartitionSpecs (None: replicated) as shardings on `mesh`."""

  def convert(spec):
    if isinstance(spec, jax.sharding.Sharding):
      return spec
    if spec is not None and not isinstance(spec, PartitionSpec):
      raise ValueError(
        'Axis resources are trees of PartitionSpec (or None: replicated). Got: '
        f'{spec!r}.'
      )
    return NamedSharding(mesh, PartitionSpec() if spec is None else spec)

  return jax.tree.map(convert, resources, is_leaf=is_spec)


def map_prefix(fn: Callable[[Any, Any], Any], prefix: PyTree, tree: PyTree) -> PyTree:
  """fn(spec, leaf) over `tree`, of whose structure `prefix` has the upper part."""
  return jax.tree.map(
    lambda spec, below: jax.tree.map(functools.partial(fn, spec), below),
    prefix,
    tree,
    is_leaf=is_spec,
  )


def host_local_array_to_global_array(
  arr_tree: PyTree, mesh: Mesh, pspecs: PyTree
) -> PyTree:
  """Joins what each host holds into arrays over all hosts.

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


def readable_path(path: Sequence[Any]) -> str:
  """A path of `jax.tree_util` as names with slashes, for messages."""
  return jax.tree_util.keystr(path, simple=True, separator='/')
