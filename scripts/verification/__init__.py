"""The parts of scripts/verify.py and scripts/repro.py."""
