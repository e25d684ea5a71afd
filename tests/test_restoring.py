"""A checkpoint must hold every parameter, whatever else it lacks."""

import pytest

from bart_t5x import restoring

NEEDED = {
  'target': {'embed': {'embedding': 0}, 'head': {'bias': 0}},
  'state': {'step': 0, 'param_states': {'0': 1}},
}


def test_states_of_the_optimizer_may_be_missing():
  held = {'target': {**NEEDED['target'], 'more': 0}, 'state': {'step': 7}}
  assert restoring.require_parameters(held, NEEDED) is held
  assert restoring.require_parameters(held, NEEDED, is_resuming=True) is held


@pytest.mark.parametrize('target', [{}, {'target': {'embed': {'embedding': 0}}}])
def test_parameters_may_not(target):
  with pytest.raises(ValueError, match=r'of the 2 parameters .*head/bias.*gin/models'):
    restoring.require_parameters({**target, 'state': {}}, NEEDED)


def test_a_long_list_is_cut():
  needed = {'target': {f'layer_{number}': 0 for number in range(9)}}
  with pytest.raises(ValueError, match='lacks 9 of the 9 .*layer_4, …'):
    restoring.require_parameters({'target': {}}, needed)
