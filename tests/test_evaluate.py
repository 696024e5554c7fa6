"""An evaluation never mixes what was measured of one set of models with another's."""

from __future__ import annotations

import pytest

from stages.errors import UserError
from stages.evaluate import _claim


def test_parts_of_an_evaluation_of_other_models_are_refused_and_kept(tmp_path):
    _claim(tmp_path / "identity", "first")
    _claim(tmp_path / "identity", "first")
    with pytest.raises(UserError, match="other models or settings"):
        _claim(tmp_path / "identity", "second")
    assert (tmp_path / "identity").read_text() == "first"
