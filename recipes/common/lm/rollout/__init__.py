"""Sample completions: `Rollouts` (rollouts.py), over our own decoder (decoder.py) or transformers' generate."""
