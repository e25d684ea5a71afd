"""The two models around small Flax modules.

Decoding with a cache is compared with the whole model's probabilities, without one, of
every possible sequence.
"""

import inspect
import itertools
import subprocess
import sys
from unittest import mock

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x import decoding, losses, models

# ---- A transformer of five tokens, and everything it could decode ----

EOS = 2
VOCABULARY = 5
LENGTH = 4
HEADS, WIDTH = 2, 8


class Attention(nn.Module):
  """Multi-head attention; its cache is laid out [batch, heads, dim, length]."""

  @nn.compact
  def __call__(self, x, source, mask, decode=False, prefill_lengths=None):
    def project(name, inputs):
      return nn.DenseGeneral((HEADS, WIDTH // HEADS), name=name)(inputs)

    query, key, value = (
      project('query', x),
      project('key', source),
      project('value', source),
    )
    if decode or prefill_lengths is not None:
      key, value, mask = self.cached(key, value, mask, prefill_lengths)
    scores = jnp.einsum('bqhd,bkhd->bhqk', query, key)
    weights = nn.softmax(jnp.where(mask, scores, -1e9))
    self.sow('intermediates', 'weights', weights)
    mixed = jnp.einsum('bhqk,bkhd->bqhd', weights, value)
    return nn.DenseGeneral(WIDTH, axis=(-2, -1), name='out')(mixed)

  def cached(self, key, value, mask, prefill_lengths):
    exists = self.has_variable('cache', 'cached_key')
    turned = tuple(key.shape[i] for i in (0, 2, 3, 1))
    keys = self.variable('cache', 'cached_key', jnp.zeros, turned)
    values = self.variable('cache', 'cached_value', jnp.zeros, turned)
    index = self.variable('cache', 'cache_index', jnp.zeros, (), jnp.int32)
    if not exists:
      return key, value, mask
    length = keys.value.shape[-1]
    if prefill_lengths is not None:
      keys.value, values.value = (jnp.moveaxis(x, 1, -1) for x in (key, value))
      index.value = prefill_lengths
      return key, value, mask
    at = jnp.broadcast_to(index.value, key.shape[:1])[:, None, None, None]
    here = jnp.arange(length) == at
    keys.value = jnp.where(here, jnp.moveaxis(key, 1, -1), keys.value)
    values.value = jnp.where(here, jnp.moveaxis(value, 1, -1), values.value)
    index.value = index.value + 1
    key, value = (jnp.moveaxis(x.value, -1, 1) for x in (keys, values))
    return key, value, jnp.arange(length) <= at


class Positions(nn.Module):
  @nn.compact
  def __call__(self, x, decode):
    table = self.param('table', nn.initializers.normal(1.0), (16, WIDTH))
    position = jnp.arange(x.shape[1])[None]
    if decode:
      stepping = self.has_variable('cache', 'position_embedder_index')
      index = self.variable(
        'cache', 'position_embedder_index', jnp.zeros, (), jnp.int32
      )
      if stepping:
        position = jnp.broadcast_to(index.value, x.shape[:1])[:, None]
        index.value = index.value + 1
    return x + table[position]


class Decoder(nn.Module):
  @nn.compact
  def __call__(self, y, encoded, masks, decode, prefill_lengths, dropout):
    y = Positions(name='position_embedder')(y, decode)
    y = y + Attention(name='self')(y, y, masks[0], decode, prefill_lengths)
    y = nn.Dropout(0.3)(y, deterministic=not dropout)
    y = y + Attention(name='cross')(y, encoded, masks[1])
    return nn.Dense(VOCABULARY, name='logits')(nn.tanh(y))


class Transformer(nn.Module):
  """T5X's contract, without prefilling."""

  def setup(self):
    self.embed = nn.Embed(VOCABULARY, WIDTH, embedding_init=nn.initializers.normal(1.0))
    self.mix = Attention()
    self.decoder = Decoder()

  def encode(self, encoder_input_tokens, encoder_segment_ids=None, enable_dropout=True):
    x = self.embed(encoder_input_tokens.astype(jnp.int32))
    return x + self.mix(x, x, (encoder_input_tokens > 0)[:, None, None, :])

  def decode(
    self,
    encoded,
    encoder_input_tokens,
    decoder_input_tokens,
    decoder_target_tokens,
    enable_dropout=True,
    decode=False,
    max_decode_length=None,
  ):
    return self._decode(
      encoded, encoder_input_tokens, decoder_input_tokens, enable_dropout, decode
    )

  def _decode(
    self, encoded, encoder_tokens, tokens, dropout, decode, prefill_lengths=None
  ):
    length = tokens.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
    masks = causal, (encoder_tokens > 0)[:, None, None, :]
    y = self.embed(tokens.astype(jnp.int32))
    return self.decoder(y, encoded, masks, decode, prefill_lengths, dropout)

  def __call__(
    self,
    encoder_input_tokens,
    decoder_input_tokens,
    decoder_target_tokens,
    encoder_segment_ids=None,
    decoder_segment_ids=None,
    encoder_positions=None,
    decoder_positions=None,
    *,
    enable_dropout=True,
    decode=False,
  ):
    encoded = self.encode(encoder_input_tokens)
    return self.decode(
      encoded,
      encoder_input_tokens,
      decoder_input_tokens,
      decoder_target_tokens,
      enable_dropout=enable_dropout,
      decode=decode,
    )


class PrefillTransformer(Transformer):
  """T5X's contract, with prefilling."""

  def decode(
    self,
    encoded,
    encoder_input_tokens,
    decoder_input_tokens,
    decoder_target_tokens,
    enable_dropout=True,
    decode=False,
    max_decode_length=None,
    prefill=False,
    prefill_lengths=None,
  ):
    return self._decode(
      encoded,
      encoder_input_tokens,
      decoder_input_tokens,
      enable_dropout,
      decode,
      prefill_lengths if prefill else None,
    )


def make_model(module=None, cls=models.EncoderDecoderModel, **options):
  vocabulary = mock.Mock(eos_id=EOS)
  return cls(
    module=module or Transformer(),
    input_vocabulary=mock.Mock(eos_id=EOS),
    output_vocabulary=vocabulary,
    optimizer_def=mock.Mock(),
    **options,
  )


def make_batch(seed=0, rows=3):
  rng = np.random.default_rng(seed)
  inputs = rng.integers(1, VOCABULARY, (rows, 5)).astype(np.int32)
  inputs[0, 3:] = 0
  targets = rng.integers(3, VOCABULARY, (rows, LENGTH)).astype(np.int32)
  targets[1, 2:] = [EOS, 0]
  shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
  return {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': shifted,
    'decoder_target_tokens': targets,
    'decoder_loss_weights': (targets != 0).astype(np.float32),
  }


def log_probs_of(params, batch):
  logits = Transformer().apply(
    {'params': params},
    batch['encoder_input_tokens'],
    batch['decoder_input_tokens'],
    batch['decoder_target_tokens'],
    enable_dropout=False,
  )
  return np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32)))


