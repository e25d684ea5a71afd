"""Models: a Flax module with its vocabularies, loss, metrics and decoding."""

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
from absl import logging
from flax import core as flax_core
from flax import linen as nn
from flax.linen import partitioning as flax_partitioning
from jaxtyping import Array, Bool, Float, Int, Num, PyTree

from t5x import decoding, losses, optimizers
from t5x.metrics import MetricsMap, compute_base_metrics, count_packed_examples

if TYPE_CHECKING:
  import seqio

__all__ = [
  'Array',
  'BaseModel',
  'BaseTransformerModel',
  'DecodeFnCallable',
  'DecoderOnlyModel',
  'DecoderParams',
  'EncoderDecoderModel',
  'MetricsMap',
  'PyTree',
  'PyTreeDef',
  'TokensIdsToLogitsCallable',
  'compute_base_metrics',
  'count_packed_examples',
  'get_input_vocabulary',
  'get_output_vocabulary',
  'remove_prefix',
]

PyTreeDef = jax.tree_util.PyTreeDef
Batch = Mapping[str, jax.Array]
LossNormalizingFactor = float | int | str | losses.SpecialLossNormalizingFactor


class TokensIdsToLogitsCallable(Protocol):
  """The interface of a model in a decoding function."""

  def __call__(
    self, decoding_state: decoding.DecodingState
  ) -> tuple[jax.Array, Mapping[str, Any]]:
    """Returns logits [rows, vocabulary] of the next token and the new cache."""


class DecodeFnCallable(Protocol):
  """The interface of a decoding function."""

  def __call__(
    self,
    *,
    inputs: jax.Array,
    cache: Mapping[str, Any],
    tokens_to_logits: TokensIdsToLogitsCallable,
    eos_id: int,
    num_decodes: int,
    decode_rng: jax.Array | None,
    cache_offset: int,
    **kwargs,
  ) -> tuple[jax.Array, jax.Array]:
    """Decodes a batch.

    Args:
      inputs: int32 [batch, length], a forced prompt where not 0.
      cache: the model's cache.
      tokens_to_logits: the model, one token per call.
      eos_id: end token of the output vocabulary.
      num_decodes: sequences per example.
      decode_rng: key for sampling.
      cache_offset: axes before the batch axis of the cache.
      **kwargs: the caller's `decoder_params`.

    Returns:
      Sequences [batch, num_decodes, length] and log probabilities
      [batch, num_decodes], best last.
    """


class _SeqioConverter:
  """A class attribute that imports seqio, and so TensorFlow, only when it is read."""

  def __init__(self, name: str):
    self._name = name

  def __get__(self, instance: Any, owner: type) -> type['seqio.FeatureConverter']:
    import seqio

    return getattr(seqio, self._name)


