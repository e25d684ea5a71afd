"""What all models share. Reached as names of `models`."""

import abc
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
from flax import core as flax_core
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Num, PyTree

from t5x import decoding, losses
from t5x.metrics import MetricsMap, compute_base_metrics

if TYPE_CHECKING:
  import seqio

  from t5x import optimizers

Batch = Mapping[str, jax.Array]
LossNormalizingFactor = float | int | str | losses.SpecialLossNormalizingFactor


class TokensIdsToLogitsCallable(Protocol):
  """How a decoding function asks the model for the next token."""

  def __call__(
    self, decoding_state: decoding.DecodingState
  ) -> tuple[jax.Array, Mapping[str, Any]]:
    """Returns logits [rows, vocabulary] and the new cache."""
    ...


class DecodeFnCallable(Protocol):
  """How a model calls a decoding function."""

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
      tokens_to_logits: the model, one token a call.
      eos_id: end token of the target vocabulary.
      num_decodes: how many sequences an example gets.
      decode_rng: key for decoding functions that draw.
      cache_offset: axes before the batch axis of the cache.
      **kwargs: what the caller gave as `decoder_params`.

    Returns:
      Sequences [batch, num_decodes, length] and log probabilities
      [batch, num_decodes], sorted so that the best is the last.
    """
    ...


class SeqioConverter:
  """A class attribute that names a feature converter of seqio.

  seqio brings TensorFlow; it is imported when the attribute is first read, not
  with this module. Assigning to the attribute, on an instance or in a subclass,
  replaces it as usual.
  """

  def __init__(self, name: str):
    self._name = name

  def __get__(self, instance: Any, owner: type) -> type['seqio.FeatureConverter']:
    import seqio

    return getattr(seqio, self._name)


class BaseModel(abc.ABC):
  """What training, evaluation and inference need of any model.

  Further parameters of these methods in a subclass need defaults.

  Attributes:
    FEATURE_CONVERTER_CLS: makes model features of task features.
    PROGRESS_METRICS: which of the model's metrics the progress bar, evaluations and the
      line of the last step show beside loss and accuracy: {name there: metric}.
    optimizer_def: definition of the optimizer.
  """

  FEATURE_CONVERTER_CLS: Callable[..., 'seqio.FeatureConverter']
  PROGRESS_METRICS: Mapping[str, str] = {}

  def __init__(self, optimizer_def: 'optimizers.OptimizerDefType'):
    self.optimizer_def = optimizer_def

  @abc.abstractmethod
  def loss_fn(
    self, params: PyTree, batch: Batch, dropout_rng: jax.Array | None
  ) -> tuple[Float[Array, ''], MetricsMap]:
    """The loss that is differentiated, and metrics of the batch.

    Args:
      params: the parameters.
      batch: model features.
      dropout_rng: key for dropout; None switches it off.
    """

  def eval_fn(
    self, params: PyTree, batch: Batch
  ) -> tuple[Float[Array, ''], MetricsMap]:
    """Loss and metrics without dropout."""
    return self.loss_fn(params=params, batch=batch, dropout_rng=None)

  def predict_batch(
    self, params: PyTree, batch: Batch, rng: jax.Array | None = None
  ) -> jax.Array:
    """Predictions alone; see `predict_batch_with_aux`."""
    predictions, _ = self.predict_batch_with_aux(params=params, batch=batch, rng=rng)
    return predictions

  @abc.abstractmethod
  def predict_batch_with_aux(
    self, params: PyTree, batch: Batch, rng: jax.Array | None = None
  ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Predictions for a batch, and by name what else there is to know of them."""

  @abc.abstractmethod
  def score_batch(
    self, params: PyTree, batch: Batch, return_intermediates: bool = False
  ) -> Any:
    """One score an example of the batch, and intermediates if asked for."""

  @abc.abstractmethod
  def get_initial_variables(
    self,
    rng: jax.Array,
    input_shapes: Mapping[str, tuple[int, ...]],
    input_types: Mapping[str, Any] | None = None,
  ) -> Mapping[str, Any]:
    """Initialises all variables of the module for inputs of these shapes."""


