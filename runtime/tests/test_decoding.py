"""Beam search against enumeration and plain Python, sampling against distributions."""

import functools
import itertools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from scipy import special, stats

from t5x import decoding

EOS = 1
# 0 is padding, which the model never emits.
VOCABULARY = 4
HISTORIES = 97
LENGTH = 4


def history_after(history, token):
  return (history * 31 + token * 7 + 1) % HISTORIES


class TableModel:
  """Logits depend on the example and, through a hash in the cache, on all tokens.

  A cache of the wrong beam gives wrong logits.
  """

  def __init__(self, examples, vocabulary=VOCABULARY, seed=0, frozen=False):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(examples, HISTORIES, vocabulary)) * 1.5
    table[:, :, 0] = -1e9
    self.table = table.astype(np.float32)
    self.frozen = frozen

  def log_probs(self, example, history):
    row = self.table[example, history].astype(np.float64)
    return row - np.log(np.exp(row).sum())

  def log_prob(self, example, sequence, prompt=0):
    """The log probability of a sequence after its first `prompt` tokens."""
    total, history = 0.0, history_after(0, 0)
    for position, token in enumerate(sequence):
      if position >= prompt:
        total += self.log_probs(example, history)[token]
      history = history_after(history, token)
    return total

  def cache(self, examples, histories=None, layers=False):
    """A cache with one row per example, and optionally a leading layer axis."""
    histories = np.zeros(len(examples), np.int32) if histories is None else histories
    leaf = np.stack([examples, histories], axis=1).astype(np.int32)
    cache = {
      'layer': {
        'cached_key': jnp.asarray(leaf[None] if layers else leaf),
        'cache_index': jnp.zeros((1,) if layers else (), jnp.int32),
      }
    }
    return flax.core.freeze(cache) if self.frozen else cache

  def tokens_to_logits(self, state, layers=False):
    leaf = state.cache['layer']['cached_key']
    example, history = leaf[..., 0], leaf[..., 1]
    history = history_after(history, state.cur_token[:, 0])
    logits = jnp.asarray(self.table)[example, history]
    cache = {
      'layer': {
        'cached_key': jnp.stack([example, history], axis=-1),
        'cache_index': state.cache['layer']['cache_index'] + 1,
      }
    }
    return logits[0] if layers else logits, cache

  def enumerate(self, example, alpha, length=LENGTH, prompt=()):
    """All finished sequences with their scores, best first."""
    ordinary = range(2, self.table.shape[2])
    found = []
    for size in range(length - len(prompt)):
      for middle in itertools.product(ordinary, repeat=size):
        sequence = (*prompt, *middle, EOS)
        score = self.log_prob(example, sequence, len(prompt))
        score /= ((5 + len(sequence)) / 6) ** alpha
        found.append((score, sequence + (0,) * (length - len(sequence))))
    return sorted(found, reverse=True)


def plain_beam_search(model, example, beams, alpha, length=LENGTH):
  """The algorithm without arrays."""
  live = [(0.0, (), history_after(0, 0))]
  closed = []
  for _ in range(length):
    grown = []
    for log_prob, sequence, history in live:
      for token, more in enumerate(model.log_probs(example, history)):
        if token:
          after = (*sequence, token)
          grown.append((log_prob + more, after, history_after(history, token)))
    grown = sorted(grown, reverse=True)[: 2 * beams]
    for log_prob, sequence, _ in grown:
      if sequence[-1] == EOS:
        closed.append((log_prob / ((5 + len(sequence)) / 6) ** alpha, sequence))
    closed = sorted(closed, reverse=True)[:beams]
    live = [entry for entry in grown if entry[1][-1] != EOS][:beams]
  return closed


def search(model, examples, inputs=None, length=LENGTH, layers=False, **options):
  examples = np.asarray(examples)
  if inputs is None:
    inputs = np.zeros((len(examples), length), np.int32)
  cache = options.pop('cache', None)
  if cache is None:
    cache = model.cache(examples, layers=layers)
  run = functools.partial(
    decoding.beam_search,
    tokens_to_logits=functools.partial(model.tokens_to_logits, layers=layers),
    eos_id=EOS,
    cache_offset=int(layers),
    **options,
  )
  sequences, scores = jax.jit(run)(inputs, cache)
  return np.asarray(sequences), np.asarray(scores)


