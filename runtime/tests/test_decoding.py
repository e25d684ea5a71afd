"""Beam search against enumeration, and against a beam search in plain Python.

The model of these tests is a table: logits depend on all tokens so far, by way
of a number that the cache carries and every token changes, and on the example.
A cache that follows the wrong beam gives wrong logits at once.
"""

import functools
import itertools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x import decoding, sampling

EOS = 1
# 0 is padding, which the model never emits.
VOCABULARY = 4
HISTORIES = 97
LENGTH = 4


def history_after(history, token):
  return (history * 31 + token * 7 + 1) % HISTORIES


class TableModel:
  """Logits by history and example."""

  def __init__(self, examples, vocabulary=VOCABULARY, seed=0, frozen=False):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(examples, HISTORIES, vocabulary)) * 1.5
    table[:, :, 0] = -1e9
    self.table = table.astype(np.float32)
    self.frozen = frozen

  def log_probs(self, example, history):
    row = self.table[example, history].astype(np.float64)
    return row - np.log(np.exp(row).sum())

  def cache(self, examples, histories=None, layers=False):
    """A cache for one row an example, with a layer axis in front if asked."""
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
    """All closed sequences with their scores, best first."""
    ordinary = range(2, self.table.shape[2])
    found = []
    for size in range(length - len(prompt)):
      for middle in itertools.product(ordinary, repeat=size):
        sequence = (*prompt, *middle, EOS)
        log_prob, history = 0.0, history_after(0, 0)
        for position, token in enumerate(sequence):
          if position >= len(prompt):
            log_prob += self.log_probs(example, history)[token]
          history = history_after(history, token)
        score = log_prob / ((5 + len(sequence)) / 6) ** alpha
        found.append((score, sequence + (0,) * (length - len(sequence))))
    return sorted(found, reverse=True)


def plain_beam_search(model, example, beams, alpha, length=LENGTH):
  """A beam search in lists: the algorithm without arrays."""
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
  """Runs the search under jit."""
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


@pytest.mark.parametrize('alpha', [0.0, 0.6, 1.0, 2.0, -0.7])
@pytest.mark.parametrize('frozen', [False, True])
def test_a_wide_search_finds_what_enumeration_finds(alpha, frozen):
  model = TableModel(examples=3, frozen=frozen)
  beams = 8  # As many as there are open sequences, so nothing is pruned.
  sequences, scores = search(model, range(3), num_decodes=beams, alpha=alpha)
  assert sequences.shape == (3, beams, LENGTH)
  for example in range(3):
    expected = model.enumerate(example, alpha)[:beams][::-1]
    np.testing.assert_allclose(
      scores[example], [score for score, _ in expected], rtol=1e-5
    )
    np.testing.assert_array_equal(sequences[example], [s for _, s in expected])


@pytest.mark.parametrize('beams', [1, 2, 3, 5])
@pytest.mark.parametrize('alpha', [0.0, 0.6])
@pytest.mark.parametrize('layers', [False, True])
def test_a_narrow_search_prunes_like_plain_python(beams, alpha, layers):
  model = TableModel(examples=4, vocabulary=9, seed=3)
  length = 7
  sequences, scores = search(
    model, range(4), length=length, num_decodes=beams, alpha=alpha, layers=layers
  )
  for example in range(4):
    expected = plain_beam_search(model, example, beams, alpha, length)[::-1]
    assert expected
    # What was not found lies first, empty.
    empty = beams - len(expected)
    assert np.all(scores[example, :empty] == decoding.NEG_INF_VALUE)
    np.testing.assert_allclose(
      scores[example, empty:], [score for score, _ in expected], rtol=1e-5
    )
    for row, (_, sequence) in zip(sequences[example, empty:], expected, strict=True):
      np.testing.assert_array_equal(row[: len(sequence)], sequence)
      assert not row[len(sequence) :].any()


def test_alpha_may_be_traced():
  model = TableModel(examples=1)
  cache = model.cache(np.arange(1))

  @jax.jit
  def run(alpha):
    return decoding.beam_search(
      jnp.zeros((1, LENGTH), jnp.int32), cache, model.tokens_to_logits, EOS, 8, alpha
    )

  for alpha in (0.0, 1.3):
    sequences, scores = run(alpha)
    best_score, best = model.enumerate(0, alpha)[0]
    np.testing.assert_array_equal(sequences[0, -1], best)
    np.testing.assert_allclose(scores[0, -1], best_score, rtol=1e-5)


