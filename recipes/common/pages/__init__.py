"""HTML pages that open without a network: the template they share, and the report of a run."""
