"""Sampling against distributions worked out by hand."""

import functools
import itertools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from scipy import stats

from t5x import sampling

EOS = 1


def softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


class BigramModel:
  """Logits depend on the last token, which the cache also counts."""

  def __init__(self, vocabulary=4, seed=0):
    logits = np.random.default_rng(seed).normal(size=(vocabulary, vocabulary))
    self.logits = logits.astype(np.float32)
    self.logits[:, 0] = -1e9

  def __call__(self, state):
    return jnp.asarray(self.logits)[state.cur_token[:, 0]], state.cache

  def probabilities(self, temperature=1.0):
    return softmax(self.logits.astype(np.float64) / temperature)


def sample(model, inputs, seed=0, cache=None, **options):
  run = functools.partial(
    sampling.temperature_sample, tokens_to_logits=model, eos_id=EOS, **options
  )
  decodes, scores = jax.jit(run)(
    jnp.asarray(inputs),
    {} if cache is None else cache,
    decode_rng=jax.random.PRNGKey(seed),
  )
  return np.asarray(decodes), np.asarray(scores)


def sequence_probabilities(transitions, length):
  """Probability of every sequence, end-padded, from a matrix of transitions."""
  table = {}
  tokens = range(transitions.shape[0])
  for sequence in itertools.product(tokens, repeat=length):
    probability, last, ended = 1.0, 0, False
    for token in sequence:
      if ended:
        probability *= token == 0
      else:
        probability *= transitions[last, token]
        ended, last = token == EOS, token
    if probability > 1e-12:
      table[sequence] = probability
  return table


def assert_drawn_from(decodes, table):
  """A chi-square test of counted sequences."""
  found, counts = np.unique(decodes, axis=0, return_counts=True)
  counted = {tuple(map(int, s)): c for s, c in zip(found, counts, strict=True)}
  assert set(counted) <= set(table)
  # Rare sequences are put together, as the test wants at least five of each.
  expected = np.array(list(table.values())) * len(decodes)
  observed = np.array([counted.get(s, 0) for s in table])
  rare = expected < 5
  expected = np.append(expected[~rare], expected[rare].sum() + 1e-9)
  observed = np.append(observed[~rare], observed[rare].sum())
  if expected[-1] < 1:
    assert observed[-1] <= 5
    expected, observed = expected[:-1], observed[:-1]
  statistic = np.sum((observed - expected) ** 2 / expected)
  assert stats.chi2.sf(statistic, len(expected) - 1) > 1e-3


