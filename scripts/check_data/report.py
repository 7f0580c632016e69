"""Print the figures of a survey as tables in a terminal."""

from typing import Any

from common.errors import spell
from rich.console import Console
from rich.table import Table
from rich.text import Text

from check_data.rules import BAD, GOOD, LOOK

COLOURS = {GOOD: "green", LOOK: "yellow", BAD: "red"}
SHOWN = 3  # places of a finding; the JSON report and the page hold more


def show(console: Console, report: dict[str, Any]) -> None:
    """Print the report, the four rules first."""
    console.print(
        Text.assemble(
            (f"{report['data']}", "bold"), f"  {report['rows']:,} rows, {report['task']}, format {report['format']}"
        ),
        soft_wrap=True,
    )
    if others := report["other_formats"]:
        which = spell(f"--format {report['format']}"), " or ".join(spell(f"--format {name}") for name in others)
        console.print(f"Read by {which[0]}; the first row also has the columns of {which[1]}", soft_wrap=True)
    rules = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    for rule in report["rules"]:
        colour = COLOURS[rule["verdict"]]
        rules.add_row(rule["rule"], Text(rule["verdict"], style=f"bold {colour}"), Text(rule["reason"]))
    console.print(rules)

    if notes := report.get("notes"):
        console.print("\nNotes", style="italic")
    for note in notes or ():
        console.print(note, soft_wrap=True)

    if report["findings"]:
        console.print("\nFindings", style="italic")
    for kind, found in report["findings"].items():
        console.print(Text.assemble(f"{found['rows']:>9,}  ", (kind, "bold"), f": {found['what']}"), soft_wrap=True)
        for one in found["listed"][:SHOWN]:
            console.print(Text(f"{'':11}{one['place']}: {one['message']}", style="dim"), soft_wrap=True)
        if (more := found["rows"] - SHOWN) > 0:
            console.print(Text(f"{'':11}... and {more:,} more rows", style="dim"))

    table = Table("figure", "value", box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.columns[1].overflow = "fold"
    for name, value in lines(report):
        table.add_row(name, Text(value))
    console.print("\nFigures", style="italic")
    console.print(table)


def rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"


def _share(found: dict[str, Any]) -> str:
    """How many rows, their share, and the places of the first."""
    return f"{rows(found['rows'])}, {found['share']:.1%}" + (
        f": {', '.join(found['places'])}" if found["places"] else ""
    )


def lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures as (name, text)."""
    usable = max(report["usable"], 1)

    def shares(counts: dict[Any, int]) -> str:
        whole = max(sum(counts.values()), 1)
        return ", ".join(f"{name} {count / whole:.1%}" for name, count in counts.items())

    def spread(values: dict[str, Any]) -> str:
        names = ("min", "p5", "p50", "p95", "p99", "max")
        return ", ".join(f"{name} {values[name]:,.4g}" if values[name] < 1 else f"{name} {values[name]:,.6g}"
                         for name in names)  # fmt: skip

    lines = [("usable rows", f"{report['usable']:,} of {report['rows']:,}")]
    if report["length"]:
        lines.append((f"length in {report['length']['unit']}", spread(report["length"])))
    if cut := report.get("truncated") or report["truncated_estimate"]:
        estimated = ", estimated" if "truncated_estimate" in report else ""
        lines.append((f"longer than {cut['max_length']} tokens{estimated}", _share(cut)))
    if (long := report["long_prompts"])["rows"]:
        estimated = ", estimated" if long["estimated"] else ""
        lines.append((f"prompts longer than {long['limit']} tokens{estimated}", _share(long)))
    lines += [
        ("turns a row", shares(report["turns"])),
        ("languages", shares(report["languages"])),
        ("system prompt", f"{report['with_system_prompt'] / usable:.1%} of the rows"),
    ]
    if report["layouts"]:
        lines.append(("layouts of completions", shares(report["layouts"])))
    lines += [(name, f"{share:.1%}") for name, share in report["diversity"].items() if share is not None]
    if pairs := report.get("pairs"):
        lines.append(
            (
                "chosen is longer",
                f"{pairs['chosen longer']:.1%} of the pairs, rejected {pairs['rejected longer']:.1%}; on average "
                f"{pairs['chosen mean characters']:.0f} and {pairs['rejected mean characters']:.0f} characters",
            )
        )
    if scores := report.get("scores"):
        lines.append(("scores", f"{spread(scores)}, mean {scores['mean']:.4g} ± {scores['deviation']:.4g}"))
    if labels := report.get("labels"):
        lines.append(("labels", shares(labels)))
    if gold_answers := report.get("gold_answers"):
        bad = report["findings"].get("gold-answer", {"rows": 0})["rows"]
        words = f"{report['gold_words']:,} are words, compared by their wording"
        lines.append(("gold answers", f"{gold_answers:,}, of which the scorer cannot parse {bad:,}; {words}"))
    sampled = (
        "near duplicates looked for in all rows"
        if report["sampled"] >= report["usable"]
        else f"near duplicates looked for in {report['sampled']:,} rows drawn at random"
    )
    lines.append(("how", f"{sampled}; n-grams of {report['ngram_rows']:,} rows"))
    lines.append(
        (
            "time and memory",
            f"{report['seconds']:.1f} s, {report['rows_per_second']:,.0f} rows/s to read and check, "
            f"peak {report['peak_mib']:,.0f} MiB",
        )
    )
    return lines
