"""The decoder-only model. Reached as `models.DecoderOnlyModel`."""

import functools
from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import core as flax_core
from flax import linen as nn
from flax.linen import partitioning as flax_partitioning
from jaxtyping import Array, Float, Int, PyTree

from t5x import base_model, decoding

if TYPE_CHECKING:
  import seqio

  from t5x import optimizers


@jax.vmap
def remove_prefix(
  sequence: Int[Array, ' length'], prefix_length: Int[Array, '']
) -> Int[Array, ' length']:
  """Drops the first tokens of every row and pads with 0 at the end.

  Args:
    sequence: int [batch, length].
    prefix_length: int [batch], how many tokens to drop.

  Returns:
    Int [batch, length].
  """
  source = jnp.arange(sequence.shape[0]) + prefix_length
  return jnp.take(sequence, source, mode='fill', fill_value=0)


class DecoderOnlyModel(base_model.BaseTransformerModel):
  """A module with a decoder alone: a language model or a prefix language model.

  Inputs and targets are one sequence, `decoder_input_tokens`. In it
  `decoder_causal_attention` is 1 over the start token and the inputs, that is
  one position longer than the inputs, and 0 over targets and padding.

  The module provides `__call__(decoder_input_tokens, decoder_target_tokens,
  decoder_segment_ids, decoder_positions, decoder_causal_attention, decode,
  enable_dropout, max_decode_length, prefill, prefill_lengths)`, giving logits.

  The decoding function must take `initial_index`, one a row.
  """

  FEATURE_CONVERTER_CLS = base_model.SeqioConverter('DecoderFeatureConverter')

  def __init__(
    self,
    module: nn.Module,
    vocabulary: 'seqio.Vocabulary',
    optimizer_def: 'optimizers.OptimizerDefType',
    decode_fn: base_model.DecodeFnCallable = decoding.temperature_sample,
    inputs_bidirectional_attention: bool = False,
    feature_converter_cls: Callable[..., 'seqio.FeatureConverter'] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: base_model.LossNormalizingFactor | None = None,
  ):
    """See `BaseTransformerModel`.

    Args:
      module: the Flax module.
      vocabulary: vocabulary of inputs and targets.
      optimizer_def: definition of the optimizer.
      decode_fn: decoding function.
      inputs_bidirectional_attention: whether the inputs attend to each other
        both ways, the prefix language model of Raffel et al. 2019
        (arXiv:1910.10683), section 3.2.
      feature_converter_cls: in place of the class's FEATURE_CONVERTER_CLS.
      label_smoothing: probability spread over the other tokens.
      z_loss: weight of the z-loss.
      loss_normalizing_factor: what the summed loss is divided by.
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
    """Initialises the module.

    Args:
      rng: key of the parameters.
      input_shapes: shape of `decoder_input_tokens`; others are not needed.
      input_types: its type, float32 unless named.

    Returns:
      All collections of variables, frozen.
    """
    name = 'decoder_input_tokens'
    tokens = jnp.ones(input_shapes[name], (input_types or {}).get(name, jnp.float32))
    return flax_core.freeze(self.module.init(rng, tokens, tokens, enable_dropout=False))

  def _get_decoder_causal_attention(
    self, batch: base_model.Batch
  ) -> Int[Array, 'batch length'] | None:
    """Where attention runs both ways; None if nowhere.

    Raises:
      ValueError: if the batch does not say where its inputs are.
    """
    if not self._inputs_bidirectional_attention:
      return None
    if 'decoder_causal_attention' not in batch:
      raise ValueError(
        'inputs_bidirectional_attention needs the feature decoder_causal_attention,'
        ' which the feature converter makes of tasks with inputs and targets. Got:'
        f' {sorted(batch)}.'
      )
    return batch['decoder_causal_attention']

  def _compute_logits(
    self,
    params: PyTree,
    batch: base_model.Batch,
    dropout_rng: jax.Array | None = None,
    mutable: Any = False,
    other_variables: PyTree | None = None,
  ) -> Any:
    """Logits, and the changed variables if `mutable` names collections."""
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
    """Logits after one more token, and the new cache."""
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

  def score_batch(
    self, params: PyTree, batch: base_model.Batch, return_intermediates: bool = False
  ) -> Any:
    """Log probability of the targets under the model, without z-loss.

    Args:
      params: the parameters.
      batch: model features; `decoder_loss_weights` says what is scored.
      return_intermediates: whether to return intermediates beside the scores;
        see `EncoderDecoderModel.score_batch`.

    Returns:
      Scores [batch], or the scores and the intermediates.
    """
    return base_model.score_targets(self, params, batch, return_intermediates)

  def _compute_kv_cache(
    self,
    params: PyTree,
    inputs: Int[Array, 'batch length'],
    causal_attention_mask: Int[Array, 'batch length'],
  ) -> tuple[PyTree, Int[Array, ' batch']]:
    """Creates the cache and fills it from the inputs.

    All inputs but the last are stored. The last one is fed again in the first
    step of decoding, since the first target is drawn from what it gives.

    Args:
      params: the parameters.
      inputs: start token and inputs, padded with 0.
      causal_attention_mask: 1 over the start token and the inputs.

    Returns:
      The cache, and the number of inputs, which is the position of the last.
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
      # As targets the mask: not 0 over the start token either, so that it is
      # attended to, and 0 over everything that must not be seen.
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
    batch: base_model.Batch,
    rng: jax.Array | None = None,
    *,
    return_all_decodes: bool = False,
    num_decodes: int = 1,
    decoder_params: MutableMapping[str, Any] | None = None,
  ) -> tuple[Int[Array, '...'], Mapping[str, jax.Array]]:
    """Continues the inputs of a batch.

    Args:
      params: the parameters.
      batch: `decoder_input_tokens` and `decoder_causal_attention`. Targets in
        the first are not looked at.
      rng: key for decoding functions that draw, passed on as `decode_rng`.
      return_all_decodes: whether all sequences are returned, sorted so that the
        best is the last, or only the best.
      num_decodes: how many sequences are searched for or drawn.
      decoder_params: more arguments for the decoding function; may hold traced
        values. `eos_id` defaults to the vocabulary's. Not changed.

    Returns:
      What was decoded after the inputs, [batch, length] or
      [batch, num_decodes, length], and `scores`, [batch] or
      [batch, num_decodes].

    Raises:
      ValueError: if the batch does not say where its inputs are, or both `rng`
        and `decoder_params` bring a key.
    """
    if 'decoder_causal_attention' not in batch:
      raise ValueError(
        'Decoding needs the feature decoder_causal_attention: task_feature_lengths'
        f' must name both inputs and targets. Got features: {sorted(batch)}.'
      )
    # The mask is one longer than the inputs: start token and inputs remain.
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
      cache_offset=base_model.cache_offset(self.module),
      **base_model.decode_options(self, rng, decoder_params),
    )
    decodes, aux = base_model.select_decodes(decodes, scores, return_all_decodes)
    # In all decodes of one example the inputs are equally long.
    drop = jax.vmap(remove_prefix) if return_all_decodes else remove_prefix
    if return_all_decodes:
      initial_index = jnp.broadcast_to(initial_index[:, None], decodes.shape[:2])
    return drop(decodes, initial_index), aux
