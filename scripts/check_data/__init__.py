"""The parts of check-data.py: what is looked at in a row, what is found, and how it is reported."""
