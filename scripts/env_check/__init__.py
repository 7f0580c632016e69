"""The parts of env-check.py: standard library only, before anything is installed."""
