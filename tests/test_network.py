"""Properties of the Transformer, and its layers against formulas."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning
from flax.traverse_util import flatten_dict

from bart_t5x import network, restack
from t5x import partitioning as t5x_partitioning

CONFIG = network.BartConfig(
    vocab_size=37, emb_dim=12, num_heads=3, num_encoder_layers=2,
    num_decoder_layers=2, mlp_dim=20, max_positions=16, vocab_multiple_of=8,
)  # fmt: skip


@functools.cache
def _shapes(config):
  tokens = jnp.ones((1, 2), jnp.int32)
  init = network.Transformer(config).init
  return jax.eval_shape(
    lambda: init(jax.random.key(0), tokens, tokens, tokens, enable_dropout=False)
  )


def _random_params(config, seed=0):
  """Random values for all parameters, biases and norms included."""
  shapes = _shapes(config)['params']
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: rng.normal(0.1, 0.3, leaf.shape).astype(np.float32), shapes
  )


def _batch(seed=0, batch=3, source=9, target=8):
  rng = np.random.default_rng(seed)
  inputs = rng.integers(4, 37, (batch, source))
  inputs[1:, -3:] = 0
  decoder_inputs = rng.integers(4, 37, (batch, target))
  decoder_inputs[:, 0] = 0
  return inputs, decoder_inputs


@functools.cache
def _jitted(config, method='__call__', **static):
  module = network.Transformer(config)

  def run(variables, *args, **kwargs):
    return module.apply(
      variables, *args, enable_dropout=False, method=method, **static, **kwargs
    )

  return jax.jit(run)


def _logits(config, params, inputs, decoder_inputs, **kwargs):
  return _jitted(config)(
    {'params': params}, inputs, decoder_inputs, decoder_inputs, **kwargs
  )


# ---- masks ---------------------------------------------------------------------


def test_decoder_is_causal():
  """Position t, row t + 2 of the table, has gradients to logits >= t only."""
  params, (inputs, decoder_inputs) = _random_params(CONFIG), _batch(batch=1)

  def outputs(table):
    changed = jax.tree.map(lambda leaf: leaf, params)
    changed['decoder']['position_embedder']['embedding'] = table
    logits = _logits(CONFIG, changed, inputs, decoder_inputs)
    return logits[0, :, : CONFIG.vocab_size].sum(-1)

  table = params['decoder']['position_embedder']['embedding']
  jacobian = jax.jit(jax.jacrev(outputs))(table)
  moved = np.abs(jacobian).sum(-1)[:, 2:10]  # [output, row]
  np.testing.assert_array_equal(moved[np.triu_indices(8, 1)], 0)
  assert (moved[np.tril_indices(8)] > 0).all()


def test_padding_of_inputs_changes_nothing():
  params = _random_params(CONFIG)
  inputs, decoder_inputs = _batch()
  short = _logits(CONFIG, params, inputs[1:, :-3], decoder_inputs[1:])
  padded = _logits(CONFIG, params, inputs[1:], decoder_inputs[1:])
  np.testing.assert_allclose(short, padded, rtol=0, atol=1e-6)


def test_decoder_input_0_is_read_as_end_of_sequence():
  params = _random_params(CONFIG)
  inputs, decoder_inputs = _batch()
  started = np.where(decoder_inputs == 0, 2, decoder_inputs)
  np.testing.assert_array_equal(
    _logits(CONFIG, params, inputs, decoder_inputs),
    _logits(CONFIG, params, inputs, started),
  )


def test_packed_examples_equal_the_same_examples_alone():
  params = _random_params(CONFIG)
  rng = np.random.default_rng(5)
  sizes = [(4, 5), (6, 3), (2, 4)]  # source and target lengths, in one row
  examples = [
    (rng.integers(4, 37, (1, source)), rng.integers(4, 37, (1, target)))
    for source, target in sizes
  ]
  packed = {}
  for side, index in (('encoder', 0), ('decoder', 1)):
    pad = np.zeros((1, 16 - sum(size[index] for size in sizes)), int)
    rows = [example[index] for example in examples]
    packed[side] = np.concatenate([*rows, pad], 1)
    packed[f'{side}_segment_ids'] = np.concatenate(
      [np.full_like(row, i + 1) for i, row in enumerate(rows)] + [pad], 1
    )
    packed[f'{side}_positions'] = np.concatenate(
      [np.arange(row.shape[1])[None] for row in rows] + [pad], 1
    )
  together = _logits(
    CONFIG, params, packed.pop('encoder'), packed.pop('decoder'), **packed
  )

  def padded(row):
    return np.pad(row[0], (0, 16 - row.shape[1]))

  rows = [[padded(side) for side in example] for example in examples]
  alone = _logits(CONFIG, params, *map(np.stack, zip(*rows, strict=True)))
  start = 0
  for row, (_, length) in enumerate(sizes):
    np.testing.assert_allclose(
      together[0, start : start + length], alone[row, :length], rtol=0, atol=2e-6
    )
    start += length
  assert np.isfinite(together).all()


# ---- the cache ---------------------------------------------------------------


def _decode(config, params, cache, encoded, inputs, tokens, mode, **kwargs):
  """Returns logits and the new cache of a call in mode 'decode' or 'prefill'."""
  run = _jitted(config, 'decode', mutable='cache', **{mode: True})
  logits, changed = run(
      {'params': params, 'cache': cache}, encoded, inputs, tokens,
      np.ones_like(tokens), **kwargs,
  )  # fmt: skip
  return logits, changed['cache']


def _setup(scan_layers, seed=0):
  config = dataclasses.replace(CONFIG, scan_layers=scan_layers)
  params = _random_params(config, seed)
  inputs, decoder_inputs = _batch(seed)
  encoded = _jitted(config, 'encode')({'params': params}, inputs)
  ones = np.ones_like(decoder_inputs)
  _, made = _jitted(config, mutable='cache', decode=True)(
    {'params': params}, np.ones_like(inputs), ones, ones
  )
  full = _logits(config, params, inputs, decoder_inputs)
  return config, params, encoded, made['cache'], inputs, decoder_inputs, full


@pytest.mark.parametrize('scan_layers', [False, True])
def test_cached_decoding_equals_the_full_pass(scan_layers):
  config, params, encoded, cache, inputs, tokens, full = _setup(scan_layers)
  for position in range(tokens.shape[1]):
    logits, cache = _decode(
        config, params, cache, encoded, inputs, tokens[:, position : position + 1],
        'decode',
    )  # fmt: skip
    np.testing.assert_allclose(logits[:, 0], full[:, position], rtol=0, atol=2e-6)


@pytest.mark.parametrize('scan_layers', [False, True])
def test_adjacent_rows_may_share_a_row_of_the_encoder(scan_layers):
  config, params, encoded, cache, inputs, _, _ = _setup(scan_layers)
  tokens = np.arange(4, 10)[:, None]
  cache = jax.tree.map(
    lambda leaf: np.repeat(leaf, 2, int(scan_layers)) if leaf.ndim > 1 else leaf, cache
  )
  shared, _ = _decode(config, params, cache, encoded, inputs, tokens, 'decode')
  repeated, _ = _decode(
      config, params, cache, np.repeat(encoded, 2, 0), np.repeat(inputs, 2, 0), tokens,
      'decode',
  )  # fmt: skip
  np.testing.assert_allclose(shared, repeated, rtol=0, atol=2e-6)


def _set_position(cache, lengths):
  """As T5X's models do after a prompt."""
  cache['decoder']['position_embedder']['position_embedder_index'] = lengths
  return cache


