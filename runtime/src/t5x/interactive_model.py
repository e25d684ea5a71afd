"""A model in a notebook: train, predict, score and evaluate on examples by hand."""

import abc
import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import tensorflow as tf
from jaxtyping import PyTree

from t5x import (
  inference,
  interactive_metrics,
  interactive_state,
  multihost,
)
from t5x.interactive_data import (
  BatchesType,
  Example,
  Preprocessors,
  T5XScriptType,
  as_batches,
  get_batches_from_seqio,
  get_dataset_from_natural_text_examples,
  get_equal_length_batches,
  get_gin_config_from_interactive_model,
  get_seqio_task_from_examples,
)
from t5x.interactive_metrics import MetricFn
from t5x.interactive_state import DEFAULT_PREPROCESSORS

__all__ = [
  'BatchesType',
  'InferenceType',
  'InteractiveModel',
  'T5XScriptType',
  'get_batches_from_seqio',
  'get_dataset_from_natural_text_examples',
  'get_gin_config_from_interactive_model',
  'get_seqio_task_from_examples',
]

# (task features of the example, its text or score), and values by name.
Inferences = tuple[list[tuple[Mapping[str, Any], Any]], Mapping[str, Any]]


class InferenceType(enum.Enum):
  """What to ask a model for."""

  PREDICT_WITH_AUX = 1
  SCORE = 2


