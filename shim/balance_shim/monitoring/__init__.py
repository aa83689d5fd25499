"""Memory while training: what each device holds step by step, what grows and why, and why memory ran out."""
