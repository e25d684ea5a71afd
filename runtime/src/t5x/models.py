"""Models: a Flax module with its vocabularies, loss, metrics and decoding.

The trainer, the evaluator and inference know a model by `BaseModel`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import core as flax_core
from flax import linen as nn
from jaxtyping import Array, Float, Int, PyTree

from t5x import base_model, decoding
from t5x.base_model import (
  BaseModel,
  BaseTransformerModel,
  Batch,
  DecodeFnCallable,
  LossNormalizingFactor,
  TokensIdsToLogitsCallable,
  get_input_vocabulary,
  get_output_vocabulary,
)
from t5x.decoder_only import DecoderOnlyModel, remove_prefix
from t5x.metrics import MetricsMap, compute_base_metrics, count_packed_examples

if TYPE_CHECKING:
  import seqio

  from t5x import optimizers

__all__ = [
  'BaseModel',
  'BaseTransformerModel',
  'DecodeFnCallable',
  'DecoderOnlyModel',
  'DecoderParams',
  'EncoderDecoderModel',
  'MetricsMap',
  'TokensIdsToLogitsCallable',
  'compute_base_metrics',
  'count_packed_examples',
  'get_input_vocabulary',
  'get_output_vocabulary',
  'remove_prefix',
]


@dataclasses.dataclass(frozen=True)
class DecoderParams:
  """Defaults of `EncoderDecoderModel.predict_batch_with_aux`.

  Attributes:
    return_all_decodes: whether all sequences are returned or the best.
    num_decodes: how many sequences are searched for or drawn.
  """

  return_all_decodes: bool = False
  num_decodes: int = 1


class EncoderDecoderModel(BaseTransformerModel):
  """A module with an encoder and a decoder.

  The module provides

  - `__call__(encoder_input_tokens, decoder_input_tokens, decoder_target_tokens,
    encoder_segment_ids, decoder_segment_ids, encoder_positions,
    decoder_positions, decode, enable_dropout)`, giving logits; with `decode` it
    creates the collection `cache` for as many positions as the tokens have;
  - `encode(encoder_input_tokens, enable_dropout)`;
  - `decode(encoded, encoder_input_tokens, decoder_input_tokens,
    decoder_target_tokens, enable_dropout, decode, max_decode_length)`, and if
    it also takes `prefill` and `prefill_lengths`, a prompt is fed at once;
  - optionally `scan_layers`, true if the cache has a leading layer axis.
  """

  FEATURE_CONVERTER_CLS = base_model.SeqioConverter('EncDecFeatureConverter')

  def __init__(
    self,
    module: nn.Module,
    input_vocabulary: 'seqio.Vocabulary',
    output_vocabulary: 'seqio.Vocabulary',
    optimizer_def: 'optimizers.OptimizerDefType',
    decode_fn: DecodeFnCallable = decoding.beam_search,
    feature_converter_cls: Callable[..., 'seqio.FeatureConverter'] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: LossNormalizingFactor | None = None,
    default_decoder_params: DecoderParams | None = None,
  ):
    """See `BaseTransformerModel`.

    Args:
      module: the Flax module.
      input_vocabulary: vocabulary of the inputs.
      output_vocabulary: vocabulary of the targets.
      optimizer_def: definition of the optimizer.
      decode_fn: decoding function.
      feature_converter_cls: in place of the class's FEATURE_CONVERTER_CLS.
      label_smoothing: probability spread over the other tokens.
      z_loss: weight of the z-loss.
      loss_normalizing_factor: what the summed loss is divided by.
      default_decoder_params: defaults of `predict_batch_with_aux`.
    """
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
      input_shapes: shapes of `encoder_input_tokens`, `decoder_input_tokens` and,
        where the batch has them, `*_positions` and `*_segment_ids`.
      input_types: their types; tokens are float32 and the others int32 unless
        named.

    Returns:
      All collections of variables, frozen.
    """
    types = input_types or {}

    def ones(name, default_type):
      return jnp.ones(input_shapes[name], types.get(name, default_type))

    decoder_tokens = ones('decoder_input_tokens', jnp.float32)
    optional = {
      f'{side}_{feature}': None
      for side in ('encoder', 'decoder')
      for feature in ('positions', 'segment_ids')
    }
    for name in optional.keys() & input_shapes.keys():
      optional[name] = ones(name, jnp.int32)
    variables = self.module.init(
      rng,
      ones('encoder_input_tokens', jnp.float32),
      decoder_tokens,
      decoder_tokens,
      decode=False,
      enable_dropout=False,
      **optional,
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
    """Logits, and the changed variables if `mutable` names collections."""
    features = ('segment_ids', 'positions')
    optional = {
      f'{side}_{feature}': batch.get(f'{side}_{feature}')
      for feature in features
      for side in ('encoder', 'decoder')
    }
    return self.module.apply(
      {'params': params, **(other_variables or {})},
      batch['encoder_input_tokens'],
      batch['decoder_input_tokens'],
      batch['decoder_target_tokens'],
      decode=False,
      enable_dropout=dropout_rng is not None,
      rngs=None if dropout_rng is None else {'dropout': dropout_rng},
      mutable=mutable,
      **optional,
    )

  def _compute_logits_from_slice(
    self,
    decoding_state: decoding.DecodingState,
    params: PyTree,
    encoded_inputs: Float[Array, 'rows input_length width'],
    raw_inputs: Int[Array, 'rows input_length'],
    max_decode_length: int,
  ) -> tuple[Float[Array, 'rows vocabulary'], Mapping[str, Any]]:
    """Logits after one more token, and the new cache.

    Args:
      decoding_state: the current token and the cache, rows = batch * beams.
      params: the parameters.
      encoded_inputs: what the encoder gave, repeated for the beams.
      raw_inputs: the encoder's input tokens, for the padding mask.
      max_decode_length: positions of the cache.
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
    """Creates the decoder's cache.

    Args:
      params: the parameters.
      encoded_inputs: what the encoder gave.
      encoder_input_tokens: its input tokens, for the padding mask.
      decoder_input_tokens: start token, prompt and padding.
      prefill_decoder_prompt: whether to fill the cache from the prompt.

    Returns:
      The cache, and the number of prompt tokens if it was filled, else None.
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
      # No target is known; ones, since padding would be masked.
      decoder_target_tokens=jnp.ones_like(decoder_input_tokens),
      mutable=['cache'],
      enable_dropout=False,
      prefill=True,
      prefill_lengths=prompt_lengths,
      method=self.module.decode,
    )
    return _with_position(changed['cache'], prompt_lengths), prompt_lengths

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
        bounds the result and whose content counts only as a prompt.
      rng: key for decoding functions that draw, passed on as `decode_rng`.
      decoder_params: more arguments for the decoding function, maybe traced; by
        default `eos_id` is the output vocabulary's. Not changed.
      return_all_decodes: return all sequences, the best last, or only the best.
      num_decodes: beams of a beam search, or sequences to draw.
      prompt_with_targets: whether the decoder input, without end tokens, is a
        forced prompt.

    Returns:
      Sequences [batch, length] and `scores` [batch]; if all are returned, both
      with an axis num_decodes behind the batch. `default_decoder_params` says
      what happens where the caller does not.

    Raises:
      ValueError: if both `rng` and `decoder_params` bring a key.
    """
    options = base_model.decode_options(self, rng, decoder_params)
    defaults = self._default_decoder_params
    if return_all_decodes is None:
      return_all_decodes = defaults.return_all_decodes
    if num_decodes is None:
      num_decodes = defaults.num_decodes
    prompt = jnp.asarray(batch['decoder_input_tokens'])
    # An end token would close the sequence right after the prompt.
    if prompt_with_targets:
      prompt = jnp.where(prompt == self.output_vocabulary.eos_id, 0, prompt)
    else:
      prompt = jnp.zeros_like(prompt)
    tokens_to_logits, cache, initial_index = self._start_decoding(
      params, batch['encoder_input_tokens'], prompt, num_decodes
    )
    # Only decoding functions that know about prefilling take the argument.
    if initial_index is not None:
      options['initial_index'] = initial_index
    decodes, scores = self._decode_fn(
      inputs=prompt,
      cache=cache,
      tokens_to_logits=tokens_to_logits,
      num_decodes=num_decodes,
      cache_offset=base_model.cache_offset(self.module),
      **options,
    )
    return base_model.select_decodes(decodes, scores, return_all_decodes)

  def _start_decoding(
    self,
    params: PyTree,
    encoder_input_tokens: Int[Array, 'batch input_length'],
    prompt: Int[Array, 'batch length'],
    num_decodes: int,
  ) -> tuple[TokensIdsToLogitsCallable, PyTree, Int[Array, ' batch'] | None]:
    """Encodes the inputs; returns the decoder, its cache and where it begins."""
    encoded_inputs = self.module.apply(
      {'params': params},
      encoder_input_tokens,
      enable_dropout=False,
      method=self.module.encode,
    )
    cache, initial_index = self._compute_kv_cache(
      params,
      encoded_inputs=encoded_inputs,
      encoder_input_tokens=encoder_input_tokens,
      decoder_input_tokens=prompt,
      prefill_decoder_prompt=self._can_prefill(),
    )
    expand = functools.partial(decoding.flat_batch_beam_expand, beam_size=num_decodes)
    tokens_to_logits = functools.partial(
      self._compute_logits_from_slice,
      params=params,
      encoded_inputs=expand(encoded_inputs),
      raw_inputs=expand(encoder_input_tokens),
      max_decode_length=prompt.shape[1],
    )
    return tokens_to_logits, cache, initial_index

  def _can_prefill(self) -> bool:
    """Whether decoding function and module both know prefilled prompts."""
    if 'initial_index' not in inspect.signature(self.decode_fn).parameters:
      logging.log_first_n(
        logging.INFO, 'Prompts are fed token by token: %s.', 1, self.decode_fn
      )
      return False
    return 'prefill' in inspect.signature(self.module.decode).parameters

  def score_batch(
    self, params: PyTree, batch: Batch, return_intermediates: bool = False
  ) -> Any:
    """Log probability of the targets under the model, without z-loss.

    Args:
      params: the parameters.
      batch: model features.
      return_intermediates: whether to return, beside the scores, what the
        module sowed as `intermediates`; under `decoder` it then also holds
        `target_tokens`, `loss_weights` and `token_scores`, each in a tuple of
        one.

    Returns:
      Scores [batch], or the scores and the intermediates.
    """
    return base_model.score_targets(self, params, batch, return_intermediates)


def _with_position(cache: PyTree, position: Int[Array, ' batch']) -> PyTree:
  """The cache with the decoder's position embedder, if any, set to `position`."""
  decoder = cache.get('decoder', {})
  if 'position_embedder' not in decoder:
    return cache
  frozen = isinstance(cache, flax_core.FrozenDict)
  decoder = flax_core.unfreeze(decoder)
  embedder = {**decoder['position_embedder'], 'position_embedder_index': position}
  changed = {
    **flax_core.unfreeze(cache),
    'decoder': {**decoder, 'position_embedder': embedder},
  }
  return flax_core.freeze(changed) if frozen else changed
