"""The parts of `make benchmark`: workloads, their rows and checkpoint, each contestant, ceilings and the table."""