def all_sequences(params, encoder_row, prompt=(), length=LENGTH):
  """Every closed sequence after a prompt with its log probability, best first."""
  sequences = []
  for size in range(length - len(prompt)):
    for middle in itertools.product((3, 4), repeat=size):
      sequence = (*prompt, *middle, EOS)
      sequences.append(sequence + (0,) * (length - len(sequence)))
  targets = np.array(sequences, np.int32)
  batch = {
    'encoder_input_tokens': np.tile(encoder_row, (len(targets), 1)),
    'decoder_input_tokens': np.pad(targets[:, :-1], ((0, 0), (1, 0))),
    'decoder_target_tokens': targets,
  }
  token = np.take_along_axis(log_probs_of(params, batch), targets[:, :, None], axis=2)[
    :, :, 0
  ]
  counted = (targets != 0) & (np.arange(length) >= len(prompt))
  log_prob = np.sum(token * counted, axis=1)
  order = np.argsort(-log_prob)
  return targets[order], log_prob[order]


# ---- The encoder-decoder model ----


@pytest.fixture(scope='module')
def params():
  model = make_model()
  shapes = {name: x.shape for name, x in make_batch().items()}
  types = dict.fromkeys(shapes, jnp.int32)
  variables = model.get_initial_variables(jax.random.PRNGKey(0), shapes, types)
  assert isinstance(variables, flax.core.FrozenDict)
  params = flax.core.unfreeze(variables)['params']
  # Padding is never decoded.
  params['decoder']['logits']['bias'] = jnp.array([-1e9, -1e9, 0.5, 0.0, 0.0])
  return params


