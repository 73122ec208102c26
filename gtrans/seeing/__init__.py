"""Looking at a training step: what a program, a terminal, a notebook or a page shows of it."""
