"""Metric functions by what they take."""

import functools

import pytest

from t5x import interactive_metrics

KNOWN = {'targets': [1, 2], 'predictions': [1, 3], 'scores': [-1.0], 'aux_values': {}}


def equal(targets, predictions):
  return {'equal': sum(a == b for a, b in zip(targets, predictions, strict=True))}


def best(targets, scores, digits=0):
  return {'best': round(max(scores), digits)}


def test_functions_are_known_by_their_required_parameters():
  assert interactive_metrics.arguments_of(equal) == ('targets', 'predictions')
  assert interactive_metrics.arguments_of(best) == ('targets', 'scores')
  assert interactive_metrics.arguments_of(functools.partial(best, digits=1)) == (
    'targets',
    'scores',
  )
  with pytest.raises(ValueError, match=r"Got: \('predictions', 'targets'\)"):
    interactive_metrics.arguments_of(lambda predictions, targets: {})


def test_metrics_of_all_functions_are_put_together():
  def size(targets, predictions, aux_values):
    return {'size': len(targets) + len(aux_values)}

  found = interactive_metrics.compute([equal, best, size], KNOWN)
  assert found == {'equal': 1, 'best': -1.0, 'size': 2}
  with pytest.raises(ValueError, match=r"same names: \['equal'\]"):
    interactive_metrics.compute([equal, equal], KNOWN)
