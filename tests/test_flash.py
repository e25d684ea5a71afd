"""The TPU kernel, interpreted, against plain attention; and compiled by libtpu."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning

from bart_t5x import attention, flash

RULES = [('batch', 'data'), ('heads', 'model')]


def _arrays(batch, queries, keys, heads, head_dim, dtype=np.float32):
  rng = np.random.default_rng(0)
  shapes = [(batch, n, heads, head_dim) for n in (queries, keys, keys, queries)]
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def _segments(batch, queries, keys, causal):
  """Packed rows; in the first of them some queries see no key, unless causal."""
  rng = np.random.default_rng(1)
  left = np.sort(rng.integers(1, 4, (batch, queries)), axis=1)
  right = left if causal else np.sort(rng.integers(1, 3, (batch, keys)), axis=1)
  return left, right


def _run(core, query, key, value, wanted, *segments, **options):
  """Mixed values of the queries that see a key, and the three gradients."""
  counted = jnp.ones(query.shape[:2], bool)
  if segments:
    counted = (segments[0][:, :, None] == segments[1][:, None]).any(-1)

  def total(query, key, value):
    mixed = core(query, key, value, *segments, **options)
    mixed = jnp.where(counted[:, :, None, None], mixed, 0)
    return jnp.sum(mixed * wanted), mixed

  run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
  (_, mixed), gradients = run(query, key, value)
  return mixed, *gradients


def _assert_equal(ours, theirs, tolerance):
  for left, right in zip(ours, theirs, strict=True):
    left, right = (np.asarray(x, np.float32) for x in (left, right))
    assert np.abs(left - right).max() <= tolerance * np.abs(right).max()


# Shapes: one block of queries or several; lanes shared by heads, filled by one, or
# left over; lengths that fill blocks and that do not.
CASES = [
  ((2, 16, 16, 3, 4), False, 0.0, False),
  ((2, 17, 23, 3, 4), False, 0.3, True),
  ((1, 300, 300, 3, 64), True, 0.3, True),
  ((1, 140, 260, 1, 128), False, 0.1, True),
]


@pytest.mark.parametrize(('shape', 'causal', 'rate', 'packed'), CASES)
def test_equals_plain_attention_with_its_dropout(shape, causal, rate, packed):
  arrays = _arrays(*shape)
  segments = _segments(*shape[:3], causal) if packed else ()
  options = {'causal': causal, 'dropout_rate': rate, 'dropout_key': jax.random.key(3)}
  with flash.interpreted():
    ours = _run(flash.flash_attention, *arrays, *segments, **options)
  theirs = _run(attention.plain_attention, *arrays, *segments, **options)
  _assert_equal(ours, theirs, 1e-5)


def test_bfloat16_is_as_near_to_float32_as_plain_attention_is():
  arrays = _arrays(1, 128, 128, 2, 64)
  low = [x.astype(jnp.bfloat16) for x in arrays]
  exact = _run(attention.plain_attention, *(x.astype(jnp.float32) for x in low))
  plain = _run(attention.plain_attention, *low)
  with flash.interpreted():
    ours = _run(flash.flash_attention, *low)

  def error(found):
    return [np.linalg.norm(np.asarray(x, np.float32) - y) for x, y in zip(found, exact)]

  for our_error, plain_error in zip(error(ours), error(plain), strict=True):
    assert 0 < our_error < 1.2 * plain_error


@pytest.mark.parametrize('axes', [(8, 1), (4, 2), (2, 4)])
def test_each_device_draws_its_part_of_the_dropout(axes):
  """Rows over `data`, heads over `model`; three heads do not divide, and stay whole."""
  mesh = jax.make_mesh(axes, ('data', 'model'), (jax.sharding.AxisType.Auto,) * 2)
  heads = 3 if axes == (8, 1) else 4
  arrays = _arrays(8, 8, 8, heads, 4)
  options = {'dropout_rate': 0.5, 'dropout_key': jax.random.key(1)}
  plain = _run(attention.plain_attention, *arrays, **options)
  with flash.interpreted(), jax.set_mesh(mesh), partitioning.axis_rules(RULES):
    placed = jax.sharding.PartitionSpec('data')
    arrays = [jax.device_put(x, jax.NamedSharding(mesh, placed)) for x in arrays]
    ours = _run(flash.flash_attention, *arrays, **options)
  _assert_equal(ours, plain, 1e-5)


def test_refuses_another_platform_and_shapes_it_does_not_take():
  with pytest.raises(ValueError, match="'flash' is a kernel for TPUs. Got: cpu"):
    _run(flash.flash_attention, *_arrays(1, 8, 8, 1, 4))
  with flash.interpreted():
    with pytest.raises(ValueError, match='width divides 128.* Got: 48'):
      _run(flash.flash_attention, *_arrays(1, 8, 8, 1, 48))
    with pytest.raises(ValueError, match='rows of at most 1024. Got: 1025'):
      _run(flash.flash_attention, *_arrays(1, 8, 1025, 1, 4))


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.parametrize(('topology', 'causal'), [('v3:2x2', True), ('v5e:2x2', False)])
def test_compiles_for_tpus(topology, causal):
  """Mosaic takes both kernels, at the size of bart-base; scores are never stored."""
  pytest.importorskip('libtpu', reason='needs libtpu: pip install "jax[tpu]"')
  from jax.experimental import topologies

  devices = topologies.get_topology_desc(topology, platform='tpu').devices
  mesh = jax.sharding.Mesh(
    np.array(devices).reshape(-1, 1),
    ('data', 'model'),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )
  shape = (2 * len(devices), 1024, 12, 64)
  core = functools.partial(
    flash.flash_attention,
    causal=causal,
    dropout_rate=0.1,
    dropout_key=jax.random.key(0),
  )

  def total(query, key, value, segments):
    return jnp.sum(core(query, key, value, segments, segments).astype(jnp.float32))

  placed = jax.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=placed)] * 3
  segments = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=placed)
  with jax.set_mesh(mesh), partitioning.axis_rules(RULES):
    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*arrays, segments)
    memory = compiled.compile().memory_analysis()
  scores = 2 * 12 * 1024 * 1024 * 4
  assert memory.temp_size_in_bytes < scores / 2
