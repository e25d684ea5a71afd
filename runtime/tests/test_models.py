"""Models with small modules; decoding with a cache against the same without one."""

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

from t5x import decoding, models

# ---- A transformer with five tokens, and all sequences that it can decode ----

EOS = 2
VOCABULARY = 5
LENGTH = 4
HEADS, WIDTH = 2, 8


class Attention(nn.Module):
  """Multi-head attention with a cache [batch, heads, dim, length]."""

  @nn.compact
  def __call__(self, x, source, mask, decode=False, prefill_lengths=None):
    query, key, value = (
      nn.DenseGeneral((HEADS, WIDTH // HEADS), name=name)(inputs)
      for name, inputs in (('query', x), ('key', source), ('value', source))
    )
    if decode or prefill_lengths is not None:
      key, value, mask = self.cached(key, value, mask, prefill_lengths)
    scores = jnp.einsum('bqhd,bkhd->bhqk', query, key)
    weights = nn.softmax(jnp.where(mask, scores, -1e9))
    self.sow('intermediates', 'weights', weights)
    output = jnp.einsum('bhqk,bkhd->bqhd', weights, value)
    return nn.DenseGeneral(WIDTH, axis=(-2, -1), name='out')(output)

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
  """A module with T5X's interface, with prefilling."""

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
    prefill=False,
    prefill_lengths=None,
  ):
    length = decoder_input_tokens.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
    masks = causal, (encoder_input_tokens > 0)[:, None, None, :]
    y = self.embed(decoder_input_tokens.astype(jnp.int32))
    return self.decoder(y, encoded, masks, decode, prefill_lengths, enable_dropout)

  def __call__(
    self,
    encoder_input_tokens,
    decoder_input_tokens,
    decoder_target_tokens,
    *,
    enable_dropout=True,
    decode=False,
    **packing,
  ):
    return self.decode(
      self.encode(encoder_input_tokens),
      encoder_input_tokens,
      decoder_input_tokens,
      decoder_target_tokens,
      enable_dropout=enable_dropout,
      decode=decode,
    )


class TransformerWithoutPrefill(Transformer):
  def decode(self, *args, **options):
    return super().decode(*args, **options)


def make_model(module=None, cls=models.EncoderDecoderModel, **options):
  return cls(
    module=module or Transformer(),
    input_vocabulary=mock.Mock(eos_id=EOS),
    output_vocabulary=mock.Mock(eos_id=EOS),
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


def token_log_probs(params, encoder_tokens, targets):
  """Log probabilities of the targets, computed without a cache."""
  shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
  logits = Transformer().apply(
    {'params': params}, encoder_tokens, shifted, targets, enable_dropout=False
  )
  log_probs = np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32)))
  return np.take_along_axis(log_probs, targets[:, :, None], axis=2)[:, :, 0]


def all_sequences(params, encoder_row, prompt=(), length=LENGTH):
  """Every finished sequence after a prompt with its log probability, best first."""
  sequences = []
  for size in range(length - len(prompt)):
    for middle in itertools.product((3, 4), repeat=size):
      sequence = (*prompt, *middle, EOS)
      sequences.append(sequence + (0,) * (length - len(sequence)))
  targets = np.array(sequences, np.int32)
  encoder_tokens = np.tile(encoder_row, (len(targets), 1))
  counted = (targets != 0) & (np.arange(length) >= len(prompt))
  log_prob = np.sum(token_log_probs(params, encoder_tokens, targets) * counted, axis=1)
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


@pytest.mark.parametrize('module', [Transformer(), TransformerWithoutPrefill()])
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


@pytest.mark.parametrize('module', [Transformer(), TransformerWithoutPrefill()])
def test_scores_of_cached_sampling(params, module):
  model = make_model(module, decode_fn=decoding.temperature_sample)
  batch = make_batch()
  options = {'topk': 0, 'max_decode_steps': 3}
  decodes, aux = model.predict_batch_with_aux(
    params,
    batch,
    rng=jax.random.PRNGKey(3),
    decoder_params=options,
    return_all_decodes=True,
    num_decodes=5,
  )
  # The caller's options are not modified.
  assert options == {'topk': 0, 'max_decode_steps': 3}
  assert decodes.shape == (3, 5, LENGTH)
  flat = np.asarray(decodes).reshape(-1, LENGTH)
  assert len(np.unique(flat, axis=0)) > 3
  encoder_tokens = np.repeat(batch['encoder_input_tokens'], 5, axis=0)
  token = token_log_probs(params, encoder_tokens, flat)
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


def test_arguments_of_the_decoding_function(params):
  batch = make_batch()
  options = decode_with(params, batch)
  assert options['eos_id'] == EOS and options['num_decodes'] == 1
  assert options['cache_offset'] == 0 and not options['inputs'].any()
  # Only decoding functions with these parameters get them.
  assert 'initial_index' not in options and 'decode_rng' not in options
  options = decode_with(
    params, batch, rng=7, decoder_params={'eos_id': 4, 'alpha': 1.0}, num_decodes=2
  )
  assert (options['decode_rng'], options['eos_id'], options['alpha']) == (7, 4, 1.0)
  assert options['cache']['decoder']['self']['cached_key'].shape == (3, 2, 4, LENGTH)
  # End tokens are removed from a prompt.
  options = decode_with(params, batch, prompt_with_targets=True)
  expected = np.where(
    batch['decoder_input_tokens'] == EOS, 0, batch['decoder_input_tokens']
  )
  np.testing.assert_array_equal(options['inputs'], expected)
  with pytest.raises(ValueError, match=r'both: 4 / 3'):
    decode_with(params, make_batch(), rng=4, decoder_params={'decode_rng': 3})