class InteractiveModel(interactive_state.TrainableModel, abc.ABC):
  """Trains, predicts, scores and evaluates on examples given by hand."""

  @functools.cached_property
  def _infer_fns(self) -> dict[Any, inference.InferFnCallable]:
    """Compiled inference steps by what was asked for."""
    return {}

  def _infer_fn(
    self, mode: InferenceType, options: Mapping[str, Any]
  ) -> inference.InferFnCallable:
    """A compiled inference step; kept for calls that ask for the same again."""
    steps = {
      InferenceType.PREDICT_WITH_AUX: self._model.predict_batch_with_aux,
      InferenceType.SCORE: self._model.score_batch,
    }
    if mode not in steps:
      raise ValueError(f'mode must be one of {list(steps)}. Got: {mode!r}.')
    key = (mode, *sorted(options.items()))
    try:
      if key in self._infer_fns:
        return self._infer_fns[key]
    except TypeError:  # An option that cannot be a key, such as an array.
      key = None
    infer_fn = inference.get_infer_fn(
      infer_step=functools.partial(steps[mode], **options),
      batch_size=self._batch_size,
      train_state_axes=self._train_state_axes,
      partitioner=self._partitioner,
    )
    if key is not None:
      self._infer_fns[key] = infer_fn
    return infer_fn

  def infer_with_preprocessors(
    self,
    mode: InferenceType,
    examples: Sequence[Example],
    preprocessors: Preprocessors,
    **inference_kwargs,
  ) -> Inferences:
    """Predicts or scores the targets of examples.

    Args:
      mode: which of the two.
      examples: texts, or mappings with `input` and `target`.
      preprocessors: functions from dataset to dataset.
      **inference_kwargs: more arguments for the model's
        `predict_batch_with_aux` or `score_batch`, say `num_decodes`.

    Returns:
      A list with, for every example, its task features and its text (bytes, in
      UTF-8; a list of them if all decodes are returned) or score; and auxiliary
      values by name, each a list over the examples.

    Raises:
      ValueError: the preprocessors leave no example.
    """
    infer_fn = self._infer_fn(mode, inference_kwargs)
    task_features, model_features = self._datasets(examples, preprocessors)
    rows = list(task_features.as_numpy_iterator())
    if not rows:
      raise ValueError(
        f'Nothing to infer: of {len(examples)} examples the preprocessors leave none.'
      )
    # One batch of all examples, so that all rows are padded to one length.
    whole = next(model_features.padded_batch(len(rows)).as_numpy_iterator())
    result = infer_fn(
      tf.data.Dataset.from_tensor_slices(whole).enumerate(),
      train_state=self.train_state,
      rng=jax.random.PRNGKey(0),
    )
    outputs, aux = result if isinstance(result, tuple) else (result, {})
    values = [value for _, value in outputs]
    if mode is InferenceType.PREDICT_WITH_AUX:
      values = [self._text_of(ids) for ids in values]
    return list(zip(rows, values, strict=True)), aux

  def _text_of(self, ids: Sequence[Any]) -> Any:
    """The text of token ids in UTF-8; nested lists stay nested."""
    if ids and isinstance(ids[0], list):
      return [self._text_of(one) for one in ids]
    return self._model.output_vocabulary.decode(ids).encode('utf-8')

  def predict_with_aux(self, examples: Sequence[Example]) -> Inferences:
    """Predicts targets; see `infer_with_preprocessors`."""
    return self.infer_with_preprocessors(
      InferenceType.PREDICT_WITH_AUX, examples, DEFAULT_PREPROCESSORS
    )

  def score(self, examples: Sequence[Example]) -> Sequence[tuple[Any, Any]]:
    """Scores targets; pairs of task features and score."""
    scores, _ = self.infer_with_preprocessors(
      InferenceType.SCORE, examples, DEFAULT_PREPROCESSORS
    )
    return scores

  # ---- evaluation ----

  def evaluate(
    self, examples: Sequence[Example], metric_fns: Sequence[MetricFn]
  ) -> Mapping[str, Any]:
    """Computes metrics; see `evaluate_with_preprocessors`."""
    return self.evaluate_with_preprocessors(examples, DEFAULT_PREPROCESSORS, metric_fns)

  def evaluate_with_preprocessors(
    self,
    examples: Sequence[Example],
    preprocessors: Preprocessors,
    metric_fns: Sequence[MetricFn],
    postprocessor: Callable[..., Any] | None = None,
  ) -> Mapping[str, Any]:
    """Computes metrics of predictions or scores.

    Args:
      examples: mappings with `input` and `target`.
      preprocessors: functions from dataset to dataset.
      metric_fns: functions of (targets, predictions), of (targets, predictions,
        aux_values) or of (targets, scores), under these names.
      postprocessor: makes of a text what metrics compare, of targets and
        predictions alike; called with the text, `example` and `is_target`.

    Returns:
      The metrics by name; nothing on processes other than the first.

    Raises:
      ValueError: if a function takes something else, or a name comes twice.
    """
    wanted = set().union(*map(interactive_metrics.arguments_of, metric_fns))

    def comparable(text, example, is_target):
      text = text.decode('utf-8') if isinstance(text, bytes) else text
      if postprocessor is None:
        return text
      return postprocessor(text, example=example, is_target=is_target)

    task_features, _ = self._datasets(examples, preprocessors)
    known = {
      'targets': [
        comparable(example['targets_pretokenized'], example, True)
        for example in task_features.as_numpy_iterator()
      ]
    }
    infer = functools.partial(
      self.infer_with_preprocessors, examples=examples, preprocessors=preprocessors
    )
    if 'scores' in wanted:
      scored, _ = infer(InferenceType.SCORE)
      known['scores'] = [score for _, score in scored]
    if 'predictions' in wanted:
      predicted, known['aux_values'] = infer(InferenceType.PREDICT_WITH_AUX)
      known['predictions'] = [
        comparable(text, example, False) for example, text in predicted
      ]
    metrics = {}
    if multihost.is_host_0():
      metrics = interactive_metrics.compute(metric_fns, known)
    multihost.sync('interactive_evaluation')
    return metrics

  def train_loop(
    self,
    num_steps: int,
    eval_period: int | None = 1,
    train_batches: BatchesType | None = None,
    predict_batches: BatchesType | None = None,
    score_batches: BatchesType | None = None,
    eval_batches: BatchesType | None = None,
    metrics_fns: Sequence[MetricFn] | None = None,
  ) -> tuple[PyTree, PyTree, PyTree]:
    """Trains, and predicts, scores and evaluates in between.

    Args:
      num_steps: how many steps.
      eval_period: after every how many steps to do the rest, the first of them
        included; 0 or None never does.
      train_batches: one batch or several, repeated as needed; None trains
        nothing.
      predict_batches: what to predict.
      score_batches: what to score.
      eval_batches: what to evaluate.
      metrics_fns: with which metrics.

    Returns:
      Predictions, scores and metrics of the last batch of each kind, at the
      last of the steps that looked at them; None where there is none.
    """
    predictions = scores = metrics = None
    for step, batch in enumerate(get_equal_length_batches(train_batches, num_steps)):
      if batch is not None:
        self.train_step(batch)
      if not eval_period or step % eval_period:
        continue
      for examples in as_batches(predict_batches):
        predictions, _ = self.predict_with_aux(examples)
      for examples in as_batches(score_batches):
        scores = self.score(examples)
      for examples in as_batches(eval_batches):
        metrics = self.evaluate(examples, metrics_fns or ())
    return predictions, scores, metrics
