"""A run: its folder, whole files, checkpoints, stopping, progress, samples, health, and its ranks on several GPUs."""
