"""SNAC on CUDA: codes and sound are the CPU's, and the same ones every time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import test_snac_codec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module", params=["plain", "attentive"])
def pair(request, require, tmp_path_factory):
    require("snac", "pip install 'foretell[orpheus]'")
    from stages.families.snac_codec import SnacCodec

    kinds = {"plain": test_snac_codec.TINY, "attentive": test_snac_codec.ATTENTIVE}
    folder = test_snac_codec.build(tmp_path_factory.mktemp("snac") / "tiny", kinds[request.param])
    return SnacCodec.open(folder), SnacCodec.open(folder, device="cuda")


def test_codes_are_those_of_the_cpu_whatever_lies_beside_them(pair):
    here, there = pair
    assert there.device.type == "cuda"
    expected = here.encode(test_snac_codec.RAGGED)
    together = there.encode(test_snac_codec.RAGGED)
    for clip, codes, known in zip(test_snac_codec.RAGGED, together, expected, strict=True):
        assert (codes == known).mean() > 0.99, "but where two entries are as near"
        np.testing.assert_array_equal(there.encode([clip])[0], codes)


def test_sound_is_that_of_the_cpu_and_the_same_every_time(pair):
    here, there = pair
    (codes,) = here.encode(test_snac_codec.RAGGED[1:2])
    sound = there.decode(codes)
    assert sound.device.type == "cpu"
    assert torch.equal(there.decode(codes), sound)
    state = torch.cuda.get_rng_state()
    there.decode(codes)
    assert torch.equal(torch.cuda.get_rng_state(), state), "noise of its own"


def test_convolutions_keep_the_bits_of_float32(pair):
    """Without the decoder's noise, whose numbers are others on each device."""
    from stages.families.exact_convolutions import exact_convolutions

    here, there = pair
    clip = test_snac_codec.RAGGED[1][None, None]
    with torch.inference_mode(), exact_convolutions():
        ours = here.model.encoder(here.model.preprocess(clip))
        theirs = there.model.encoder(there.model.preprocess(clip.cuda())).cpu()
    assert float((theirs - ours).norm() / ours.norm()) < 1e-5
