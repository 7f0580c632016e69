"""Language models: cards, the hub, loading, chat templates, sampling, log-probabilities, scalar heads, fp8."""
