"""A run: its folder, whole files, checkpoints, stopping, progress, samples, and which prompts come next."""
