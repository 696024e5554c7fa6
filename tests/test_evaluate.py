"""An evaluation never mixes models, and reports what each of them costs."""

from __future__ import annotations

import pytest

from stages.architecture import Architecture
from stages.errors import UserError
from stages.evaluate import _claim
from stages.measure import Measure
from stages.metrics import Bootstrap
from stages.verdict import system_numbers


def test_parts_of_an_evaluation_of_other_models_are_refused_and_kept(tmp_path):
    _claim(tmp_path / "identity", "first")
    _claim(tmp_path / "identity", "first")
    with pytest.raises(UserError, match="other models or settings"):
        _claim(tmp_path / "identity", "second")
    assert (tmp_path / "identity").read_text() == "first"


def test_a_report_says_what_a_model_costs_and_nothing_of_a_copy():
    counted = Architecture(
        parameters=1000, parts={"decoder": 1000}, active_parameters=400,
        flops_per_timestep=1500, dense_flops_per_timestep=2500, experts=8, active_experts=2,
    )  # fmt: skip
    bootstrap = Bootstrap.over(["a", "b"], draws=100, seed=0)
    student, copy = (
        system_numbers(
            Measure(name="x", architecture=a, passes=p, decode_s=1.0, audio_s=(2.0, 2.0)),
            {}, bootstrap,
        )
        for a, p in ((counted, 1), (None, 0))
    )  # fmt: skip
    assert student.parameters.value == 1000
    assert student.active_parameters.value == 400
    assert student.flops_per_timestep.value == 1500
    assert student.dense_flops_per_timestep.value == 2500
    assert copy.parameters is copy.flops_per_timestep is None
