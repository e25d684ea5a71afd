"""Sampling from a language model: temperature, top-k and top-p.

Reached by models and gin files as `decoding.temperature_sample`.

Inputs have the start token at position 0. The tokens after it, up to the first 0,
are a prompt: they are kept and cost no probability, and end tokens among them end
nothing. Without `initial_index` the model is fed the prompt token by token; with
it, the cache holds the prompt up to that position, whose token is fed first. After
the end token a sequence is padded with 0.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from t5x.beams import (
  DecodingState,
  TokensToLogits,
  cache_map,
  expand_position_indices,
  flat_batch_beam_expand,
  unflatten_beam_dim,
)

# Temperatures up to here mean the most probable token: 1 / temperature would
# overflow soon after.
MIN_TEMPERATURE = np.array(1e-4)

# Columns after the last position. State callbacks write the token after the
# current one, also for an example that stands at its end.
_SPARE_COLUMNS = 2


@flax.struct.dataclass
class SamplingLoopState:
  """What sampling carries from step to step; callbacks see and replace it.

  Rows are batch * num_decodes, the decodes of one example side by side.

  Attributes:
    step: int32 scalar, steps done.
    cur_index: int32 [rows], position of the current token.
    sequences: int32 [rows, length + 2], tokens so far; position 0 is the start
      token, the last column is spare.
    cache: the model's cache.
    cur_token: int32 [rows, 1], the token that is fed next.
    ended: bool [rows, 1], which rows are complete.
    rng: key for the steps to come.
    log_prob: float32 [rows], log probability of the sampled tokens.
  """

  step: jax.Array
  cur_index: jax.Array
  sequences: jax.Array
  cache: Mapping[str, Any]
  cur_token: jax.Array
  ended: jax.Array
  rng: jax.Array
  log_prob: jax.Array


StateCallbackFn = Callable[[SamplingLoopState], SamplingLoopState]
LogitCallbackFn = Callable[[jax.Array, SamplingLoopState], jax.Array]


def _is_static(value: Any) -> bool:
  return not isinstance(value, jax.core.Tracer)


def _ordered_bits(x: Float[Array, '...']) -> UInt[Array, '...']:
  """Unsigned integers in the order of the floats (their radix sort keys)."""
  bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  sign = jnp.uint32(1 << 31)
  # Negative floats count downwards: all their bits are flipped.
  return jnp.where(bits & sign, ~bits, bits | sign)


def _highest_cutoff(
  keys: UInt[Array, '*batch vocabulary'],
  enough: Callable[[Bool[Array, '*batch vocabulary']], Bool[Array, '*batch']],
) -> Bool[Array, '*batch vocabulary']:
  """The smallest upper set of keys that is enough, found bit by bit.

  Thirty-two reductions over the vocabulary, where a sort needs more on TPU.

  Args:
    keys: what to cut.
    enough: says by rows whether a set will do; larger sets do if smaller ones
      do. If no set will, all is kept.

  Returns:
    The set.
  """

  def set_bit(step, cutoff):
    bit = jnp.uint32(1) << (jnp.uint32(31) - jnp.uint32(step))
    higher = cutoff | bit
    return jnp.where(enough(keys >= higher[..., None]), higher, cutoff)

  cutoff = lax.fori_loop(0, 32, set_bit, jnp.zeros(keys.shape[:-1], jnp.uint32))
  return keys >= cutoff[..., None]


def keep_top_k(
  logits: Float[Array, '*batch vocabulary'], k: int | Int[Array, '']
) -> Float[Array, '*batch vocabulary']:
  """Sets all but the k largest logits of a row to -inf.

  Logits equal to the k-th largest stay too. `k` may be traced; 0 keeps all.

  Args:
    logits: unnormalised log probabilities.
    k: how many to keep.

  Returns:
    The masked logits.
  """
  kept = _highest_cutoff(_ordered_bits(logits), lambda chosen: chosen.sum(-1) >= k)
  return jnp.where(kept | (jnp.asarray(k) <= 0), logits, -jnp.inf)


def keep_top_p(
  logits: Float[Array, '*batch vocabulary'], p: float | Float[Array, '']
) -> Float[Array, '*batch vocabulary']:
  """Keeps the fewest logits of a row that hold at least the probability `p`.

  Nucleus sampling, Holtzman et al. 2020 (arXiv:1904.09751), section 3.1. Logits
  equal to the smallest kept one stay too. `p` may be traced; 0 keeps all.

  Args:
    logits: unnormalised log probabilities.
    p: probability to keep, 0 to 1.

  Returns:
    The masked logits, -inf where dropped.
  """
  probabilities = jax.nn.softmax(logits.astype(jnp.float32))

  def enough(chosen):
    return jnp.where(chosen, probabilities, 0.0).sum(-1) >= p

  kept = _highest_cutoff(_ordered_bits(probabilities), enough)
  return jnp.where(kept | (jnp.asarray(p) <= 0), logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class _Options:
  """How tokens are drawn; see `temperature_sample`."""

  temperature: float | jax.Array
  topk: int | jax.Array
  topp: float | jax.Array
  rescale_log_probs: bool
  state_callback_fn: StateCallbackFn | None
  logit_callback_fn: LogitCallbackFn | None

  def __post_init__(self):
    """Refuses what can be known to be wrong before tracing."""
    temperature, topk, topp = self.temperature, self.topk, self.topp
    if _is_static(topk) and _is_static(topp) and topk and topp:
      raise ValueError(
        'topk and topp exclude each other: set one of them to 0. Got: topk'
        f' {topk}, topp {topp}.'
      )
    if _is_static(topp) and not 0 <= topp <= 1:
      raise ValueError(f'topp is a probability, from 0 to 1. Got: {topp}.')
    if _is_static(topk) and topk < 0:
      raise ValueError(f'topk must be a number of tokens, or 0 for all. Got: {topk}.')
    if _is_static(temperature) and np.any(np.asarray(temperature) < 0):
      raise ValueError(f'A temperature is at least 0. Got: {temperature}.')


@dataclasses.dataclass(frozen=True)
class _Sampler:
  """What stays the same while sampling, and its step.

  Attributes:
    tokens_to_logits: the model.
    eos_id: token that ends a sequence.
    options: how to draw.
    temperature: float32 [rows].
    last: int32 [rows], position of each row's last token.
    prompt_ends: int32 [rows, 1], end tokens in the prompts.
  """

  tokens_to_logits: TokensToLogits
  eos_id: int
  options: _Options
  temperature: jax.Array
  last: jax.Array
  prompt_ends: jax.Array

  def _draw(
    self, key: jax.Array, logits: Float[Array, 'rows vocabulary']
  ) -> tuple[Int[Array, ' rows'], Float[Array, ' rows']]:
    """Draws one token a row; returns it and its log probability."""
    options = self.options
    heated = self.temperature > MIN_TEMPERATURE
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def sample(logits):
      # Reshaped logits are what is drawn from.
      shaped = logits / jnp.maximum(self.temperature, MIN_TEMPERATURE)[:, None]
      if not _is_static(options.topk) or options.topk:
        shaped = keep_top_k(shaped, options.topk)
      if not _is_static(options.topp) or options.topp:
        shaped = keep_top_p(shaped, options.topp)
      drawn = jax.random.categorical(key, shaped).astype(jnp.int32)
      token = jnp.where(heated, drawn, greedy)
      log_prob = _log_prob_of(token, shaped if options.rescale_log_probs else logits)
      if options.rescale_log_probs:
        # At temperature 0 all probability is on the token that is taken.
        log_prob = jnp.where(heated, log_prob, 0.0)
      return token, log_prob

    def take_greedy(logits):
      if options.rescale_log_probs:
        return greedy, jnp.zeros(greedy.shape, jnp.float32)
      return greedy, _log_prob_of(greedy, logits)

    return lax.cond(jnp.any(heated), sample, take_greedy, logits)

  def goes_on(self, state: SamplingLoopState) -> jax.Array:
    """Whether any row is not complete."""
    return ~jnp.all(state.ended)

  def step(self, state: SamplingLoopState) -> SamplingLoopState:
    """Feeds the current token and writes the next one."""
    if self.options.state_callback_fn is not None:
      state = self.options.state_callback_fn(state)
    key, rng = jax.random.split(state.rng)
    logits, cache = self.tokens_to_logits(
      DecodingState(
        cur_index=state.cur_index,
        sequences=state.sequences[:, :-_SPARE_COLUMNS],
        cur_token=state.cur_token,
        cache=state.cache,
      )
    )
    if isinstance(state.cache, flax.core.FrozenDict):
      cache = flax.core.freeze(cache)
    if self.options.logit_callback_fn is not None:
      logits = self.options.logit_callback_fn(logits, state)
    token, token_log_prob = self._draw(key, jnp.asarray(logits, jnp.float32))

    ended = state.ended[:, 0]
    following = (state.cur_index + 1)[:, None]
    forced = jnp.take_along_axis(state.sequences, following, axis=1)[:, 0]
    drawn = forced == 0
    token = jnp.where(ended, 0, jnp.where(drawn, token, forced))
    here = (jnp.arange(state.sequences.shape[1]) == following) & ~state.ended
    sequences = jnp.where(here, token[:, None], state.sequences)
    # Counted and not compared with the token: a prompt may hold end tokens, and
    # a callback may end a row by writing one.
    ends = jnp.sum(sequences == self.eos_id, axis=1, keepdims=True)
    complete = state.cur_index + 1 >= self.last
    return SamplingLoopState(
      step=state.step + 1,
      cur_index=jnp.minimum(state.cur_index + 1, self.last),
      sequences=sequences,
      cache=cache,
      cur_token=token[:, None],
      ended=state.ended | (ends > self.prompt_ends) | complete[:, None],
      rng=rng,
      log_prob=state.log_prob + jnp.where(drawn & ~ended, token_log_prob, 0.0),
    )


def _log_prob_of(
  token: Int[Array, ' rows'], logits: Float[Array, 'rows vocabulary']
) -> Float[Array, ' rows']:
  log_probs = jax.nn.log_softmax(logits)
  return jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]


def _checked_steps(
  length: int, max_decode_steps: Any, hard_limit: int | None
) -> int | jax.Array | None:
  """How many tokens may follow a prompt; None for as many as there is room.

  Raises:
    ValueError: if it is known to be more than `length`.
  """
  if max_decode_steps is None:
    return None
  if hard_limit is not None and hard_limit > 0:
    return jnp.minimum(max_decode_steps, hard_limit)
  if _is_static(max_decode_steps) and max_decode_steps > length:
    raise ValueError(
      'max_decode_steps must not exceed the length of the inputs. Got:'
      f' {max_decode_steps} / {length}.'
    )
  return max_decode_steps


def _last_positions(
  prompts: Int[Array, 'rows length'], steps: int | Int[Array, ''] | None
) -> Int[Array, ' rows']:
  """Position of the last token each row may get."""
  rows, length = prompts.shape
  if steps is None:
    return jnp.full((rows,), length, jnp.int32)
  prompt_lengths = jnp.sum(prompts != 0, axis=1)
  return jnp.minimum(prompt_lengths + steps, length).astype(jnp.int32)


def _expand_cache(
  cache: Any, batch: int, num_decodes: int, offset: int, prefilled: bool
) -> Any:
  """A cache for every decode of every example."""
  if prefilled:
    cache = expand_position_indices(cache, batch, num_decodes, offset)
  if num_decodes == 1:
    return cache
  expand = functools.partial(
    flat_batch_beam_expand, beam_size=num_decodes, offset=offset
  )
  return cache_map(expand, cache, apply_to_index=prefilled)


def temperature_sample(
  inputs: Int[Array, 'batch length'],
  cache: Mapping[str, Any],
  tokens_to_logits: TokensToLogits,
  eos_id: int,
  decode_rng: jax.Array | None = None,
  num_decodes: int = 1,
  temperature: float | Float[Array, '*batch'] = 1.0,
  topk: int = 1,
  topp: float = 0.0,
  cache_offset: int = 0,
  initial_index: Int[Array, ' batch'] | None = None,
  max_decode_steps: int | Int[Array, ''] | None = None,
  max_decode_steps_hard_limit: int | None = None,
  rescale_log_probs: bool = True,
  state_callback_fn: StateCallbackFn | None = None,
  logit_callback_fn: LogitCallbackFn | None = None,
) -> tuple[Int[Array, 'batch num_decodes length'], Float[Array, 'batch num_decodes']]:
  """Draws sequences token by token, all of them independently.

  Args:
    inputs: start token and prompt, padded with 0; see this module's top.
    cache: the model's cache for `batch` rows.
    tokens_to_logits: the model, for batch * num_decodes rows.
    eos_id: token that ends a sequence.
    decode_rng: key to draw with; by default that of seed 0.
    num_decodes: how many sequences to draw for each example.
    temperature: divides the logits; up to 1e-4 is greedy. One, or one an example.
    topk: draw from that many most probable tokens; 0 for all.
    topp: draw from the fewest tokens that hold this probability; 0 for all.
    cache_offset: axes before the batch axis of the cache.
    initial_index: position to begin at, if the cache is filled up to there.
    max_decode_steps: most tokens after the prompt; by default what fits.
    max_decode_steps_hard_limit: static bound on it; none unless positive.
    rescale_log_probs: report probabilities as drawn from, not the model's.
    state_callback_fn: from state to state, before each step and after the last.
    logit_callback_fn: from logits and state to logits.

  Returns:
    Sequences without the start token, and log probabilities; the best is last.

  Raises:
    ValueError: if topk and topp are both set, or an option is out of range.
  """
  options = _Options(
    temperature, topk, topp, rescale_log_probs, state_callback_fn, logit_callback_fn
  )
  steps = _checked_steps(inputs.shape[1], max_decode_steps, max_decode_steps_hard_limit)
  cache = _expand_cache(
    cache, inputs.shape[0], num_decodes, cache_offset, initial_index is not None
  )
  model = tokens_to_logits, eos_id
  return _sample(
    inputs, cache, initial_index, decode_rng, num_decodes, steps, options, *model
  )


def _sample(
  inputs: Int[Array, 'batch length'],
  cache: Any,
  initial_index: Int[Array, ' batch'] | None,
  decode_rng: jax.Array | None,
  num_decodes: int,
  steps: int | jax.Array | None,
  options: _Options,
  tokens_to_logits: TokensToLogits,
  eos_id: int,
) -> tuple[jax.Array, jax.Array]:
  """See `temperature_sample`; the cache has a row for every decode."""
  batch = inputs.shape[0]
  expand = functools.partial(flat_batch_beam_expand, beam_size=num_decodes)
  prompts = expand(jnp.asarray(inputs, jnp.int32))
  temperature = jnp.asarray(options.temperature, jnp.float32)
  sampler = _Sampler(
    tokens_to_logits=tokens_to_logits,
    eos_id=eos_id,
    options=options,
    temperature=expand(jnp.broadcast_to(temperature, (batch,))),
    last=_last_positions(prompts, steps),
    prompt_ends=jnp.sum(prompts == eos_id, axis=1, keepdims=True),
  )
  start = None if initial_index is None else expand(jnp.asarray(initial_index))
  state = _first_state(prompts, cache, start, sampler.last, decode_rng)
  state = lax.while_loop(sampler.goes_on, sampler.step, state)
  if options.state_callback_fn is not None:
    state = options.state_callback_fn(state)
  sequences = unflatten_beam_dim(state.sequences[:, 1:-1], batch, num_decodes)
  log_prob = unflatten_beam_dim(state.log_prob, batch, num_decodes)
  order = jnp.argsort(log_prob, axis=1)
  return (
    jnp.take_along_axis(sequences, order[:, :, None], axis=1),
    jnp.take_along_axis(log_prob, order, axis=1),
  )


def _first_state(
  inputs: Int[Array, 'rows length'],
  cache: Mapping[str, Any],
  initial_index: Int[Array, ' rows'] | None,
  last: Int[Array, ' rows'],
  decode_rng: jax.Array | None,
) -> SamplingLoopState:
  """The state before the first step."""
  rows = inputs.shape[0]
  if initial_index is None:
    position = jnp.zeros((rows,), jnp.int32)
    token = jnp.zeros((rows, 1), jnp.int32)
  else:
    position = initial_index.astype(jnp.int32)
    token = jnp.take_along_axis(inputs, position[:, None], axis=1)
  return SamplingLoopState(
    step=jnp.zeros((), jnp.int32),
    cur_index=position,
    sequences=jnp.pad(inputs, ((0, 0), (0, _SPARE_COLUMNS))),
    cache=cache,
    cur_token=token,
    ended=(position >= last)[:, None],
    rng=jax.random.PRNGKey(0) if decode_rng is None else decode_rng,
    log_prob=jnp.zeros((rows,), jnp.float32),
  )
