"""Beam search and sampling with a cache, traced with static shapes.

Position 0 of the inputs is the start token. The tokens after it, up to the first 0, are
a prompt: they are forced and do not count in the log probability, and end tokens among
them do not end the sequence. Without `initial_index` the prompt is fed token by token;
with it, the cache already holds the prompt before that position, whose token is fed
first. After the end token a sequence is padded with 0.

The rows of an example are adjacent: `[batch * beam, ...]` and `[batch, beam, ...]` are
reshapes of each other. With scanned layers a cache has a leading layer axis; `offset`
(0 or 1) is the number of axes before the batch axis.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

# The score of an empty slot: below that of any sequence, and finite, so that sums are.
NEG_INF_VALUE = -1.0e7
NEG_INF = np.array(NEG_INF_VALUE)

# Below this a slot is empty, even after adding log probabilities.
_EMPTY = NEG_INF_VALUE / 2

# Lower temperatures are greedy: 1 / temperature would overflow.
MIN_TEMPERATURE = np.array(1e-4)

# Width of a TPU vector register, the unit into which top-k splits rows.
_LANES = 128


@flax.struct.dataclass
class DecodingState:
  """The model's input for one token; rows = batch * num_decodes."""

  cur_index: jax.Array  # int32 [rows], the position of `cur_token`.
  sequences: jax.Array  # int32 [rows, length], tokens so far, start token included.
  cur_token: jax.Array  # int32 [rows, 1], the token to feed.
  cache: Mapping[str, Any]


# Returns logits [batch * num_decodes, vocabulary] and the new cache.
TokensToLogits = Callable[[DecodingState], tuple[jax.Array, Mapping[str, Any]]]


# ---- The beam dimension ----


def _leaf_name(path: tuple[Any, ...]) -> str | None:
  keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
  return keys[-1] if keys else None


def cache_map(
  fn: Callable[[jax.Array], jax.Array],
  cache: PyTree,
  apply_to_index: bool = False,
) -> PyTree:
  """Applies `fn` to the leaves of a cache that have a batch axis.

  These are all but `cached_bias`, `position_embedder_index` and, unless the cache was
  filled from prompts (`apply_to_index`), `cache_index`.
  """
  untouched = {'cached_bias', 'position_embedder_index'}
  if not apply_to_index:
    untouched.add('cache_index')
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf if _leaf_name(path) in untouched else fn(leaf), cache
  )


def add_beam_dim(
  x: Shaped[Array, '...'], beam_size: int, offset: int = 0
) -> Shaped[Array, '...']:
  """Repeats each example: [batch, ...] to [batch, beam_size, ...]."""
  x = jnp.expand_dims(x, offset + 1)
  shape = x.shape[: offset + 1] + (beam_size,) + x.shape[offset + 2 :]
  return jnp.broadcast_to(x, shape)


def flatten_beam_dim(x: Shaped[Array, '...'], offset: int = 0) -> Shaped[Array, '...']:
  """Joins batch and beam: [batch, beam, ...] to [batch * beam, ...]."""
  rows = x.shape[offset] * x.shape[offset + 1]
  return x.reshape(x.shape[:offset] + (rows,) + x.shape[offset + 2 :])


def unflatten_beam_dim(
  x: Shaped[Array, '...'], batch_size: int, beam_size: int, offset: int = 0
) -> Shaped[Array, '...']:
  """Splits rows: [batch * beam, ...] to [batch, beam, ...]."""
  return x.reshape(x.shape[:offset] + (batch_size, beam_size) + x.shape[offset + 1 :])


def flat_batch_beam_expand(
  x: Shaped[Array, '...'], beam_size: int, offset: int = 0
) -> Shaped[Array, '...']:
  """Repeats each example: [batch, ...] to [batch * beam_size, ...]."""
  return flatten_beam_dim(add_beam_dim(x, beam_size, offset), offset)


def _expand_position_indices(
  cache: PyTree, batch_size: int, beam_size: int, offset: int
) -> PyTree:
  """Repeats the position of each prompt for its beams, as `cache_map` does not."""

  def expand(path, leaf):
    if _leaf_name(path) != 'position_embedder_index':
      return leaf
    # An embedder outside the layer scan has no layer axis.
    axis = next(
      (a for a in (0, offset) if leaf.ndim > a and leaf.shape[a] == batch_size), None
    )
    return leaf if axis is None else flat_batch_beam_expand(leaf, beam_size, axis)

  return jax.tree_util.tree_map_with_path(expand, cache)


