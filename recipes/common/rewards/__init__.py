"""Rewards: named functions and a user's own, their contract, reward models, answers, and the sandbox for code."""