@pytest.mark.parametrize('module', [Transformer(), PrefillTransformer()])
@pytest.mark.parametrize('prompted', [False, True])
def test_cached_beam_search_against_brute_force(params, module, prompted):
  model = make_model(module)
  batch = make_batch()
  prompts = [(3,), (4, 3), ()] if prompted else [(), (), ()]
  batch['decoder_input_tokens'] = np.zeros((3, LENGTH), np.int32)
  for row, prompt in zip(batch['decoder_input_tokens'], prompts, strict=True):
    row[1 : len(prompt) + 1] = prompt

  def predict(params, batch):
    return model.predict_batch_with_aux(
      params,
      batch,
      decoder_params={'alpha': 0.0},
      return_all_decodes=True,
      num_decodes=8,
      prompt_with_targets=prompted,
    )

  decodes, aux = jax.jit(predict)(params, batch)
  for row, prompt in enumerate(prompts):
    sequences, log_prob = all_sequences(
      params, batch['encoder_input_tokens'][row], prompt
    )
    found = np.asarray(aux['scores'][row]) > decoding.NEG_INF_VALUE
    count = min(8, len(sequences))
    assert found.sum() == count
    np.testing.assert_array_equal(decodes[row][found], sequences[:count][::-1])
    np.testing.assert_allclose(
      aux['scores'][row][found], log_prob[:count][::-1], rtol=1e-5
    )


@pytest.mark.parametrize('module', [Transformer(), PrefillTransformer()])
def test_cached_sampling_scores_are_the_whole_models(params, module):
  model = make_model(module, decode_fn=decoding.temperature_sample)
  batch = make_batch()
  options = {'topk': 0, 'max_decode_steps': 3}
  before = dict(options)
  decodes, aux = model.predict_batch_with_aux(
    params,
    batch,
    rng=jax.random.PRNGKey(3),
    decoder_params=options,
    return_all_decodes=True,
    num_decodes=5,
  )
  # Options are read, not edited.
  assert options == before
  assert decodes.shape == (3, 5, LENGTH)
  assert len(np.unique(decodes.reshape(-1, LENGTH), axis=0)) > 3
  flat = np.asarray(decodes).reshape(-1, LENGTH)
  log_probs = log_probs_of(
    params,
    {
      'encoder_input_tokens': np.repeat(batch['encoder_input_tokens'], 5, axis=0),
      'decoder_input_tokens': np.pad(flat[:, :-1], ((0, 0), (1, 0))),
      'decoder_target_tokens': flat,
    },
  )
  token = np.take_along_axis(log_probs, flat[:, :, None], axis=2)[:, :, 0]
  expected = np.sum(token * (flat != 0), axis=1).reshape(3, 5)
  np.testing.assert_allclose(aux['scores'], expected, rtol=1e-5)


