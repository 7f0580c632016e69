"""`python -m install`, which is `make setup`."""

from install.environment import main, run_command

run_command("setup", main)