@pytest.mark.parametrize('scan_layers', [False, True])
def test_prompts_of_unequal_lengths_then_steps_equal_the_full_pass(scan_layers):
  config, params, encoded, cache, inputs, tokens, full = _setup(scan_layers)
  lengths = np.array([1, 4, 2])
  prompts = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, 0)
  logits, cache = _decode(
      config, params, cache, encoded, inputs, prompts, 'prefill',
      prefill_lengths=lengths,
  )  # fmt: skip
  rows = np.arange(3)
  np.testing.assert_allclose(
    logits[rows, lengths - 1], full[rows, lengths - 1], rtol=0, atol=2e-6
  )
  cache = _set_position(cache, lengths)
  for step in range(3):
    here = lengths + step
    logits, cache = _decode(
        config, params, cache, encoded, inputs, tokens[rows, here][:, None],
        'decode',
    )  # fmt: skip
    np.testing.assert_allclose(logits[:, 0], full[rows, here], rtol=0, atol=2e-6)


@pytest.mark.parametrize('index_shape', [(3,), (6,), (3, 2)])
def test_cache_index_per_row_beam_or_both(index_shape):
  config, params, encoded, cache, inputs, tokens, full = _setup(False)
  _, cache = _decode(
      config, params, cache, encoded, inputs, tokens, 'prefill',
      prefill_lengths=np.array([3, 3, 3]),
  )  # fmt: skip
  cache = jax.tree.map(lambda leaf: np.repeat(leaf, 2, 0) if leaf.ndim else leaf, cache)
  cache = _set_position(cache, np.array([3, 3, 3]))
  for layer in ('layers_0', 'layers_1'):
    attention = cache['decoder'][layer]['self_attention']
    attention['cache_index'] = np.full(index_shape, 3)
  logits, cache = _decode(
      config, params, cache, np.repeat(encoded, 2, 0), np.repeat(inputs, 2, 0),
      np.repeat(tokens[:, 3:4], 2, 0), 'decode',
  )  # fmt: skip
  np.testing.assert_allclose(
    logits[:, 0], np.repeat(full[:, 3], 2, 0), rtol=0, atol=2e-6
  )
  index = cache['decoder']['layers_0']['self_attention']['cache_index']
  np.testing.assert_array_equal(index, np.full(index_shape, 4))


