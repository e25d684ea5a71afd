"""Metrics of generated text, under seqio's `metric_fn` interface."""

from collections.abc import Sequence

import sacrebleu


def reconstruction(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
  """How well a denoiser gives whole texts back.

  Args:
    targets: clean texts.
    predictions: generated texts, in the same order.

  Returns:
    `exact_match`, the share of texts given back letter by letter, and `chrf`
    (Popović 2015, as sacrebleu computes it), both from 0 to 100.

  Raises:
    ValueError: there is nothing to compare.
  """
  if not targets:
    raise ValueError('no examples to evaluate: the split is empty')
  same = sum(t == p for t, p in zip(targets, predictions, strict=True))
  return {
    'exact_match': 100.0 * same / len(targets),
    'chrf': sacrebleu.corpus_chrf(list(predictions), [list(targets)]).score,
  }
