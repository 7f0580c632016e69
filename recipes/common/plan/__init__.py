"""The planner: the peak memory and the time of a run, from a model's sizes, before anything is loaded."""
