"""The TPU kernel, interpreted, against plain attention; and compiled by libtpu."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning
from jax.extend import core as jax_core
from jax.interpreters import partial_eval

from bart_t5x import attention, flash, network

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


def _run(attend, query, key, value, wanted, *segments, **options):
  """The output of the queries that see a key, and the three gradients."""
  counted = jnp.ones(query.shape[:2], bool)
  if segments:
    counted = (segments[0][:, :, None] == segments[1][:, None]).any(-1)

  def total(query, key, value):
    attended = attend(query, key, value, *segments, **options)
    attended = jnp.where(counted[:, :, None, None], attended, 0)
    return jnp.sum(attended * wanted), attended

  run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
  (_, attended), gradients = run(query, key, value)
  return attended, *gradients


def _assert_equal(ours, theirs, tolerance):
  for left, right in zip(ours, theirs, strict=True):
    left, right = (np.asarray(x, np.float32) for x in (left, right))
    assert np.abs(left - right).max() <= tolerance * np.abs(right).max()


# One block of queries or several; lanes shared by heads, filled by one, or left over;
# lengths that fill blocks or not; keys in one block or two.
CASES = [
  ((2, 16, 16, 3, 4), False, 0.0, False),
  ((2, 17, 23, 3, 4), False, 0.3, True),
  ((1, 300, 300, 3, 64), True, 0.3, True),
  ((1, 140, 260, 1, 128), False, 0.1, True),
  ((1, 130, 600, 2, 64), False, 0.1, True),
  ((1, 600, 600, 2, 64), True, 0.1, True),
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


@pytest.mark.parametrize('widened', [False, True])
def test_bfloat16_is_as_accurate_as_plain_attention(monkeypatch, widened):
  """With products of bfloat16 and, as on a v3, of float32."""
  monkeypatch.setattr(flash, '_FLOAT32_KINDS', ('cpu',) if widened else ())
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


def _kernels(jaxpr):
  """Counts calls of each kernel whose results are needed."""
  needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  counts = collections.Counter()
  for equation in needed.eqns:
    if equation.primitive.name == 'pallas_call':
      counts[equation.params['name']] += 1
    else:
      for inner in jax_core.jaxprs_in_params(equation.params):
        counts += _kernels(inner)
  return counts


@pytest.mark.parametrize(('policy', 'calls'), [('dots', 1), ('full', 2)])
def test_recomputation_repeats_the_kernel_only_with_full(policy, calls):
  config = network.BartConfig(
      vocab_size=40, emb_dim=128, num_heads=2, num_encoder_layers=1,
      num_decoder_layers=1, mlp_dim=16, max_positions=16, attention_impl='flash',
      remat_policy=policy,
  )  # fmt: skip
  model = network.Transformer(config)
  tokens = jnp.ones((1, 16), jnp.int32)

  def loss(params):
    return model.apply({'params': params}, *[tokens] * 3, enable_dropout=False).sum()

  plain = network.Transformer(dataclasses.replace(config, attention_impl='plain'))
  shapes = jax.eval_shape(
    lambda: plain.init(jax.random.key(0), *[tokens] * 3, enable_dropout=False)
  )
  mesh = jax.make_mesh((1, 1), ('data', 'model'), (jax.sharding.AxisType.Auto,) * 2)
  with flash.interpreted(), jax.set_mesh(mesh), partitioning.axis_rules(RULES):
    jaxpr = jax.make_jaxpr(jax.grad(loss))(shapes['params']).jaxpr
  assert _kernels(jaxpr) == {
    'flash_attention_forward_kernel': 3 * calls,
    'flash_attention_backward_kernel': 3,
  }


def test_other_platforms_and_unsupported_shapes_raise():
  with pytest.raises(ValueError, match='Got: cpu'):
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
  attend = functools.partial(
    flash.flash_attention,
    causal=causal,
    dropout_rate=0.1,
    dropout_key=jax.random.key(0),
  )

  def total(query, key, value, segments):
    return jnp.sum(attend(query, key, value, segments, segments).astype(jnp.float32))

  placed = jax.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=placed)] * 3
  segments = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=placed)
  with jax.set_mesh(mesh), partitioning.axis_rules(RULES):
    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*arrays, segments)
    memory = compiled.compile().memory_analysis()
  scores = 2 * 12 * 1024 * 1024 * 4
  assert memory.temp_size_in_bytes < scores / 2


# ---- parts of arrays on each device ------------------------------------------


def _mesh():
  return jax.make_mesh((4, 2), ('data', 'model'), (jax.sharding.AxisType.Auto,) * 2)


def _numbered(heads=4):
  """Each element as (its part's first row, its part's first head)."""

  def part(starts, x):
    return [jnp.zeros_like(x) + starts[0] * 100 + starts[1]]

  x, names = jnp.zeros((8, heads), jnp.int32), [('batch', 'heads')]
  return jax.jit(flash.on_each_device(part, names, names, 8, heads))(x)[0]


@pytest.mark.parametrize(('heads', 'first_heads'), [(4, [0, 0, 2, 2]), (3, [0, 0, 0])])
def test_parts_know_their_first_row_and_head(heads, first_heads):
  """Three heads do not divide among two devices and stay whole."""
  with jax.set_mesh(_mesh()), partitioning.axis_rules(RULES):
    got = _numbered(heads)
  np.testing.assert_array_equal(got, np.arange(8)[:, None] // 2 * 200 + first_heads)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_mesh_entered_as_a_context_manager():
  """As google-research/t5x enters it."""
  with _mesh(), partitioning.axis_rules(RULES):
    assert flash.mesh().shape['model'] == 2
    assert flash.device().platform == 'cpu'
    got = _numbered()
  assert got[7, 3] == 602


def test_device_and_mesh_in_use():
  assert flash.mesh() is None and flash.device().platform == 'cpu'
  np.testing.assert_array_equal(_numbered(), 0)
  with jax.set_mesh(_mesh()):
    assert flash.mesh().shape['data'] == 4
    assert flash.device().platform == 'cpu'