# ---- equivalent configurations -------------------------------------------------

ONE_LAYER = dataclasses.replace(CONFIG, num_encoder_layers=1, num_decoder_layers=1)


def _loss(config, params, key=None):
  logits = network.Transformer(config).apply(
      {'params': params}, *_batch(), _batch()[1], enable_dropout=key is not None,
      rngs=None if key is None else {'dropout': key},
  )  # fmt: skip
  return jnp.mean(jnp.sin(logits[..., : config.vocab_size]))


@functools.cache
def _loss_and_gradients(config, seed=None):
  """The same random parameters for all configs, stacked if the config scans."""
  # JAX's own generator takes long to compile where a network folds in many keys.
  key = None if seed is None else jax.random.key(seed, impl='unsafe_rbg')
  params = _random_params(dataclasses.replace(config, scan_layers=False))
  if config.scan_layers:
    params = restack.stack_layers(params)
  run = jax.jit(jax.value_and_grad(functools.partial(_loss, config, key=key)))
  value, gradients = run(params)
  return value, restack.unstack_layers(gradients)


def _assert_close(left, right, tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance),
    left,
    right,
  )


def test_scanned_layers_equal_separate_layers():
  scanned = dataclasses.replace(CONFIG, scan_layers=True)
  _assert_close(_loss_and_gradients(scanned), _loss_and_gradients(CONFIG), 1e-6)


DROPPING = dataclasses.replace(
  ONE_LAYER, dropout_rate=0.2, attention_dropout_rate=0.3, activation_dropout_rate=0.1
)


@pytest.mark.parametrize(
  ('remat_policy', 'scan_layers'),
  [('attention', False), ('dots', False), ('full', True)],
)
def test_recomputation_changes_neither_loss_nor_gradients(remat_policy, scan_layers):
  """With dropout, whose bits must be the same in the recomputation."""
  config = dataclasses.replace(DROPPING, scan_layers=scan_layers)
  changed = dataclasses.replace(config, remat_policy=remat_policy)
  _assert_close(_loss_and_gradients(config, 3), _loss_and_gradients(changed, 3), 1e-6)


def test_bfloat16_is_near_float32():
  config = dataclasses.replace(CONFIG, dtype='bfloat16')
  params = _random_params(config)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype('float32')}
  inputs, decoder_inputs = _batch()
  low = _logits(config, params, inputs, decoder_inputs)
  high = _logits(CONFIG, params, inputs, decoder_inputs)
  assert low.dtype == jnp.float32
  difference = np.abs(low - high)[..., :37]
  assert 0 < difference.max() < 0.05 * np.abs(high[..., :37]).max()


# ---- dropout -----------------------------------------------------------------


@pytest.mark.parametrize(
  'name', ['dropout_rate', 'attention_dropout_rate', 'activation_dropout_rate']
)
def test_each_dropout_rate_acts(name):
  off = dataclasses.replace(
    ONE_LAYER, dropout_rate=0, attention_dropout_rate=0, activation_dropout_rate=0
  )
  on = dataclasses.replace(off, **{name: 0.5})
  params = _random_params(on)
  run = jax.jit(functools.partial(_loss, on))
  keys = [jax.random.key(seed, impl='unsafe_rbg') for seed in (0, 0, 1)]
  first, again, other = (run(params, key) for key in keys)
  assert first == again != other
  # At rate 0 the key changes nothing.
  drawn = jax.jit(functools.partial(_loss, off))(params, keys[0])
  np.testing.assert_allclose(drawn, _loss_and_gradients(ONE_LAYER)[0], atol=1e-7)


# ---- parameters --------------------------------------------------------------


