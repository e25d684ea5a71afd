"""Compares descriptions of data (`data.describe_source`)."""

from collections.abc import Mapping


def differences(saved: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
  """Names the fields in which two descriptions differ."""
  return [
    f"{field} was '{saved.get(field)}' and is '{value}'"
    for field, value in present.items()
    if saved.get(field) != value
  ]
