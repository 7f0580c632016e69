"""The parts of `make pipeline`: the chain of stages, the steps of one, and the report."""