class BaseTransformerModel(BaseModel):
  """A module that turns a batch into logits over an output vocabulary.

  Subclasses define `_compute_logits` and what `BaseModel` leaves open.
  """

  def __init__(
    self,
    module: nn.Module,
    input_vocabulary: 'seqio.Vocabulary',
    output_vocabulary: 'seqio.Vocabulary',
    optimizer_def: 'optimizers.OptimizerDefType',
    decode_fn: DecodeFnCallable | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: LossNormalizingFactor | None = None,
  ):
    """Keeps its arguments.

    Args:
      module: the Flax module.
      input_vocabulary: vocabulary of the inputs.
      output_vocabulary: vocabulary of the targets.
      optimizer_def: definition of the optimizer.
      decode_fn: decoding function.
      label_smoothing: probability taken from the target and spread over the
        other tokens.
      z_loss: weight of the squared log partition function in the loss.
      loss_normalizing_factor: what the summed loss is divided by, a number or
        one of `losses.SpecialLossNormalizingFactor`; nothing by default.
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
    """Vocabulary of the inputs."""
    return self._input_vocabulary

  @property
  def output_vocabulary(self) -> 'seqio.Vocabulary':
    """Vocabulary of the targets."""
    return self._output_vocabulary

  @property
  def decode_fn(self) -> DecodeFnCallable | None:
    """The decoding function."""
    return self._decode_fn

  @abc.abstractmethod
  def _compute_logits(
    self, params: PyTree, batch: Batch, dropout_rng: jax.Array | None = None
  ) -> Float[Array, 'batch length vocabulary']:
    """Logits of the decoder targets."""

  def loss_fn(
    self, params: PyTree, batch: Batch, dropout_rng: jax.Array | None
  ) -> tuple[Float[Array, ''], MetricsMap]:
    """Cross entropy of the decoder targets, with label smoothing and z-loss."""
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
    metrics = self._compute_metrics(
      logits=logits,
      targets=targets,
      mask=weights,
      loss=loss,
      z_loss=z_loss,
      segment_ids=_segments_of(batch),
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
    """Metrics of a training or evaluation step."""
    return compute_base_metrics(
      logits=logits,
      targets=targets,
      mask=mask,
      loss=loss,
      z_loss=z_loss,
      segment_ids=segment_ids,
    )


def _segments_of(batch: Batch) -> dict[str, jax.Array]:
  """Which example each position belongs to, by feature; 0 is padding."""
  suffix = '_segment_ids'
  packed = {
    name.removesuffix(suffix): ids
    for name, ids in batch.items()
    if name.endswith(suffix)
  }
  # Without packing a row is one example.
  rows = ('encoder_input_tokens', 'decoder_target_tokens')
  return packed or {name: batch[name] != 0 for name in rows if name in batch}


def cache_offset(module: Any) -> int:
  """Axes before the batch axis of a module's cache: 1 if layers are scanned."""
  return 1 if getattr(module, 'scan_layers', False) else 0


def decode_options(
  model: BaseTransformerModel,
  rng: jax.Array | None,
  decoder_params: Mapping[str, Any] | None,
) -> dict[str, Any]:
  """Arguments for the decoding function, with their defaults; a new dict.

  Raises:
    ValueError: if both `rng` and `decoder_params` bring a key.
  """
  options = dict(decoder_params or {})
  if rng is not None:
    if options.get('decode_rng') is not None:
      raise ValueError(
        "Give the key either as `rng` or as `decoder_params['decode_rng']`. Got"
        f' both: {rng} / {options["decode_rng"]}.'
      )
    options['decode_rng'] = rng
  if 'eos_id' not in options:
    options['eos_id'] = model.output_vocabulary.eos_id or 1
  return options


def select_decodes(
  decodes: Int[Array, 'batch decodes length'],
  scores: Float[Array, 'batch decodes'],
  return_all_decodes: bool,
) -> tuple[Int[Array, '...'], dict[str, Float[Array, '...']]]:
  """All sequences and scores, or those of the best, which is the last."""
  if return_all_decodes:
    return decodes, {'scores': scores}
  return decodes[:, -1], {'scores': scores[:, -1]}


def score_targets(
  model: BaseTransformerModel,
  params: PyTree,
  batch: Batch,
  return_intermediates: bool,
) -> Any:
  """See `score_batch` of the models."""
  targets = batch['decoder_target_tokens'].astype(jnp.int32)
  weights = batch['decoder_loss_weights']
  changed = {}
  if return_intermediates:
    logits, changed = model._compute_logits(
      params=params, batch=batch, mutable=['intermediates']
    )
  else:
    logits = model._compute_logits(params=params, batch=batch)
  logits = jnp.asarray(logits, jnp.float32)
  # By index: a one-hot matrix would be as large as the logits.
  target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  token_scores = (target_logits - jax.nn.logsumexp(logits, axis=-1)) * weights
  scores = token_scores.sum(axis=-1)
  if not return_intermediates:
    return scores
  intermediates = dict(flax_core.unfreeze(changed.get('intermediates', {})))
  # Values are tuples, as those that `nn.Module.sow` collects.
  intermediates['decoder'] = {
    **intermediates.get('decoder', {}),
    'target_tokens': (targets,),
    'loss_weights': (weights,),
    'token_scores': (token_scores,),
  }
  return scores, intermediates


def get_input_vocabulary(model: BaseTransformerModel) -> 'seqio.Vocabulary':
  """Vocabulary of a model's inputs; for gin, which binds functions."""
  return model.input_vocabulary


def get_output_vocabulary(model: BaseTransformerModel) -> 'seqio.Vocabulary':
  """Vocabulary of a model's targets; for gin, which binds functions."""
  return model.output_vocabulary
