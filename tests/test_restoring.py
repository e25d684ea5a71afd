"""Checks of the checkpoint that a run starts from."""

import pytest

from bart_t5x import restoring

NEEDED = {
  'target': {'embed': {'embedding': 0}, 'head': {'bias': 0}},
  'state': {'step': 0, 'param_states': {'0': 1}},
}


def test_optimizer_state_may_be_missing():
  held = {'target': {**NEEDED['target'], 'more': 0}, 'state': {'step': 7}}
  assert restoring.require_parameters(held, NEEDED) is held
  assert restoring.require_parameters(held, NEEDED, is_resuming=True) is held


@pytest.mark.parametrize('target', [{}, {'target': {'embed': {'embedding': 0}}}])
def test_parameters_may_not_be_missing(target):
  with pytest.raises(ValueError, match=r'of the 2 parameters .*head/bias.*gin/models'):
    restoring.require_parameters({**target, 'state': {}}, NEEDED)
