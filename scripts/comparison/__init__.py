"""The parts of `make compare`: rating by rules, rating by a judge, the figures, and the page to read."""
