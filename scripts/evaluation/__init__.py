"""The parts of `make evaluate`: what is measured of a policy and of a reward model, and the figures of it."""