@pytest.mark.parametrize(
    ('overrides', 'parameters', 'leaves'),
    [
        ({}, 139_420_416, 260),
        (
            {
                'emb_dim': 1024, 'num_heads': 16, 'num_encoder_layers': 12,
                'num_decoder_layers': 12, 'mlp_dim': 4096,
            },
            406_291_456,
            512,
        ),
    ],
)  # fmt: skip
def test_published_models_have_as_many_parameters(overrides, parameters, leaves):
  config = network.BartConfig(vocab_size=50265, vocab_multiple_of=1, **overrides)
  shapes = _shapes(config)['params']
  flat = flatten_dict(shapes, sep='/')
  counted = sum(leaf.size for name, leaf in flat.items() if name != 'final_logits_bias')
  assert (counted, len(flat)) == (parameters, leaves)


@pytest.mark.parametrize('scan_layers', [False, True])
def test_standard_rules_cover_all_parameters(scan_layers):
  variables = _shapes(dataclasses.replace(CONFIG, scan_layers=scan_layers))
  axes = partitioning.get_axis_names(variables['params_axes'])
  names, params = (
    flatten_dict(axes, sep='/'),
    flatten_dict(variables['params'], sep='/'),
  )
  assert names.keys() == params.keys()
  known = {name for name, _ in t5x_partitioning.standard_logical_axis_rules()}
  for path, spec in names.items():
    assert len(spec) == params[path].ndim, path
    assert set(spec) <= known, path


def test_initial_parameters():
  config = dataclasses.replace(CONFIG, emb_dim=96, mlp_dim=200)
  tokens = jnp.ones((1, 2), jnp.int32)
  init = jax.jit(network.Transformer(config).init, static_argnames='enable_dropout')
  params = init(jax.random.key(0), tokens, tokens, tokens, enable_dropout=False)
  params = params['params']
  for path, leaf in flatten_dict(params, sep='/').items():
    if path.endswith('scale'):
      np.testing.assert_array_equal(leaf, 1)
    elif path.endswith('bias'):
      np.testing.assert_array_equal(leaf, 0)
    else:
      assert abs(leaf.std() - 0.02) < 0.002, path


def test_logits_bias_is_not_trained_and_padding_is_never_best():
  params = _random_params(CONFIG)
  gradients = _loss_and_gradients(CONFIG)[1]
  np.testing.assert_array_equal(gradients['final_logits_bias'], 0)
  np.testing.assert_array_equal(gradients['token_embedder']['embedding'][37:], 0)
  logits = _logits(CONFIG, params, *_batch())
  assert logits.shape[-1] == CONFIG.padded_vocab_size == 40
  assert (logits[..., 37:] == -1e9).all()


def test_weight_decay_spares_biases_norms_and_the_logits_bias():
  mask = flatten_dict(network.weight_decay_mask(_random_params(CONFIG)), sep='/')
  decayed = {path.rsplit('/', 1)[-1] for path, decays in mask.items() if decays}
  spared = {path.rsplit('/', 1)[-1] for path, decays in mask.items() if not decays}
  assert decayed == {'kernel', 'embedding'}
  assert spared == {'bias', 'scale', 'final_logits_bias'}


# ---- errors ------------------------------------------------------------------


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('num_heads', 5, '5 / 12'),
    ('mlp_dim', 2.5, 'positive integer. Got: 2.5'),
    ('dropout_rate', 1.0, 'below 1. Got: 1.0'),
    ('attention_dropout_rate', '0.1', "Got: '0.1'"),
    ('dtype', 'float17', "Got: 'float17'"),
    ('dtype', 'int32', "Got: 'int32'"),
    ('remat_policy', 'minimal', "Got: 'minimal'"),
    ('attention_impl', 'fast', "Got: 'fast'"),
    ('attention_impl', 'cudnn', 'attention_dropout_rate = 0'),
  ],
)
def test_config_rejects_invalid_values(field, value, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **{field: value})


@pytest.mark.parametrize(
  ('length', 'features', 'message'),
  [
    (17, (), 'row of 17 tokens .* 16'),
    (4, ('encoder_segment_ids',), 'needs encoder_positions'),
  ],
)
def test_invalid_rows_raise(length, features, message):
  params, rows = _random_params(CONFIG), np.ones((1, length), int)
  with pytest.raises(ValueError, match=message):
    _logits(CONFIG, params, rows, rows, **dict.fromkeys(features, rows))


# ---- layers --------------------------------------------------------------------


