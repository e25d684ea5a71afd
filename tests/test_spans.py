"""Text infilling: span lengths, places, and spans by hand."""

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

from bart_t5x import spans

MASK = 4


def seed(*numbers):
  return tf.constant(numbers or (1, 2), tf.int64)


def test_p06_shares_are_rounded_up_exactly():
  for ratio in ('0.07', '0.1', '0.15', '0.3', '0.35', '0.5', '1'):
    counts = np.arange(2000)
    got = spans.ceil_share(float(ratio), tf.constant(counts, tf.int32)).numpy()
    want = [math.ceil(Fraction(ratio) * int(count)) for count in counts]
    np.testing.assert_array_equal(got, want)


def test_p06_too_few_draws_lengthen_the_last_span():
  edges = spans.span_edges(tf.constant([0.5, 0.5]), tf.constant(40), 3.0).numpy()
  assert edges[0] == 0 and edges[-1] == 40 and len(edges) == 3


@pytest.mark.parametrize('mean', [1.0, 3.0, 3.5])
def test_p08_span_lengths_are_poisson(mean):
  # Far from the budget, so that nothing is clipped.
  uniform = spans.uniform_draws(400_000, seed(5, 6))
  edges = spans.span_edges(uniform, tf.constant(2**30), mean).numpy()
  lengths = np.diff(edges)[:-1].astype(np.int64)
  most = int(scipy.stats.poisson.ppf(1 - 1e-4, mean))
  seen = np.bincount(np.minimum(lengths, most), minlength=most + 1)
  expected = scipy.stats.poisson.pmf(np.arange(most + 1), mean)
  expected[most] += 1 - expected.sum()
  result = scipy.stats.chisquare(seen, expected * seen.sum())
  assert result.pvalue > 1e-3
  zero = math.exp(-mean)
  spread = math.sqrt(zero * (1 - zero) / len(lengths))
  assert abs(seen[0] / seen.sum() - zero) < 4 * spread


def test_gaps_are_sorted_and_equally_likely():
  uniform = spans.uniform_draws(210_000, seed(8, 9))
  gaps = spans.span_gaps(uniform, tf.constant(20)).numpy()
  assert (np.diff(gaps) >= 0).all()
  counts = np.bincount(gaps, minlength=21)
  assert len(counts) == 21
  assert scipy.stats.chisquare(counts).pvalue > 1e-3


# refs, begins, ends, replace_length, result
BY_HAND = [
  ([1, 2, 3, 4, 5], [1], [3], 1, [1, -4, 4, 5]),
  # Adjacent spans keep their masks apart; P7.
  ([1, 2, 3, 4, 5], [1, 3], [3, 4], 1, [1, -4, -4, 5]),
  # Insertions at the beginning, in the middle and at the end.
  ([1, 2, 3], [0, 2, 3], [0, 2, 3], 1, [-4, 1, 2, -4, 3, -4]),
  # Two insertions in one gap, and one against a span.
  ([1, 2, 3], [1, 1, 1], [1, 1, 2], 1, [1, -4, -4, -4, 3]),
  ([1, 2, 3, 4, 5], [1, 3, 4], [3, 3, 5], 0, [1, -4, 4]),
  ([1, 2, 3, 4, 5], [1, 3, 4], [3, 3, 5], -1, [1, -4, -4, -4, 4, -4]),
  ([1, 2, 3], [0], [3], 1, [-4]),
  ([1, 2, 3], [0], [3], 0, []),
  ([1, 2, 3], [0], [3], -1, [-4, -4, -4]),
  ([], [0, 0], [0, 0], 1, [-4, -4]),
  ([1, 2], [], [], 1, [1, 2]),
]


@pytest.mark.parametrize(('refs', 'begins', 'ends', 'replace_length', 'want'), BY_HAND)
def test_spans_by_hand(refs, begins, ends, replace_length, want):
  got = spans.replace_spans(
    tf.constant(refs, tf.int32),
    tf.constant(begins, tf.int32),
    tf.constant(ends, tf.int32),
    replace_length,
    MASK,
  )
  assert got.numpy().tolist() == want


# begins, ends, replace_length, merge, result for five elements
OVERLAPPING = [
  # One inside another leaves no mask; touching ones keep two.
  ([1, 2], [4, 3], 1, False, [1, -4, 5]),
  ([2, 1], [5, 3], 1, False, [1, -4]),
  ([1, 3], [3, 4], 1, False, [1, -4, -4, 5]),
  ([1, 3], [3, 4], 1, True, [1, -4, 5]),
  ([0, 1, 4], [2, 3, 5], 1, False, [-4, 4, -4]),
  ([1, 2], [4, 3], 0, False, [1, 5]),
  ([1, 2], [4, 3], -1, False, [1, -4, -4, -4, 5]),
]


@pytest.mark.parametrize(
  ('begins', 'ends', 'replace_length', 'merge', 'want'), OVERLAPPING
)
def test_overlapping_spans_by_hand(begins, ends, replace_length, merge, want):
  got = spans._replace_overlapping(
    tf.range(1, 6), tf.constant(begins), tf.constant(ends), replace_length, merge, MASK
  )
  assert got.numpy().tolist() == want