@pytest.mark.parametrize('prompted', [False, True])
def test_only_a_prompt_is_prefilled(params, prompted):
  found = []

  def decode_fn(initial_index=None, **options):
    found.append(initial_index)
    return decoding.beam_search(initial_index=initial_index, **options)

  make_model(decode_fn=decode_fn).predict_batch_with_aux(
    params, make_batch(), prompt_with_targets=prompted
  )
  assert (found[0] is not None) == prompted


def test_encoder_rows_are_not_repeated_for_a_module_that_shares_them(
  params, monkeypatch
):
  def encoder_rows():
    options = decode_with(params, make_batch(), num_decodes=2)
    given = options['tokens_to_logits'].keywords
    return len(given['encoded_inputs']), len(given['raw_inputs'])

  assert encoder_rows() == (6, 6)
  monkeypatch.setattr(Transformer, 'shares_encoded', True, raising=False)
  assert encoder_rows() == (3, 3)


def test_scores_and_intermediates(params):
  batch = make_batch()
  weights = batch['decoder_loss_weights']
  weights[2, 0] = 0.5
  token = token_log_probs(
    params, batch['encoder_input_tokens'], batch['decoder_target_tokens']
  )
  expected = np.sum(token, axis=1, where=weights > 0) - 0.5 * token[:, 0] * [0, 0, 1]
  model = make_model()
  scores = model.score_batch(params, batch)
  np.testing.assert_allclose(scores, expected, rtol=1e-6)
  again, found = model.score_batch(params, batch, return_intermediates=True)
  np.testing.assert_allclose(again, scores, rtol=1e-6)
  assert found['mix']['weights'][0].shape == (3, HEADS, 5, 5)
  assert found['decoder']['self']['weights'][0].shape == (3, HEADS, LENGTH, LENGTH)
  np.testing.assert_array_equal(found['decoder']['loss_weights'][0], weights)
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
  # Dropout needs a key.
  noisy, _ = model.loss_fn(params, batch, jax.random.PRNGKey(0))
  again, _ = model.loss_fn(params, batch, jax.random.PRNGKey(0))
  assert noisy == again and noisy != loss


def test_subclass_overrides(params):
  class Sub(models.EncoderDecoderModel):
    FEATURE_CONVERTER_CLS = 'mine'

    def _compute_metrics(self, logits, targets, mask, loss, z_loss, segment_ids):
      return {'features': sorted(segment_ids)}

    def _compute_logits_from_slice(self, decoding_state, params, **kwargs):
      rows = decoding_state.cur_token.shape[0]
      logits = jnp.where(jnp.arange(VOCABULARY) == 3, 0.0, -1e4)
      return jnp.tile(logits, (rows, 1)), decoding_state.cache

  model = make_model(cls=Sub)
  batch = make_batch()
  _, metrics = model.loss_fn(params, batch, None)
  # Without packing each row is one example.
  assert metrics == {'features': ['decoder_target_tokens', 'encoder_input_tokens']}
  packed = batch | {'decoder_segment_ids': batch['decoder_target_tokens']}
  assert model.loss_fn(params, packed, None)[1] == {'features': ['decoder']}
  assert np.all(model.predict_batch(params, batch) == 3)
  assert model.FEATURE_CONVERTER_CLS == 'mine'
  given = make_model(cls=Sub, feature_converter_cls='given')
  assert given.FEATURE_CONVERTER_CLS == 'given' and Sub.FEATURE_CONVERTER_CLS == 'mine'


def test_importing_models_does_not_import_tensorflow():
  program = (
    'import sys; from t5x import models;'
    'assert not {"tensorflow", "seqio"} & set(sys.modules), "too early"'
  )
  subprocess.run([sys.executable, '-c', program], check=True)


# ---- The decoder-only model, with a module that averages visible positions ----

LM_EOS = 1
LM_VOCABULARY = 7
LM_LENGTH = 7
LM_WIDTH = 6


class Averager(nn.Module):
  """A module with T5X's interface of a decoder."""

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
    x = jnp.einsum('bqk,bkd->bqd', weights, x)
    x = nn.Dropout(0.5)(x, deterministic=not enable_dropout)
    return nn.Dense(LM_VOCABULARY, kernel_init=nn.initializers.normal(0.3))(x)


def make_lm(**options):
  return models.DecoderOnlyModel(
    module=Averager(),
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


@pytest.mark.parametrize('num_decodes', [1, 4])
@pytest.mark.parametrize(
  ('decode_fn', 'options'),
  [(decoding.temperature_sample, {'topk': 0}), (decoding.beam_search, {'alpha': 0.0})],
)
def test_lm_scores_of_decodes(lm_params, num_decodes, decode_fn, options):
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
  loss, _ = make_lm().eval_fn(lm_params, LM_BATCH)
  np.testing.assert_allclose(loss, -np.sum(scores), rtol=1e-5)


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
  with pytest.raises(ValueError, match='decoder_causal_attention'):
    causal.predict_batch(lm_params, without)
  causal._compute_logits(lm_params, without)


def test_remove_prefix():
  rows = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]])
  np.testing.assert_array_equal(
    models.remove_prefix(rows, np.array([2, 1, 0, 5])),
    [[3, 4, 5, 0, 0], [7, 8, 0, 0, 0], [1, 2, 3, 4, 5], [0, 0, 0, 0, 0]],
  )
