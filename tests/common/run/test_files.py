"""Files written whole."""

import os
import resource

import pytest
from common.run.files import write_bytes


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


def test_a_program_can_be_executed_as_soon_as_it_is_there(tmp_path):
    write_bytes(tmp_path / "program", b"#!/bin/sh\n", executable=True)
    assert os.access(tmp_path / "program", os.X_OK)
