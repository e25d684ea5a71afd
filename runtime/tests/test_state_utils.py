"""Flattening and renaming of nested state dicts."""

import pytest

from t5x import state_utils

SPEC = {'driver': 'zarr', 'kvstore': {'path': 'x'}, 'metadata': {'shape': [1]}}


def test_tensorstore_specs_are_leaves():
  tree = {'target': {'a': SPEC, 'b': 1}, 'state': {}}
  flat = state_utils.flatten_state_dict(tree)
  assert flat == {'target/a': SPEC, 'target/b': 1}
  assert 'state' in state_utils.flatten_state_dict(tree, keep_empty_nodes=True)


def assign(saved, wanted, rules, **kwargs):
  return state_utils.apply_assignment_map(saved, wanted, rules, **kwargs)


def test_renaming_with_groups():
  saved = {'enc': {'l0': 1, 'l1': 2}, 'step': 7}
  wanted = {'encoder': {'layer_0': 0, 'layer_1': 0}, 'step': 0}
  got = assign(saved, wanted, [(r'encoder/layer_(\d)', r'enc/l\1')])
  assert got == {'encoder': {'layer_0': 1, 'layer_1': 2}, 'step': 7}


def test_shared_and_swapped_names():
  got = assign({'a': 1}, {'x': 0, 'y': 0}, [('x', 'a'), ('y', 'a')])
  assert got == {'x': 1, 'y': 1}
  got = assign({'a': 1, 'b': 2}, {'a': 0, 'b': 0}, [('a', 'b'), ('b', 'a')])
  assert got == {'a': 2, 'b': 1}
  # The rule applies even if the checkpoint has an entry of the new name.
  assert assign({'a': 1, 'b': 2}, {'b': 0}, [('b', 'a')]) == {'b': 1}
  # An entry taken under another name is still found under its own.
  assert assign({'a': 1}, {'a': 0, 'b': 0}, [('b', 'a')]) == {'a': 1, 'b': 1}


def test_none_drops_an_entry():
  got = assign({'a': 1, 'b': 2, 'other': 3}, {'a': 0, 'b': 0}, [('a', None)])
  assert got == {'b': 2, 'other': 3}


def test_first_rule_wins():
  rules = [('x', 'p'), ('x|z', 'q')]
  got = assign({'p': 1, 'q': 2}, {'x': 0}, rules, require_all_rules_match=False)
  assert got == {'x': 1, 'q': 2}


def test_bad_rules():
  with pytest.raises(ValueError, match='nope'):
    assign({'a': 1}, {'a': 0}, [('a', 'nope')])
  with pytest.raises(ValueError, match='zzz'):
    assign({'a': 1}, {'a': 0}, [('zzz', 'a')])
  assert assign({'a': 1}, {'a': 0}, [('zzz', 'a')], require_all_rules_match=False)


def test_nothing_is_renamed_on_resuming():
  saved = {'a': 1}
  assert assign(saved, {'a': 0}, [('a', None)], is_resuming=True) is saved
