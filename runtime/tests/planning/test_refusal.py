"""What a reader is told of a step that does not fit."""

import math

import pytest

from t5x.planning import refusal, step_costs, topologies
from t5x.planning.live_arrays import LargeArray

GIB = topologies.GIB

SCORES = LargeArray(
  (256, 12, 1024, 1024),
  'float32',
  6,
  'jvp(Net.hidden)/Net.decode/decoder/layers_0/layers_0.attend/self_attention/'
  'bqhd,bkhd->bhqk/dot_general',
  1.5 * GIB,
)
QUERIES = LargeArray(
  (256, 1024, 12, 64), 'bfloat16', 6, 'decoder/self_attention/mul', 0.05 * GIB
)
HIDDEN = LargeArray((256, 1024, 3072), 'bfloat16', 12, 'mlp/wi/dot', 0.25 * GIB)
LOGITS = LargeArray((256, 1024, 50304), 'float32', 1, '...d,vd->...v/dot', 6 * GIB)
STATE = LargeArray((768, 768), 'float32', 200, '', 0.01 * GIB)


def told(*held, kind='train', needed=40 * GIB):
  error = step_costs.DoesNotFitError(needed, 15 * GIB, held)
  return refusal.text(error, kind)


def test_how_much_what_and_what_to_change():
  text = told(SCORES, HIDDEN, STATE, QUERIES)
  assert '25.00 GiB too much' in text
  # 9 + 3 + 2 + 0.3
  assert 'holds 14.30 GiB at the fullest moment' in text
  assert (
    '9.00 GiB  6 x float32[256,12,1024,1024], the first in '
    'decoder/layers_0/self_attention/bqhd,bkhd->bhqk/dot_general\n'
  ) in text
  assert '2.00 GiB  parameters, optimizer state and the batch' in text
  assert '- attention scores (9.00 GiB): ' in text
  assert '- what the backward pass needs (12.30 GiB): ' in text
  assert '- parameters and optimizer state (2.00 GiB): ' in text
  for word in ('attention_impl', 'remat_policy', 'num_microbatches', '--find_batch'):
    assert word in text
  assert 'logits' not in text


def test_logits():
  text = told(LOGITS, HIDDEN)
  assert '- logits (6.00 GiB): ' in text and 'loss_chunk_length' in text
  assert '- what the backward pass needs (3.00 GiB): ' in text
  assert 'attention scores' not in text


@pytest.mark.parametrize('kind', ['eval', 'decode'])
def test_without_a_backward_pass_recomputation_is_no_remedy(kind):
  text = told(SCORES, HIDDEN, STATE, kind=kind)
  assert 'remat_policy' not in text and 'attention_impl' in text


def test_small_arrays_share_a_line_and_are_not_worth_a_change():
  small = [LargeArray((n,), 'int8', 1, 'mlp/wi', 0.01 * GIB) for n in range(10, 30)]
  text = told(LOGITS, LOGITS, LOGITS, *small)
  assert text.count('the first in') == 8
  # Twenty of them, five with a line of their own.
  assert '0.15 GiB  smaller ones' in text
  assert 'what the backward pass needs' not in text


def test_a_compiler_that_does_not_say_how_much():
  text = told(HIDDEN, needed=math.inf)
  assert text.startswith('A device has 15.00 GiB, which is not enough.')
  assert 'inf' not in text


def test_nothing_known():
  assert told().count('  - ') == len(refusal._REMEDIES)