def test_prediction_sharded_over_devices(params):
  model = make_model()
  batch = make_batch(rows=8)
  mesh = Mesh(np.array(jax.devices()[:8]), ('data',))
  rows = NamedSharding(mesh, PartitionSpec('data'))
  predict = jax.jit(lambda p, b: model.predict_batch_with_aux(p, b, num_decodes=3))
  whole, whole_aux = predict(params, batch)
  sharded, aux = predict(params, jax.device_put(batch, rows))
  np.testing.assert_array_equal(whole, sharded)
  np.testing.assert_allclose(whole_aux['scores'], aux['scores'], rtol=1e-5)


def test_default_decoder_params(params):
  batch = make_batch()
  model = make_model(
    default_decoder_params=models.DecoderParams(return_all_decodes=True, num_decodes=3)
  )
  decodes, aux = model.predict_batch_with_aux(params, batch)
  assert decodes.shape == (3, 3, LENGTH)
  best, best_aux = model.predict_batch_with_aux(params, batch, return_all_decodes=False)
  np.testing.assert_array_equal(best, decodes[:, -1])
  np.testing.assert_array_equal(best_aux['scores'], aux['scores'][:, -1])
  alone = make_model().predict_batch(params, batch)
  assert alone.shape == (3, LENGTH)


def decode_with(params, batch, **arguments):
  """Returns the arguments of the decoding function."""
  calls = []

  def decode_fn(**options):
    calls.append(options)
    rows, length = options['inputs'].shape
    number = options['num_decodes']
    return jnp.zeros((rows, number, length), jnp.int32), jnp.zeros((rows, number))

  make_model(decode_fn=decode_fn).predict_batch_with_aux(params, batch, **arguments)
  return calls[0]


def test_arguments_of_the_decoding_function(params):
  batch = make_batch()
  options = decode_with(params, batch)
  assert options['eos_id'] == EOS and options['num_decodes'] == 1
  assert options['cache_offset'] == 0 and not options['inputs'].any()
  # Only functions that know them get them.
  assert 'initial_index' not in options and 'decode_rng' not in options
  options = decode_with(
    params, batch, rng=7, decoder_params={'eos_id': 4, 'alpha': 1.0}, num_decodes=2
  )
  assert (options['decode_rng'], options['eos_id'], options['alpha']) == (7, 4, 1.0)
  assert options['cache']['decoder']['self']['cached_key'].shape == (3, 2, 4, LENGTH)
  # End tokens of a prompt are taken out.
  options = decode_with(params, batch, prompt_with_targets=True)
  expected = np.where(
    batch['decoder_input_tokens'] == EOS, 0, batch['decoder_input_tokens']
  )
  np.testing.assert_array_equal(options['inputs'], expected)


def test_two_keys_are_an_error(params):
  with pytest.raises(ValueError, match=r'both: 4 / 3'):
    decode_with(params, make_batch(), rng=4, decoder_params={'decode_rng': 3})


def test_score_is_the_sum_of_log_probabilities(params):
  batch = make_batch()
  batch['decoder_loss_weights'][2, 0] = 0.5
  scores = make_model().score_batch(params, batch)
  log_probs = log_probs_of(params, batch)
  for row in range(3):
    expected = sum(
      weight * log_probs[row, position, token]
      for position, (token, weight) in enumerate(
        zip(
          batch['decoder_target_tokens'][row],
          batch['decoder_loss_weights'][row],
          strict=True,
        )
      )
      if weight
    )
    np.testing.assert_allclose(scores[row], expected, rtol=1e-6)


def test_score_with_intermediates(params):
  batch = make_batch()
  model = make_model()
  scores, found = model.score_batch(params, batch, return_intermediates=True)
  np.testing.assert_allclose(scores, model.score_batch(params, batch), rtol=1e-6)
  assert found['mix']['weights'][0].shape == (3, HEADS, 5, 5)
  assert found['decoder']['self']['weights'][0].shape == (3, HEADS, LENGTH, LENGTH)
  for name, feature in (
    ('target_tokens', 'decoder_target_tokens'),
    ('loss_weights', 'decoder_loss_weights'),
  ):
    np.testing.assert_array_equal(found['decoder'][name][0], batch[feature])
  np.testing.assert_allclose(
    found['decoder']['token_scores'][0].sum(axis=1), scores, rtol=1e-6
  )


