"""Stands in for AirIO, which is not on PyPI: the names that T5X looks up."""
