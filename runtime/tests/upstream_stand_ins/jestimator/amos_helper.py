"""The names that T5X's optimizers look up when they are imported."""


def state_partition_rule(*args, **kwargs):
  """Refuses: only the name is here."""
  raise NotImplementedError('Amos needs the real jestimator.')
