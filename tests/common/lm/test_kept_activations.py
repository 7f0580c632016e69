"""Layers that keep their activations: by our argument, or by the variable that Unsloth's users know."""

import os

import pytest
from common.lm.load import keep_activations

VARIABLE = "UNSLOTH_GC_KEEP_LAYERS"


@pytest.mark.parametrize(
    ("own", "layers", "left", "printed"),
    [(None, 0, None, ""), (None, 4, "4", ""), ("auto", 0, "auto", "auto is set in the environment: so many"),
     ("8", 0, "8", "8 is set in the environment: so many"), ("8", 4, "4", "--checkpoint-skip-layers=4 holds"),
     ("4", 4, "4", ""), ("0", 4, "4", "")],
)  # fmt: skip
def test_a_variable_of_the_user_stays_where_the_argument_is_not_given(own, layers, left, printed, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", {**os.environ})
    os.environ.pop(VARIABLE, None)
    os.environ.update({VARIABLE: own} if own else {})
    keep_activations(layers)
    assert os.environ.get(VARIABLE) == left
    out = " ".join("".join(capsys.readouterr()).split())
    assert printed in out
    assert bool(out) == bool(printed)
