"""Which vocabularies a task uses, and whether the model has the same ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from t5x import data

if TYPE_CHECKING:
  import seqio


def get_vocabulary(
  cfg: data.DatasetConfig,
) -> tuple[seqio.Vocabulary, seqio.Vocabulary]:
  """The vocabularies of a task's inputs and targets.

  Args:
    cfg: names the task or mixture.

  Returns:
    (inputs' vocabulary, targets' vocabulary). A task without both features has
    one vocabulary, given twice; pass-through vocabularies count only where
    there is no other.

  Raises:
    ValueError: the task has no feature, or lacks inputs or targets while its
      features disagree about the vocabulary.
  """
  import seqio

  provider = data.find_provider(cfg)
  features = provider.output_features
  if 'inputs' in features and 'targets' in features:
    return features['inputs'].vocabulary, features['targets'].vocabulary
  by_feature = {name: feature.vocabulary for name, feature in features.items()}
  real = [
    vocabulary
    for vocabulary in by_feature.values()
    if not isinstance(vocabulary, seqio.PassThroughVocabulary)
  ]
  candidates = real or list(by_feature.values())
  if not candidates:
    raise ValueError(f"'{provider.name}' has no output feature, so no vocabulary.")
  if any(other != candidates[0] for other in candidates[1:]):
    raise ValueError(
      f"'{provider.name}' lacks 'inputs' or 'targets', and its features "
      f'{sorted(by_feature)} have different vocabularies: which one the model should '
      'use cannot be told.'
    )
  return candidates[0], candidates[0]


def verify_matching_vocabs(cfg: data.DatasetConfig, model: Any):
  """Checks that the model was given the task's vocabularies.

  Args:
    cfg: names the task.
    model: has `input_vocabulary` and `output_vocabulary`.

  Raises:
    ValueError: they differ.
  """
  task_side = get_vocabulary(cfg)
  model_side = (model.input_vocabulary, model.output_vocabulary)
  for role, in_task, in_model in zip(('input', 'output'), task_side, model_side):
    if in_task != in_model:
      raise ValueError(
        f"The {role} vocabulary of task '{cfg.task_name}' is {in_task}, "
        f'the model has {in_model}. Give the model the vocabulary that the task '
        'uses.'
      )


def round_vocab_size_to_multiple(
  vocabulary: seqio.Vocabulary, divisor: int = 128
) -> int:
  """The vocabulary's size rounded up, since accelerators like round shapes.

  Args:
    vocabulary: has `vocab_size`.
    divisor: of which the result is a multiple.

  Returns:
    The smallest multiple of `divisor` that holds the vocabulary.
  """
  return -(-vocabulary.vocab_size // divisor) * divisor
