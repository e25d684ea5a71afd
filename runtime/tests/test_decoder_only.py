"""The decoder-only model around a small module with a cache.

The module averages what a position sees, so that all of the prefix counts, and
which part of it may be seen both ways.
"""

from unittest import mock

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from t5x import decoding, models

EOS = 1
VOCABULARY = 7
LENGTH = 7
WIDTH = 6


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
    x = nn.Embed(VOCABULARY, WIDTH, embedding_init=nn.initializers.normal(2.0))(
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
    return nn.Dense(VOCABULARY, kernel_init=nn.initializers.normal(0.3))(mixed)


def make_model(**options):
  return models.DecoderOnlyModel(
    module=options.pop('module', Averager()),
    vocabulary=mock.Mock(eos_id=EOS),
    optimizer_def=mock.Mock(),
    **options,
  )


BATCH = {
  # Inputs 3 4 2 and targets 5 6; inputs 6 and targets 3 4.
  'decoder_target_tokens': np.array([[3, 4, 2, 5, 6, 1, 0], [6, 3, 4, 1, 0, 0, 0]]),
  'decoder_input_tokens': np.array([[0, 3, 4, 2, 5, 6, 1], [0, 6, 3, 4, 1, 0, 0]]),
  'decoder_loss_weights': np.array([[0, 0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0]]),
  'decoder_causal_attention': np.array([[1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]]),
}
PROMPTS = [[3, 4, 2], [6]]


@pytest.fixture(scope='module')
def params():
  shape = {'decoder_input_tokens': (2, LENGTH)}
  variables = make_model().get_initial_variables(
    jax.random.PRNGKey(1), shape, {'decoder_input_tokens': jnp.int32}
  )
  params = flax.core.unfreeze(variables['params'])
  # Padding is never decoded, the end often.
  params['Dense_0']['bias'] = jnp.array([-1e9, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0])
  return params


def log_probs_after(params, tokens):
  """Log probabilities of the next token after the start token and `tokens`."""
  inputs = np.array([[0, *tokens]])
  logits = Averager().apply(
    {'params': params}, inputs, np.ones_like(inputs), enable_dropout=False
  )
  return np.array(jax.nn.log_softmax(logits[0, -1]))


def test_greedy_decoding_continues_the_prompt(params):
  decodes = make_model().predict_batch(params, BATCH)
  for row, prompt in enumerate(PROMPTS):
    expected, tokens = [], list(prompt)
    while len(tokens) < LENGTH and EOS not in expected:
      log_probs = log_probs_after(params, tokens)
      expected.append(int(log_probs.argmax()))
      tokens.append(expected[-1])
    expected += [0] * (LENGTH - len(expected))
    np.testing.assert_array_equal(decodes[row], expected)


def test_targets_are_not_looked_at(params):
  blind = dict(BATCH)
  for name in ('decoder_target_tokens', 'decoder_loss_weights'):
    blind[name] = np.zeros_like(BATCH[name])
  blind['decoder_input_tokens'] = (
    BATCH['decoder_input_tokens'] * BATCH['decoder_causal_attention']
  )
  model = make_model()
  np.testing.assert_array_equal(
    model.predict_batch(params, BATCH), model.predict_batch(params, blind)
  )


@pytest.mark.parametrize('num_decodes', [1, 4])
@pytest.mark.parametrize(
  ('decode_fn', 'options'),
  [(decoding.temperature_sample, {'topk': 0}), (decoding.beam_search, {'alpha': 0.0})],
)
def test_scores_of_decodes_are_their_log_probabilities(
  params, num_decodes, decode_fn, options
):
  before = dict(options)
  decodes, aux = jax.jit(
    lambda params, batch: make_model(decode_fn=decode_fn).predict_batch_with_aux(
      params,
      batch,
      decoder_params=options,
      num_decodes=num_decodes,
      return_all_decodes=True,
      rng=jax.random.PRNGKey(0),
    )
  )(params, BATCH)
  assert options == before
  assert decodes.shape == (2, num_decodes, LENGTH)
  for row, prompt in enumerate(PROMPTS):
    assert len({tuple(map(int, d)) for d in decodes[row]}) > num_decodes // 2
    for decode, score in zip(decodes[row], aux['scores'][row], strict=True):
      tokens, expected = list(prompt), 0.0
      for token in decode[: LENGTH - len(prompt)]:
        expected += log_probs_after(params, tokens)[token]
        tokens.append(int(token))
        if token == EOS:
          break
      np.testing.assert_allclose(score, expected, rtol=1e-4)


def test_a_score_counts_weighted_targets_only(params):
  scores = make_model().score_batch(params, BATCH)
  expected = []
  for tokens, weights in zip(
    BATCH['decoder_target_tokens'], BATCH['decoder_loss_weights'], strict=True
  ):
    expected.append(
      sum(
        log_probs_after(params, tokens[:position])[tokens[position]]
        for position in np.flatnonzero(weights)
      )
    )
  np.testing.assert_allclose(scores, expected, rtol=1e-5)
  again, found = make_model().score_batch(params, BATCH, return_intermediates=True)
  np.testing.assert_allclose(again, scores, rtol=1e-6)
  np.testing.assert_allclose(
    found['decoder']['token_scores'][0].sum(axis=1), scores, rtol=1e-6
  )


def test_a_prefix_may_be_seen_both_ways(params):
  causal, both = make_model(), make_model(inputs_bidirectional_attention=True)
  changed = dict(BATCH)
  changed['decoder_input_tokens'] = BATCH['decoder_input_tokens'].copy()
  changed['decoder_input_tokens'][0, 3] = 5
  before, after = (causal._compute_logits(params, b) for b in (BATCH, changed))
  np.testing.assert_array_equal(before[0, :3], after[0, :3])
  before, after = (both._compute_logits(params, b) for b in (BATCH, changed))
  assert np.all(np.abs(before[0, :3] - after[0, :3]).max(axis=-1) > 1e-3)
  without = {k: v for k, v in BATCH.items() if k != 'decoder_causal_attention'}
  with pytest.raises(ValueError, match='needs the feature decoder_causal_attention'):
    both._compute_logits(params, without)
  causal._compute_logits(params, without)


def test_the_cache_is_filled_from_the_inputs(params):
  inputs = BATCH['decoder_input_tokens'] * BATCH['decoder_causal_attention']
  cache, lengths = make_model()._compute_kv_cache(
    params, inputs, BATCH['decoder_causal_attention']
  )
  np.testing.assert_array_equal(lengths, [3, 1])
  np.testing.assert_array_equal(cache['cache_index'], [3, 1])
  embedding = params['Embed_0']['embedding']
  np.testing.assert_allclose(cache['cached_key'][0, :3], embedding[inputs[0, :3]])


def test_decoding_needs_inputs_and_one_key(params):
  without = {k: v for k, v in BATCH.items() if k != 'decoder_causal_attention'}
  with pytest.raises(ValueError, match='must name both inputs and targets'):
    make_model().predict_batch(params, without)
  with pytest.raises(ValueError, match='both: 4 / 3'):
    make_model().predict_batch_with_aux(
      params, BATCH, rng=4, decoder_params={'decode_rng': 3}
    )


def test_the_loss_is_that_of_the_weighted_targets(params):
  loss, metrics = make_model().eval_fn(params, BATCH)
  expected = -np.sum(make_model().score_batch(params, BATCH))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(metrics['cross_ent_loss'].compute(), expected, rtol=1e-5)
  assert make_model().loss_fn(params, BATCH, jax.random.PRNGKey(0))[0] != loss


def test_a_converter_and_a_vocabulary_are_kept():
  model = make_model(feature_converter_cls='mine')
  assert model.FEATURE_CONVERTER_CLS == 'mine'
  assert model.input_vocabulary is model.output_vocabulary


def test_remove_prefix_shifts_every_row_by_its_own_length():
  rows = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]])
  np.testing.assert_array_equal(
    models.remove_prefix(rows, np.array([2, 1, 0, 5])),
    [[3, 4, 5, 0, 0], [7, 8, 0, 0, 0], [1, 2, 3, 4, 5], [0, 0, 0, 0, 0]],
  )