def _take_beams(
  x: Shaped[Array, '...'], beam_indices: Int[Array, 'batch new_beam'], offset: int = 0
) -> Shaped[Array, '...']:
  """Picks beams by index: [batch, beam, ...] to [batch, new_beam, ...]."""
  # With vmap the gather stays local where the batch is sharded.
  take = functools.partial(jnp.take, axis=offset, mode='clip')
  return jax.vmap(take, in_axes=(offset, 0), out_axes=offset)(x, beam_indices)


def _best_beams(
  nested: PyTree, scores: Float[Array, 'batch old_beam'], new_beam_size: int
) -> PyTree:
  """Keeps the best beams of arrays [batch, old_beam, ...], best last."""
  _, best = lax.top_k(scores, new_beam_size)
  return jax.tree.map(lambda x: _take_beams(x, best[:, ::-1]), nested)


def top_k_two_stage(
  x: Float[Array, 'batch samples'], k: int
) -> tuple[Float[Array, 'batch k'], Int[Array, 'batch k']]:
  """Computes `lax.top_k` faster for long rows.

  The k largest values are in the k pieces of a row with the largest maxima.
  """
  batch, samples = x.shape
  if samples <= 2 * _LANES * k:
    return tuple(lax.top_k(x, k))
  x = jnp.pad(x, ((0, 0), (0, -samples % _LANES)), constant_values=-np.inf)
  pieces = x.reshape(batch, -1, _LANES)
  best = jnp.sort(lax.top_k(pieces.max(2), k)[1])  # Of equal values the first counts.
  chosen = jnp.take_along_axis(pieces, best[:, :, None], axis=1)
  values, where = lax.top_k(chosen.reshape(batch, -1), k)
  piece = jnp.take_along_axis(best, where // _LANES, axis=1)
  return values, piece * _LANES + where % _LANES


# ---- Beam search ----


@flax.struct.dataclass
class BeamState:
  """State of a beam search, with beams sorted by ascending score."""

  cur_index: jax.Array  # int32 scalar, steps done.
  live_logprobs: jax.Array  # float32 [batch, beam], of open sequences.
  finished_scores: jax.Array  # float32 [batch, beam], of closed sequences.
  live_seqs: jax.Array  # int32 [batch, beam, positions], start token included.
  finished_seqs: jax.Array  # int32 [batch, beam, positions].
  finished_flags: jax.Array  # bool [batch, beam], which slots hold a closed sequence.
  cache: Any  # The model's cache, [batch, beam, ...] each.
  initial_index: jax.Array  # int32 [batch], position where each example began.


def brevity_penalty(
  alpha: float | Float[Array, ''], length: Int[Array, '...'] | int
) -> Float[Array, '...']:
  """Returns the length penalty, a divisor of log probabilities.

  `((5 + length) / 6) ** alpha`, equation 14 of Wu et al. 2016 (arXiv:1609.08144); the
  length includes the end token.
  """
  return ((5.0 + jnp.asarray(length)) / 6.0) ** alpha


def beam_search(
  inputs: Int[Array, 'batch length'],
  cache: Mapping[str, Any],
  tokens_to_logits: TokensToLogits,
  eos_id: int,
  num_decodes: int = 4,
  alpha: float = 0.6,
  max_decode_len: int | None = None,
  max_decode_step: int = -1,
  min_log_prob: float = NEG_INF_VALUE,
  decode_rng: jax.Array | None = None,
  cache_offset: int = 0,
  initial_index: Int[Array, ' batch'] | None = None,
) -> tuple[
  Int[Array, 'batch num_decodes max_decode_len'], Float[Array, 'batch num_decodes']
]:
  """Searches for the most probable sequences.

  The score of a finished sequence is its log probability divided by `brevity_penalty`
  of its length, prompt and end token included. The search for an example ends when no
  live sequence can beat its worst finished one. If none finished, it returns the live
  ones with plain log probabilities. Empty slots are all 0 and score NEG_INF. Examples
  do not depend on the rest of their batch.

  Args:
    inputs: start token and prompt, padded with 0.
    cache: the model's cache for `batch` rows.
    tokens_to_logits: the model, for batch * num_decodes rows.
    eos_id: the end token.
    num_decodes: number of beams, all of which are returned.
    alpha: exponent of the length penalty, 0 for none; may be traced.
    max_decode_len: maximum number of tokens; by default the length of `inputs`.
    max_decode_step: maximum number of steps, if positive.
    min_log_prob: an example is done when all its live sequences are below.
    decode_rng: ignored; part of the interface of decoding functions.
    cache_offset: axes before the batch axis of the cache.
    initial_index: position to start at, if the cache is filled up to there.

  Returns:
    Sequences without the start token, and scores, best last.
  """
  del decode_rng
  batch, beams = inputs.shape[0], num_decodes
  limit = inputs.shape[1] if max_decode_len is None else max_decode_len
  # Reading the prompt after the last position yields 0.
  prompts = jnp.pad(jnp.asarray(inputs, jnp.int32), ((0, 0), (0, limit + 2)))
  prompts = prompts[:, : limit + 2]
  prefilled = initial_index is not None
  # In a prefilled cache `cache_index` has a batch axis.
  on_cache = functools.partial(cache_map, apply_to_index=prefilled)

  def is_done(state: BeamState) -> Bool[Array, ' batch']:
    """Returns which examples no further step can change."""
    position = state.initial_index + state.cur_index
    best_live = state.live_logprobs.max(axis=1)
    # Log probabilities only fall and the penalty is monotonic in the length: the best
    # penalty is that of the shortest or the longest continuation.
    best_penalty = jnp.maximum(
      brevity_penalty(alpha, jnp.minimum(position + 1, limit)),
      brevity_penalty(alpha, limit),
    )
    # Empty slots score NEG_INF, so this holds only once all slots are taken.
    beaten = state.finished_scores.min(axis=1) > best_live / best_penalty
    hopeless = best_live < jnp.maximum(min_log_prob, _EMPTY)
    return (position >= limit) | beaten | hopeless

  def should_continue(state: BeamState) -> Bool[Array, '']:
    out_of_steps = (max_decode_step > 0) & (state.cur_index >= max_decode_step)
    return ~jnp.all(is_done(state)) & ~out_of_steps

  def next_log_probs(
    state: BeamState, position: Int[Array, ' batch']
  ) -> tuple[Float[Array, 'batch beam vocabulary'], Any]:
    token = jnp.take_along_axis(state.live_seqs, position[:, None, None], axis=2)
    flatten = functools.partial(flatten_beam_dim, offset=cache_offset)
    logits, new_cache = tokens_to_logits(
      DecodingState(
        cur_index=flat_batch_beam_expand(position, beams),
        sequences=flatten_beam_dim(state.live_seqs),
        cur_token=flatten_beam_dim(token),
        cache=on_cache(flatten, state.cache),
      )
    )
    if isinstance(state.cache, flax.core.FrozenDict):
      new_cache = flax.core.freeze(new_cache)
    split = functools.partial(unflatten_beam_dim, batch_size=batch, beam_size=beams)
    log_probs = jax.nn.log_softmax(split(logits).astype(jnp.float32))
    new_cache = on_cache(functools.partial(split, offset=cache_offset), new_cache)
    return log_probs + state.live_logprobs[:, :, None], new_cache

  def step(state: BeamState) -> BeamState:
    """Extends every live sequence by one token."""
    done = is_done(state)
    position = jnp.minimum(state.initial_index + state.cur_index, limit)
    log_probs, new_cache = next_log_probs(state, position)

    # Of twice as many candidates as beams at most half end, so that enough stay live.
    width = 2 * beams
    vocabulary = log_probs.shape[-1]
    scores, flat_index = top_k_two_stage(log_probs.reshape(batch, -1), width)
    parents, tokens = flat_index // vocabulary, flat_index % vocabulary
    forced = jnp.take_along_axis(prompts, position[:, None] + 1, axis=1)
    in_prompt = forced != 0
    # All beams share the prompt, so keep only one alive.
    only_first = jnp.where(jnp.arange(width) == 0, 0.0, NEG_INF_VALUE)
    scores = jnp.where(in_prompt, only_first, scores)
    tokens = jnp.where(in_prompt, forced, tokens)
    closes = ~in_prompt & (tokens == eos_id)

    sequences = _take_beams(state.live_seqs, parents)
    here = jnp.arange(sequences.shape[2]) == position[:, None, None] + 1
    sequences = jnp.where(here, tokens[:, :, None], sequences)

    open_scores = jnp.where(closes, NEG_INF_VALUE, scores)
    live_seqs, live_logprobs, live_parents = _best_beams(
      (sequences, open_scores, parents), open_scores, beams
    )
    closed = closes & (scores > _EMPTY)
    penalty = brevity_penalty(alpha, position[:, None] + 1)
    closed_scores = jnp.where(closed, scores / penalty, NEG_INF_VALUE)
    pool = jax.tree.map(
      lambda old, new: jnp.concatenate([old, new], axis=1),
      (state.finished_seqs, state.finished_scores, state.finished_flags),
      (sequences, closed_scores, closed),
    )
    finished = _best_beams(pool, pool[1], beams)

    # The result of a finished example must not depend on the rest of its batch.
    def keep(old, new):
      return jnp.where(done.reshape((batch,) + (1,) * (new.ndim - 1)), old, new)

    if beams > 1:
      # Not `on_cache`: `cache_index` is the same for all beams.
      new_cache = cache_map(
        lambda x: _take_beams(x, live_parents, cache_offset), new_cache
      )
    return state.replace(
      cur_index=state.cur_index + 1,
      live_logprobs=keep(state.live_logprobs, live_logprobs),
      live_seqs=keep(state.live_seqs, live_seqs),
      finished_seqs=keep(state.finished_seqs, finished[0]),
      finished_scores=keep(state.finished_scores, finished[1]),
      finished_flags=keep(state.finished_flags, finished[2]),
      cache=new_cache,
    )

  shape = (batch, beams)
  nothing = jnp.zeros(shape + (limit + 1,), jnp.int32)
  live_seqs = nothing
  if prefilled:
    live_seqs = add_beam_dim(prompts[:, : limit + 1], beams)
    cache = _expand_position_indices(cache, batch, beams, cache_offset)
  else:
    initial_index = jnp.zeros((batch,), jnp.int32)
  # Start with one live beam per example: equal beams would stay copies.
  only_last = jnp.where(jnp.arange(beams) == beams - 1, 0.0, NEG_INF_VALUE)
  state = BeamState(
    cur_index=jnp.zeros((), jnp.int32),
    live_logprobs=jnp.broadcast_to(only_last.astype(jnp.float32), shape),
    finished_scores=jnp.full(shape, NEG_INF_VALUE, jnp.float32),
    live_seqs=live_seqs,
    finished_seqs=nothing,
    finished_flags=jnp.zeros(shape, jnp.bool_),
    cache=on_cache(
      functools.partial(add_beam_dim, beam_size=beams, offset=cache_offset), cache
    ),
    initial_index=jnp.asarray(initial_index, jnp.int32),
  )
  state = lax.while_loop(should_continue, step, state)
  any_closed = state.finished_flags.any(axis=1, keepdims=True)
  sequences = jnp.where(any_closed[:, :, None], state.finished_seqs, state.live_seqs)
  scores = jnp.where(any_closed, state.finished_scores, state.live_logprobs)
  return sequences[:, :, 1:], scores


# ---- Sampling ----


@flax.struct.dataclass
class SamplingLoopState:
  """State of sampling, passed to callbacks; rows = batch * num_decodes."""

  step: jax.Array  # int32 scalar, steps done.
  cur_index: jax.Array  # int32 [rows], position of the current token.
  sequences: jax.Array  # int32 [rows, length + 2], tokens so far; the last is spare.
  cache: Mapping[str, Any]
  cur_token: jax.Array  # int32 [rows, 1], the token to feed next.
  ended: jax.Array  # bool [rows, 1], which rows are complete.
  rng: jax.Array  # Key for the next steps.
  log_prob: jax.Array  # float32 [rows], of the sampled tokens.


StateCallbackFn = Callable[[SamplingLoopState], SamplingLoopState]
LogitCallbackFn = Callable[[jax.Array, SamplingLoopState], jax.Array]


def _is_tracer(value: Any) -> bool:
  return isinstance(value, jax.core.Tracer)


def _largest_that_suffice(
  values: Float[Array, '*batch vocabulary'],
  enough: Callable[[Bool[Array, '*batch vocabulary']], Bool[Array, '*batch']],
) -> Bool[Array, '*batch vocabulary']:
  """Returns the smallest set of largest values, ties included, that is `enough`.

  If no set is enough, it returns all. Finding the cutoff bit by bit takes 32 reductions
  over the vocabulary, which is faster than a sort on TPUs.
  """
  bits = lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
  sign = jnp.uint32(1 << 31)
  # Unsigned integers in the order of the floats.
  keys = jnp.where(bits & sign, ~bits, bits | sign)

  def set_bit(step, cutoff):
    higher = cutoff | (jnp.uint32(1) << (jnp.uint32(31) - jnp.uint32(step)))
    return jnp.where(enough(keys >= higher[..., None]), higher, cutoff)

  cutoff = lax.fori_loop(0, 32, set_bit, jnp.zeros(keys.shape[:-1], jnp.uint32))
  return keys >= cutoff[..., None]


def keep_top_k(
  logits: Float[Array, '*batch vocabulary'], k: int | Int[Array, '']
) -> Float[Array, '*batch vocabulary']:
  """Sets all but the k largest logits of each row, ties included, to NEG_INF.

  `k` may be traced; 0 keeps all.
  """
  kept = _largest_that_suffice(logits, lambda chosen: chosen.sum(-1) >= k)
  return jnp.where(kept | (jnp.asarray(k) <= 0), logits, NEG_INF_VALUE)


def keep_top_p(
  logits: Float[Array, '*batch vocabulary'], p: float | Float[Array, '']
) -> Float[Array, '*batch vocabulary']:
  """Sets all but the fewest logits with total probability `p` to NEG_INF.

  Nucleus sampling, Holtzman et al. 2020 (arXiv:1904.09751), section 3.1. Keeps ties.
  `p` may be traced; 0 keeps all.
  """
  probabilities = jax.nn.softmax(logits.astype(jnp.float32))

  def enough(chosen):
    return jnp.where(chosen, probabilities, 0.0).sum(-1) >= p

  kept = _largest_that_suffice(probabilities, enough)
  return jnp.where(kept | (jnp.asarray(p) <= 0), logits, NEG_INF_VALUE)


def _log_prob_of(
  token: Int[Array, ' rows'], logits: Float[Array, 'rows vocabulary']
) -> Float[Array, ' rows']:
  log_probs = jax.nn.log_softmax(logits)
  return jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]


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
  """Samples sequences independently, token by token.

  Args:
    inputs: start token and prompt, padded with 0.
    cache: the model's cache for `batch` rows.
    tokens_to_logits: the model, for batch * num_decodes rows.
    eos_id: the end token.
    decode_rng: key for sampling; by default that of seed 0.
    num_decodes: sequences to sample per example.
    temperature: divisor of the logits, greedy up to 1e-4; one, or one per example.
    topk: number of most probable tokens to sample from; 0 for all.
    topp: total probability of the most probable tokens to sample from; 0 for all.
    cache_offset: axes before the batch axis of the cache.
    initial_index: position to start at, if the cache is filled up to there.
    max_decode_steps: maximum number of tokens after the prompt.
    max_decode_steps_hard_limit: static upper bound of it, if positive.
    rescale_log_probs: report probabilities after temperature, topk and topp.
    state_callback_fn: maps the state, before each step and after the last.
    logit_callback_fn: maps logits, given the state.

  Returns:
    Sequences without the start token, and log probabilities, best last.

  Raises:
    ValueError: topk and topp are both set, or max_decode_steps exceeds the inputs.
  """
  batch, length = inputs.shape
  if not _is_tracer(topk) and not _is_tracer(topp) and topk and topp:
    raise ValueError(
      f'topk and topp cannot be used together: set one to 0. Got: topk {topk}, topp '
      f'{topp}.'
    )
  steps = max_decode_steps
  if steps is not None and (max_decode_steps_hard_limit or 0) > 0:
    steps = jnp.minimum(steps, max_decode_steps_hard_limit)
  elif steps is not None and not _is_tracer(steps) and steps > length:
    raise ValueError(
      'max_decode_steps must not exceed the length of the inputs. Got: '
      f'{steps} / {length}.'
    )
  on_state = state_callback_fn or (lambda state: state)
  on_logits = logit_callback_fn or (lambda logits, state: logits)
  expand = functools.partial(flat_batch_beam_expand, beam_size=num_decodes)

  prompts = expand(jnp.asarray(inputs, jnp.int32))
  prompt_ends = jnp.sum(prompts == eos_id, axis=1, keepdims=True)
  heat = expand(jnp.full(batch, temperature, jnp.float32))
  # Without heat, the sampler, which takes long to compile, is left out.
  heats = _is_tracer(temperature) or np.any(np.array(temperature) > MIN_TEMPERATURE)
  # Position of each row's last token.
  last = jnp.full((batch * num_decodes,), length, jnp.int32)
  if steps is not None:
    last = jnp.minimum(jnp.sum(prompts != 0, axis=1) + steps, length)
    last = last.astype(jnp.int32)

  def draw(
    key: jax.Array, logits: Float[Array, 'rows vocabulary']
  ) -> tuple[Int[Array, ' rows'], Float[Array, ' rows']]:
    """Samples one token per row; returns it and its log probability."""
    heated = heat > MIN_TEMPERATURE
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def sample(logits):
      shaped = logits / jnp.maximum(heat, MIN_TEMPERATURE)[:, None]
      if _is_tracer(topk) or topk:
        shaped = keep_top_k(shaped, topk)
      if _is_tracer(topp) or topp:
        shaped = keep_top_p(shaped, topp)
      drawn = jax.random.categorical(key, shaped).astype(jnp.int32)
      token = jnp.where(heated, drawn, greedy)
      log_prob = _log_prob_of(token, shaped if rescale_log_probs else logits)
      if rescale_log_probs:
        log_prob = jnp.where(heated, log_prob, 0.0)
      return token, log_prob

    def take_greedy(logits):
      if rescale_log_probs:
        return greedy, jnp.zeros(greedy.shape, jnp.float32)
      return greedy, _log_prob_of(greedy, logits)

    if heats:
      return lax.cond(jnp.any(heated), sample, take_greedy, logits)
    return take_greedy(logits)

  def step(state: SamplingLoopState) -> SamplingLoopState:
    """Feeds the current token and writes the next one."""
    state = on_state(state)
    key, rng = jax.random.split(state.rng)
    logits, new_cache = tokens_to_logits(
      DecodingState(
        cur_index=state.cur_index,
        sequences=state.sequences[:, :-2],
        cur_token=state.cur_token,
        cache=state.cache,
      )
    )
    if isinstance(state.cache, flax.core.FrozenDict):
      new_cache = flax.core.freeze(new_cache)
    logits = on_logits(logits, state)
    token, token_log_prob = draw(key, jnp.asarray(logits, jnp.float32))

    ended = state.ended[:, 0]
    following = (state.cur_index + 1)[:, None]
    forced = jnp.take_along_axis(state.sequences, following, axis=1)[:, 0]
    drawn = forced == 0
    token = jnp.where(ended, 0, jnp.where(drawn, token, forced))
    here = (jnp.arange(state.sequences.shape[1]) == following) & ~state.ended
    sequences = jnp.where(here, token[:, None], state.sequences)
    # End tokens are counted, as prompts may contain some and callbacks may write one.
    ends = jnp.sum(sequences == eos_id, axis=1, keepdims=True)
    complete = state.cur_index + 1 >= last
    return SamplingLoopState(
      step=state.step + 1,
      cur_index=jnp.minimum(state.cur_index + 1, last),
      sequences=sequences,
      cache=new_cache,
      cur_token=token[:, None],
      ended=state.ended | (ends > prompt_ends) | complete[:, None],
      rng=rng,
      log_prob=state.log_prob + jnp.where(drawn & ~ended, token_log_prob, 0.0),
    )

  prefilled = initial_index is not None
  position = jnp.zeros(last.shape, jnp.int32)
  token = jnp.zeros((*last.shape, 1), jnp.int32)
  if prefilled:
    position = expand(jnp.asarray(initial_index)).astype(jnp.int32)
    token = jnp.take_along_axis(prompts, position[:, None], axis=1)
    cache = _expand_position_indices(cache, batch, num_decodes, cache_offset)
  if num_decodes > 1:
    expand_cache = functools.partial(expand, offset=cache_offset)
    cache = cache_map(expand_cache, cache, apply_to_index=prefilled)
  state = SamplingLoopState(
    step=jnp.zeros((), jnp.int32),
    cur_index=position,
    # State callbacks write the token after the current one, also at a row's end.
    sequences=jnp.pad(prompts, ((0, 0), (0, 2))),
    cache=cache,
    cur_token=token,
    ended=(position >= last)[:, None],
    rng=jax.random.PRNGKey(0) if decode_rng is None else decode_rng,
    log_prob=jnp.zeros(last.shape, jnp.float32),
  )
  state = lax.while_loop(lambda state: ~jnp.all(state.ended), step, state)
  state = on_state(state)
  sequences = unflatten_beam_dim(state.sequences[:, 1:-1], batch, num_decodes)
  log_prob = unflatten_beam_dim(state.log_prob, batch, num_decodes)
  order = jnp.argsort(log_prob, axis=1)
  return (
    jnp.take_along_axis(sequences, order[:, :, None], axis=1),
    jnp.take_along_axis(log_prob, order, axis=1),
  )