def test_loss_is_minus_the_scores(params):
  batch = make_batch()
  model = make_model()
  loss, metrics = model.eval_fn(params, batch)
  expected = -np.sum(model.score_batch(params, batch))
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_allclose(metrics['loss'].compute(), expected, rtol=1e-6)
  assert metrics['z_loss'].compute() == 0
  # Dropout is on only with a key.
  noisy, _ = model.loss_fn(params, batch, jax.random.PRNGKey(0))
  again, _ = model.loss_fn(params, batch, jax.random.PRNGKey(0))
  assert noisy == again and noisy != loss


def test_loss_options(params):
  batch = make_batch()
  logits = make_model()._compute_logits(params, batch)
  for options in (
    {'label_smoothing': 0.1},
    {'z_loss': 0.2},
    {'loss_normalizing_factor': 12},
    {'loss_normalizing_factor': 'NUM_REAL_TARGET_TOKENS'},
  ):
    loss, metrics = make_model(**options).loss_fn(params, batch, None)
    divisor, weights = losses.get_loss_normalizing_factor_and_weights(
      options.get('loss_normalizing_factor'), batch
    )
    expected, z_loss, _ = losses.compute_weighted_cross_entropy(
      logits,
      batch['decoder_target_tokens'],
      weights,
      options.get('label_smoothing', 0.0),
      options.get('z_loss', 0.0),
      divisor,
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics['z_loss'].compute(), z_loss, rtol=1e-6)
    assert loss != make_model().loss_fn(params, batch, None)[0]


def test_module_contract(params):
  module = mock.Mock()
  module.apply.return_value = jnp.zeros((3, LENGTH, VOCABULARY))
  batch = make_batch()
  batch |= {
    'encoder_segment_ids': np.ones((3, 5), np.int32),
    'decoder_positions': np.ones((3, LENGTH), np.int32),
  }
  model = make_model(module)
  model._compute_logits(params, batch, other_variables={'extra': {'a': 1}})
  (variables, *tokens), options = module.apply.call_args
  assert variables == {'params': params, 'extra': {'a': 1}}
  for token, name in zip(tokens, ('encoder_input', 'decoder_input', 'decoder_target')):
    assert token is batch[f'{name}_tokens']
  assert options['encoder_segment_ids'] is batch['encoder_segment_ids']
  assert options['decoder_positions'] is batch['decoder_positions']
  assert options['decoder_segment_ids'] is options['encoder_positions'] is None
  assert options['decode'] is options['enable_dropout'] is options['mutable'] is False
  assert options['rngs'] is None
  model._compute_logits(params, batch, dropout_rng=5)
  assert module.apply.call_args[1]['rngs'] == {'dropout': 5}
  assert module.apply.call_args[1]['enable_dropout'] is True


def test_overrides_of_a_subclass(params):
  class Sub(models.EncoderDecoderModel):
    FEATURE_CONVERTER_CLS = 'mine'

    def _compute_logits(self, params, batch, dropout_rng=None, mutable=False):
      return jnp.zeros(batch['decoder_target_tokens'].shape + (VOCABULARY,))

    def _compute_metrics(self, logits, targets, mask, loss, z_loss, segment_ids):
      return {'features': sorted(segment_ids)}

    def _compute_logits_from_slice(self, decoding_state, params, **kwargs):
      rows = decoding_state.cur_token.shape[0]
      logits = jnp.where(jnp.arange(VOCABULARY) == 3, 0.0, -1e4)
      return jnp.tile(logits, (rows, 1)), decoding_state.cache

  model = make_model(cls=Sub)
  batch = make_batch()
  loss, metrics = model.loss_fn(params, batch, None)
  np.testing.assert_allclose(
    loss, batch['decoder_loss_weights'].sum() * np.log(VOCABULARY), rtol=1e-6
  )
  # Without packing a row is one example.
  assert metrics == {'features': ['decoder_target_tokens', 'encoder_input_tokens']}
  packed = batch | {'decoder_segment_ids': batch['decoder_loss_weights']}
  assert model.loss_fn(params, packed, None)[1] == {'features': ['decoder']}
  np.testing.assert_allclose(
    model.score_batch(params, batch),
    -batch['decoder_loss_weights'].sum(axis=1) * np.log(VOCABULARY),
    rtol=1e-6,
  )
  assert np.all(model.predict_batch(params, batch) == 3)
  assert model.FEATURE_CONVERTER_CLS == 'mine'
  given = make_model(cls=Sub, feature_converter_cls='given')
  assert given.FEATURE_CONVERTER_CLS == 'given' and Sub.FEATURE_CONVERTER_CLS == 'mine'


