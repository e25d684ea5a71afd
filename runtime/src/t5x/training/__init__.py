"""How a run trains, behind T5X's `train` and `trainer`.

`loop` goes from stop to stop of a `run_schedule`; `base_trainer` runs the steps between
two stops, each a `train_step` on a batch that `feeding` has put on the devices. The
metrics go to `progress` (screen), `summaries` (TensorBoard), `health` and `actions`.
"""
