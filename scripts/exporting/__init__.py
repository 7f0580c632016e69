"""The parts of scripts/export.py: a run as files that other programs load, and the gate that compares them with it."""
