"""The encoder-decoder model around a small Flax transformer.

What is decoded with a cache is compared with what the whole model says of every
sequence there is, without one.
"""

import inspect
import subprocess
import sys
from unittest import mock

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from five_tokens import (
  EOS,
  HEADS,
  LENGTH,
  VOCABULARY,
  PrefillTransformer,
  Transformer,
  all_sequences,
  log_probs_of,
  make_batch,
  make_model,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x import decoding, losses, models


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
def test_cached_beam_search_finds_the_best_of_all_sequences(params, module, prompted):
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
def test_cached_sampling_draws_what_the_whole_model_says(params, module):
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


def test_prediction_runs_sharded_over_devices(params):
  model = make_model()
  batch = make_batch(rows=8)
  mesh = Mesh(np.array(jax.devices()[:8]), ('data',))
  rows = NamedSharding(mesh, PartitionSpec('data'))
  predict = jax.jit(lambda p, b: model.predict_batch_with_aux(p, b, num_decodes=3))
  whole, whole_aux = predict(params, batch)
  sharded, aux = predict(params, jax.device_put(batch, rows))
  np.testing.assert_array_equal(whole, sharded)
  np.testing.assert_allclose(whole_aux['scores'], aux['scores'], rtol=1e-5)


def test_the_best_decode_is_returned_unless_all_are_wanted(params):
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
  """What a decoding function is called with, under various calls."""
  calls = []

  def decode_fn(**options):
    calls.append(options)
    rows, length = options['inputs'].shape
    number = options['num_decodes']
    return jnp.zeros((rows, number, length), jnp.int32), jnp.zeros((rows, number))

  make_model(decode_fn=decode_fn).predict_batch_with_aux(params, batch, **arguments)
  return calls[0]


def test_what_the_decoding_function_is_told(params):
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


def test_two_keys_are_refused(params):
  with pytest.raises(ValueError, match=r'both: 4 / 3'):
    decode_with(params, make_batch(), rng=4, decoder_params={'decode_rng': 3})


def test_a_score_is_the_sum_of_its_tokens_log_probabilities(params):
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


def test_a_score_comes_with_intermediates_on_request(params):
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


def test_the_loss_is_minus_the_scores(params):
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


def test_smoothing_z_loss_and_normalisation_reach_the_loss(params):
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


def test_the_module_is_called_by_its_contract(params):
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


def test_initial_variables_know_all_features_and_types():
  module = mock.Mock()
  module.init.return_value = {'params': {}}
  shapes = {
    'encoder_input_tokens': (1, 5),
    'decoder_input_tokens': (1, 3),
    'decoder_positions': (1, 3),
    'encoder_segment_ids': (1, 5),
  }
  types = {'decoder_input_tokens': jnp.int32, 'encoder_segment_ids': jnp.uint8}
  make_model(module).get_initial_variables('key', shapes, types)
  (rng, encoder, decoder, targets), options = module.init.call_args
  assert rng == 'key'
  assert (encoder.shape, encoder.dtype) == ((1, 5), jnp.float32)
  assert (decoder.shape, decoder.dtype) == ((1, 3), jnp.int32)
  assert targets.shape == (1, 3)
  assert options['decoder_positions'].dtype == jnp.int32
  assert options['encoder_segment_ids'].dtype == jnp.uint8
  assert options['encoder_positions'] is options['decoder_segment_ids'] is None
  assert options['decode'] is options['enable_dropout'] is False


def test_what_a_subclass_overrides_is_what_is_used(params):
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


def test_vocabularies_and_decoding_function_are_properties():
  model = make_model()
  assert models.get_input_vocabulary(model) is model.input_vocabulary
  assert models.get_output_vocabulary(model) is model.output_vocabulary
  assert model.input_vocabulary is not model.output_vocabulary
  assert model.decode_fn is decoding.beam_search


def test_importing_models_brings_no_tensorflow_until_a_converter_is_asked_for():
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
def test_the_feature_converters_are_those_of_seqio():
  import seqio

  assert models.EncoderDecoderModel.FEATURE_CONVERTER_CLS is (
    seqio.EncDecFeatureConverter
  )
  assert models.DecoderOnlyModel.FEATURE_CONVERTER_CLS is seqio.DecoderFeatureConverter
  assert make_model().FEATURE_CONVERTER_CLS is seqio.EncDecFeatureConverter


def test_models_are_abstract_where_they_must_be():
  assert inspect.isabstract(models.BaseModel)
  assert models.BaseTransformerModel.__abstractmethods__ == {
    '_compute_logits',
    'predict_batch_with_aux',
    'score_batch',
    'get_initial_variables',
  }