def test_importing_models_does_not_import_tensorflow():
  program = (
    'import sys; from t5x import models;'
    'assert not {"tensorflow", "seqio"} & set(sys.modules), "too early";'
    'print("ok")'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=False
  )
  assert done.stdout.strip() == 'ok', done.stderr


@pytest.mark.slow
def test_feature_converters():
  import seqio

  assert models.EncoderDecoderModel.FEATURE_CONVERTER_CLS is (
    seqio.EncDecFeatureConverter
  )
  assert models.DecoderOnlyModel.FEATURE_CONVERTER_CLS is seqio.DecoderFeatureConverter
  assert make_model().FEATURE_CONVERTER_CLS is seqio.EncDecFeatureConverter


def test_abstract_methods():
  assert inspect.isabstract(models.BaseModel)
  assert models.BaseTransformerModel.__abstractmethods__ == {
    '_compute_logits',
    'predict_batch_with_aux',
    'get_initial_variables',
  }


# ---- The decoder-only model, around a module that averages what a position sees ----

LM_EOS = 1
LM_VOCABULARY = 7
LM_LENGTH = 7
LM_WIDTH = 6


class Averager(nn.Module):
  """T5X's contract of a decoder."""

  @nn.compact
  def __call__(
    self,
    decoder_input_tokens,
    decoder_target_tokens,
    decoder_segment_ids=None,
    decoder_positions=None,
    decoder_causal_attention=None,
    *,
    enable_dropout=True,
    decode=False,
    max_decode_length=None,
    prefill=False,
    prefill_lengths=None,
  ):
    x = nn.Embed(LM_VOCABULARY, LM_WIDTH, embedding_init=nn.initializers.normal(2.0))(
      decoder_input_tokens.astype(jnp.int32)
    )
    length = x.shape[1]
    seen = jnp.tril(jnp.ones((length, length), bool))[None]
    if decoder_causal_attention is not None:
      seen = seen | (decoder_causal_attention > 0)[:, None, :]
    seen = seen & (decoder_target_tokens > 0)[:, None, :]
    exists = self.has_variable('cache', 'cached_key')
    if decode or prefill:
      values = self.variable('cache', 'cached_key', jnp.zeros_like, x)
      index = self.variable('cache', 'cache_index', jnp.zeros, (), jnp.int32)
      if prefill:
        values.value, index.value = x, prefill_lengths
      elif exists:
        at = jnp.broadcast_to(index.value, x.shape[:1])[:, None]
        here = jnp.arange(values.value.shape[1]) == at
        x = values.value = jnp.where(here[:, :, None], x, values.value)
        seen = (jnp.arange(x.shape[1]) <= at)[:, None]
        index.value = index.value + 1
    weights = seen / jnp.maximum(seen.sum(axis=-1, keepdims=True), 1)
    mixed = jnp.einsum('bqk,bkd->bqd', weights, x)
    mixed = nn.Dropout(0.5)(mixed, deterministic=not enable_dropout)
    return nn.Dense(LM_VOCABULARY, kernel_init=nn.initializers.normal(0.3))(mixed)


