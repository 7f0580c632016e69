"""Every test that SECURITY.md names for a promise is there, and every section of promises names some."""

import re

from conftest import ROOT

PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_the_tests_that_the_page_names_exist():
    text = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert named
    assert sorted(name for name in named if f"def {name}(" not in text) == []


def test_every_section_of_promises_names_tests():
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
    for title in ("Models", "Names and texts", "The sandbox of the `code` reward", "Secrets"):
        assert len(re.findall(r"`test_\w+`", sections[title])) >= 4, title
