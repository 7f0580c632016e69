"""The parts of `make plan`: the rows of a data file, what fits instead, and the gain of several GPUs."""
