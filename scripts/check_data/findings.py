"""The kinds of findings in a data file, and the record of where each was found."""

from collections import Counter, defaultdict

from common.data.rows import Faults

LISTED = 100  # findings of a kind that the JSON and the page list; the rest are counted

# The four rules of good training data, and the findings against each.
QUALITY, DIVERSITY, ONE_FORMAT, DUPLICATES = (
    "Quality of the outputs",
    "Diversity over amount",
    "One format",
    "No duplicates",
)
KINDS = {
    "fault": (ONE_FORMAT, "cannot be used"),
    "long-prompt": (ONE_FORMAT, "its prompt is longer than the limit; a recipe drops such rows, and stops at too many"),
    "special-token": (ONE_FORMAT, "a text holds a special token, which the model reads as a control signal"),
    "turn-order": (ONE_FORMAT, "turns of user and assistant do not alternate"),
    "refusal": (QUALITY, "the completion is a refusal"),
    "empty-thought": (QUALITY, "the thought is empty"),
    "unbalanced-tags": (QUALITY, "a tag is not closed, or closed and never opened"),
    "repeats-prompt": (QUALITY, "the completion repeats the prompt"),
    "outlier": (QUALITY, "the score is far outside the others"),
    "near-identical": (QUALITY, "chosen and rejected are nearly the same"),
    "contradiction": (QUALITY, "the same completion is marked good and bad"),
    "gold-answer": (QUALITY, "the scorer cannot parse the gold answer"),
    "duplicate": (DUPLICATES, "an exact duplicate of an earlier row"),
    "near-duplicate": (DUPLICATES, "a near duplicate of an earlier row"),
    "overlap": (DUPLICATES, "its prompt is in the evaluation data too"),
}


class Findings:
    """What was found, by kind. The first 100 of a kind are kept with their places; with `keep_all` every one, by place.

    One row may be found several times of a kind (a fault per field); `rows` counts it once.
    """

    def __init__(self, keep_all: bool = False) -> None:
        self.listed: dict[str, list[tuple[str, str]]] = defaultdict(list)
        self.rows: Counter[str] = Counter()
        self.by_place: dict[str, list[tuple[str, str]]] | None = defaultdict(list) if keep_all else None
        self._last: dict[str, str] = {}

    def add(self, kind: str, place: str, message: str | None = None, reason_to_drop: bool = True) -> None:
        """Record a finding. Without `reason_to_drop` the row stays in the cleaned file, whatever kinds are dropped."""
        message = message or KINDS[kind][1]
        if self._last.get(kind) != place:
            self.rows[kind] += 1
            self._last[kind] = place
        if len(self.listed[kind]) < LISTED:
            self.listed[kind].append((place, message))
        if self.by_place is not None and reason_to_drop:
            self.by_place[place].append((kind, message))


class RecordedFaults(Faults):
    """Faults that are findings too."""

    def __init__(self, findings: Findings) -> None:
        super().__init__()
        self.findings = findings

    def add(self, place: str, message: str) -> None:
        super().add(place, message)
        self.findings.add("fault", place, message)
