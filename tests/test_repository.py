"""What contributors and CI start is what is there: hooks, workflow, issue forms, and the versions in pyproject.toml."""

import re
import subprocess
import tomllib

import pytest
import yaml
from conftest import ROOT

LINT = (ROOT / "scripts" / "lint").read_text(encoding="utf-8")


def load(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_every_hook_is_a_part_of_make_lint():
    hooks = [hook for repository in load(".pre-commit-config.yaml")["repos"] for hook in repository["hooks"]]
    parts = re.search(r"set -- ([\w ]+)", LINT)[1].split()
    assert sorted(hook["entry"] for hook in hooks) == sorted(f"scripts/lint {part}" for part in parts)
    assert {hook["language"] for hook in hooks} == {"system"}


def test_the_workflow_runs_what_a_contributor_can_run():
    steps = load(".github/workflows/ci.yml")["jobs"]["all"]["steps"]
    assert steps[-1]["run"] == ".ci/run"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_an_issue_form_has_what_a_form_needs(form):
    content = yaml.safe_load(form.read_text(encoding="utf-8"))
    if form.stem == "config":
        assert all({"name", "url", "about"} == link.keys() for link in content["contact_links"])
    else:
        assert {"name", "description", "body"} <= content.keys()
        assert all(field["id"] and field["attributes"]["label"] for field in content["body"])


def test_all_tools_know_the_same_python():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["project"]["requires-python"] == ">=3.11"
    assert settings["tool"]["pyrefly"]["python-version"] == "3.11"
    assert settings["tool"]["ruff"]["target-version"] == "py311"


def test_lint_refuses_a_check_that_it_does_not_know():
    done = subprocess.run([ROOT / "scripts" / "lint", "pyhton"], capture_output=True, text=True, check=False)
    assert (done.returncode, "pyhton" in done.stderr) == (2, True)


SILENCED = re.compile(r"# (?:noqa\b|pyrefly: ignore|type: ignore)(?P<what>[^#]*)$")


def test_what_silences_a_check_names_it_and_has_its_reason():
    files = [ROOT / "env-check.py", *(file for room in ("recipes", "scripts") for file in (ROOT / room).rglob("*.py"))]
    found = [
        (file.relative_to(ROOT), number, silenced["what"])
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if (silenced := SILENCED.search(line))
    ]
    assert len(found) > 20
    assert [one for one in found if not re.fullmatch(r"(: [A-Z]+\d+(, [A-Z]+\d+)*|\[[a-z-]+\])  \S.*", one[2])] == []