def make_lm(**options):
  return models.DecoderOnlyModel(
    module=options.pop('module', Averager()),
    vocabulary=mock.Mock(eos_id=LM_EOS),
    optimizer_def=mock.Mock(),
    **options,
  )


LM_BATCH = {
  # Inputs 3 4 2 and targets 5 6; inputs 6 and targets 3 4.
  'decoder_target_tokens': np.array([[3, 4, 2, 5, 6, 1, 0], [6, 3, 4, 1, 0, 0, 0]]),
  'decoder_input_tokens': np.array([[0, 3, 4, 2, 5, 6, 1], [0, 6, 3, 4, 1, 0, 0]]),
  'decoder_loss_weights': np.array([[0, 0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0]]),
  'decoder_causal_attention': np.array([[1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]]),
}
PROMPTS = [[3, 4, 2], [6]]


@pytest.fixture(scope='module')
def lm_params():
  shape = {'decoder_input_tokens': (2, LM_LENGTH)}
  variables = make_lm().get_initial_variables(
    jax.random.PRNGKey(1), shape, {'decoder_input_tokens': jnp.int32}
  )
  lm_params = flax.core.unfreeze(variables['params'])
  # Padding is never decoded, the end often.
  lm_params['Dense_0']['bias'] = jnp.array([-1e9, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0])
  return lm_params


def log_probs_after(lm_params, tokens):
  """Log probabilities of the next token after the start token and `tokens`."""
  inputs = np.array([[0, *tokens]])
  logits = Averager().apply(
    {'params': lm_params}, inputs, np.ones_like(inputs), enable_dropout=False
  )
  return np.array(jax.nn.log_softmax(logits[0, -1]))


def test_lm_greedy_decoding_continues_the_prompt(lm_params):
  decodes = make_lm().predict_batch(lm_params, LM_BATCH)
  for row, prompt in enumerate(PROMPTS):
    expected, tokens = [], list(prompt)
    while len(tokens) < LM_LENGTH and LM_EOS not in expected:
      log_probs = log_probs_after(lm_params, tokens)
      expected.append(int(log_probs.argmax()))
      tokens.append(expected[-1])
    expected += [0] * (LM_LENGTH - len(expected))
    np.testing.assert_array_equal(decodes[row], expected)


def test_lm_decoding_ignores_targets(lm_params):
  blind = dict(LM_BATCH)
  for name in ('decoder_target_tokens', 'decoder_loss_weights'):
    blind[name] = np.zeros_like(LM_BATCH[name])
  blind['decoder_input_tokens'] = (
    LM_BATCH['decoder_input_tokens'] * LM_BATCH['decoder_causal_attention']
  )
  model = make_lm()
  np.testing.assert_array_equal(
    model.predict_batch(lm_params, LM_BATCH), model.predict_batch(lm_params, blind)
  )


@pytest.mark.parametrize('num_decodes', [1, 4])
@pytest.mark.parametrize(
  ('decode_fn', 'options'),
  [(decoding.temperature_sample, {'topk': 0}), (decoding.beam_search, {'alpha': 0.0})],
)
def test_lm_scores_of_decodes(lm_params, num_decodes, decode_fn, options):
  before = dict(options)
  decodes, aux = jax.jit(
    lambda lm_params, batch: make_lm(decode_fn=decode_fn).predict_batch_with_aux(
      lm_params,
      batch,
      decoder_params=options,
      num_decodes=num_decodes,
      return_all_decodes=True,
      rng=jax.random.PRNGKey(0),
    )
  )(lm_params, LM_BATCH)
  assert options == before
  assert decodes.shape == (2, num_decodes, LM_LENGTH)
  for row, prompt in enumerate(PROMPTS):
    assert len({tuple(map(int, d)) for d in decodes[row]}) > num_decodes // 2
    for decode, score in zip(decodes[row], aux['scores'][row], strict=True):
      tokens, expected = list(prompt), 0.0
      for token in decode[: LM_LENGTH - len(prompt)]:
        expected += log_probs_after(lm_params, tokens)[token]
        tokens.append(int(token))
        if token == LM_EOS:
          break
      np.testing.assert_allclose(score, expected, rtol=1e-4)