def prompts_of(*prompts, length=LENGTH):
  """Decoder inputs: the start token, the prompt, padding."""
  inputs = np.zeros((len(prompts), length), np.int32)
  for row, prompt in zip(inputs, prompts, strict=True):
    row[1 : 1 + len(prompt)] = prompt
  return inputs


def prefilled_cache(model, prompts, layers=False):
  """The cache after the start token and all of the prompt but its last token.

  The index has a batch axis then.
  """
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
def test_prompts_are_kept_and_cost_nothing(prefill, layers):
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
    # Slots without a sequence are empty.
    assert not sequences[example][~found].any()


def test_prefilled_and_forced_prompts_agree_on_a_long_search():
  prompts = [(2,), (3, 2, 5, 4), (5, 5)]
  model = TableModel(examples=3, vocabulary=6, seed=8)
  inputs = prompts_of(*prompts, length=9)
  forced = search(model, range(3), inputs, num_decodes=3)
  cache, lengths = prefilled_cache(model, prompts)
  filled = search(
    model, range(3), inputs, num_decodes=3, cache=cache, initial_index=lengths
  )
  np.testing.assert_array_equal(forced[0], filled[0])
  np.testing.assert_allclose(forced[1], filled[1], rtol=1e-5)


def test_a_prompt_as_long_as_the_inputs_leaves_one_token_to_decode():
  model = TableModel(examples=1)
  inputs = np.array([[0, 2, 3, 2]])
  sequences, scores = search(model, [0], inputs, num_decodes=2, alpha=0.0)
  np.testing.assert_array_equal(sequences[0, -1], [2, 3, 2, EOS])
  np.testing.assert_allclose(
    scores[0, -1], model.enumerate(0, 0.0, prompt=(2, 3, 2))[0][0], rtol=1e-5
  )


def test_an_end_token_in_a_prompt_closes_nothing():
  model = TableModel(examples=1)
  inputs = np.array([[0, 2, EOS, 0, 0, 0]])
  sequences, _ = search(model, [0], inputs, num_decodes=2, alpha=0.0)
  for row in sequences[0]:
    np.testing.assert_array_equal(row[:2], [2, EOS])
    assert np.sum(row == EOS) == 2


def test_an_example_does_not_depend_on_its_batch():
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


def test_without_a_closed_sequence_the_open_ones_are_returned():
  model = TableModel(examples=1)
  model.table[:, :, EOS] = -1e9
  sequences, scores = search(model, [0], num_decodes=4, length=3, alpha=0.6)
  expected = []
  for sequence in itertools.product((2, 3), repeat=3):
    log_prob, history = 0.0, history_after(0, 0)
    for token in sequence:
      log_prob += model.log_probs(0, history)[token]
      history = history_after(history, token)
    expected.append((log_prob, sequence))
  expected = sorted(expected, reverse=True)[:4][::-1]
  # Plain log probabilities: the penalty belongs to closed sequences.
  np.testing.assert_allclose(scores[0], [s for s, _ in expected], rtol=1e-5)
  np.testing.assert_array_equal(sequences[0], [s for _, s in expected])


def steps_of(model, length, **options):
  """How often the model is asked."""
  calls = []

  def counted(state):
    calls.append(np.asarray(state.cur_index))
    return model.tokens_to_logits(state)

  with jax.disable_jit():
    decoding.beam_search(
      jnp.zeros((1, length), jnp.int32),
      model.cache(np.arange(1)),
      counted,
      EOS,
      **options,
    )
  return calls


def test_the_search_stops_as_soon_as_no_step_can_change_its_result():
  model = TableModel(examples=1)
  model.table[:] = np.log([1e-30, 0.98, 0.01, 0.01])
  # log 0.98 after one step; all else lies below log 0.01.
  assert len(steps_of(model, 9, num_decodes=1, alpha=0.0)) == 1
  # With this alpha a longer sequence may still win, until the bound says no:
  # log(0.01) / (14 / 6) ** 8 > log 0.98, so it goes on.
  assert len(steps_of(model, 9, num_decodes=1, alpha=8.0)) > 1


