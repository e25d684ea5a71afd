"""The version of this package."""

from importlib import metadata

try:
  __version__ = metadata.version('bart-t5x-runtime')
except metadata.PackageNotFoundError:  # Run from a clone without installing.
  __version__ = '0.0.0'
