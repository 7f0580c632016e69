"""The health of a run: named findings from what it logs, with evidence and what to change."""
