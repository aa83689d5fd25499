"""Placement of blocks on devices: the solver, the plan, its verification, and moves between maps."""
