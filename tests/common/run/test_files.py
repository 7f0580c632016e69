"""Files written whole."""

import json
import os
import resource

import pytest
from common.environment import ROOT
from common.errors import InputError
from common.run.files import (
    keep_rows,
    make_reproducible,
    read_jsonl,
    read_object,
    read_objects,
    write_bytes,
    write_folder,
    write_json,
)


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    file = tmp_path / "file"
    write_bytes(file, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # as a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            write_bytes(file, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_name_that_is_no_text_in_this_locale_is_written_and_read_back(tmp_path):
    """As in an ASCII locale, where Python keeps the bytes of an ü apart."""
    name = os.fsdecode(b"Stra\xdfe") + "ü"
    write_json(tmp_path / "run.json", {"data": name})
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == {"data": name}


def test_a_program_can_be_executed_as_soon_as_it_is_there(tmp_path):
    write_bytes(tmp_path / "program", b"#!/bin/sh\n", executable=True)
    assert os.access(tmp_path / "program", os.X_OK)


@pytest.mark.parametrize(
    ("base", "named"),
    [
        (str(ROOT / "outputs" / "merged"), "outputs/merged"),
        ("/somewhere/else/my-model", "my-model"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        (None, None),
    ],
)
def test_an_adapters_folder_is_the_same_from_every_process_and_machine(tmp_path, base, named):
    for order, modules in enumerate((["v_proj", "q_proj"], ["q_proj", "v_proj"])):
        with write_folder(tmp_path / str(order)) as part:
            (part / "critic").mkdir()
            for folder in (part, part / "critic"):
                config = {"base_model_name_or_path": base, "target_modules": modules, "exclude_modules": None}
                (folder / "adapter_config.json").write_text(json.dumps(config))
            (part / "README.md").write_text(f"---\nbase_model: {base}\n---\n[More Information Needed]\n")

    def files(folder):
        return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    assert files(tmp_path / "0") == files(tmp_path / "1")
    for folder in (tmp_path / "0", tmp_path / "0" / "critic"):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == named
        assert config["target_modules"] == ["q_proj", "v_proj"]
    assert not (tmp_path / "0" / "README.md").exists()  # PEFT's form, which nobody has filled in


def test_target_modules_that_are_one_pattern_stay_as_they_are(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"target_modules": ".*_proj"}')
    make_reproducible(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {"target_modules": ".*_proj"}


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"a":' * 100_000, "\ud800"])
def test_a_damaged_json_file_is_one_message(content, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match=r"config\.json: (is damaged or no JSON|holds no JSON object)"):
        read_object(file)
    with pytest.raises(InputError, match=r"config\.json: (is damaged or no JSON|holds no list of JSON objects)"):
        read_objects(file)


def test_lines_that_a_killed_process_left_half_are_dropped_and_counted(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 2, "text": "a\xe2\x80\xa8b"}\n{"step": 3}\n{"step": 4, "lo')
    assert [row["step"] for row in read_jsonl(file)] == [1, 2, 3]
    keep_rows(file, lambda row: row["step"] < 3)
    assert capsys.readouterr().out.startswith(f"{file}: dropped 2 damaged lines, ")
    assert file.read_bytes() == b'{"step": 1}\n{"step": 2, "text": "a\xe2\x80\xa8b"}\n'
    keep_rows(file, lambda row: True)
    keep_rows(tmp_path / "none.jsonl", lambda row: True)
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
