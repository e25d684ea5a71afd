"""BART as a T5X model: loss without full logits, metrics by kind of target."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
import seqio
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Num, PyTree

from bart_t5x import features, network, noise
from bart_t5x import loss as loss_lib
from bart_t5x.tokenization import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from t5x import decoding, losses, models

Batch = Mapping[str, jax.Array]
Metrics = dict[str, clu.metrics.Metric]


class BartModel(models.EncoderDecoderModel):
  """A `network.Transformer` with vocabularies, loss, metrics and decoding."""

  FEATURE_CONVERTER_CLS = features.BartFeatureConverter
  # Metrics that our runtime shows after loss and accuracy.
  PROGRESS_METRICS = {
    'infilled': 'infilled_accuracy',
    'copied': 'copied_accuracy',
    'end': 'end_accuracy',
    'copying alone': 'copy_baseline_accuracy',
    'hf_compat loss': 'hf_compat_loss',
    'hf_compat accuracy': 'hf_compat_accuracy',
  }

  def __init__(
    self,
    module: nn.Module,
    input_vocabulary: seqio.Vocabulary,
    output_vocabulary: seqio.Vocabulary,
    optimizer_def: Any,
    decode_fn: Callable[..., Any] = decoding.beam_search,
    feature_converter_cls: Callable[..., seqio.FeatureConverter] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: Any = None,
    default_decoder_params: models.DecoderParams | None = None,
    loss_chunk_length: int | None = 64,
    forced_first_id: int | None = None,
  ):
    """Takes `EncoderDecoderModel`'s arguments and two more.

    Reported losses do not depend on `loss_normalizing_factor`.

    Args:
      loss_chunk_length: target positions per row whose logits exist at a time, None for
        all. They take rows x this x vocabulary x 4 bytes: some 100 MB suit
        accelerators; on CPUs they should fit into the cache.
      forced_first_id: the first token of every decoded sequence, for models trained
        that way (Hugging Face's `forced_bos_token_id`).

    Raises:
      ValueError: a vocabulary and the module differ in size, or one of the two
        arguments is out of range.
    """
    super().__init__(
      module=module,
      input_vocabulary=input_vocabulary,
      output_vocabulary=output_vocabulary,
      optimizer_def=optimizer_def,
      decode_fn=decode_fn,
      feature_converter_cls=feature_converter_cls,
      label_smoothing=label_smoothing,
      z_loss=z_loss,
      loss_normalizing_factor=loss_normalizing_factor,
      default_decoder_params=default_decoder_params,
    )
    _check_settings(loss_chunk_length, forced_first_id, module.config.vocab_size)
    self._loss_chunk_length = loss_chunk_length
    self._forced_first_id = forced_first_id
    for side, vocabulary in (
      ('input', input_vocabulary),
      ('output', output_vocabulary),
    ):
      _check_vocabulary(side, vocabulary, module.config.vocab_size)

  def loss_fn(
    self, params: PyTree, batch: Batch, dropout_rng: jax.Array | None
  ) -> tuple[Float[Array, ''], Metrics]:
    """Returns Σ weight · loss / `loss_normalizing_factor` and the metrics.

    The feature `decoder_targets_noised` adds `noise_metrics`; `dropout_rng` enables
    dropout.
    """
    factor, weights = losses.get_loss_normalizing_factor_and_weights(
      self._loss_normalizing_factor, batch
    )
    targets = batch['decoder_target_tokens']
    if weights is None:
      weights = jnp.ones(targets.shape, jnp.float32)
    total, tokens = self._token_losses(params, batch, weights, dropout_rng)
    if factor is not None:
      total = total / factor
    counted = batch.get('decoder_loss_weights', weights).astype(jnp.float32)
    found = {
      **token_metrics(tokens, counted),
      **compatible_metrics(tokens, targets, counted, self._special_ids()),
      **_rates(batch, counted),
    }
    if features.DECODER_NOISED in batch:
      found |= noise_metrics(tokens, batch[features.DECODER_NOISED], counted)
    return total, found

  def score_batch(
    self, params: PyTree, batch: Batch, return_intermediates: bool = False
  ) -> Any:
    """Returns the log probability of each row's targets, [batch].

    With return_intermediates it stores full logits.
    """
    if return_intermediates:
      return super().score_batch(params, batch, return_intermediates)
    weights = batch['decoder_loss_weights']
    _, tokens = self._token_losses(params, batch, weights, None)
    return -jnp.sum(tokens.negative_log_likelihood * weights, axis=-1)

  def _compute_logits_from_slice(
    self, decoding_state: decoding.DecodingState, *args: Any, **kwargs: Any
  ) -> tuple[Float[Array, 'rows vocabulary'], Mapping[str, Any]]:
    """Forces the first token; a prompt takes precedence."""
    # A logit callback would not do: beam search has none.
    logits, cache = super()._compute_logits_from_slice(decoding_state, *args, **kwargs)
    if self._forced_first_id is None:
      return logits, cache
    is_start = (decoding_state.cur_token == 0) & (
      jnp.reshape(decoding_state.cur_index, (-1, 1)) == 0
    )
    forbidden = jnp.arange(logits.shape[-1]) != self._forced_first_id
    return jnp.where(is_start & forbidden, decoding.NEG_INF, logits), cache

  def _token_losses(self, params, batch, weights, dropout_rng):
    """Returns the weighted total and the losses per token."""
    module = self.module
    source, target = (
      network.Rows(
        batch[f'{side}_input_tokens'],
        batch.get(f'{side}_segment_ids'),
        batch.get(f'{side}_positions'),
      )
      for side in ('encoder', 'decoder')
    )
    hidden = module.apply(
      {'params': params},
      source,
      target,
      enable_dropout=dropout_rng is not None,
      rngs=None if dropout_rng is None else {'dropout': dropout_rng},
      method=module.hidden,
    )
    table, bias = module.apply({'params': params}, method=module.output_weights)
    settings = loss_lib.LossSettings(
      vocab_size=module.config.vocab_size,
      label_smoothing=self._label_smoothing,
      z_loss=self._z_loss,
      chunk_length=self._loss_chunk_length,
      # A multiple of the devices along the batch axis on any mesh.
      groups=math.gcd(hidden.shape[0], jax.device_count()),
    )
    return loss_lib.chunked_loss(
      settings, hidden, table, bias, batch['decoder_target_tokens'], weights
    )

  def _special_ids(self):
    vocabulary = self.output_vocabulary
    # A BartVocabulary without its file raises.
    if getattr(vocabulary, 'available', True) and hasattr(vocabulary, 'special_ids'):
      return vocabulary.special_ids
    return PAD_ID, BOS_ID, EOS_ID, UNK_ID


def _check_settings(loss_chunk_length, forced_first_id, vocab_size):
  if loss_chunk_length is not None and loss_chunk_length < 1:
    raise ValueError(
      'BartModel.loss_chunk_length must be a positive integer or None. '
      f'Got: {loss_chunk_length!r}'
    )
  if forced_first_id is not None and not 0 < forced_first_id < vocab_size:
    raise ValueError(
      f'BartModel.forced_first_id must be above 0 and below {vocab_size}, or None. '
      f'Got: {forced_first_id!r}'
    )


def _check_vocabulary(side, vocabulary, vocab_size):
  if not getattr(vocabulary, 'available', True):
    return
  if vocabulary.vocab_size != vocab_size:
    raise ValueError(
      f'The {side} vocabulary has {vocabulary.vocab_size} ids, and '
      f'BartConfig.vocab_size is {vocab_size}. Set '
      f'network.BartConfig.vocab_size = {vocabulary.vocab_size}, or prepare the '
      f'corpus again with --vocab_size={vocab_size}.'
    )


# ---- metrics -------------------------------------------------------------------


def _share(
  values: Num[Array, 'b l'] | Bool[Array, 'b l'], weights: Float[Array, 'b l']
) -> clu.metrics.Average:
  """Returns the metric Σ weight · value / Σ weight."""
  return clu.metrics.Average(total=jnp.sum(values * weights), count=jnp.sum(weights))


def token_metrics(
  tokens: loss_lib.TokenLosses, weights: Float[Array, 'b l']
) -> Metrics:
  """Returns loss, cross-entropy, z-loss and accuracy per weighted target."""
  return {
    'loss': _share(tokens.cross_entropy + tokens.z_loss, weights),
    'cross_ent_loss': _share(tokens.cross_entropy, weights),
    'z_loss': _share(tokens.z_loss, weights),
    'accuracy': _share(tokens.correct, weights),
  }


def noise_metrics(
  tokens: loss_lib.TokenLosses,
  noised: Int[Array, 'b l'],
  weights: Float[Array, 'b l'],
) -> Metrics:
  """Returns accuracy by kind of target (codes of `noise`, 0 for padding).

  `copy_baseline_accuracy` is that of copying alone: the share of copied targets.
  """
  kinds = {'copied': noise.COPIED, 'infilled': noise.INFILLED, 'end': noise.END}
  accuracies = {
    f'{name}_accuracy': _share(tokens.correct, weights * (noised == code))
    for name, code in kinds.items()
  }
  return {
    **accuracies,
    'copy_baseline_accuracy': _share(noised == noise.COPIED, weights),
  }


def compatible_metrics(
  tokens: loss_lib.TokenLosses,
  targets: Int[Array, 'b l'],
  weights: Float[Array, 'b l'],
  special_ids: tuple[int, ...],
) -> Metrics:
  """Returns loss and accuracy as Hugging Face's Flax script for BART defines them.

  Without special tokens (so without the end), smoothing and z-loss; for comparison with
  published numbers.
  """
  special = jnp.isin(targets, jnp.asarray(special_ids, targets.dtype))
  kept = weights * ~special
  return {
    'hf_compat_loss': _share(tokens.negative_log_likelihood, kept),
    'hf_compat_accuracy': _share(tokens.correct, kept),
  }


def _rates(batch: Batch, weights: Float[Array, 'b l']) -> Metrics:
  """Returns T5X's metrics of time, padding and packing."""
  targets = batch['decoder_target_tokens']
  segments = {
    # Without packing each row is one segment.
    side: batch.get(f'{side}_segment_ids', (batch[tokens] != 0).astype(jnp.int32))
    for side, tokens in (
      ('encoder', 'encoder_input_tokens'),
      ('decoder', 'decoder_target_tokens'),
    )
  }
  found = models.compute_base_metrics(
    logits=jnp.zeros((*targets.shape, 1)),
    targets=targets,
    mask=weights,
    loss=jnp.zeros(()),
    segment_ids=segments,
  )
  del found['non_padding_fraction/overall']
  return {name: metric for name, metric in found.items() if '/' in name}
