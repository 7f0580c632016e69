"""The field's words, and none that readers cannot search for: CONTRIBUTING.md has the glossary."""

import re
import subprocess

from conftest import ROOT

# Each retired word, and what to write in its place. A name such as `texts_said` or `test_it_is_said` counts, too.
RETIRED = {
    r"said": "name who does it: prints, reports, writes; what a model wrote is a completion",
    r"asked": "requested, given; what a model gets is a prompt",
    r"whence": "from where",
    r"lest": "so that ... not",
    r"mend(?:s|ed|ing)?": "fix, correct",
    r"thereof": "of it",
    r"go(?:es|ing|ne)?[ _-]on": "resume, continue",
    r"(?:is|are|was|were|be|been|being)[ _](?:also[ _])?told": "gets, receives, learns",
    r"cut[ _]off": "truncated",
}
# Where a retired word is right: a quotation, other people's text, or the corpus of the tiny model, whose bytes count.
ALLOWED = {
    ("CONTRIBUTING.md", "every"): "the glossary lists them",
    ("tests/test_words.py", "every"): "this list",
    ("scripts/check_data/refusals.py", r"said"): "patterns that find words of other people's texts",
    ("scripts/check_data/refusals.py", r"asked"): "patterns that find words of other people's texts",
    ("scripts/tiny/corpus.py", r"said"): "stories, on which the tiny model was trained",
}
TEXT = (".py", ".md", ".toml", ".sh", ".yml", ".yaml", ".in", ".txt")
NO_SUFFIX = re.compile(r"(^|/)(Makefile|Dockerfile|[a-z-]+)$")  # scripts such as .ci/run


def our_files() -> list[str]:
    """The tracked files and the new ones that people write; no locks, no data, no licence of others."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [
        name
        for name in names
        if (name.endswith(TEXT) or NO_SUFFIX.search(name)) and (ROOT / name).is_file() and name != "LICENSE"
    ]


def findings(name: str, text: str) -> list[tuple[str, str]]:
    """Every retired word in a file: the word's pattern, and a line that says where and what to write."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        for word, better in RETIRED.items():
            if re.search(rf"(?<![A-Za-z])(?:{word})(?![A-Za-z])", line, re.ASCII | re.IGNORECASE):
                found.append((word, f"{name}:{number}: {line.strip()[:100]}  ->  {better}"))
    return found


def test_no_retired_word_is_left():
    left, needed = [], set()
    for name in our_files():
        for word, finding in findings(name, (ROOT / name).read_text(encoding="utf-8")):
            exceptions = {(name, word), (name, "every")} & ALLOWED.keys()
            needed |= exceptions
            if not exceptions:
                left.append(finding)
    assert not left, f"{len(left)} lines with retired words:\n" + "\n".join(left)
    assert needed == ALLOWED.keys(), f"no longer needed: {ALLOWED.keys() - needed}"


def test_words_are_found_in_prose_and_in_names_and_nowhere_else():
    for line in ("as he said.", "SAID = 1", "def was_asked():", "x.said_2", "it goes on", "gone_on", "it is told to"):
        assert findings("x", line), line
    for line in ("saidi", "tasked", "recommended", "tell", "on the go only", "the bold one", "blessed", "unmask"):
        assert not findings("x", line), line
