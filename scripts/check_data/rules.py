"""The four rules of good training data, and how well this data follows each.

Better outputs before more of them; different prompts before many; one format throughout; nothing twice. A verdict is a
reason to look at the data, no more: what is right depends on the task.
"""

from collections.abc import Iterator

from check_data.findings import DIVERSITY, DUPLICATES, KINDS, ONE_FORMAT, QUALITY, Findings
from check_data.survey import Survey

GOOD, LOOK, BAD = "good", "look", "bad"
FOUND = (0.0, 0.05)  # of the rows: good up to the first, bad beyond the second
OTHER_LAYOUTS = (0.05, 0.2)  # of the completions do not have the commonest layout
REPEATED_PROMPTS = (0.2, 0.5)  # of the prompts repeat an earlier one
LENGTH_BIAS = 0.15  # chosen is longer in half of the pairs and so much more or less: length alone tells the two apart


def rules(survey: Survey, findings: Findings, read: int) -> list[dict[str, str]]:
    """Each rule with its verdict and the reason. `read` is the number of rows, faulty ones included."""
    return [
        {"rule": rule, "verdict": verdict, "reason": reason}
        for rule, (verdict, reason) in {
            QUALITY: _quality(survey, findings, read),
            DIVERSITY: _diversity(survey),
            ONE_FORMAT: _format(survey, findings, read),
            DUPLICATES: (_verdict(_share(findings, DUPLICATES, read), FOUND), _counts(findings, DUPLICATES) or "none"),
        }.items()
    ]


def _quality(survey: Survey, findings: Findings, read: int) -> tuple[str, str]:
    verdict, reason = _verdict(_share(findings, QUALITY, read), FOUND), _counts(findings, QUALITY)
    if pairs := sum(survey.longer.values()):
        chosen = survey.longer["chosen"] / pairs
        if abs(chosen - 0.5) > LENGTH_BIAS:
            verdict = LOOK if verdict == GOOD else verdict
            reason += f"{'; ' if reason else ''}chosen is the longer completion in {chosen:.0%} of the pairs"
    if survey.scores and min(survey.scores) == max(survey.scores):
        verdict = BAD
        reason += f"{'; ' if reason else ''}every score is {survey.scores[0]:g}"
    if len(survey.labels) == 1:
        verdict = BAD
        reason += f"{'; ' if reason else ''}every completion is {'good' if True in survey.labels else 'bad'}"
    return verdict, reason or "nothing found"


def _diversity(survey: Survey) -> tuple[str, str]:
    share = survey.distinct_prompts()
    # To one prompt, as in most such data.
    several_completions = survey.scores or survey.labels or any(survey.longer.values())
    reason = f"{share:.1%} distinct prompts"
    if bigrams := survey.diversity.get("distinct 2-grams"):
        reason += f", {bigrams:.1%} distinct 2-grams"
    return GOOD if several_completions else _verdict(1 - share, REPEATED_PROMPTS), reason


def _format(survey: Survey, findings: Findings, read: int) -> tuple[str, str]:
    reason = _counts(findings, ONE_FORMAT)
    others = 0.0
    if survey.layouts:
        name, count = survey.layouts.most_common(1)[0]
        others = 1 - count / sum(survey.layouts.values())
        reason += f"{'; ' if reason else ''}{1 - others:.1%} of the completions are {name}"
    if findings.rows["fault"]:
        return BAD, reason
    return _verdict(max(others, _share(findings, ONE_FORMAT, read)), OTHER_LAYOUTS), reason or "prompts of one format"


def _kinds(findings: Findings, rule: str) -> Iterator[tuple[str, int]]:
    return ((kind, findings.rows[kind]) for kind, (of, _) in KINDS.items() if of == rule and findings.rows[kind])


def _share(findings: Findings, rule: str, read: int) -> float:
    return sum(count for _, count in _kinds(findings, rule)) / max(read, 1)


def _counts(findings: Findings, rule: str) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in _kinds(findings, rule))


def _verdict(share: float, limits: tuple[float, float]) -> str:
    return GOOD if share <= limits[0] else LOOK if share <= limits[1] else BAD
