"""T5X's interface, from packages on PyPI only.

Empty on purpose: `python -m t5x.train` imports this package first, and must then load
the module it runs only once.
"""
