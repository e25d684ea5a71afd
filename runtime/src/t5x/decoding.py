"""Beam search; the public names of decoding.

Sampling lives in `sampling`, work on the beam dimension in `beams`; both are
reachable from here under the names that gin files and models use. Every
function traces with static shapes.

Position 0 of the inputs is the start token; the tokens after it, up to the first 0,
are a prompt, forced at no cost. A closed sequence scores its log probability divided
by `brevity_penalty` of its length, prompt and end token included. An example is done
when no open sequence can beat the worst kept one. If none closed, it gets its open
sequences with plain log probabilities; slots for which there is no sequence are all
0 and score NEG_INF. What an example gets does not depend on the others of its batch.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from t5x.beams import (
  DecodingState,
  TokensToLogits,
  add_beam_dim,
  cache_gather_beams,
  cache_map,
  expand_position_indices,
  flat_batch_beam_expand,
  flatten_beam_dim,
  gather_beams,
  gather_topk_beams,
  top_k_two_stage,
  unflatten_beam_dim,
)
from t5x.sampling import (
  MIN_TEMPERATURE,
  LogitCallbackFn,
  SamplingLoopState,
  StateCallbackFn,
  temperature_sample,
)

__all__ = [
  'MIN_TEMPERATURE',
  'NEG_INF',
  'NEG_INF_VALUE',
  'BeamState',
  'DecodingState',
  'LogitCallbackFn',
  'SamplingLoopState',
  'StateCallbackFn',
  'TokensToLogits',
  'add_beam_dim',
  'beam_init',
  'beam_search',
  'brevity_penalty',
  'cache_gather_beams',
  'cache_map',
  'flat_batch_beam_expand',
  'flatten_beam_dim',
  'gather_beams',
  'gather_topk_beams',
  'temperature_sample',
  'top_k_two_stage',
  'unflatten_beam_dim',
]

# The score of a slot that holds nothing: far below any sequence's, and finite,
# so that sums of it stay numbers.
NEG_INF_VALUE = -1.0e7
NEG_INF = np.array(NEG_INF_VALUE)

# What scores less is an empty slot, however many log probabilities were added.
_EMPTY = NEG_INF_VALUE / 2


@flax.struct.dataclass
class BeamState:
  """What a beam search carries from step to step.

  Beams are sorted by rising score. Sequences have `max_decode_len` positions,
  of which the first is the start token.

  Attributes:
    cur_index: int32 scalar, steps done.
    live_logprobs: float32 [batch, beam], log probabilities of open sequences.
    finished_scores: float32 [batch, beam], scores of closed sequences.
    live_seqs: int32 [batch, beam, max_decode_len].
    finished_seqs: int32 [batch, beam, max_decode_len].
    finished_flags: bool [batch, beam], which slots hold a closed sequence.
    cache: the model's cache, [batch, beam, ...] each.
    initial_index: int32 [batch], position where each example began.
  """

  cur_index: jax.Array
  live_logprobs: jax.Array
  finished_scores: jax.Array
  live_seqs: jax.Array
  finished_seqs: jax.Array
  finished_flags: jax.Array
  cache: Any
  initial_index: jax.Array | None


def brevity_penalty(
  alpha: float | Float[Array, ''], length: Int[Array, '...'] | int
) -> Float[Array, '...']:
  """Length penalty by which log probabilities are divided.

  `((5 + length) / 6) ** alpha`, equation 14 of Wu et al. 2016
  (arXiv:1609.08144).

  Args:
    alpha: 0 for none; larger values favour longer sequences.
    length: number of tokens, the end token included.

  Returns:
    The penalty, of the shape of `length`.
  """
  return ((5.0 + jnp.asarray(length)) / 6.0) ** alpha


def beam_init(
  batch_size: int,
  beam_size: int,
  max_decode_len: int,
  cache: Mapping[str, Any],
  offset: int = 0,
  live_seqs: Int[Array, 'batch beam max_decode_len'] | None = None,
  initial_index: Int[Array, ' batch'] | None = None,
) -> BeamState:
  """The state before the first step: one live beam an example, none closed.

  Args:
    batch_size: number of examples.
    beam_size: number of beams.
    max_decode_len: positions a sequence, the start token included.
    cache: the model's cache for `batch_size` rows.
    offset: axes before the batch axis of the cache.
    live_seqs: the prompts, if the cache was filled from them; `cache_index`
      then has a batch axis.
    initial_index: position where each example begins.

  Returns:
    The state.
  """
  shape = (batch_size, beam_size)
  # The beams start equal: with all alive, the search would keep copies.
  only_last = jnp.where(jnp.arange(beam_size) == beam_size - 1, 0.0, NEG_INF_VALUE)
  prefilled = live_seqs is not None
  nothing = jnp.zeros(shape + (max_decode_len,), jnp.int32)
  return BeamState(
    cur_index=jnp.zeros((), jnp.int32),
    live_logprobs=jnp.broadcast_to(only_last.astype(jnp.float32), shape),
    finished_scores=jnp.full(shape, NEG_INF_VALUE, jnp.float32),
    live_seqs=live_seqs if prefilled else nothing,
    finished_seqs=nothing,
    finished_flags=jnp.zeros(shape, jnp.bool_),
    cache=cache_map(
      functools.partial(add_beam_dim, beam_size=beam_size, offset=offset),
      cache,
      apply_to_index=prefilled,
    ),
    initial_index=initial_index,
  )


@dataclasses.dataclass(frozen=True)
class _BeamSearch:
  """What stays the same through one search, and its step.

  Attributes:
    prompts: int32 [batch, limit + 2], forced tokens, 0 where none is.
    tokens_to_logits: the model.
    eos_id: token that closes a sequence.
    beam_size: number of beams.
    alpha: exponent of the length penalty.
    limit: most tokens a sequence may have, start token not counted.
    max_steps: most steps, or at most 0 for no such bound.
    min_log_prob: an example whose open sequences all lie below is done.
    cache_offset: axes before the batch axis of the cache.
    prefilled: whether the cache came filled, its index one an example.
  """

  prompts: jax.Array
  tokens_to_logits: TokensToLogits
  eos_id: int
  beam_size: int
  alpha: float
  limit: int
  max_steps: int
  min_log_prob: float
  cache_offset: int
  prefilled: bool

  def run(
    self, cache: Any, initial_index: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    """Searches from a cache; returns sequences and scores."""
    batch, positions = self.prompts.shape[0], self.limit + 1
    live_seqs = None
    if self.prefilled:
      live_seqs = add_beam_dim(self.prompts[:, :positions], self.beam_size)
      cache = expand_position_indices(cache, batch, self.beam_size, self.cache_offset)
    else:
      initial_index = jnp.zeros((batch,), jnp.int32)
    state = beam_init(
      batch,
      self.beam_size,
      positions,
      cache,
      self.cache_offset,
      live_seqs=live_seqs,
      initial_index=jnp.asarray(initial_index, jnp.int32),
    )
    state = lax.while_loop(self.goes_on, self.step, state)
    any_closed = state.finished_flags.any(axis=1, keepdims=True)
    sequences = jnp.where(any_closed[:, :, None], state.finished_seqs, state.live_seqs)
    scores = jnp.where(any_closed, state.finished_scores, state.live_logprobs)
    return sequences[:, :, 1:], scores

  def goes_on(self, state: BeamState) -> jax.Array:
    """Whether a further step can change any example's result."""
    out_of_steps = (self.max_steps > 0) & (state.cur_index >= self.max_steps)
    return ~jnp.all(self._done(state)) & ~out_of_steps

  def _done(self, state: BeamState) -> jax.Array:
    """Which examples ([batch]) no further step can change."""
    position = state.initial_index + state.cur_index
    best_live = state.live_logprobs.max(axis=1)
    # Log probabilities only fall, and the penalty is monotonic in the length:
    # the kindest one is that of the shortest or the longest continuation.
    kindest = jnp.maximum(
      brevity_penalty(self.alpha, jnp.minimum(position + 1, self.limit)),
      brevity_penalty(self.alpha, self.limit),
    )
    # Empty slots score NEG_INF, so the minimum counts only once all are taken.
    beaten = state.finished_scores.min(axis=1) > best_live / kindest
    hopeless = best_live < jnp.maximum(self.min_log_prob, _EMPTY)
    return (position >= self.limit) | beaten | hopeless

  def _next_log_probs(
    self, state: BeamState, position: jax.Array
  ) -> tuple[jax.Array, Any]:
    """Log probabilities [batch, beam, vocabulary] of whole sequences, cache."""
    batch = position.shape[0]
    on_cache = functools.partial(cache_map, apply_to_index=self.prefilled)
    token = jnp.take_along_axis(state.live_seqs, position[:, None, None], axis=2)
    logits, cache = self.tokens_to_logits(
      DecodingState(
        cur_index=flat_batch_beam_expand(position, self.beam_size),
        sequences=flatten_beam_dim(state.live_seqs),
        cur_token=flatten_beam_dim(token),
        cache=on_cache(
          functools.partial(flatten_beam_dim, offset=self.cache_offset), state.cache
        ),
      )
    )
    if isinstance(state.cache, flax.core.FrozenDict):
      cache = flax.core.freeze(cache)
    split = functools.partial(
      unflatten_beam_dim, batch_size=batch, beam_size=self.beam_size
    )
    log_probs = jax.nn.log_softmax(split(logits).astype(jnp.float32))
    cache = on_cache(functools.partial(split, offset=self.cache_offset), cache)
    return log_probs + state.live_logprobs[:, :, None], cache

  def _candidates(
    self, log_probs: jax.Array, position: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The best 2 * beam continuations, falling, or the prompt's one.

    Twice as many as beams: even if half of them close, every beam finds an
    open continuation.

    Returns:
      Log probability, parent beam, token and whether that token closes the
      sequence, each [batch, 2 * beam].
    """
    batch, _, vocabulary = log_probs.shape
    width = 2 * self.beam_size
    scores, flat_index = top_k_two_stage(log_probs.reshape(batch, -1), width)
    forced = jnp.take_along_axis(self.prompts, position[:, None] + 1, axis=1)
    in_prompt = forced != 0
    # All beams share a prompt, so that only one may leave it alive.
    only_first = jnp.where(jnp.arange(width) == 0, 0.0, NEG_INF_VALUE)
    scores = jnp.where(in_prompt, only_first, scores)
    tokens = jnp.where(in_prompt, forced, flat_index % vocabulary)
    # An end token in a prompt separates its parts and closes nothing.
    closes = ~in_prompt & (tokens == self.eos_id)
    return scores, flat_index // vocabulary, tokens, closes

  def step(self, state: BeamState) -> BeamState:
    """Extends every live sequence by one token."""
    batch = state.live_seqs.shape[0]
    done = self._done(state)
    # Examples at their last position go through the motions with the others.
    position = jnp.minimum(state.initial_index + state.cur_index, self.limit)
    log_probs, cache = self._next_log_probs(state, position)
    scores, parents, tokens, closes = self._candidates(log_probs, position)
    width = 2 * self.beam_size
    sequences = gather_beams(
      state.live_seqs, parents, batch, self.beam_size, width, one_hot=False
    )
    here = jnp.arange(sequences.shape[2]) == position[:, None, None] + 1
    sequences = jnp.where(here, tokens[:, :, None], sequences)

    open_scores = jnp.where(closes, NEG_INF_VALUE, scores)
    live_seqs, live_logprobs, live_parents = gather_topk_beams(
      (sequences, open_scores, parents), open_scores, batch, self.beam_size
    )
    closed = closes & (scores > _EMPTY)
    penalty = brevity_penalty(self.alpha, position[:, None] + 1)
    closed_scores = jnp.where(closed, scores / penalty, NEG_INF_VALUE)
    pool = jax.tree.map(
      lambda old, new: jnp.concatenate([old, new], axis=1),
      (state.finished_seqs, state.finished_scores, state.finished_flags),
      (sequences, closed_scores, closed),
    )
    finished = gather_topk_beams(pool, pool[1], batch, self.beam_size)

    # An example that is done keeps its result: it must not depend on how long
    # the others of its batch go on.
    def keep(old, new):
      return jnp.where(done.reshape((batch,) + (1,) * (new.ndim - 1)), old, new)

    return state.replace(
      cur_index=state.cur_index + 1,
      live_logprobs=keep(state.live_logprobs, live_logprobs),
      live_seqs=keep(state.live_seqs, live_seqs),
      finished_seqs=keep(state.finished_seqs, finished[0]),
      finished_scores=keep(state.finished_scores, finished[1]),
      finished_flags=keep(state.finished_flags, finished[2]),
      cache=self._follow_parents(cache, live_parents),
    )

  def _follow_parents(self, cache: Any, parents: jax.Array) -> Any:
    """Gives every beam the cache of the beam that it continues."""
    if self.beam_size == 1:
      return cache
    return cache_gather_beams(
      cache,
      parents,
      parents.shape[0],
      self.beam_size,
      self.beam_size,
      one_hot=False,
      offset=self.cache_offset,
    )


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
  """Searches for the most probable sequences; see this module's top.

  Args:
    inputs: start token and prompt, padded with 0.
    cache: the model's cache for `batch` rows.
    tokens_to_logits: the model, for batch * num_decodes rows.
    eos_id: token that closes a sequence.
    num_decodes: number of beams, all of which are returned.
    alpha: exponent of the length penalty, 0 for none; may be traced.
    max_decode_len: most tokens a sequence; by default the length of `inputs`.
    max_decode_step: most steps of the loop; no bound unless positive.
    min_log_prob: an example is done when its open sequences all lie below.
    decode_rng: not used, as nothing is drawn; all decoding functions take it.
    cache_offset: axes before the batch axis of the cache.
    initial_index: position to begin at, if the cache is filled up to there.

  Returns:
    Sequences without the start token, and scores; the best is the last.
  """
  del decode_rng
  limit = inputs.shape[1] if max_decode_len is None else max_decode_len
  # One column more than positions: a look past the last one reads "no prompt".
  prompts = jnp.pad(jnp.asarray(inputs, jnp.int32), ((0, 0), (0, limit + 2)))
  search = _BeamSearch(
    prompts=prompts[:, : limit + 2],
    tokens_to_logits=tokens_to_logits,
    eos_id=eos_id,
    beam_size=num_decodes,
    alpha=alpha,
    limit=limit,
    max_steps=max_decode_step,
    min_log_prob=min_log_prob,
    cache_offset=cache_offset,
    prefilled=initial_index is not None,
  )
  return search.run(cache, initial_index)
