"""Judge a run at its end, when all that it leaves is there."""

from common.errors import spell
from common.run.folder import Run
from common.run.health.files import recall, write_findings
from common.run.health.seen import Finding
from common.run.samples import read_samples
from common.run.screen import console


def end_health(run: Run) -> None:
    """Print the findings that show only at the end of a run, such as those about its samples, and name all of them."""
    if "steps" not in run.record:  # a run that nothing has judged while it trained
        return
    health = recall(run.folder, run.record, run.record["steps"])
    show_findings(health.end(run.record, read_samples(run.folder)))
    if health.findings:
        names = ", ".join(finding.name for finding in health.findings)
        console().print(f"Health: {names}; the report has the figures", style="yellow", highlight=False, soft_wrap=True)
    write_findings(run.folder, health.findings)


def show_findings(findings: list[Finding]) -> None:
    """Print findings, each with what to change."""
    for finding in findings:
        for line in finding.lines():
            console().print(spell(line), style="yellow", markup=False, highlight=False, soft_wrap=True)