def test_lm_score_of_weighted_targets(lm_params):
  scores = make_lm().score_batch(lm_params, LM_BATCH)
  expected = []
  for tokens, weights in zip(
    LM_BATCH['decoder_target_tokens'], LM_BATCH['decoder_loss_weights'], strict=True
  ):
    expected.append(
      sum(
        log_probs_after(lm_params, tokens[:position])[tokens[position]]
        for position in np.flatnonzero(weights)
      )
    )
  np.testing.assert_allclose(scores, expected, rtol=1e-5)
  again, found = make_lm().score_batch(lm_params, LM_BATCH, return_intermediates=True)
  np.testing.assert_allclose(again, scores, rtol=1e-6)
  np.testing.assert_allclose(
    found['decoder']['token_scores'][0].sum(axis=1), scores, rtol=1e-6
  )


def test_lm_bidirectional_prefix(lm_params):
  causal, both = make_lm(), make_lm(inputs_bidirectional_attention=True)
  changed = dict(LM_BATCH)
  changed['decoder_input_tokens'] = LM_BATCH['decoder_input_tokens'].copy()
  changed['decoder_input_tokens'][0, 3] = 5
  before, after = (causal._compute_logits(lm_params, b) for b in (LM_BATCH, changed))
  np.testing.assert_array_equal(before[0, :3], after[0, :3])
  before, after = (both._compute_logits(lm_params, b) for b in (LM_BATCH, changed))
  assert np.all(np.abs(before[0, :3] - after[0, :3]).max(axis=-1) > 1e-3)
  without = {k: v for k, v in LM_BATCH.items() if k != 'decoder_causal_attention'}
  with pytest.raises(ValueError, match='decoder_causal_attention'):
    both._compute_logits(lm_params, without)
  causal._compute_logits(lm_params, without)


def test_lm_prefilled_cache(lm_params):
  inputs = LM_BATCH['decoder_input_tokens'] * LM_BATCH['decoder_causal_attention']
  cache, lengths = make_lm()._compute_kv_cache(
    lm_params, inputs, LM_BATCH['decoder_causal_attention']
  )
  np.testing.assert_array_equal(lengths, [3, 1])
  np.testing.assert_array_equal(cache['cache_index'], [3, 1])
  embedding = lm_params['Embed_0']['embedding']
  np.testing.assert_allclose(cache['cached_key'][0, :3], embedding[inputs[0, :3]])


def test_lm_decoding_errors(lm_params):
  without = {k: v for k, v in LM_BATCH.items() if k != 'decoder_causal_attention'}
  with pytest.raises(ValueError, match='decoder_causal_attention'):
    make_lm().predict_batch(lm_params, without)
  with pytest.raises(ValueError, match='both: 4 / 3'):
    make_lm().predict_batch_with_aux(
      lm_params, LM_BATCH, rng=4, decoder_params={'decode_rng': 3}
    )


def test_lm_loss(lm_params):
  loss, metrics = make_lm().eval_fn(lm_params, LM_BATCH)
  expected = -np.sum(make_lm().score_batch(lm_params, LM_BATCH))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(metrics['cross_ent_loss'].compute(), expected, rtol=1e-5)
  assert make_lm().loss_fn(lm_params, LM_BATCH, jax.random.PRNGKey(0))[0] != loss


def test_remove_prefix():
  rows = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]])
  np.testing.assert_array_equal(
    models.remove_prefix(rows, np.array([2, 1, 0, 5])),
    [[3, 4, 5, 0, 0], [7, 8, 0, 0, 0], [1, 2, 3, 4, 5], [0, 0, 0, 0, 0]],
  )
