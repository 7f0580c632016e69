"""What recipes and the commands around them share: a room each for data, language models, pages, rewards and runs."""