@pytest.mark.parametrize('beams', [1, 2, 5])
@pytest.mark.parametrize('alpha', [0.0, 0.6, 2.0, -0.7])
@pytest.mark.parametrize('layers', [False, True])
def test_search_against_plain_python(beams, alpha, layers):
  model = TableModel(examples=4, vocabulary=9, seed=3, frozen=layers)
  length = 7
  sequences, scores = search(
    model, range(4), length=length, num_decodes=beams, alpha=alpha, layers=layers
  )
  for example in range(4):
    expected = plain_beam_search(model, example, beams, alpha, length)[::-1]
    assert expected
    # Empty slots come first.
    empty = beams - len(expected)
    assert np.all(scores[example, :empty] == decoding.NEG_INF_VALUE)
    np.testing.assert_allclose(
      scores[example, empty:], [score for score, _ in expected], rtol=1e-5
    )
    for row, (_, sequence) in zip(sequences[example, empty:], expected, strict=True):
      np.testing.assert_array_equal(row[: len(sequence)], sequence)
      assert not row[len(sequence) :].any()


def prompts_of(*prompts, length=LENGTH):
  """Decoder inputs: start token, prompt, padding."""
  inputs = np.zeros((len(prompts), length), np.int32)
  for row, prompt in zip(inputs, prompts, strict=True):
    row[1 : 1 + len(prompt)] = prompt
  return inputs


def prefilled_cache(model, prompts, layers=False):
  """The cache before the last token of each prompt; its index has a batch axis."""
  histories = []
  for prompt in prompts:
    history = 0
    for token in (0, *prompt)[:-1]:
      history = history_after(history, token)
    histories.append(history)
  cache = model.cache(np.arange(len(prompts)), np.array(histories), layers)
  lengths = np.array([len(p) for p in prompts], np.int32)
  cache['layer']['cache_index'] = jnp.asarray(lengths[None] if layers else lengths)
  return cache, lengths


@pytest.mark.parametrize('layers', [False, True])
@pytest.mark.parametrize('prefill', [False, True])
def test_prompts_are_forced_without_cost(prefill, layers):
  prompts = [(), (2,), (3, 2), (3, 3, 2)]
  model = TableModel(examples=len(prompts), seed=5)
  options = {}
  if prefill:
    cache, lengths = prefilled_cache(model, prompts, layers)
    options = {'cache': cache, 'initial_index': lengths}
  sequences, scores = search(
    model,
    range(len(prompts)),
    prompts_of(*prompts),
    num_decodes=8,
    alpha=0.6,
    layers=layers,
    **options,
  )
  for example, prompt in enumerate(prompts):
    expected = model.enumerate(example, 0.6, prompt=prompt)
    found = scores[example] > decoding.NEG_INF_VALUE
    assert found.sum() == min(8, len(expected))
    expected = expected[: found.sum()][::-1]
    np.testing.assert_array_equal(sequences[example][found], [s for _, s in expected])
    np.testing.assert_allclose(
      scores[example][found], [s for s, _ in expected], rtol=1e-5
    )
    assert not sequences[example][~found].any()


def test_end_token_in_a_prompt():
  model = TableModel(examples=1)
  inputs = np.array([[0, 2, EOS, 0, 0, 0]])
  sequences, _ = search(model, [0], inputs, num_decodes=2, alpha=0.0)
  for row in sequences[0]:
    np.testing.assert_array_equal(row[:2], [2, EOS])
    assert np.sum(row == EOS) == 2


def test_example_is_independent_of_its_batch():
  prompts = [(), (3,), (2, 2), (4, 3, 2)]
  model = TableModel(examples=4, vocabulary=7, seed=11)
  inputs = prompts_of(*prompts, length=8)
  cache, lengths = prefilled_cache(model, prompts)
  options = {'num_decodes': 3, 'min_log_prob': -4.0}
  together = search(
    model, range(4), inputs, cache=cache, initial_index=lengths, **options
  )
  for example in range(4):
    row = slice(example, example + 1)
    own_cache = jax.tree.map(lambda x, row=row: x[row], cache)
    alone = search(
      model,
      [example],
      inputs[row],
      cache=own_cache,
      initial_index=lengths[row],
      **options,
    )
    np.testing.assert_array_equal(together[0][row], alone[0])
    np.testing.assert_allclose(together[1][row], alone[1], rtol=1e-5)