@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0])
@pytest.mark.parametrize('num_decodes', [1, 4])
def test_sequences_are_drawn_with_the_models_probabilities(temperature, num_decodes):
  model = BigramModel()
  decodes, scores = sample(
    model,
    np.zeros((20000 // num_decodes, 3), np.int32),
    temperature=temperature,
    topk=0,
    num_decodes=num_decodes,
  )
  assert np.all(np.diff(scores, axis=1) >= 0)
  decodes = decodes.reshape(-1, 3)
  table = sequence_probabilities(model.probabilities(temperature), 3)
  assert_drawn_from(decodes, table)
  expected = np.log([table[tuple(map(int, row))] for row in decodes])
  np.testing.assert_allclose(scores.reshape(-1), expected, rtol=1e-4, atol=1e-5)


def test_decodes_of_one_example_are_independent():
  model = BigramModel(vocabulary=6)
  decodes, _ = sample(
    model,
    np.zeros((10000, 1), np.int32),
    topk=0,
    num_decodes=2,
    temperature=jnp.full((10000,), 1.5),
  )
  # Pairs are unordered, since decodes are sorted by probability.
  pairs = np.sort(decodes[:, :, 0], axis=1)
  single = model.probabilities(1.5)[0]
  table = {
    (a, b): single[a] * single[b] * (1 if a == b else 2)
    for a, b in itertools.combinations_with_replacement(range(6), 2)
    if single[a] * single[b] > 1e-12
  }
  assert_drawn_from(pairs, table)


def test_each_example_may_have_its_own_temperature():
  model = BigramModel(vocabulary=5)
  temperatures = np.repeat([0.0, 0.5, 3.0], 8000)
  decodes, scores = sample(
    model, np.zeros((24000, 1), np.int32), temperature=temperatures, topk=0
  )
  drawn = decodes[:, 0]
  assert np.all(drawn[:8000] == model.logits[0].argmax())
  assert np.all(scores[:8000] == 0)
  for start, temperature in ((8000, 0.5), (16000, 3.0)):
    table = sequence_probabilities(model.probabilities(temperature), 1)
    assert_drawn_from(drawn[start : start + 8000], table)


@pytest.mark.parametrize('rescale', [False, True])
@pytest.mark.parametrize(
  'options',
  [
    {'topk': 2, 'temperature': 0.7},
    {'topk': 0, 'topp': 0.6},
    {'topk': 0, 'temperature': 0.0},
    {},
  ],
  ids=str,
)
def test_reported_probabilities_with_and_without_rescaling(options, rescale):
  model = BigramModel(vocabulary=7, seed=2)
  decodes, scores = sample(
    model, np.zeros((400, 1), np.int32), rescale_log_probs=rescale, **options
  )
  logits = model.logits[0].astype(np.float64)
  temperature, topk = options.get('temperature', 1.0), options.get('topk', 1)
  # Temperature 0 takes the most probable token.
  topk = topk if temperature else 1
  shaped = logits / (temperature or 1.0)
  order = np.argsort(-shaped)
  if topk:
    kept = order[:topk]
  elif 'topp' in options:
    mass = np.cumsum(softmax(shaped)[order])
    kept = order[: np.searchsorted(mass, options['topp']) + 1]
  else:
    kept = order
  masked = np.full_like(shaped, -1e9)
  masked[kept] = shaped[kept]
  expected = np.log(softmax(masked if rescale else logits) + 1e-300)
  tokens = decodes[:, 0, 0]
  assert set(tokens) <= set(kept)
  np.testing.assert_allclose(scores[:, 0], expected[tokens], rtol=1e-5, atol=1e-6)


def test_top_k_draws_from_k_tokens():
  model = BigramModel(vocabulary=8)
  decodes, _ = sample(model, np.zeros((20000, 1), np.int32), topk=3)
  kept = np.argsort(-model.logits[0])[:3]
  single = softmax(model.logits[0][kept].astype(np.float64))
  table = {(int(token),): p for token, p in zip(kept, single, strict=True)}
  assert_drawn_from(decodes[:, 0], table)


def test_keep_top_k_is_sorting():
  rng = np.random.default_rng(0)
  logits = np.concatenate(
    [rng.normal(size=(5, 40)), -rng.exponential(size=(5, 40)), rng.normal(size=(1, 40))]
  ).astype(np.float32)
  logits[-1, 5:] = -np.inf
  cut = jax.jit(sampling.keep_top_k)
  for k in (1, 2, 7, 40):
    masked = np.asarray(cut(logits, k))
    threshold = np.sort(logits, axis=1)[:, -k][:, None]
    np.testing.assert_array_equal(
      masked, np.where(logits >= threshold, logits, -np.inf)
    )
  # Zero keeps all, also where it is not known before tracing; ties stay.
  np.testing.assert_array_equal(cut(logits, 0), logits)
  ties = jnp.array([[1.0, 3.0, 2.0, 2.0, 0.0]])
  np.testing.assert_array_equal(cut(ties, 2), [[-np.inf, 3.0, 2.0, 2.0, -np.inf]])
  # Negative zero and zero are equal.
  zeros = jnp.array([[0.0, -0.0, -1.0]])
  assert np.isfinite(sampling.keep_top_k(zeros, 1)).sum() in (1, 2)


def test_keep_top_p_is_the_smallest_set_that_holds_p():
  logits = np.random.default_rng(1).normal(size=(50, 30)).astype(np.float32) * 2
  cut = jax.jit(sampling.keep_top_p)
  probabilities = np.asarray(jax.nn.softmax(logits))
  for p in (0.01, 0.3, 0.9, 0.999):
    kept = np.isfinite(np.asarray(cut(logits, p)))
    for row, chosen in zip(probabilities, kept, strict=True):
      assert row[chosen].min() > row[~chosen].max(initial=0)
      assert row[chosen].sum() >= p - 1e-6
      assert row[chosen].sum() - row[chosen].min() < p
  # All is kept by 0 and, whatever the rounding, by 1.
  np.testing.assert_array_equal(cut(logits, 0.0), logits)
  np.testing.assert_array_equal(cut(logits[:, :3] * 0, 1.0), logits[:, :3] * 0)


def test_options_may_be_traced():
  model = BigramModel(vocabulary=6)

  @jax.jit
  def run(temperature, topk, topp, steps):
    return sampling.temperature_sample(
      jnp.zeros((500, 4), jnp.int32),
      {},
      model,
      9,
      temperature=temperature,
      topk=topk,
      topp=topp,
      max_decode_steps=steps,
      max_decode_steps_hard_limit=3,
    )[0]

  everything = np.asarray(run(1.0, 0, 0.0, 4))
  assert set(np.unique(everything[:, :, :3])) == {1, 2, 3, 4, 5}
  assert not everything[:, :, 3].any()
  assert len(np.unique(run(1.0, 2, 0.0, 1)[:, 0, 0])) == 2
  assert not run(1.0, 2, 0.0, 1)[:, 0, 1:].any()
  best = model.logits[0].argmax()
  assert np.all(run(1.0, 0, 1e-6, 1)[:, 0, 0] == best)
  assert np.all(run(0.0, 0, 0.0, 1)[:, 0, 0] == best)


def test_the_default_is_greedy():
  model = BigramModel(vocabulary=6)
  model.logits[:, EOS] = -1e9
  decodes, scores = sample(model, np.zeros((1, 4), np.int32))
  expected, last = [], 0
  for _ in range(4):
    last = int(model.logits[last].argmax())
    expected.append(last)
  np.testing.assert_array_equal(decodes[0, 0], expected)
  assert scores[0, 0] == 0


class CyclicModel:
  """Says token + 1, with certainty; counts its calls in the cache."""

  def __init__(self, vocabulary=10):
    self.vocabulary = vocabulary

  def __call__(self, state):
    logits = jnp.where(jnp.arange(self.vocabulary) == state.cur_token + 1, 0.0, -1e4)
    cache = {
      'cached_key': state.cache['cached_key'] * 3 + state.cur_token,
      'cache_index': state.cache['cache_index'] + 1,
    }
    return logits, cache


def cyclic_cache(rows, index=0):
  return {
    'cached_key': jnp.zeros((rows, 1), jnp.int32),
    'cache_index': jnp.asarray(index, jnp.int32),
  }


@pytest.mark.parametrize('num_decodes', [1, 3])
@pytest.mark.parametrize('prefilled', [False, True])
def test_prompts_are_kept_and_continued(num_decodes, prefilled):
  inputs = np.array(
    [[0, 3, 4, 0, 0, 0], [0, 2, EOS, 5, 0, 0], [0, 4, 4, 4, 4, 2]], np.int32
  )
  lengths = np.sum(inputs != 0, axis=1)
  options = {'initial_index': lengths} if prefilled else {}
  decodes, scores = sample(
    CyclicModel(),
    inputs,
    cache=cyclic_cache(3, lengths if prefilled else 0),
    num_decodes=num_decodes,
    **options,
  )
  expected = [[3, 4, 5, 6, 7, 8], [2, EOS, 5, 6, 7, 8], [4, 4, 4, 4, 2, 3]]
  np.testing.assert_array_equal(
    decodes, np.repeat(np.array(expected)[:, None], num_decodes, axis=1)
  )
  np.testing.assert_array_equal(scores, np.zeros((3, num_decodes)))


def test_a_prompt_costs_no_probability():
  model = BigramModel(vocabulary=5)
  inputs = np.array([[0, 3, 2, 0, 0]], np.int32)
  decodes, scores = sample(model, inputs, topk=0, max_decode_steps=1)
  token = decodes[0, 0, 2]
  np.testing.assert_allclose(
    scores[0, 0], np.log(model.probabilities()[2, token]), rtol=1e-5
  )


@pytest.mark.parametrize('steps', [0, 1, 2])
@pytest.mark.parametrize('prefilled', [False, True])
def test_max_decode_steps_counts_from_the_end_of_the_prompt(steps, prefilled):
  inputs = np.array([[0, 2, 0, 0, 0, 0], [0, 2, 3, 4, 0, 0]], np.int32)
  lengths = np.sum(inputs != 0, axis=1)
  options = {'initial_index': lengths} if prefilled else {}
  decodes, _ = sample(
    CyclicModel(),
    inputs,
    cache=cyclic_cache(2, lengths if prefilled else 0),
    max_decode_steps=steps,
    **options,
  )
  expected = np.array([[2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6, 7]])
  expected[0, 1 + steps :] = 0
  expected[1, 3 + steps :] = 0
  np.testing.assert_array_equal(decodes[:, 0], expected)


def test_after_the_end_token_comes_padding():
  class EndsModel:
    def __call__(self, state):
      # Row 0 ends at position 2, row 1 at position 4.
      ends = state.cur_index + 1 == jnp.array([2, 4])
      token = jnp.where(ends, EOS, 5)[:, None]
      return jnp.where(jnp.arange(7) == token, 0.0, -1e4), state.cache

  decodes, _ = sample(EndsModel(), np.zeros((2, 6), np.int32))
  np.testing.assert_array_equal(
    decodes[:, 0], [[5, EOS, 0, 0, 0, 0], [5, 5, 5, EOS, 0, 0]]
  )


def test_state_callbacks_may_write_tokens_and_end_rows():
  def stop_after_three(state):
    def write(position, sequences):
      sequences = np.array(sequences)
      for row, at in enumerate(np.asarray(position)):
        if sequences[row, at] == 3:
          sequences[row, at + 1] = EOS
      return sequences

    shape = jax.ShapeDtypeStruct(state.sequences.shape, state.sequences.dtype)
    sequences = io_callback(write, shape, state.cur_index, state.sequences)
    return state.replace(sequences=sequences)

  decodes, _ = sample(
    CyclicModel(vocabulary=20),
    np.array([[0, 7, 0, 0, 0], [0, 2, 0, 0, 0]], np.int32),
    cache=cyclic_cache(2),
    state_callback_fn=stop_after_three,
  )
  np.testing.assert_array_equal(decodes[:, 0], [[7, 8, 9, 10, 11], [2, 3, EOS, 0, 0]])


def test_logit_callbacks_see_the_state_and_change_the_logits():
  def forbid_repetition(logits, state):
    repeated = jnp.arange(logits.shape[1]) == state.cur_token
    return jnp.where(repeated, -jnp.inf, logits)

  class StutterModel:
    def __call__(self, state):
      return jnp.tile(jnp.array([-9.0, -8.0, 1.0, 0.0]), (2, 1)), state.cache

  decodes, _ = sample(
    StutterModel(), np.zeros((2, 4), np.int32), logit_callback_fn=forbid_repetition
  )
  np.testing.assert_array_equal(decodes[:, 0], [[2, 3, 2, 3]] * 2)


def test_the_cache_follows_the_rows_under_scanned_layers():
  class ScannedModel:
    def __call__(self, state):
      # [layers, rows]: every layer has the row's own number.
      number = state.cache['cached_key'][0]
      logits = jnp.where(jnp.arange(12) == number[:, None], 0.0, -1e4)
      return logits, flax.core.unfreeze(state.cache)

  cache = flax.core.freeze({'cached_key': jnp.tile(jnp.array([4, 7, 9]), (2, 1))})
  decodes, _ = sample(
    ScannedModel(),
    np.zeros((3, 2), np.int32),
    cache=cache,
    num_decodes=2,
    cache_offset=1,
  )
  np.testing.assert_array_equal(decodes[:, :, 0], [[4, 4], [7, 7], [9, 9]])


def test_draws_depend_on_the_key_alone():
  model = BigramModel(vocabulary=8)
  inputs = np.zeros((50, 4), np.int32)
  first = sample(model, inputs, topk=0, seed=1)
  np.testing.assert_array_equal(first[0], sample(model, inputs, topk=0, seed=1)[0])
  assert np.any(first[0] != sample(model, inputs, topk=0, seed=2)[0])
  unkeyed, _ = sampling.temperature_sample(inputs, {}, model, EOS, topk=0)
  np.testing.assert_array_equal(unkeyed, sample(model, inputs, topk=0, seed=0)[0])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'topk': 3, 'topp': 0.5}, 'exclude each other'),
    ({'topk': 0, 'topp': 1.5}, 'from 0 to 1. Got: 1.5'),
    ({'topk': -1}, 'number of tokens'),
    ({'temperature': -0.1}, 'at least 0'),
    ({'max_decode_steps': 4}, '4 / 3'),
  ],
)
def test_options_out_of_range_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    sample(BigramModel(), np.zeros((1, 3), np.int32), **options)
