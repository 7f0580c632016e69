"""The parts of check-data.py."""