def test_live_sequences_if_none_finished():
  model = TableModel(examples=1)
  model.table[:, :, EOS] = -1e9
  sequences, scores = search(model, [0], num_decodes=4, length=3, alpha=0.6)
  expected = [(model.log_prob(0, s), s) for s in itertools.product((2, 3), repeat=3)]
  expected = sorted(expected, reverse=True)[:4][::-1]
  # Plain log probabilities, without length penalty.
  np.testing.assert_allclose(scores[0], [s for s, _ in expected], rtol=1e-5)
  np.testing.assert_array_equal(sequences[0], [s for _, s in expected])


def states_of(model, inputs, cache, num_decodes=2, **options):
  """The states with which the model is called."""
  states = []

  def recorded(state):
    states.append(jax.tree.map(np.asarray, state))
    return model.tokens_to_logits(state)

  with jax.disable_jit():
    decoding.beam_search(inputs, cache, recorded, EOS, num_decodes, **options)
  return states


def steps_of(model, length=9, **options):
  inputs, cache = jnp.zeros((1, length), jnp.int32), model.cache(np.arange(1))
  return len(states_of(model, inputs, cache, **options))


def test_early_stop():
  model = TableModel(examples=1)
  model.table[:] = np.log([1e-30, 0.98, 0.01, 0.01])
  # log 0.98 after one step; all others are below log 0.01.
  assert steps_of(model, num_decodes=1, alpha=0.0) == 1
  # A longer sequence may still win: log(0.01) / (14 / 6) ** 8 > log 0.98.
  assert steps_of(model, num_decodes=1, alpha=8.0) > 1


def test_limits():
  model = TableModel(examples=1, vocabulary=9, seed=2)
  model.table[:, :, EOS] = -1e9
  assert steps_of(model) == 9
  assert steps_of(model, max_decode_step=3) == 3
  assert steps_of(model, max_decode_len=5) == 5
  probable = steps_of(model, min_log_prob=-3.0)
  assert 1 < probable < 9
  for steps, below in ((probable - 1, False), (probable, True)):
    _, scores = search(model, [0], length=9, num_decodes=2, max_decode_step=steps)
    assert (scores.max() < -3.0) == below
  longer, _ = search(model, [0], length=3, num_decodes=2, max_decode_len=5)
  assert longer.shape == (1, 2, 5)


def test_decoding_state():
  model = TableModel(examples=2, seed=1)
  cache, lengths = prefilled_cache(model, [(2,), (3, 2)])
  inputs = prompts_of((2,), (3, 2))
  first, second, *_ = states_of(model, inputs, cache, initial_index=lengths)
  np.testing.assert_array_equal(first.cur_index, [1, 1, 2, 2])
  np.testing.assert_array_equal(first.cur_token, [[2], [2], [2], [2]])
  np.testing.assert_array_equal(
    first.sequences[:, :3], [[0, 2, 0], [0, 2, 0], [0, 3, 2], [0, 3, 2]]
  )
  np.testing.assert_array_equal(first.cache['layer']['cache_index'], [1, 1, 2, 2])
  np.testing.assert_array_equal(second.cur_index, [2, 2, 3, 3])
  np.testing.assert_array_equal(
    second.sequences[np.arange(4), second.cur_index], second.cur_token[:, 0]
  )


# ---- The beam dimension ----


