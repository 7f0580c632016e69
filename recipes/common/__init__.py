"""What recipes and commands share: a room each for data, language models, pages, the planner, rewards and runs."""
