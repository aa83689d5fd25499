"""Which block goes to which device: the solver, the plan, and device maps as files."""
