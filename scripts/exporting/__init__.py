"""The parts of `make export`, `make push` and `make serve`: files for other programs, and how those run them."""
