"""How checkpoints are written, read, kept and removed, behind T5X's `checkpoints`.

`manager` saves and restores with Orbax: `writing`, `reading` and `dataset_position` are
what goes in and comes out, `save_schedule` and `retention` say when and for how long.
`configs` is what a user sets; `old_layout` and `old_interface` are T5X's before Orbax.
"""
