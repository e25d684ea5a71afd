"""Flattens nested state dicts and renames their entries."""

import collections
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from absl import logging
from flax import traverse_util


def flatten_state_dict(
  state_dict: Mapping[str, Any], keep_empty_nodes: bool = False
) -> dict[str, Any]:
  """Flattens to names joined by '/', with TensorStore specifications as leaves."""
  return traverse_util.flatten_dict(
    state_dict,
    keep_empty_nodes=keep_empty_nodes,
    is_leaf=lambda _, value: {'driver', 'kvstore', 'metadata'} <= set(value),
    sep='/',
  )


def flatten_dict_string_keys(x: Mapping[str, Any]) -> dict[str, Any]:
  """Flattens to names joined by '/', without empty dicts."""
  return traverse_util.flatten_dict(x, sep='/')


def _report(log: Callable[..., None], what: str, names: Collection[str]):
  """Logs a few names, or how many there are in each folder."""
  if len(names) <= 8:
    shown = ', '.join(sorted(names))
  else:
    folders = collections.Counter('/'.join(name.split('/')[:2]) for name in names)
    shown = ', '.join(f'{n} in {folder}' for folder, n in sorted(folders.items()))
    logging.debug('%s: %s', what, ', '.join(sorted(names)))
  if names:
    log('%s: %s', what, shown)


def apply_assignment_map(
  ckpt_optimizer_state: Mapping[str, Any],
  optimizer_state: Mapping[str, Any],
  assignment_map: Sequence[tuple[str, str | None]],
  require_all_rules_match: bool = True,
  *,
  is_resuming: bool = False,
) -> Mapping[str, Any]:
  """Renames a checkpoint's entries to the names of the current state.

  Each name of the current state follows the first rule whose pattern matches all of it:

  1. A replacement names the checkpoint's entry to take. Two names may take the same.
  2. None drops the name: it is not restored, even if the checkpoint has it.

  A name that no rule matches takes the checkpoint's entry of the same name. Entries
  taken under another name are removed from the result; the other entries stay.

  Args:
    ckpt_optimizer_state: the checkpoint's state dict.
    optimizer_state: the current state dict; only its names matter.
    assignment_map: (regular expression, replacement with group references or None).
    require_all_rules_match: whether a rule that matches nothing is an error.
    is_resuming: renames nothing: a run's own checkpoint has the new names already.

  Raises:
    ValueError: a rule names an entry that the checkpoint lacks, or matches nothing.
  """
  if is_resuming:
    return ckpt_optimizer_state
  source = flatten_state_dict(ckpt_optimizer_state)
  renamed, dropped, unmatched, used = {}, set(), [], set()
  for name in flatten_state_dict(optimizer_state):
    for pattern, replacement in assignment_map:
      if match := re.fullmatch(pattern, name):
        break
    else:
      unmatched.append(name)
      continue
    used.add(pattern)
    if replacement is None:
      dropped.add(name)
      continue
    renamed[name] = match.expand(replacement)
    if renamed[name] not in source:
      raise ValueError(
        f'assignment_map: {pattern!r} maps {name!r} to {renamed[name]!r}, which the '
        f'checkpoint does not have. It has: {", ".join(sorted(source))}'
      )
  unused = [pattern for pattern, _ in assignment_map if pattern not in used]
  if require_all_rules_match and unused:
    raise ValueError(
      'Every rule of assignment_map must match a name of the current state. Unused: '
      + ', '.join(map(repr, unused))
    )
  absent = [name for name in unmatched if name not in source]
  _report(logging.warning, 'Not in the checkpoint and without a rule', absent)
  _report(logging.info, 'Dropped by the assignment map', dropped)
  gone = dropped | set(renamed.values())
  # An unmatched name keeps its entry even if another name takes it too.
  kept = {k: v for k, v in source.items() if k not in gone or k in unmatched}
  taken = {name: source[old] for name, old in renamed.items()}
  return traverse_util.unflatten_dict(kept | taken, sep='/')