def test_gelu_is_exact():
  x = np.linspace(-9, 9, 2001).astype(np.float32)
  phi = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.astype(float)])
  # Four roundings relative to the larger of 1 and x.
  spacing = np.finfo(np.float32).eps * np.maximum(1, np.abs(x))
  assert (np.abs(network.gelu(x) - x * phi) <= 2 * spacing).all()
  # The tanh approximation, JAX's default, is less accurate.
  assert np.abs(jax.nn.gelu(x) - x * phi).max() > 1e-4


def test_layer_norm_with_epsilon_1e_5():
  x = np.random.default_rng(0).normal(0.1, 1e-2, (2, 3, 8)).astype(np.float32)
  scale, bias = np.linspace(0.5, 2, 8), np.linspace(-1, 1, 8)
  got = network.LayerNorm(jnp.float32).apply(
    {'params': {'scale': scale, 'bias': bias}}, x
  )
  x = x.astype(np.float64)
  spread = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  wanted = (x - x.mean(-1, keepdims=True)) / spread * scale + bias
  np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)


def test_layer_norm_of_bfloat16_runs_in_float32():
  x = jnp.asarray(np.random.default_rng(0).normal(100, 1, (1, 2, 64)), jnp.bfloat16)
  params = {'params': {'scale': np.ones(64), 'bias': np.zeros(64)}}
  low = network.LayerNorm(jnp.bfloat16).apply(params, x)
  high = network.LayerNorm(jnp.float32).apply(params, x.astype(jnp.float32))
  assert low.dtype == jnp.bfloat16
  np.testing.assert_array_equal(low, high.astype(jnp.bfloat16))


SMALL = network.BartConfig(
  vocab_size=8, vocab_multiple_of=8, emb_dim=3, num_heads=1, max_positions=6
)


TABLE = np.arange(24, dtype=np.float32).reshape(8, 3)


def test_positions_are_offset_by_two_rows():
  params = {'params': {'embedding': TABLE}}
  tokens = np.ones((2, 4), int)
  embed = network.PositionEmbedder(SMALL).apply
  counted = embed(params, network.Rows(tokens))
  np.testing.assert_array_equal(counted, TABLE[None, 2:6])
  packed = np.array([[0, 1, 0, 1], [0, 1, 2, 5]])
  got = embed(params, network.Rows(tokens, positions=packed))
  np.testing.assert_array_equal(got, TABLE[packed + 2])


def test_unknown_ids_embed_as_nan():
  module = network.TokenEmbedder(SMALL)
  got = module.apply({'params': {'embedding': TABLE}}, np.array([[7, 8]]))
  np.testing.assert_array_equal(got[0, 0], TABLE[7])
  assert np.isnan(got[0, 1]).all()


def _attention(causal=False, **mode):
  config = network.BartConfig(vocab_size=8, emb_dim=6, num_heads=2, init_std=0.3)
  return network.Attention(config, network.Mode(**mode), causal)


@pytest.mark.parametrize(
  ('mode', 'length', 'message'),
  [('decode', 4, r'one position .*\[2, 4\]'), ('prefill', 3, r'\(2, 3\) / \(2, 4\)')],
)
def test_cache_rejects_other_shapes(mode, length, message):
  x = np.ones((2, 4, 6), np.float32)
  variables = _attention(causal=True, decode=True).init(jax.random.key(0), x, x)
  variables.pop('params_axes')
  module, x = _attention(causal=True, **{mode: True}), x[:, :length]
  with pytest.raises(ValueError, match=message):
    module.apply(variables, x, x, None, None, np.array([1, 1]), mutable=['cache'])


def test_prompts_need_a_cache():
  module, x = _attention(causal=True, prefill=True), np.ones((2, 4, 6), np.float32)
  with pytest.raises(ValueError, match='needs a cache'):
    module.init(jax.random.key(0), x, x, None, None, np.array([1, 1]))


def test_attention_is_the_formula():
  rng = np.random.default_rng(1)
  queries, keys = rng.normal(size=(1, 3, 6)), rng.normal(size=(1, 4, 6))
  module = _attention()
  variables = module.init(jax.random.key(0), queries, keys)
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), variables['params'])
  got = module.apply({'params': params}, queries, keys)
  heads = []
  for head in (slice(0, 3), slice(3, 6)):
    q, k, v = (
      x @ params[name]['kernel'][:, head] + params[name]['bias'][head]
      for name, x in (('query', queries), ('key', keys), ('value', keys))
    )
    scores = np.exp((q / math.sqrt(3)) @ k.transpose(0, 2, 1))
    heads.append(scores / scores.sum(-1, keepdims=True) @ v)
  out = params['out']
  wanted = np.concatenate(heads, -1) @ out['kernel'] + out['bias']
  np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)
