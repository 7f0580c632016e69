"""Data: rows of a source, their formats, the examples they become, and what is held out."""
