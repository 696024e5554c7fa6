"""Guidance distillation on real images by the command line, and controls that must fail."""

from __future__ import annotations

import json

import pytest

from tests.conftest import ROOT

IMPORTS = ["stages.families.diffusion", "sklearn.datasets", "sklearn.linear_model"]


@pytest.fixture(scope="module")
def ratios(require, run_program, tmp_path_factory) -> dict[str, float]:
    """What the small form of the proof measures, once."""
    require("diffusers", "pip install 'foretell[diffusion]'")
    folder = str(tmp_path_factory.mktemp("proof"))
    done = run_program(
        "script", ROOT / "benchmarks" / "digits_proof.py", "--json", "--small", "--seeds", "0",
        "--keep", folder, imports=IMPORTS,
    )  # fmt: skip
    (line,) = done.stdout.splitlines()
    last = json.loads(line)
    assert last["benchmark"] == "digits_proof"
    assert "machine" in last
    assert "command" in last
    found: dict[str, float] = last["ratios"]
    return found


@pytest.mark.slow
def test_a_student_comes_near_the_guided_teacher_in_one_pass(ratios):
    assert ratios["student_over_unguided"] <= 0.25
    assert ratios["frechet_over_guided"] <= 1.5


@pytest.mark.slow
def test_the_same_store_read_without_guidance_teaches_nothing(ratios):
    assert ratios["unguided_control"] == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_a_store_whose_keys_collide_teaches_something_else(ratios):
    # After a full training it is over 1, worse than doing nothing (docs/benchmarks.md).
    assert ratios["colliding_keys"] >= 3 * ratios["student_over_unguided"]
    assert ratios["colliding_keys"] >= 0.5