def test_limits_of_steps_length_and_probability():
  model = TableModel(examples=1, vocabulary=9, seed=2)
  model.table[:, :, EOS] = -1e9
  assert len(steps_of(model, 9, num_decodes=2)) == 9
  assert len(steps_of(model, 9, num_decodes=2, max_decode_step=3)) == 3
  assert len(steps_of(model, 9, num_decodes=2, max_decode_len=5)) == 5
  probable = steps_of(model, 9, num_decodes=2, min_log_prob=-3.0)
  assert 1 < len(probable) < 9
  for steps, below in ((len(probable) - 1, False), (len(probable), True)):
    _, scores = search(model, [0], length=9, num_decodes=2, max_decode_step=steps)
    assert (scores.max() < -3.0) == below
  longer, _ = search(model, [0], length=3, num_decodes=2, max_decode_len=5)
  assert longer.shape == (1, 2, 5)


def test_the_model_is_told_positions_tokens_and_prefixes():
  model = TableModel(examples=2, seed=1)
  inputs = prompts_of((2,), (3, 2))
  cache, lengths = prefilled_cache(model, [(2,), (3, 2)])
  states = []

  def recorded(state):
    states.append(jax.tree.map(np.asarray, state))
    return model.tokens_to_logits(state)

  with jax.disable_jit():
    decoding.beam_search(inputs, cache, recorded, EOS, 2, initial_index=lengths)
  first = states[0]
  np.testing.assert_array_equal(first.cur_index, [1, 1, 2, 2])
  np.testing.assert_array_equal(first.cur_token, [[2], [2], [2], [2]])
  np.testing.assert_array_equal(first.sequences[0, :3], [0, 2, 0])
  np.testing.assert_array_equal(first.sequences[2, :3], [0, 3, 2])
  np.testing.assert_array_equal(first.cache['layer']['cache_index'], [1, 1, 2, 2])
  second = states[1]
  np.testing.assert_array_equal(second.cur_index, [2, 2, 3, 3])
  np.testing.assert_array_equal(
    second.sequences[np.arange(4), second.cur_index], second.cur_token[:, 0]
  )


def test_the_search_runs_sharded_over_devices():
  model = TableModel(examples=8, vocabulary=9, seed=4)
  mesh = Mesh(np.array(jax.devices()[:8]), ('data',))
  rows = NamedSharding(mesh, PartitionSpec('data'))
  cache = model.cache(np.arange(8))
  whole = search(model, range(8), length=6, num_decodes=3)
  inputs = jax.device_put(np.zeros((8, 6), np.int32), rows)
  cache['layer']['cached_key'] = jax.device_put(cache['layer']['cached_key'], rows)
  sharded = search(model, range(8), inputs, num_decodes=3, cache=cache)
  np.testing.assert_array_equal(whole[0], sharded[0])
  np.testing.assert_allclose(whole[1], sharded[1], rtol=1e-6)


def test_brevity_penalty_is_that_of_its_paper():
  lengths = jnp.array([1, 7, 13])
  expected = [1.0, 2.0**0.6, 3.0**0.6]
  np.testing.assert_allclose(
    decoding.brevity_penalty(0.6, lengths), expected, rtol=1e-6
  )


def test_beam_init_has_one_live_beam_and_none_closed():
  cache = {'cached_key': jnp.ones((2, 3)), 'cache_index': jnp.zeros((2,), jnp.int32)}
  state = decoding.beam_init(2, 3, 5, cache)
  np.testing.assert_array_equal(state.live_logprobs[:, -1], [0, 0])
  assert np.all(state.live_logprobs[:, :-1] == decoding.NEG_INF_VALUE)
  assert np.all(state.finished_scores == decoding.NEG_INF_VALUE)
  assert not state.finished_flags.any()
  assert state.live_seqs.shape == state.finished_seqs.shape == (2, 3, 5)
  assert state.cache['cached_key'].shape == (2, 3, 3)
  assert state.cache['cache_index'].shape == (2,)
  prompts = jnp.ones((2, 3, 5), jnp.int32)
  filled = decoding.beam_init(2, 3, 5, cache, live_seqs=prompts)
  assert filled.cache['cache_index'].shape == (2, 3)
  np.testing.assert_array_equal(filled.live_seqs, prompts)


def test_sampling_is_reached_under_the_same_module():
  assert decoding.temperature_sample is sampling.temperature_sample