class BaseModel(abc.ABC):
  """The interface of any model.

  `FEATURE_CONVERTER_CLS` converts task features to model features. `PROGRESS_METRICS`,
  {name on the screen: metric}, are reported next to loss and accuracy.
  """

  FEATURE_CONVERTER_CLS: Callable[..., 'seqio.FeatureConverter']
  PROGRESS_METRICS: Mapping[str, str] = {}

  def __init__(self, optimizer_def: optimizers.OptimizerDefType):
    self.optimizer_def = optimizer_def

  @abc.abstractmethod
  def loss_fn(
    self, params: PyTree, batch: Batch, dropout_rng: jax.Array | None
  ) -> tuple[Float[Array, ''], MetricsMap]:
    """Computes the loss to differentiate, and metrics; without a key no dropout."""

  def eval_fn(
    self, params: PyTree, batch: Batch
  ) -> tuple[Float[Array, ''], MetricsMap]:
    """Computes loss and metrics without dropout."""
    return self.loss_fn(params=params, batch=batch, dropout_rng=None)

  def predict_batch(
    self, params: PyTree, batch: Batch, rng: jax.Array | None = None
  ) -> jax.Array:
    """Returns the predictions of `predict_batch_with_aux` alone."""
    predictions, _ = self.predict_batch_with_aux(params=params, batch=batch, rng=rng)
    return predictions

  @abc.abstractmethod
  def predict_batch_with_aux(
    self, params: PyTree, batch: Batch, rng: jax.Array | None = None
  ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Returns predictions for a batch, and named auxiliary values."""

  @abc.abstractmethod
  def score_batch(
    self, params: PyTree, batch: Batch, return_intermediates: bool = False
  ) -> Any:
    """Returns a score per example, and optionally intermediates."""

  @abc.abstractmethod
  def get_initial_variables(
    self,
    rng: jax.Array,
    input_shapes: Mapping[str, tuple[int, ...]],
    input_types: Mapping[str, Any] | None = None,
  ) -> Mapping[str, Any]:
    """Initialises the module's variables for inputs of these shapes."""


class BaseTransformerModel(BaseModel):
  """A model that computes logits over an output vocabulary.

  Subclasses define `_compute_logits`, with a parameter `mutable` if `score_batch` is to
  return intermediates, and the remaining abstract methods of `BaseModel`.
  """

  def __init__(
    self,
    module: nn.Module,
    input_vocabulary: 'seqio.Vocabulary',
    output_vocabulary: 'seqio.Vocabulary',
    optimizer_def: optimizers.OptimizerDefType,
    decode_fn: DecodeFnCallable | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: LossNormalizingFactor | None = None,
  ):
    """Stores its arguments.

    For `label_smoothing` and `z_loss` see `losses.compute_weighted_cross_entropy`, for
    `loss_normalizing_factor` see `losses.get_loss_normalizing_factor_and_weights`.
    """
    super().__init__(optimizer_def=optimizer_def)
    self.module = module
    self._input_vocabulary = input_vocabulary
    self._output_vocabulary = output_vocabulary
    self._decode_fn = decode_fn
    self._label_smoothing = label_smoothing
    self._z_loss = z_loss
    self._loss_normalizing_factor = loss_normalizing_factor

  @property
  def input_vocabulary(self) -> 'seqio.Vocabulary':
    return self._input_vocabulary

  @property
  def output_vocabulary(self) -> 'seqio.Vocabulary':
    return self._output_vocabulary

  @property
  def decode_fn(self) -> DecodeFnCallable | None:
    return self._decode_fn

  @abc.abstractmethod
  def _compute_logits(
    self, params: PyTree, batch: Batch, dropout_rng: jax.Array | None = None
  ) -> Float[Array, 'batch length vocabulary']:
    """Computes the logits of the decoder targets."""

  def loss_fn(
    self, params: PyTree, batch: Batch, dropout_rng: jax.Array | None
  ) -> tuple[Float[Array, ''], MetricsMap]:
    """Computes the cross-entropy of the decoder targets, and metrics."""
    logits = self._compute_logits(params, batch, dropout_rng)
    divisor, weights = losses.get_loss_normalizing_factor_and_weights(
      self._loss_normalizing_factor, batch
    )
    targets = batch['decoder_target_tokens']
    loss, z_loss, _ = losses.compute_weighted_cross_entropy(
      logits,
      targets=targets,
      weights=weights,
      label_smoothing=self._label_smoothing,
      z_loss=self._z_loss,
      loss_normalizing_factor=divisor,
    )
    suffix = '_segment_ids'
    segment_ids = {
      name.removesuffix(suffix): ids
      for name, ids in batch.items()
      if name.endswith(suffix)
    }
    # Without packing a row is one example.
    rows = ('encoder_input_tokens', 'decoder_target_tokens')
    metrics = self._compute_metrics(
      logits=logits,
      targets=targets,
      mask=weights,
      loss=loss,
      z_loss=z_loss,
      segment_ids=segment_ids or {k: batch[k] != 0 for k in rows if k in batch},
    )
    return loss, metrics

  def _compute_metrics(
    self,
    logits: Float[Array, 'batch length vocabulary'],
    targets: Int[Array, 'batch length'],
    mask: Num[Array, 'batch length'] | None,
    loss: Float[Array, ''],
    z_loss: Float[Array, ''] | None = None,
    segment_ids: Mapping[str, Num[Array, 'batch _'] | Bool[Array, 'batch _']]
    | None = None,
  ) -> MetricsMap:
    """Computes the metrics of a training or evaluation step."""
    return compute_base_metrics(
      logits=logits,
      targets=targets,
      mask=mask,
      loss=loss,
      z_loss=z_loss,
      segment_ids=segment_ids,
    )

  def score_batch(
    self, params: PyTree, batch: Batch, return_intermediates: bool = False
  ) -> Any:
    """Returns the log probabilities [batch] of the targets, without z-loss.

    `decoder_loss_weights` weights the tokens. With `return_intermediates` it returns
    also the collection `intermediates` that the module sowed, with `target_tokens`,
    `loss_weights` and `token_scores` added to `decoder`.
    """
    targets = batch['decoder_target_tokens'].astype(jnp.int32)
    weights = batch['decoder_loss_weights']
    changed = {}
    if return_intermediates:
      logits, changed = self._compute_logits(
        params=params, batch=batch, mutable=['intermediates']
      )
    else:
      logits = self._compute_logits(params=params, batch=batch)
    logits = jnp.asarray(logits, jnp.float32)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    token_scores = (target_logits - jax.nn.logsumexp(logits, axis=-1)) * weights
    scores = token_scores.sum(axis=-1)
    if not return_intermediates:
      return scores
    intermediates = dict(flax_core.unfreeze(changed.get('intermediates', {})))
    # Tuples, like the values that `nn.Module.sow` collects.
    intermediates['decoder'] = {
      **intermediates.get('decoder', {}),
      'target_tokens': (targets,),
      'loss_weights': (weights,),
      'token_scores': (token_scores,),
    }
    return scores, intermediates

  def _cache_offset(self) -> int:
    """Returns the number of axes before the cache's batch axis."""
    return int(getattr(self.module, 'scan_layers', False))

  def _decode_options(
    self, rng: jax.Array | None, decoder_params: Mapping[str, Any] | None
  ) -> dict[str, Any]:
    options = dict(decoder_params or {})
    if rng is not None:
      if options.get('decode_rng') is not None:
        raise ValueError(
          "Pass the key either as `rng` or as `decoder_params['decode_rng']`. Got "
          f'both: {rng} / {options["decode_rng"]}.'
        )
      options['decode_rng'] = rng
    if 'eos_id' not in options:
      options['eos_id'] = self.output_vocabulary.eos_id or 1
    return options


@dataclasses.dataclass(frozen=True)
class DecoderParams:
  """Defaults for `EncoderDecoderModel.predict_batch_with_aux`."""

  return_all_decodes: bool = False
  num_decodes: int = 1


class EncoderDecoderModel(BaseTransformerModel):
  """A model with an encoder and a decoder.

  The module provides

  - `__call__(encoder_input_tokens, decoder_input_tokens, decoder_target_tokens,
    encoder_segment_ids, decoder_segment_ids, encoder_positions,
    decoder_positions, decode, enable_dropout)`, which returns logits; with `decode` it
    creates the collection `cache` for as many positions as the tokens have;
  - `encode(encoder_input_tokens, enable_dropout)`;
  - `decode(encoded, encoder_input_tokens, decoder_input_tokens,
    decoder_target_tokens, enable_dropout, decode, max_decode_length)`; if it also has
    `prefill` and `prefill_lengths`, prompts are fed in one call;
  - optionally `scan_layers`, true if the cache has a leading layer axis;
  - optionally `shares_encoded`, true if `decode` with a cache takes one row of
    `encoded` and `encoder_input_tokens` for several adjacent rows of the decoder.
  """

  FEATURE_CONVERTER_CLS = _SeqioConverter('EncDecFeatureConverter')

  def __init__(
    self,
    module: nn.Module,
    input_vocabulary: 'seqio.Vocabulary',
    output_vocabulary: 'seqio.Vocabulary',
    optimizer_def: optimizers.OptimizerDefType,
    decode_fn: DecodeFnCallable = decoding.beam_search,
    feature_converter_cls: Callable[..., 'seqio.FeatureConverter'] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: LossNormalizingFactor | None = None,
    default_decoder_params: DecoderParams | None = None,
  ):
    """See `BaseTransformerModel`; `feature_converter_cls` overrides the class's."""
    if feature_converter_cls is not None:
      self.FEATURE_CONVERTER_CLS = feature_converter_cls
    super().__init__(
      module,
      input_vocabulary,
      output_vocabulary,
      optimizer_def,
      decode_fn,
      loss_normalizing_factor=loss_normalizing_factor,
      label_smoothing=label_smoothing,
      z_loss=z_loss,
    )
    self._default_decoder_params = default_decoder_params or DecoderParams()

  def get_initial_variables(
    self,
    rng: jax.Array,
    input_shapes: Mapping[str, tuple[int, ...]],
    input_types: Mapping[str, Any] | None = None,
  ) -> Mapping[str, Any]:
    """Initialises the module.

    Args:
      rng: key of the parameters.
      input_shapes: shapes of `encoder_input_tokens`, `decoder_input_tokens` and
        optionally `*_positions` and `*_segment_ids`.
      input_types: their types; by default float32 for tokens, int32 for the others.

    Returns:
      All collections of variables, frozen.
    """
    types = input_types or {}

    def ones(name, default_type):
      return jnp.ones(input_shapes[name], types.get(name, default_type))

    decoder_tokens = ones('decoder_input_tokens', jnp.float32)
    variables = self.module.init(
      rng,
      ones('encoder_input_tokens', jnp.float32),
      decoder_tokens,
      decoder_tokens,
      decode=False,
      enable_dropout=False,
      **{
        name: ones(name, jnp.int32) if name in input_shapes else None
        for name in _PACKING_FEATURES
      },
    )
    return flax_core.freeze(variables)

  def _compute_logits(
    self,
    params: PyTree,
    batch: Batch,
    dropout_rng: jax.Array | None = None,
    mutable: Any = False,
    other_variables: PyTree | None = None,
  ) -> Any:
    """Computes logits, and the changed variables if `mutable` names collections."""
    return self.module.apply(
      {'params': params, **(other_variables or {})},
      batch['encoder_input_tokens'],
      batch['decoder_input_tokens'],
      batch['decoder_target_tokens'],
      decode=False,
      enable_dropout=dropout_rng is not None,
      rngs=None if dropout_rng is None else {'dropout': dropout_rng},
      mutable=mutable,
      **{name: batch.get(name) for name in _PACKING_FEATURES},
    )

  def _compute_logits_from_slice(
    self,
    decoding_state: decoding.DecodingState,
    params: PyTree,
    encoded_inputs: Float[Array, 'inputs input_length width'],
    raw_inputs: Int[Array, 'inputs input_length'],
    max_decode_length: int,
  ) -> tuple[Float[Array, 'rows vocabulary'], Mapping[str, Any]]:
    """Feeds one token; returns the next token's logits and the new cache.

    Rows are batch * beams; the encoder's output and input tokens are repeated for them
    unless the module `shares_encoded`.
    """
    token = decoding_state.cur_token
    logits, changed = self.module.apply(
      {'params': params, 'cache': decoding_state.cache},
      encoded_inputs,
      raw_inputs,
      token,
      token,
      method=self.module.decode,
      mutable=['cache'],
      max_decode_length=max_decode_length,
      decode=True,
      enable_dropout=False,
    )
    return jnp.squeeze(logits, axis=1), changed['cache']

  def _compute_kv_cache(
    self,
    params: PyTree,
    encoded_inputs: Float[Array, 'batch input_length width'],
    encoder_input_tokens: Int[Array, 'batch input_length'],
    decoder_input_tokens: Int[Array, 'batch length'],
    prefill_decoder_prompt: bool = False,
  ) -> tuple[PyTree, Int[Array, ' batch'] | None]:
    """Creates the decoder's cache and optionally fills it from the prompt.

    Returns:
      The cache; the number of prompt tokens, or None if it was not filled.
    """
    sources, targets = map(jnp.ones_like, (encoder_input_tokens, decoder_input_tokens))
    _, changed = self.module.apply(
      {'params': params},
      encoder_input_tokens=sources,
      decoder_input_tokens=targets,
      decoder_target_tokens=targets,
      enable_dropout=False,
      decode=True,
      mutable=['cache'],
    )
    if not prefill_decoder_prompt:
      return changed['cache'], None
    prompt_lengths = jnp.sum(decoder_input_tokens != 0, axis=1)
    _, changed = self.module.apply(
      {'params': params, 'cache': changed['cache']},
      encoded=encoded_inputs,
      encoder_input_tokens=encoder_input_tokens,
      decoder_input_tokens=decoder_input_tokens,
      # Targets are unknown; zeros would be masked as padding.
      decoder_target_tokens=jnp.ones_like(decoder_input_tokens),
      mutable=['cache'],
      enable_dropout=False,
      prefill=True,
      prefill_lengths=prompt_lengths,
      method=self.module.decode,
    )
    cache = flax_core.unfreeze(changed['cache'])
    embedder = cache.get('decoder', {}).get('position_embedder')
    if embedder is not None:
      embedder['position_embedder_index'] = prompt_lengths
    if isinstance(changed['cache'], flax_core.FrozenDict):
      cache = flax_core.freeze(cache)
    return cache, prompt_lengths

  def predict_batch_with_aux(
    self,
    params: PyTree,
    batch: Batch,
    rng: jax.Array | None = None,
    decoder_params: MutableMapping[str, Any] | None = None,
    return_all_decodes: bool | None = None,
    num_decodes: int | None = None,
    prompt_with_targets: bool = False,
  ) -> tuple[Int[Array, '...'], Mapping[str, jax.Array]]:
    """Decodes a batch.

    Args:
      params: the parameters.
      batch: `encoder_input_tokens`, and `decoder_input_tokens`, whose length
        bounds the result and whose content is used only as a prompt.
      rng: key for sampling, passed on as `decode_rng`.
      decoder_params: other arguments for the decoding function, possibly traced;
        `eos_id` is by default the output vocabulary's.
      return_all_decodes: whether to return all sequences, best last, or only the best;
        by default as in `default_decoder_params`, as `num_decodes` is.
      num_decodes: beams of a beam search, or sequences to sample.
      prompt_with_targets: whether the decoder input, without end tokens, is a
        forced prompt.

    Returns:
      Sequences [batch, length] and `scores` [batch]; if all are returned, both
      with an axis num_decodes after the batch.
    """
    options = self._decode_options(rng, decoder_params)
    defaults = self._default_decoder_params
    if return_all_decodes is None:
      return_all_decodes = defaults.return_all_decodes
    if num_decodes is None:
      num_decodes = defaults.num_decodes
    encoder_tokens = batch['encoder_input_tokens']
    prompt = jnp.asarray(batch['decoder_input_tokens'])
    # An end token would end the sequence right after the prompt.
    if prompt_with_targets:
      prompt = jnp.where(prompt == self.output_vocabulary.eos_id, 0, prompt)
    else:
      prompt = jnp.zeros_like(prompt)
    encoded = self.module.apply(
      {'params': params},
      encoder_tokens,
      enable_dropout=False,
      method=self.module.encode,
    )
    cache, initial_index = self._compute_kv_cache(
      params,
      encoded_inputs=encoded,
      encoder_input_tokens=encoder_tokens,
      decoder_input_tokens=prompt,
      prefill_decoder_prompt=prompt_with_targets and self._can_prefill(),
    )
    if initial_index is not None:
      options['initial_index'] = initial_index
    repeats = 1 if getattr(self.module, 'shares_encoded', False) else num_decodes
    expand = functools.partial(decoding.flat_batch_beam_expand, beam_size=repeats)
    decodes, scores = self._decode_fn(
      inputs=prompt,
      cache=cache,
      tokens_to_logits=functools.partial(
        self._compute_logits_from_slice,
        params=params,
        encoded_inputs=expand(encoded),
        raw_inputs=expand(encoder_tokens),
        max_decode_length=prompt.shape[1],
      ),
      num_decodes=num_decodes,
      cache_offset=self._cache_offset(),
      **options,
    )
    if return_all_decodes:
      return decodes, {'scores': scores}
    return decodes[:, -1], {'scores': scores[:, -1]}

  def _can_prefill(self) -> bool:
    if 'initial_index' not in inspect.signature(self.decode_fn).parameters:
      logging.log_first_n(
        logging.INFO, 'Prompts are fed token by token: %s.', 1, self.decode_fn
      )
      return False
    return 'prefill' in inspect.signature(self.module.decode).parameters


_PACKING_FEATURES = [
  f'{side}_{feature}'
  for feature in ('segment_ids', 'positions')
  for side in ('encoder', 'decoder')
]


class DecoderOnlyModel(BaseTransformerModel):
  """A causal language model or prefix language model.

  `decoder_input_tokens` holds inputs and targets in one sequence.
  `decoder_causal_attention` is 1 over the start token and the inputs, 0 over targets
  and padding.

  The module provides `__call__(decoder_input_tokens, decoder_target_tokens,
  decoder_segment_ids, decoder_positions, decoder_causal_attention, decode,
  enable_dropout, max_decode_length, prefill, prefill_lengths)`, which returns logits.
  The decoding function must have a parameter `initial_index`.
  """

  FEATURE_CONVERTER_CLS = _SeqioConverter('DecoderFeatureConverter')

  def __init__(
    self,
    module: nn.Module,
    vocabulary: 'seqio.Vocabulary',
    optimizer_def: optimizers.OptimizerDefType,
    decode_fn: DecodeFnCallable = decoding.temperature_sample,
    inputs_bidirectional_attention: bool = False,
    feature_converter_cls: Callable[..., 'seqio.FeatureConverter'] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: LossNormalizingFactor | None = None,
  ):
    """See `BaseTransformerModel`; `feature_converter_cls` overrides the class's.

    With `inputs_bidirectional_attention` the inputs attend to each other in both
    directions: a prefix language model (arXiv:1910.10683, section 3.2).
    """
    if feature_converter_cls is not None:
      self.FEATURE_CONVERTER_CLS = feature_converter_cls
    self._inputs_bidirectional_attention = inputs_bidirectional_attention
    super().__init__(
      module=module,
      input_vocabulary=vocabulary,
      output_vocabulary=vocabulary,
      optimizer_def=optimizer_def,
      decode_fn=decode_fn,
      label_smoothing=label_smoothing,
      z_loss=z_loss,
      loss_normalizing_factor=loss_normalizing_factor,
    )

  def get_initial_variables(
    self,
    rng: jax.Array,
    input_shapes: Mapping[str, tuple[int, ...]],
    input_types: Mapping[str, Any] | None = None,
  ) -> Mapping[str, Any]:
    """Returns all collections of variables, frozen."""
    name = 'decoder_input_tokens'
    tokens = jnp.ones(input_shapes[name], (input_types or {}).get(name, jnp.float32))
    return flax_core.freeze(self.module.init(rng, tokens, tokens, enable_dropout=False))

  def _get_decoder_causal_attention(
    self, batch: Batch
  ) -> Int[Array, 'batch length'] | None:
    if not self._inputs_bidirectional_attention:
      return None
    if 'decoder_causal_attention' not in batch:
      raise ValueError(
        'inputs_bidirectional_attention needs the feature decoder_causal_attention, '
        'which the feature converter creates for tasks with inputs and targets. Got '
        f'features: {sorted(batch)}.'
      )
    return batch['decoder_causal_attention']

  def _compute_logits(
    self,
    params: PyTree,
    batch: Batch,
    dropout_rng: jax.Array | None = None,
    mutable: Any = False,
    other_variables: PyTree | None = None,
  ) -> Any:
    """Computes logits, and the changed variables if `mutable` names collections."""
    return self.module.apply(
      {'params': params, **(other_variables or {})},
      batch['decoder_input_tokens'],
      batch['decoder_target_tokens'],
      decoder_segment_ids=batch.get('decoder_segment_ids'),
      decoder_positions=batch.get('decoder_positions'),
      decoder_causal_attention=self._get_decoder_causal_attention(batch),
      decode=False,
      enable_dropout=dropout_rng is not None,
      rngs=None if dropout_rng is None else {'dropout': dropout_rng},
      mutable=mutable,
    )

  def _compute_logits_from_slice(
    self,
    decoding_state: decoding.DecodingState,
    params: PyTree,
    max_decode_length: int,
  ) -> tuple[Float[Array, 'rows vocabulary'], Mapping[str, Any]]:
    """Feeds one token; returns the next token's logits and the new cache."""
    token = decoding_state.cur_token
    logits, changed = self.module.apply(
      {'params': params, 'cache': decoding_state.cache},
      token,
      token,
      mutable=['cache'],
      max_decode_length=max_decode_length,
      decode=True,
      enable_dropout=False,
    )
    return jnp.squeeze(logits, axis=1), changed['cache']

  def _compute_kv_cache(
    self,
    params: PyTree,
    inputs: Int[Array, 'batch length'],
    causal_attention_mask: Int[Array, 'batch length'],
  ) -> tuple[PyTree, Int[Array, ' batch']]:
    """Creates the cache and fills it from the inputs (start token first).

    Returns:
      The cache; the position of the last input, whose token is fed again to get the
      logits of the first target.
    """
    lengths = jnp.sum(inputs[:, 1:] != 0, axis=1)
    ones = jnp.ones_like(inputs)
    _, changed = self.module.apply(
      {'params': params},
      ones,
      ones,
      mutable=['cache'],
      decode=True,
      enable_dropout=False,
    )
    cache = changed['cache']
    if 'cache_axes' in changed:
      cache = jax.tree.map(
        flax_partitioning.with_sharding_constraint,
        cache,
        flax_partitioning.get_axis_names(changed['cache_axes']),
      )
    _, changed = self.module.apply(
      {'params': params, 'cache': cache},
      decoder_input_tokens=inputs,
      # As targets, the mask unmasks the start token and the inputs alone.
      decoder_target_tokens=causal_attention_mask,
      decoder_causal_attention=self._get_decoder_causal_attention(
        {'decoder_causal_attention': causal_attention_mask}
      ),
      mutable=['cache'],
      enable_dropout=False,
      prefill=True,
      prefill_lengths=lengths,
    )
    return changed['cache'], lengths

  def predict_batch_with_aux(
    self,
    params: PyTree,
    batch: Batch,
    rng: jax.Array | None = None,
    *,
    return_all_decodes: bool = False,
    num_decodes: int = 1,
    decoder_params: MutableMapping[str, Any] | None = None,
  ) -> tuple[Int[Array, '...'], Mapping[str, jax.Array]]:
    """Continues the inputs of a batch, whose targets are ignored.

    For the parameters see `EncoderDecoderModel.predict_batch_with_aux`.

    Returns:
      The tokens after the inputs, [batch, length] or [batch, num_decodes, length],
      and `scores`, [batch] or [batch, num_decodes].
    """
    if 'decoder_causal_attention' not in batch:
      raise ValueError(
        'Decoding needs the feature decoder_causal_attention: task_feature_lengths '
        f'must name both inputs and targets. Got features: {sorted(batch)}.'
      )
    # The mask is one longer than the inputs, to include the start token.
    attended = batch['decoder_causal_attention']
    inputs = batch['decoder_input_tokens'] * attended
    cache, initial_index = self._compute_kv_cache(params, inputs, attended)
    decodes, scores = self._decode_fn(
      inputs=inputs,
      cache=cache,
      tokens_to_logits=functools.partial(
        self._compute_logits_from_slice,
        params=params,
        max_decode_length=inputs.shape[1],
      ),
      num_decodes=num_decodes,
      initial_index=initial_index,
      cache_offset=self._cache_offset(),
      **self._decode_options(rng, decoder_params),
    )
    if return_all_decodes:
      lengths = jnp.broadcast_to(initial_index[:, None], decodes.shape[:2])
      return jax.vmap(remove_prefix)(decodes, lengths), {'scores': scores}
    return remove_prefix(decodes[:, -1], initial_index), {'scores': scores[:, -1]}


@jax.vmap
def remove_prefix(
  sequence: Int[Array, ' length'], prefix_length: Int[Array, '']
) -> Int[Array, ' length']:
  """Drops the first `prefix_length` tokens of each row and pads with 0 at the end."""
  source = jnp.arange(sequence.shape[0]) + prefix_length
  return jnp.take(sequence, source, mode='fill', fill_value=0)


def get_input_vocabulary(model: BaseTransformerModel) -> 'seqio.Vocabulary':
  """Returns `model.input_vocabulary`, as a function for gin."""
  return model.input_vocabulary


def get_output_vocabulary(model: BaseTransformerModel) -> 'seqio.Vocabulary':
  """Returns `model.output_vocabulary`, as a function for gin."""
  return model.output_vocabulary
