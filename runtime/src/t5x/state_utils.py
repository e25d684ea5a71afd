"""Nested state dicts: flattening, intersecting, merging and renaming.

A state dict nests string keys; its leaves are arrays or, in an index of the previous
checkpoint layout, TensorStore specifications (dicts too, which are not taken apart).
"""

import collections
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging
from flax import traverse_util


def tensorstore_leaf(_: Any, value: Mapping[str, Any]) -> bool:
  """Whether a dict is a TensorStore specification and so a leaf.

  Args:
    _: the path to it, unused (`traverse_util.flatten_dict` passes it).
    value: the dict.
  """
  return {'driver', 'kvstore', 'metadata'} <= set(value)


def flatten_state_dict(
  state_dict: Mapping[str, Any], keep_empty_nodes: bool = False
) -> dict[str, Any]:
  """Flattens to paths joined by '/', TensorStore specifications staying whole."""
  return traverse_util.flatten_dict(
    state_dict,
    keep_empty_nodes=keep_empty_nodes,
    is_leaf=tensorstore_leaf,
    sep='/',
  )


def flatten_dict_string_keys(x: Mapping[str, Any]) -> dict[str, Any]:
  """Flattens to paths joined by '/', without empty dicts."""
  return traverse_util.flatten_dict(x, sep='/')


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  return traverse_util.unflatten_dict(dict(flat), sep='/')


def get_name_tree(
  state_dict: Mapping[str, Any], keep_empty_nodes: bool = False
) -> dict[str, Any]:
  """Replaces each leaf by its own path, joined by '/'."""
  paths = traverse_util.flatten_dict(state_dict, keep_empty_nodes=keep_empty_nodes)
  return traverse_util.unflatten_dict({path: '/'.join(path) for path in paths})


def _report(
  what: str, names: Sequence[str], log: Callable[..., None] = logging.warning
) -> None:
  """Logs a few names, or of hundreds (an optimizer's) how many lie where."""
  if len(names) <= 8:
    told = ', '.join(sorted(names))
  else:
    folders = collections.Counter('/'.join(name.split('/')[:2]) for name in names)
    told = ', '.join(f'{n} in {folder}' for folder, n in sorted(folders.items()))
    told += ' (-v=1 lists them)'
    logging.debug('%s: %s', what, ', '.join(sorted(names)))
  if names:
    log('%s: %s', what, told)


def intersect_state(
  state_dict: Mapping[str, Any], intersect_state_dict: Mapping[str, Any]
) -> dict[str, Any]:
  """Keeps of `state_dict` what `intersect_state_dict` has too, and logs the rest."""
  kept = flatten_state_dict(intersect_state_dict)
  flat = flatten_state_dict(state_dict)
  _report('Not restored, not in the checkpoint', [k for k in flat if k not in kept])
  return _unflatten({k: v for k, v in flat.items() if k in kept})


def merge_state(
  state_dict: Mapping[str, Any],
  from_scratch_state: Mapping[str, Any],
  overwrite: bool = False,
) -> dict[str, Any]:
  """Adds to `state_dict` what only `from_scratch_state` has, and logs it.

  Args:
    state_dict: what was restored.
    from_scratch_state: what was initialised.
    overwrite: take every value of `from_scratch_state`, those in both included.

  Returns:
    A new nested dict.
  """
  restored = flatten_state_dict(state_dict)
  fresh = flatten_state_dict(from_scratch_state)
  added = {k: v for k, v in fresh.items() if overwrite or k not in restored}
  _report('Initialised from scratch', list(added))
  return _unflatten(restored | added)


def _first_rule(
  name: str, assignment_map: Sequence[tuple[str, str | None]]
) -> tuple[str, str | None] | None:
  """Finds the rule for a name: (pattern, the source's name, or None to drop it)."""
  for pattern, replacement in assignment_map:
    match = re.fullmatch(pattern, name)
    if match:
      return pattern, None if replacement is None else match.expand(replacement)
  return None


def apply_assignment_map(
  ckpt_optimizer_state: Mapping[str, Any],
  optimizer_state: Mapping[str, Any],
  assignment_map: Sequence[tuple[str, str | None]],
  require_all_rules_match: bool = True,
  *,
  is_resuming: bool = False,
) -> Mapping[str, Any]:
  """Renames a checkpoint's entries to those of the current state.

  For each name of the current state, by the first rule whose pattern matches it whole:

  1. a replacement names the checkpoint's entry to take (two may take the same one);
  2. None drops the name: it is not restored, even where the checkpoint has it.

  Names that no rule matches take the checkpoint's entry of the same name. Entries of
  the checkpoint that were taken under another name are gone; the others stay.

  Args:
    ckpt_optimizer_state: what the checkpoint holds.
    optimizer_state: the current state (only its names matter).
    assignment_map: (regular expression, replacement with group references, or None).
    require_all_rules_match: whether a rule that matches nothing is an error.
    is_resuming: whether the run's own checkpoint is read, which has the new names
      already: nothing is changed then.

  Returns:
    The renamed state.

  Raises:
    ValueError: a rule names an entry that the checkpoint lacks, or matches nothing.
  """
  if is_resuming:
    return ckpt_optimizer_state
  source = flatten_state_dict(ckpt_optimizer_state)
  wanted = flatten_state_dict(optimizer_state)
  rules = {name: _first_rule(name, assignment_map) for name in wanted}
  used = {rule[0] for rule in rules.values() if rule}
  unused = [pattern for pattern, _ in assignment_map if pattern not in used]
  if require_all_rules_match and unused:
    raise ValueError(
      'Every rule of assignment_map must match a name of the current state. Unused: '
      + ', '.join(map(repr, unused))
    )
  return _unflatten(_assign(source, rules))


def _assign(
  source: Mapping[str, Any], rules: Mapping[str, tuple[str, str | None] | None]
) -> dict[str, Any]:
  """Applies to each name its rule, or None; see `apply_assignment_map`."""
  renamed, taken = {}, set()
  for name, rule in rules.items():
    if rule is None or rule[1] is None:
      continue
    pattern, old_name = rule
    if old_name not in source:
      raise ValueError(
        f'assignment_map: {pattern!r} maps {name!r} to {old_name!r}, which the '
        f'checkpoint does not have. It has: {", ".join(sorted(source))}'
      )
    renamed[name] = source[old_name]
    taken.add(old_name)
  dropped = {name for name, rule in rules.items() if rule and rule[1] is None}
  unmatched = [name for name, rule in rules.items() if rule is None]
  absent = [name for name in unmatched if name not in source]
  _report('Without a rule and not in the checkpoint', absent)
  # As the map was told to.
  _report('Not restored, by the assignment map', list(dropped), logging.info)
  left_over = {k: v for k, v in source.items() if k not in taken | dropped}
  # A name that no rule matches finds its entry even if another name has taken it too.
  same_name = {name: source[name] for name in unmatched if name in source}
  return left_over | same_name | renamed
