"""BART as T5X trains it: the loss without full logits, and honest metrics."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import clu.metrics
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Num, PyTree

from bart_t5x import features
from bart_t5x import loss as loss_lib
from t5x import decoding, losses, metrics, models

if TYPE_CHECKING:
  import seqio

Batch = Mapping[str, jax.Array]
Metrics = dict[str, clu.metrics.Metric]

# How `decoder_targets_noised` codes what became of a target in the input.
COPIED, INFILLED, END = 1, 2, 3

# Padding, <s>, </s>, <unk>: the same inside ids in every vocabulary.
ALWAYS_SPECIAL = (0, 1, 2, 3)


class BartModel(models.EncoderDecoderModel):
  """A `network.Transformer` with its vocabularies, loss, metrics and decoding."""

  FEATURE_CONVERTER_CLS = features.BartFeatureConverter
  # What the runtime's progress bar, its evaluations and its last line show behind loss
  # and accuracy of all targets.
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
    input_vocabulary: 'seqio.Vocabulary',
    output_vocabulary: 'seqio.Vocabulary',
    optimizer_def: Any,
    decode_fn: Callable[..., Any] = decoding.beam_search,
    feature_converter_cls: Callable[..., 'seqio.FeatureConverter'] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: Any = None,
    default_decoder_params: models.DecoderParams | None = None,
    loss_chunk_length: int | None = 64,
    forced_first_id: int | None = None,
  ):
    """As `EncoderDecoderModel`, with two arguments more.

    Args:
      module: a `network.Transformer`.
      input_vocabulary: vocabulary of the inputs.
      output_vocabulary: vocabulary of the targets.
      optimizer_def: definition of the optimizer.
      decode_fn: decoding function.
      feature_converter_cls: in place of `BartFeatureConverter`.
      label_smoothing: probability spread evenly over the other ids.
      z_loss: weight of log(Z)^2.
      loss_normalizing_factor: what the summed loss is divided by, see
        `t5x.losses`; reported losses do not depend on it.
      default_decoder_params: defaults of `predict_batch_with_aux`.
      loss_chunk_length: target positions of every row whose logits exist at a
        time, None for all. Rows x this x vocabulary x 4 bytes is what they take:
        accelerators want some 100 MB, CPUs what fits into the cache.
      forced_first_id: the token with which every decoded sequence begins, for
        models that were made so (Hugging Face's `forced_bos_token_id`); None
        leaves it to the model.

    Raises:
      ValueError: for a vocabulary whose size is not the module's, a chunk length
        below 1, and a forced id that the vocabulary does not have.
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
    """The loss that is differentiated, and metrics of the batch.

    Args:
      params: the parameters.
      batch: model features; `decoder_targets_noised` may be among them.
      dropout_rng: key for dropout; None switches it off.

    Returns:
      Σ weight · loss / `loss_normalizing_factor`, and metrics, all Σ / Σ.
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
      **packing_metrics(batch, counted),
      **timing_metrics(targets.shape),
    }
    if features.DECODER_NOISED in batch:
      found |= noise_metrics(tokens, batch[features.DECODER_NOISED], counted)
    return total, found

  def score_batch(
    self, params: PyTree, batch: Batch, return_intermediates: bool = False
  ) -> Any:
    """Log probability of each row's targets, [batch]; without full logits.

    With return_intermediates it is the base class's, which holds the logits.
    """
    if return_intermediates:
      return super().score_batch(params, batch, return_intermediates)
    weights = batch['decoder_loss_weights']
    _, tokens = self._token_losses(params, batch, weights, None)
    return -jnp.sum(tokens.negative_log_likelihood * weights, axis=-1)

  def _compute_logits_from_slice(
    self, decoding_state: decoding.DecodingState, *args: Any, **kwargs: Any
  ) -> tuple[Float[Array, 'rows vocabulary'], Mapping[str, Any]]:
    """As the base class's; the first token may be forced.

    Here and not in a logit callback, which only sampling has: every decoding
    function asks for its logits here. A prompt overrules what is forced.
    """
    logits, cache = super()._compute_logits_from_slice(decoding_state, *args, **kwargs)
    if self._forced_first_id is None:
      return logits, cache
    is_start = (decoding_state.cur_token == 0) & (
      jnp.reshape(decoding_state.cur_index, (-1, 1)) == 0
    )
    forbidden = jnp.arange(logits.shape[-1]) != self._forced_first_id
    return jnp.where(is_start & forbidden, decoding.NEG_INF, logits), cache

  def _token_losses(self, params, batch, weights, dropout_rng):
    """Weighted total and per-token losses, by `loss.chunked_loss`."""
    module = self.module
    optional = {
        name: batch.get(name)
        for name in (
            'encoder_segment_ids', 'decoder_segment_ids',
            'encoder_positions', 'decoder_positions',
        )
    }  # fmt: skip
    hidden = module.apply(
      {'params': params},
      batch['encoder_input_tokens'],
      batch['decoder_input_tokens'],
      enable_dropout=dropout_rng is not None,
      rngs=None if dropout_rng is None else {'dropout': dropout_rng},
      method=module.hidden,
      **optional,
    )
    table, bias = module.apply({'params': params}, method=module.output_weights)
    settings = loss_lib.LossSettings(
      vocab_size=module.config.vocab_size,
      label_smoothing=self._label_smoothing,
      z_loss=self._z_loss,
      chunk_length=self._loss_chunk_length,
      # A multiple of the devices along the batch, whatever the mesh: the batch
      # divides over them.
      groups=math.gcd(hidden.shape[0], jax.device_count()),
    )
    return loss_lib.chunked_loss(
      settings, hidden, table, bias, batch['decoder_target_tokens'], weights
    )

  def _special_ids(self) -> tuple[int, ...]:
    """Ids that carry no text; without a vocabulary's word, those BART always has."""
    vocabulary = self.output_vocabulary
    # Asked first: where there is no file yet, the ids themselves raise.
    if getattr(vocabulary, 'available', True) and hasattr(vocabulary, 'special_ids'):
      return vocabulary.special_ids
    return ALWAYS_SPECIAL


def _check_settings(loss_chunk_length, forced_first_id, vocab_size):
  if loss_chunk_length is not None and loss_chunk_length < 1:
    raise ValueError(
      'BartModel.loss_chunk_length must be a positive integer or None. '
      f'Got: {loss_chunk_length!r}'
    )
  if forced_first_id is not None and not 0 < forced_first_id < vocab_size:
    raise ValueError(
      f'BartModel.forced_first_id must be an id above 0 and below {vocab_size}, or '
      f'None. Got: {forced_first_id!r}'
    )


def _check_vocabulary(side, vocabulary, vocab_size):
  """A model for another vocabulary would train, on nonsense."""
  if not getattr(vocabulary, 'available', True):
    return
  if vocabulary.vocab_size != vocab_size:
    raise ValueError(
      f'The {side} vocabulary has {vocabulary.vocab_size} ids, and '
      f'BartConfig.vocab_size is {vocab_size}. Set '
      f'network.BartConfig.vocab_size = {vocabulary.vocab_size}, or prepare the '
      f'corpus again with --vocab_size={vocab_size}.'
    )


# ---- metrics: functions of per-token losses ----------------------------------


def _share(
  values: Num[Array, 'b l'] | Bool[Array, 'b l'], weights: Float[Array, 'b l']
) -> clu.metrics.Average:
  """Σ weight · value / Σ weight, over all that is merged."""
  return clu.metrics.Average(total=jnp.sum(values * weights), count=jnp.sum(weights))


def token_metrics(
  tokens: loss_lib.TokenLosses, weights: Float[Array, 'b l']
) -> Metrics:
  """Loss, with the z-loss in it and without, and accuracy, by weighted target."""
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
  """Accuracy by what the model had to do, and what copying alone would reach.

  Args:
    tokens: losses of each target.
    noised: 1 where the target stands in the input, 2 where it was masked away, 3
      at the end token, 0 on padding.
    weights: weight of each target.

  Returns:
    The accuracies; `copy_baseline_accuracy` is the copied targets' share.
  """
  kinds = {'copied': COPIED, 'infilled': INFILLED, 'end': END}
  accuracies = {
    f'{name}_accuracy': _share(tokens.correct, weights * (noised == code))
    for name, code in kinds.items()
  }
  return {**accuracies, 'copy_baseline_accuracy': _share(noised == COPIED, weights)}


def compatible_metrics(
  tokens: loss_lib.TokenLosses,
  targets: Int[Array, 'b l'],
  weights: Float[Array, 'b l'],
  special_ids: tuple[int, ...],
) -> Metrics:
  """Loss and accuracy as Hugging Face's Flax script for BART counts them.

  It leaves out special tokens (so the end as well) and knows neither smoothing nor
  z-loss. To compare with numbers of old, not to judge by.
  """
  special = jnp.isin(targets, jnp.asarray(special_ids, targets.dtype))
  kept = weights * ~special
  return {
    'hf_compat_loss': _share(tokens.negative_log_likelihood, kept),
    'hf_compat_accuracy': _share(tokens.correct, kept),
  }


def packing_metrics(batch: Batch, weights: Float[Array, 'b l']) -> Metrics:
  """How full the rows are, and how many examples a step sees."""
  found = {
    'non_padding_fraction/loss_weights': clu.metrics.Average(
      total=jnp.sum(weights), count=jnp.asarray(weights.size)
    )
  }
  for side, tokens in (
    ('encoder', 'encoder_input_tokens'),
    ('decoder', 'decoder_target_tokens'),
  ):
    # Without packing each row is one example, of segment 1.
    ids = batch.get(f'{side}_segment_ids', (batch[tokens] != 0).astype(jnp.int32))
    found[f'non_padding_fraction/{side}'] = clu.metrics.Average(
      total=jnp.sum(ids != 0), count=jnp.asarray(ids.size)
    )
    found[f'effective_batch_size/{side}'] = metrics.AveragePerStep(
      total=models.count_packed_examples(ids)
    )
  return found


def timing_metrics(shape: tuple[int, int]) -> Metrics:
  """Rates under T5X's names; the trainer fills the durations in.

  Args:
    shape: rows and target length of the batch.
  """
  rows, slots = jnp.asarray(shape[0]), jnp.asarray(shape[0] * shape[1])
  per_time = metrics.TimeRate.from_model_output
  devices = jax.device_count()
  return {
    'timing/seconds': metrics.Time(),
    'timing/seqs': metrics.Sum.from_model_output(rows),
    'timing/seqs_per_second': per_time(numerator=rows),
    'timing/seqs_per_second_per_core': per_time(numerator=rows / devices),
    'timing/steps_per_second': metrics.StepsPerTime.from_model_output(),
    'timing/target_tokens_per_second': per_time(numerator=slots),
    'timing/target_tokens_per_second_per_core': per_time(numerator=slots / devices),
  }
