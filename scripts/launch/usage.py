"""What `make` and `make help-COMMAND` print, and the same for scripts/run: from the docstrings, without a .venv."""

import ast
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path

from common.arguments import Field, name_arguments
from common.errors import spell

from launch.commands import BRIEF, COMMANDS, GROUPS, VARIABLES

START = {
    "check": "what this machine can run, and what is broken",
    "sft": "train the tiny model on sample data, a minute on a CPU",
}


def overview(by_make: bool) -> str:
    """Every command, on one screen of 80 columns."""
    run = "make" if by_make else "scripts/run"
    example = "MODEL=qwen2.5-7b DATA=my.jsonl" if by_make else "--model qwen2.5-7b --data my.jsonl"
    arguments = "make help-sft" if by_make else "scripts/run sft --help"
    lines = [heading("Start here")]
    width = len(arguments) + 2
    lines += [f"  {f'{run} {name}':<{width}}{text}" for name, text in START.items()]
    lines += [f"  {run} sft {example}", f"  {arguments}  all arguments of sft, or of any other command"]
    for title, commands in GROUPS.items():
        brief = textwrap.wrap(" ".join(name for name in commands if name in BRIEF), 76, break_on_hyphens=False)
        shown = {name: command for name, command in commands.items() if name not in BRIEF}
        lines += [heading(title), *(f"  {name:<13}{command.summary}" for name, command in shown.items())]
        lines += [f"  {line}" for line in brief]
    lines += ["Exit codes: 0 done, 2 wrong input, 3 not on this machine, 75 stopped: repeat it"]
    return "\n".join(line.rstrip() for line in lines)


def help_of(name: str, by_make: bool) -> str:
    """What a command does, and every argument and setting it takes, at the width of the terminal."""
    command, fields = COMMANDS[name], COMMANDS[name].fields()
    width = min(shutil.get_terminal_size().columns, 100)
    spelling = "NAME=value ..." if by_make else "--name value ..."
    lines = [f"{'make' if by_make else 'scripts/run'} {name} {spelling}", ""]
    name_arguments(fields)
    lines += description(command.file, width) if command.file else [command.summary.capitalize() + "."]
    group = None
    for field in fields:
        if field.group != group:
            lines += ["", *map(heading, textwrap.wrap(field.group.rstrip(".") or "Arguments", width))]
            group = field.group
        choices = f"One of {', '.join(field.choices)}." if field.choices else ""
        text = ("Required. " if field.required else "") + f"{spell(field.help)} {choices}".strip()
        lines += entry(variable(field) if by_make else flag(field), text, width)
    lines += ["", heading("Settings, by environment or as variables of make" if not by_make else "Settings")]
    settings = [one for one in (*command.variables, "ARGS") if by_make or one not in ("ARGS", "FROM")]
    if "FROM" in command.variables and not by_make:
        lines += entry("--from RUN.JSON", VARIABLES["FROM"], width)
    for one in settings:
        lines += entry(f"{one}=", VARIABLES[one], width)
    return "\n".join(lines)


def description(file: Path, width: int) -> list[str]:
    """The docstring of a file, wrapped; the explanation of an example that is too long gets a line of its own."""
    lines = []
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    for paragraph in re.split(r"\n\s*\n", text):
        if not paragraph.startswith("    "):
            lines += textwrap.wrap(spell(paragraph), width, break_on_hyphens=False)
        for line in textwrap.dedent(paragraph).splitlines() if paragraph.startswith("    ") else []:
            if len(line) + 2 <= width:
                lines.append("  " + line)
                continue
            example, _, what = line.partition("  ")
            parts = textwrap.wrap(example, width - 8, break_on_hyphens=False)
            lines += ["  " + " \\\n      ".join(parts)]
            lines += textwrap.wrap(what.strip(), width - 6, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append("")
    return lines[:-1]


def heading(text: str) -> str:
    """Bold on a terminal."""
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def variable(field: Field) -> str:
    return f"{field.variable}=" + (f'"{field.shown}"' if " " in field.shown else field.shown)


def flag(field: Field) -> str:
    if field.kind == "bool":
        return f"{field.flag}, {field.off} ({field.shown})"
    return " ".join([", ".join([*field.aliases, field.flag]), field.shown])


def entry(head: str, text: str, width: int, column: int = 30) -> list[str]:
    """A name and its explanation in two columns; a long name has a line of its own."""
    lines = textwrap.wrap(text, width - column, break_on_hyphens=False) or [""]
    if len(head) < column - 2:
        head = f"{head:<{column - 2}}{lines.pop(0)}".rstrip()
    first = textwrap.wrap(head, width, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)
    return [*first, *(" " * column + line for line in lines if text)]
