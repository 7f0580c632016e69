"""The four rules of good training data, and how far this data keeps to each.

Better outputs before more of them; different prompts before many; one format throughout; nothing twice. A verdict calls
for a look, no more: what is right depends on the task.
"""

from collections.abc import Iterator

from .findings import DIVERSITY, DUPLICATES, FORM, KINDS, QUALITY, Findings
from .survey import Survey

GOOD, LOOK, BAD = "good", "look", "bad"
FOUND = (0.0, 0.05)  # of the rows: good up to the first, bad beyond the second
OTHER_FORMS = (0.05, 0.2)  # of the answers are not of the commonest form
REPEATED_PROMPTS = (0.2, 0.5)  # of the prompts were asked before
LENGTH_BIAS = 0.15  # chosen is longer in half of the pairs and so much more or less: length alone tells the two apart


def rules(survey: Survey, findings: Findings, read: int) -> list[dict[str, str]]:
    """Each rule with its verdict and what that rests on. `read` is the number of rows, faulty ones included."""
    return [
        {"rule": rule, "verdict": verdict, "says": says}
        for rule, (verdict, says) in {
            QUALITY: _quality(survey, findings, read),
            DIVERSITY: _diversity(survey),
            FORM: _form(survey, findings, read),
            DUPLICATES: (_verdict(_share(findings, DUPLICATES, read), FOUND), _counts(findings, DUPLICATES) or "none"),
        }.items()
    ]


def _quality(survey: Survey, findings: Findings, read: int) -> tuple[str, str]:
    verdict, says = _verdict(_share(findings, QUALITY, read), FOUND), _counts(findings, QUALITY)
    if pairs := sum(survey.longer.values()):
        chosen = survey.longer["chosen"] / pairs
        if abs(chosen - 0.5) > LENGTH_BIAS:
            verdict = LOOK if verdict == GOOD else verdict
            says += f"{'; ' if says else ''}chosen is the longer answer in {chosen:.0%} of the pairs"
    if survey.scores and min(survey.scores) == max(survey.scores):
        verdict = BAD
        says += f"{'; ' if says else ''}every score is {survey.scores[0]:g}"
    return verdict, says or "nothing found"


def _diversity(survey: Survey) -> tuple[str, str]:
    share = survey.distinct_prompts()
    several_answers = survey.scores or any(survey.longer.values())  # to one prompt, as in most such data
    says = f"{share:.1%} distinct prompts"
    if bigrams := survey.diversity.get("distinct 2-grams"):
        says += f", {bigrams:.1%} distinct 2-grams"
    return GOOD if several_answers else _verdict(1 - share, REPEATED_PROMPTS), says


def _form(survey: Survey, findings: Findings, read: int) -> tuple[str, str]:
    says = _counts(findings, FORM)
    others = 0.0
    if survey.answer_forms:
        name, count = survey.answer_forms.most_common(1)[0]
        others = 1 - count / sum(survey.answer_forms.values())
        says += f"{'; ' if says else ''}{1 - others:.1%} of the answers are {name}"
    if findings.rows["fault"]:
        return BAD, says
    return _verdict(max(others, _share(findings, FORM, read)), OTHER_FORMS), says or "prompts of one format"


def _kinds(findings: Findings, rule: str) -> Iterator[tuple[str, int]]:
    return ((kind, findings.rows[kind]) for kind, (of, _) in KINDS.items() if of == rule and findings.rows[kind])


def _share(findings: Findings, rule: str, read: int) -> float:
    return sum(count for _, count in _kinds(findings, rule)) / max(read, 1)


def _counts(findings: Findings, rule: str) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in _kinds(findings, rule))


def _verdict(share: float, limits: tuple[float, float]) -> str:
    return GOOD if share <= limits[0] else LOOK if share <= limits[1] else BAD
