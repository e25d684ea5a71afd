"""What a step would take on devices that are not there: `t5x.precompile` shows it.

`planner` compiles a run's `abstract_steps` for one of the `topologies` and hands out a
`report`; `step_costs` is the account, from the compiled program (`hlo_text`,
`hlo_loops`, `hlo_costs`) and from the traced one (`jaxpr_costs`). Where a step does not
fit, `refusal` says what fills the memory (`live_arrays`) and what to change.
"""
