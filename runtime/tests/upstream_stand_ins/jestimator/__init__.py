"""Stands in for jestimator, which is not on PyPI: the optimizer Amos, by name only."""
