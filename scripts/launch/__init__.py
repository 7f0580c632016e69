"""The launcher behind scripts/run and every make target: which command, with which arguments, and where it runs.

Standard library only: it runs before there is a .venv, and outside of the containers it starts.
"""