def numbers(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('apply_to_index', [False, True])
def test_cache_map_skips_leaves_without_batch_axis(apply_to_index):
  skipped = {'cached_bias': 1, 'position_embedder_index': 1}
  cache = flax.core.freeze({'layer': {'cached_key': 1, 'cache_index': 1, **skipped}})
  mapped = decoding.cache_map(lambda x: x + 1, cache, apply_to_index)
  index = 2 if apply_to_index else 1
  assert mapped == flax.core.freeze(
    {'layer': {'cached_key': 2, 'cache_index': index, **skipped}}
  )


@pytest.mark.parametrize('offset', [0, 1])
def test_positions_of_prompts_are_expanded(offset):
  for index, want in (([1, 4, 2], [1, 1, 4, 4, 2, 2]), (5, 5)):
    cache = {'position_embedder_index': jnp.asarray(index)}
    expanded = decoding._expand_position_indices(cache, 3, 2, offset)
    np.testing.assert_array_equal(expanded['position_embedder_index'], want)


@pytest.mark.parametrize('batch', [1, 8, 9])
@pytest.mark.parametrize('samples', [50, 5000, 8192])
def test_top_k_two_stage_is_top_k(batch, samples):
  x = numbers(batch, samples)
  # Of equal values the first is taken.
  x = np.round(x, 1)
  found, where = jax.jit(lambda x: decoding.top_k_two_stage(x, 3))(x)
  expected, expected_where = jax.lax.top_k(x, 3)
  np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(where, expected_where)


# ---- Sampling ----


class BigramModel:
  """Logits depend on the last token."""

  def __init__(self, vocabulary=4, seed=0):
    logits = np.random.default_rng(seed).normal(size=(vocabulary, vocabulary))
    self.logits = logits.astype(np.float32)
    self.logits[:, 0] = -1e9

  def __call__(self, state):
    return jnp.asarray(self.logits)[state.cur_token[:, 0]], state.cache

  def probabilities(self, temperature=1.0):
    return special.softmax(self.logits.astype(np.float64) / temperature, axis=-1)


def sample(model, inputs, seed=0, cache=None, **options):
  run = functools.partial(
    decoding.temperature_sample, tokens_to_logits=model, eos_id=EOS, **options
  )
  decodes, scores = jax.jit(run)(
    jnp.asarray(inputs),
    {} if cache is None else cache,
    decode_rng=jax.random.PRNGKey(seed),
  )
  return np.asarray(decodes), np.asarray(scores)


def sequence_probabilities(transitions, length):
  """Probabilities of all sequences, padded after the end, of a transition matrix."""
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
  # The test needs at least five of each, so rare sequences are joined.
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
def test_sampled_distribution(temperature, num_decodes):
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
  # Decodes are sorted by probability, so pairs are unordered.
  pairs = np.sort(decodes[:, :, 0], axis=1)
  single = model.probabilities(1.5)[0]
  table = {
    (a, b): single[a] * single[b] * (1 if a == b else 2)
    for a, b in itertools.combinations_with_replacement(range(6), 2)
    if single[a] * single[b] > 1e-12
  }
  assert_drawn_from(pairs, table)


@pytest.mark.parametrize('temperature', [0.0, np.zeros(2, np.float32)])
def test_greedy_search_leaves_out_the_sampler(temperature):
  def program(temperature):
    run = functools.partial(
      decoding.temperature_sample, np.zeros((2, 3), np.int32), {}, BigramModel(), EOS
    )
    return str(jax.make_jaxpr(lambda: run(temperature=temperature))())

  assert 'random_bits' in program(1.0) and 'random_bits' not in program(temperature)


def test_temperature_per_example():
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
def test_reported_log_probs(options, rescale):
  model = BigramModel(vocabulary=7, seed=2)
  decodes, scores = sample(
    model, np.zeros((400, 1), np.int32), rescale_log_probs=rescale, **options
  )
  logits = model.logits[0].astype(np.float64)
  temperature, topk = options.get('temperature', 1.0), options.get('topk', 1)
  topk = topk if temperature else 1
  shaped = logits / (temperature or 1.0)
  order = np.argsort(-shaped)
  if topk:
    kept = order[:topk]
  elif 'topp' in options:
    mass = np.cumsum(special.softmax(shaped)[order])
    kept = order[: np.searchsorted(mass, options['topp']) + 1]
  else:
    kept = order
  masked = np.full_like(shaped, -1e9)
  masked[kept] = shaped[kept]
  expected = special.log_softmax(masked if rescale else logits)
  tokens = decodes[:, 0, 0]
  assert set(tokens) <= set(kept)
  np.testing.assert_allclose(scores[:, 0], expected[tokens], rtol=1e-5, atol=1e-6)


def test_traced_sampling_options():
  model = BigramModel(vocabulary=6)

  @jax.jit
  def run(temperature, topk, topp, max_decode_steps):
    options = dict(temperature=temperature, topk=topk, topp=topp)
    return decoding.temperature_sample(
      jnp.zeros((500, 4), jnp.int32),
      {},
      model,
      9,
      max_decode_steps=max_decode_steps,
      max_decode_steps_hard_limit=3,
      **options,
    )[0]

  everything = np.asarray(run(1.0, 0, 0.0, 4))
  assert set(np.unique(everything[:, :, :3])) == {1, 2, 3, 4, 5}
  assert not everything[:, :, 3].any()
  assert len(np.unique(run(1.0, 2, 0.0, 1)[:, 0, 0])) == 2
  assert not run(1.0, 2, 0.0, 1)[:, 0, 1:].any()
  best = model.logits[0].argmax()
  assert np.all(run(1.0, 0, 1e-6, 1)[:, 0, 0] == best)
  assert np.all(run(0.0, 0, 0.0, 1)[:, 0, 0] == best)


class SuccessorModel:
  """Always predicts the current token + 1."""

  def __call__(self, state):
    logits = jnp.where(jnp.arange(20) == state.cur_token + 1, 0.0, -1e4)
    return logits, {'cache_index': state.cache['cache_index'] + 1}


def test_ties_and_zero_in_top_k_and_top_p():
  top_k, top_p = jax.jit(decoding.keep_top_k), jax.jit(decoding.keep_top_p)
  logits = np.array([[1.0, 3.0, 2.0, 2.0, decoding.NEG_INF_VALUE]], np.float32)
  kept = np.where(logits >= 2, logits, decoding.NEG_INF_VALUE)
  np.testing.assert_array_equal(top_k(logits, 2), kept)
  # The three largest have a probability of 0.93, the first of 0.53.
  np.testing.assert_array_equal(top_p(logits, 0.6), kept)
  np.testing.assert_array_equal(top_k(logits, 0), logits)
  np.testing.assert_array_equal(top_p(logits, 0.0), logits)
  # 1 keeps all in spite of rounding.
  np.testing.assert_array_equal(top_p(logits[:, :3] * 0, 1.0), logits[:, :3] * 0)


@pytest.mark.parametrize('steps', [None, 0, 1, 2])
@pytest.mark.parametrize(
  ('num_decodes', 'prefilled'), [(1, True), (3, False), (3, True)]
)
def test_sampling_continues_prompts(num_decodes, prefilled, steps):
  inputs = np.array(
    [[0, 3, 4, 0, 0, 0], [0, 2, EOS, 5, 0, 0], [0, 4, 4, 4, 4, 2]], np.int32
  )
  lengths = np.sum(inputs != 0, axis=1)
  options = {'initial_index': lengths} if prefilled else {}
  decodes, scores = sample(
    SuccessorModel(),
    inputs,
    cache={'cache_index': jnp.asarray(lengths if prefilled else 0)},
    num_decodes=num_decodes,
    max_decode_steps=steps,
    **options,
  )
  expected = [[3, 4, 5, 6, 7, 8], [2, EOS, 5, 6, 7, 8], [4, 4, 4, 4, 2, 3]]
  if steps is not None:
    for row, length in zip(expected, lengths):
      row[length + steps :] = [0] * len(row[length + steps :])
  np.testing.assert_array_equal(
    decodes, np.repeat(np.array(expected)[:, None], num_decodes, axis=1)
  )
  np.testing.assert_array_equal(scores, np.zeros((3, num_decodes)))


def test_prompt_does_not_count_in_the_score():
  model = BigramModel(vocabulary=5)
  inputs = np.array([[0, 3, 2, 0, 0]], np.int32)
  decodes, scores = sample(model, inputs, topk=0, max_decode_steps=1)
  token = decodes[0, 0, 2]
  np.testing.assert_allclose(
    scores[0, 0], np.log(model.probabilities()[2, token]), rtol=1e-5
  )


def test_state_callback():
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
    SuccessorModel(),
    np.array([[0, 7, 0, 0, 0], [0, 2, 0, 0, 0]], np.int32),
    cache={'cache_index': jnp.asarray(0)},
    state_callback_fn=stop_after_three,
  )
  np.testing.assert_array_equal(decodes[:, 0], [[7, 8, 9, 10, 11], [2, 3, EOS, 0, 0]])


def test_logit_callback():
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


def test_sampling_under_scanned_layers():
  class ScannedModel:
    def __call__(self, state):
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


def test_draws_depend_only_on_the_key():
  model = BigramModel(vocabulary=8)
  inputs = np.zeros((50, 4), np.int32)
  first = sample(model, inputs, topk=0, seed=1)
  np.testing.assert_array_equal(first[0], sample(model, inputs, topk=0, seed=1)[0])
  assert np.any(first[0] != sample(model, inputs, topk=0, seed=2)[0])
  unkeyed, _ = decoding.temperature_sample(inputs, {}, model, EOS, topk=0)
  np.testing.assert_array_equal(unkeyed, sample(model, inputs, topk=0, seed=0)[0])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'topk': 3, 'topp': 0.5}, 'topp'),
    ({'max_decode_steps': 4}, '4 / 3'),
  ],
)
def test_invalid_sampling_options(options, message):
  with pytest.raises(ValueError, match=message):
    sample(BigramModel(), np.zeros((1, 3), np.int32), **options)
