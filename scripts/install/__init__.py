"""Make what the recipes run in: .venv from a lock, the locks themselves, the image. Standard library only."""
