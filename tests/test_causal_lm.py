"""The family causal_lm: decoding equals scoring, slots keep their ids, folders are stock ones."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from stages.audit import audit, predictions
from stages.causal_lm_config import CausalLMConfig
from stages.errors import Refused, UserError
from stages.family import LinearOutput, has_linear_heads, load_family
from store.schema import Sampler
from tests import rolled as rolled_up

SLOTS = ((0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (2, 2), (2, 3))
ENTRIES, WIDTH = 6, 8
"""Entries of a codebook, and ids of a slot: two of each slot are never spoken."""
BASE, END = 300, 290
SPECIAL = {
    "start": {"id": 280, "token": "<|start|>"}, "stop": {"id": 281, "token": "<|stop|>"},
    "speech": {"id": 282},
}  # fmt: skip
LAYOUT = {"slots": SLOTS, "codes_per_slot": WIDTH, "audio_base_id": BASE, "end_id": END}
VOCABULARY = BASE + 7 * WIDTH + 5
"""Padded: five ids more than the layout has."""
LIMIT = 7
DRAWN = {"max_timesteps": LIMIT, "min_timesteps": 1}
policy_of, roll = partial(rolled_up.policy_of, **DRAWN), partial(rolled_up.roll, **DRAWN)


@pytest.fixture(scope="module")
def tiny(require):
    require("peft", "pip install 'foretell[orpheus]'")
    from stages.families import causal_lm_tiny

    return causal_lm_tiny


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A base model whose predictions are far from uniform."""
    path = tmp_path_factory.mktemp("base")
    save(tiny, path)
    return path


def save(tiny, path, seed: int = 0, width: int = 32, size: float = 0.3, tied: bool = True):
    config = tiny.tiny_config(
        width=width, layers=2, heads=4, key_value_heads=2, feed_forward=3 * width // 2,
        positions=256, vocabulary=VOCABULARY, tied=tied,
    )  # fmt: skip
    special = {"<|start|>": 280, "<|stop|>": 281, "<|speech|>": 282}
    model = tiny.save_tiny(path, config, seed=seed, tokenizer=tiny.tiny_tokenizer(special))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    return model


def settings(path, **changes: Any) -> dict[str, Any]:
    known = {
        "family": "causal_lm",
        "path": path,
        "layout": LAYOUT,
        "special": SPECIAL,
        "prompt": "<start>{speaker}: {text}<stop><speech>",
    }  # fmt: skip
    return known | changes


FACTS = {
    "alphabet": " abc",
    "speakers": ["low", "high"],
    "codebooks": 7,
    "codes_per_codebook": ENTRIES,
    "frame_rate_hz": 12.0,
    "audio_codec": "ab",
}


def samples_of(count: int) -> list[dict]:
    """Samples whose texts and recordings all differ in length."""
    random = np.random.default_rng(0)
    return [
        {
            "sample_id": f"s{i}",
            "text": "abc"[: 1 + i % 3] * (1 + i),
            "speaker": ["low", "high"][i % 2],
            "codes": random.integers(0, ENTRIES, size=7 * (2 + i)).astype(np.uint16),
        }
        for i in range(count)
    ]


def family_of(path, **changes: Any):
    config = CausalLMConfig.model_validate(settings(path, **changes))
    family = load_family("causal_lm").build(config, FACTS, seed=0)
    family.module.eval()
    return family


@pytest.mark.parametrize("vocabulary", ["slots", "full"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_rollout_logits_equal_teacher_forced_ones(folder, scale, vocabulary):
    family, samples = family_of(folder, vocabulary=vocabulary), samples_of(6)
    rolled = roll(family, samples, scale)
    rolled.require_departures()
    codes = rolled.poisoned()
    with torch.no_grad():
        scores = family.score(samples, codes, rolled.lengths, cfg_scale=scale)
    for row, length in enumerate(rolled.lengths):
        torch.testing.assert_close(
            scores.logits[row, :length].float(), rolled.logits[row, :length], atol=1e-4, rtol=1e-4
        )


def test_only_ids_of_the_slot_are_drawn_and_what_follows_an_end_is_no_frame(folder):
    family, samples = family_of(folder, vocabulary="full"), samples_of(6)
    rolled = roll(family, samples, 2.0)
    slots = torch.arange(7)
    for row, length in enumerate(rolled.lengths):
        codes = rolled.codes[row, :length]
        relative = codes - BASE - slots * WIDTH
        ends = codes == END
        assert (ends | ((relative >= 0) & (relative < ENTRIES))).all()
        predicted = family.predicted(codes)
        assert (codes[~predicted] == END).all(), "behind an end stand ends"
        assert ends[predicted].sum() <= 1
        frames = family.frames(codes)
        assert len(frames) == int(length) - bool(ends.any())
        torch.testing.assert_close(frames, relative[: len(frames)])


def test_slots_are_what_the_full_vocabulary_says_of_them(folder):
    """The distribution over a slot's ids is that of the whole model, given that they are spoken."""
    samples = samples_of(4)
    slots, full = family_of(folder), family_of(folder, vocabulary="full")
    lengths = torch.tensor([family.timesteps(s) for s in samples for family in [slots]])
    codes = torch.nn.utils.rnn.pad_sequence(
        [slots.reference_codes(sample) for sample in samples], batch_first=True
    )
    ids = torch.nn.utils.rnn.pad_sequence(
        [full.reference_codes(sample) for sample in samples], batch_first=True
    )
    with torch.no_grad():
        ours = slots.score(samples, codes, lengths, cfg_scale=1.7).logits
        theirs = full.score(samples, ids, lengths, cfg_scale=1.7).logits
    columns = torch.stack([slots.layout.columns(slot) for slot in range(7)])
    expected = theirs.gather(-1, columns.expand(*theirs.shape[:2], -1, -1))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(ours[row, :length], expected[row, :length])


def test_scores_are_those_of_transformers_on_the_same_ids(folder):
    """Against the model's own logits, fed prompt and codes by hand: no code of the family's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sample = samples_of(3)[2]
    family = family_of(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer(f"{sample['speaker']}: {sample['text']}", add_special_tokens=False).input_ids
    prompts = {"cond": [280, *text, 281, 282], "uncond": [280, 281, 282]}
    frames = torch.tensor(sample["codes"].astype(np.int64)).view(-1, 7)
    audio = (frames + BASE + torch.arange(7) * WIDTH).flatten().tolist()
    model = AutoModelForCausalLM.from_pretrained(folder)
    logits = {}
    with torch.no_grad():
        for name, prompt in prompts.items():
            whole = model(torch.tensor([prompt + audio])).logits[0, len(prompt) - 1 :]
            logits[name] = whole
        guided = 3.0 * logits["cond"] - 2.0 * logits["uncond"]
        codes = family.reference_codes(sample).unsqueeze(0)
        ours = family.score([sample], codes, torch.tensor([len(frames) + 1]), cfg_scale=3.0).logits
    ours = ours[0].flatten(0, 1)[: len(audio) + 1]
    for position in range(len(audio) + 1):
        first = BASE + position % 7 * WIDTH
        expected = torch.cat([guided[position, first : first + WIDTH], guided[position, END][None]])
        torch.testing.assert_close(ours[position], expected, atol=1e-4, rtol=1e-4)


def test_linear_heads_give_the_logits_and_branches_their_mixture(folder):
    family, samples = family_of(folder), samples_of(3)
    lengths = torch.tensor([family.timesteps(sample) for sample in samples])
    codes = torch.nn.utils.rnn.pad_sequence(
        [family.reference_codes(sample) for sample in samples], batch_first=True
    )
    assert has_linear_heads(family)
    with torch.no_grad():
        plain = family.score(samples, codes, lengths, cfg_scale=2.0, both_branches=True)
        linear = family.score(samples, codes, lengths, cfg_scale=2.0, linear=True)
    assert isinstance(linear.outputs[0], LinearOutput)
    torch.testing.assert_close(linear.logits, plain.logits, atol=1e-4, rtol=1e-4)
    mixed = 2.0 * plain.branches.cond.logits[0] - plain.branches.uncond.logits[0]
    torch.testing.assert_close(plain.logits, mixed, atol=1e-4, rtol=1e-4)
    heads = family.head_weights()
    state = linear.outputs[0].states[0, 0, 3].numpy()
    by_hand = heads["backbone.weight"][3] @ state + heads["backbone.bias"][3]
    np.testing.assert_allclose(plain.logits[0, 0, 3].numpy(), by_hand, atol=1e-4)


def test_a_saved_model_is_one_of_transformers_and_loads_as_it_was(folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    family = family_of(folder)
    family.condition_dropout = 0.25
    family.save(tmp_path)
    again = load_family("causal_lm").load(tmp_path, device="cpu", dtype=torch.float32)
    assert again.fingerprint() == family.fingerprint()
    assert again.tokenizer_fingerprint() == family.tokenizer_fingerprint()
    assert again.condition_dropout == 0.25
    again.save(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[280, 5, 281, 282, 300]])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        torch.testing.assert_close(stock(ids).logits, expected, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(tmp_path)("a").input_ids


def adapted(folder, rank: int, seed: int = 1, **changes: Any):
    """Adapters that say something: their second factors are drawn too."""
    family = family_of(folder, lora={"rank": rank, "targets": ["q_proj", "down_proj"]}, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in family.module.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return family


def logits_of(family) -> torch.Tensor:
    samples = samples_of(2)
    lengths = torch.tensor([family.timesteps(sample) for sample in samples])
    codes = torch.nn.utils.rnn.pad_sequence(
        [family.reference_codes(sample) for sample in samples], batch_first=True
    )
    family.module.eval()
    with torch.no_grad():
        return family.score(samples, codes, lengths).logits


def load(path):
    return load_family("causal_lm").load(path, device="cpu", dtype=torch.float32)


def test_fresh_adapters_change_nothing_and_are_all_that_is_trained(folder):
    plain, family = family_of(folder), family_of(folder, lora={"rank": 4})
    torch.testing.assert_close(logits_of(family), logits_of(plain), rtol=0, atol=0)
    trained = [name for name, p in family.module.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_saved_adapters_open_in_peft_and_load_as_they_were(folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    family = adapted(folder, 4)
    family.save(tmp_path)
    again = load(tmp_path)
    assert again.fingerprint() == family.fingerprint()
    torch.testing.assert_close(logits_of(again), logits_of(family), rtol=0, atol=0)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    ids = torch.tensor([[280, 5, 281, 282, 300]])
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, family.module.model(ids).logits)


def test_an_adapter_of_another_base_is_refused(tiny, folder, tmp_path):
    adapted(folder, 4).save(tmp_path / "student")
    other = tmp_path / "base2"
    save(tiny, other, seed=9)
    description = json.loads((tmp_path / "student" / "config.json").read_text())
    description["base"] = str(other)
    (tmp_path / "student" / "config.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="was trained on another base"):
        load(tmp_path / "student")


def test_a_student_begins_as_the_teachers_adapter_truncated(folder, tmp_path):
    """Equal where the teacher's change has the student's rank, and no further away elsewhere."""
    teacher = adapted(folder, 4)
    teacher.save(tmp_path)
    same, lower = (
        family_of(folder, lora={"rank": rank, "alpha": 5.0, "targets": ["q_proj", "down_proj"]})
        for rank in (4, 2)
    )
    for student in (same, lower):
        student.inherit(tmp_path, None)
    torch.testing.assert_close(logits_of(same), logits_of(teacher), atol=1e-4, rtol=1e-4)
    plain, target = logits_of(family_of(folder)), logits_of(teacher)
    assert (logits_of(lower) - target).norm() < 0.9 * (plain - target).norm()


def test_a_student_on_the_merged_teacher_begins_as_the_teacher(folder, tmp_path):
    teacher = adapted(folder, 4)
    teacher.save(tmp_path / "teacher")
    student = family_of(folder, lora={"rank": 2})
    student.inherit(tmp_path / "teacher", None, merged=True)
    torch.testing.assert_close(logits_of(student), logits_of(teacher), atol=1e-4, rtol=1e-4)
    trained = {name for name, p in student.module.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    student.save(tmp_path / "student")
    again = load(tmp_path / "student")
    torch.testing.assert_close(logits_of(again), logits_of(student), atol=1e-4, rtol=1e-4)
    # The base lies nowhere else, so it comes along; where it does, it is named.
    assert (tmp_path / "student" / "base" / "model.safetensors").exists()
    whole = family_of(folder)
    whole.save(tmp_path / "whole")
    other = family_of(folder, lora={"rank": 2})
    other.inherit(tmp_path / "whole", None, merged=True)
    other.save(tmp_path / "other")
    assert not (tmp_path / "other" / "base").exists()
    assert load(tmp_path / "other").fingerprint() == other.fingerprint()


def test_a_shallower_student_keeps_the_layers_named(tiny, folder, tmp_path):
    family_of(folder).save(tmp_path / "teacher")
    shallow = tmp_path / "shallow"
    config = tiny.tiny_config(
        width=32, layers=1, feed_forward=48, positions=256, vocabulary=VOCABULARY
    )
    special = {"<|start|>": 280, "<|stop|>": 281, "<|speech|>": 282}
    tiny.save_tiny(shallow, config, tokenizer=tiny.tiny_tokenizer(special))
    student = family_of(shallow, weights="fresh")
    student.inherit(tmp_path / "teacher", [1])
    theirs = family_of(folder).module.model.state_dict()
    ours = student.module.model.state_dict()
    name = "model.layers.{}.mlp.up_proj.weight"
    torch.testing.assert_close(ours[name.format(0)], theirs[name.format(1)], rtol=0, atol=0)
    with pytest.raises(UserError, match="has decoder layers 0 to 1"):
        student.inherit(tmp_path / "teacher", [2])


def test_texts_never_become_special_tokens(folder):
    family = family_of(folder)
    plain = family._reader.conditional({"sample_id": "a", "text": "x", "speaker": "low"})
    sly = family._reader.conditional({"sample_id": "b", "text": "<|stop|>", "speaker": "{text}"})
    assert plain.tolist()[-2:] == [281, 282] == sly.tolist()[-2:]
    assert 281 not in sly.tolist()[1:-2]
    assert len(sly) == 1 + len("{text}: <|stop|>") + 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"special": SPECIAL | {"stop": {"id": 283, "token": "<|stop|>"}}},
            "at id 281, but special.stop says 283",
        ),
        ({"layout": LAYOUT | {"codes_per_slot": 20}}, "has 361 ids, .* reaches to 439"),
        ({"layout": LAYOUT | {"codes_per_slot": 4}}, "7 codes of 6 entries, .* 7 slots of 4"),
        ({"lora": {"targets": ["kv_proj"]}}, "names 'kv_proj'"),
        ({"path": "nowhere"}, "nowhere is no folder here"),
        (
            {"special": SPECIAL | {"speech": {"id": 400}}},
            "has the ids 0 to 360, but special gives {'speech': 400}",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_refused(folder, changes, message):
    with pytest.raises(UserError, match=message):
        family_of(**{"path": folder, **changes})


def test_weights_that_are_not_all_there_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight is missing"):
        family_of(tmp_path)


def test_a_text_over_the_context_is_named(folder):
    family = family_of(folder)
    long = samples_of(1)[0] | {"sample_id": "long", "text": "a" * 240}
    with pytest.raises(
        UserError, match=r"'long': too long .*: a prompt of 248 ids and 7 timesteps"
    ):
        family.check_sample(long, LIMIT)


def test_ends_of_codes_drawn_in_parallel_are_no_fault_of_a_sample(folder):
    with pytest.raises(UserError, match="end_on='majority'") as caught:
        family_of(folder).check(Sampler(max_timesteps=LIMIT, end_on="majority"))
    assert not isinstance(caught.value, Refused)
    family_of(folder).check(Sampler(max_timesteps=LIMIT, end_on="any"))


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"text": " "}, "empty text", "nothing to say"),
        ({"text": None}, "empty text", "nothing to say"),
        ({"speaker": None}, "no speaker", "its cell is empty"),
        ({"codes": np.ones(15, np.uint16)}, "truncated frame", "codes are 15, .* has 1 of 7"),
        (
            {"codes": np.full(21, ENTRIES, np.uint16)},
            "code outside its codebook",
            "codes have 6 at place 0 of frame 0, but codebooks have 0 to 5",
        ),
    ],
)
def test_a_sample_that_the_model_cannot_take_is_refused_by_its_kind(folder, change, kind, words):
    family, (sample,) = family_of(folder), samples_of(1)
    family.check_sample(sample, LIMIT)
    with pytest.raises(Refused, match=words) as caught:
        family.check_sample(sample | change, LIMIT)
    assert caught.value.reason.startswith(f"{kind}: ")
    assert str(caught.value) == f"sample 's0': {caught.value.reason}"


@pytest.mark.parametrize("quantization", ["bf16", "int8", "int4"])
def test_adapters_train_on_a_quantized_base_that_stays_as_it_is(
    tiny, tmp_path, require, quantization
):
    require("torchao", "pip install 'foretell[orpheus]'")
    require("bitsandbytes", "pip install 'foretell[orpheus]'")
    folder = tmp_path / "base"
    save(tiny, folder, width=128, size=0.1)  # whose rows are whole blocks of int4
    family = family_of(folder, lora={"rank": 4}, quantization=quantization)
    plain, ours = logits_of(family_of(folder)), logits_of(family).float()
    error = (ours - plain).norm() / plain.norm()
    assert 0 < error < {"bf16": 0.03, "int8": 0.05, "int4": 0.5}[quantization]

    trained = [p for p in family.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        samples = samples_of(2)
        lengths = torch.tensor([family.timesteps(sample) for sample in samples])
        codes = torch.nn.utils.rnn.pad_sequence(
            [family.reference_codes(sample) for sample in samples], batch_first=True
        )
        logits = family.score(samples, codes, lengths).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 2), codes.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    family.save(tmp_path / "student")
    again = load(tmp_path / "student")
    # It is loaded on the base as it lies, where it may be quantized anew, or merged.
    ours_again, theirs = logits_of(again), logits_of(family).float()
    assert 0 < (ours_again - theirs).norm() / theirs.norm() < 0.5
    trained = {n: p for n, p in family.module.named_parameters() if p.requires_grad}
    loaded = dict(again.module.named_parameters())
    assert all(torch.equal(p, loaded[name]) for name, p in trained.items())
    fresh = family_of(folder, lora={"rank": 4}, quantization=quantization)
    torch.testing.assert_close(logits_of(fresh).float(), ours, rtol=0, atol=0)


def test_a_quantized_base_counts_as_many_parameters(tiny, tmp_path, require):
    require("bitsandbytes", "pip install 'foretell[orpheus]'")
    save(tiny, tmp_path, width=128)
    lora = {"rank": 4, "targets": ["q_proj"]}
    plain, packed = (
        family_of(tmp_path, lora=lora, quantization=quantization).architecture()
        for quantization in (None, "int4")
    )
    assert packed == plain
    assert plain.parts["adapters"] == 2 * 4 * (128 + 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "<start><|stop|>{text}<speech>"}, "holds '<|stop|>', which would be read as"),
        ({"prompt": "<start>{text.upper}{text}<speech>"}, "holds '{text.upper}', which"),
        ({"prompt": "<start>{txt}<speech>"}, "holds '{txt}', which"),
        ({"prompt": "<start>{text}<speach>"}, r"names the special tokens \['speach'\]"),
        ({"negative_prompt": "<start>{text}<speech>"}, "what stands there without the text"),
        ({"negative_prompt": "silence"}, "needs a special token"),
        ({"weights": "fresh", "lora": {"rank": 2}}, "would freeze random weights"),
        ({"layout": LAYOUT | {"end_id": BASE}}, "end_id=300 lies among the audio's, 300 to 355"),
    ],
)  # fmt: skip
def test_settings_that_mean_something_else_are_refused(folder, changes, message):
    with pytest.raises(ValidationError, match=message):
        CausalLMConfig.model_validate(settings(folder, **changes))


def test_what_only_the_negative_prompt_reads_is_read(folder):
    changes = {"prompt": "<start>{text}<speech>", "negative_prompt": "<start>{speaker}<speech>"}
    assert family_of(folder, **changes).conditions == ("text", "speaker")


def copy_of(folder, path, *, without: str = "", **settings: Any):
    """A copy of a model folder that lacks a file, or whose config.json says something else."""
    path.mkdir()
    for file in folder.iterdir():
        if file.name != without:
            (path / file.name).write_bytes(file.read_bytes())
    if settings:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | settings))
    return path


FOLDERS = {
    "tokenizer": ({"without": "tokenizer.json"}, "no tokenizer can be read from .*model"),
    "pickled": ({"without": "model.safetensors"}, "no file named model.safetensors .* give a"),
    "width": ({"intermediate_size": 64}, r"gate_proj.weight has shape \(48, 32\), not \(64, 32\)"),
    "depth": ({"num_hidden_layers": 3}, "model.layers.2.mlp.up_proj.weight is missing"),
    "shallow": ({"num_hidden_layers": 1}, "model.layers.1.mlp.up_proj.weight is unknown"),
    "number": (
        {"hidden_size": "32"},
        "Field 'hidden_size' expected int, got str .* give the folder",
    ),
    "division": ({"num_attention_heads": 0}, "modulo by zero; give the folder"),
    "activation": ({"hidden_act": "none"}, "the weights in .* cannot be read: 'none'; give a"),
    "quantized": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "quantized already .*bitsandbytes.* give the model as it was before",
    ),
    "kind": ({"model_type": "martian"}, "no language model can be read from .*transformers itself"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_no_whole_model_is_refused_in_one_line(folder, tmp_path, case):
    changes, message = FOLDERS[case]
    broken = copy_of(folder, tmp_path / "model", **changes)
    if case == "pickled":
        torch.save({"model.norm.weight": torch.ones(32)}, broken / "pytorch_model.bin")
    with pytest.raises(UserError, match=message) as caught:
        family_of(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("window", "message"),
    [(8, "has layers of .*sliding_window 8.* everything before"), (256, None), (None, None)],
)
def test_a_window_that_hides_what_is_before_is_refused(tiny, tmp_path, window, message):
    """Scoring would see the window that decoding does not."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
        sliding_window=window, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tiny.tiny_tokenizer({"<|start|>": 280, "<|stop|>": 281, "<|speech|>": 282}).save_pretrained(
        tmp_path
    )
    if message is None:
        assert family_of(tmp_path).module.vocabulary == WIDTH + 1
    else:
        with pytest.raises(UserError, match=message):
            family_of(tmp_path)


def test_a_model_without_a_limit_of_ids_is_refused(folder, tmp_path):
    """As those whose attention fades with the distance."""
    endless = copy_of(folder, tmp_path / "endless", model_type="bloom")
    config = json.loads((endless / "config.json").read_text())
    del config["max_position_embeddings"]
    (endless / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="max_position_embeddings None"):
        family_of(endless)


def test_code_of_a_model_folder_is_never_run_whatever_is_answered(folder, tmp_path, monkeypatch):
    names = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    sly = copy_of(folder, tmp_path / "sly", model_type="own", auto_map=names)
    (sly / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="transformers itself knows"):
        family_of(sly)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([1] * 12, "sample 'cut': truncated frame: codes are 12, so the last frame has 5 of 7"),
        ([1] * 13 + [6], "sample 'cut': .*: codes have 6 at place 6 of frame 1"),
    ],
)
def test_a_recording_that_is_no_row_of_frames_is_named(folder, codes, message):
    with pytest.raises(UserError, match=message):
        family_of(folder).reference_codes({"sample_id": "cut", "codes": np.array(codes, np.uint16)})


def test_layers_are_chosen_of_weights_that_are_copied_alone(folder, tmp_path):
    adapted(folder, 4).save(tmp_path)
    for merged in (False, True):
        student = family_of(folder, lora={"rank": 2, "targets": ["q_proj", "down_proj"]})
        with pytest.raises(UserError, match=r"init.layers=\[0\] chooses layers"):
            student.inherit(tmp_path, [0], merged=merged)


def test_a_merged_teacher_must_be_what_the_student_was_built_as(tiny, folder, tmp_path):
    """Else its folder would say another model than the one that was trained."""
    adapted(folder, 4).save(tmp_path / "teacher")
    narrow = tmp_path / "narrow"
    save(tiny, narrow, width=16)
    student = family_of(narrow, lora={"rank": 2})
    with pytest.raises(UserError, match=r"holds another kind of model .*hidden_size: 32, not 16"):
        student.inherit(tmp_path / "teacher", None, merged=True)


def test_an_adapter_whose_base_is_gone_says_where_it_was(folder, tmp_path):
    base = copy_of(folder, tmp_path / "base")
    adapted(base, 4).save(tmp_path / "student")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"config.json names the base .*base, which is no folder"):
        load(tmp_path / "student")


def test_an_adapter_of_fit_is_known_to_have_learnt_both_prompts(folder, tmp_path):
    """Or guidance would be said to mean little when it is opened beside its base."""
    from stages.causal_lm_config import CausalLMTeacher
    from stages.config import DatasetFacts

    family = adapted(folder, 4)
    family.condition_dropout = 0.25
    family.save(tmp_path)
    given = settings(folder, adapter=tmp_path)
    teacher = load_family("causal_lm").pretrained(
        CausalLMTeacher.model_validate(given), DatasetFacts.model_validate(FACTS),
        device="cpu", dtype=torch.float32,
    )  # fmt: skip
    assert teacher.condition_dropout == 0.25


def test_prompts_of_one_length_need_no_mask(folder):
    """Rows of the same text, alone and with the other branch: the same logits as one by one."""
    family = family_of(folder, negative_prompt="<start>low: bb<stop><speech>")
    samples = [samples_of(2)[0] | {"sample_id": f"same{i}", "text": "bb"} for i in range(4)]
    for scale in (1.0, 2.0):
        rolled = roll(family, samples, scale)
        for row, length in enumerate(rolled.lengths.tolist()):
            codes = rolled.codes[row : row + 1, :length]
            with torch.no_grad():
                scored = family.score(
                    [samples[row]], codes, torch.tensor([length]), cfg_scale=scale
                )
            torch.testing.assert_close(
                scored.logits[0], rolled.logits[row, :length], atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_a_model_whose_logits_were_all_computed(tiny, tmp_path, tied):
    """Through the rows of a tied or a separate head, with both prompts in one padded batch."""
    from transformers import AutoModelForCausalLM

    save(tiny, tmp_path, tied=tied)
    family, samples = family_of(tmp_path), samples_of(3)
    codes = torch.nn.utils.rnn.pad_sequence(
        [family.reference_codes(sample) for sample in samples], batch_first=True
    )
    lengths = torch.tensor([family.timesteps(sample) for sample in samples])
    dropped = torch.tensor([False, True, False])
    logits = family.score(samples, codes, lengths, unconditional=dropped).logits
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours, theirs = [], []
    for row, (sample, length) in enumerate(zip(samples, lengths.tolist(), strict=True)):
        text = [ord(c) for c in f"{sample['speaker']}: {sample['text']}"]
        text = family._reader.tokenizer(bytes(text).decode(), add_special_tokens=False).input_ids
        prompt = [280, 281, 282] if dropped[row] else [280, *text, 281, 282]
        audio = family.layout.to_vocabulary(codes[row, :length].flatten()).tolist()
        whole = stock(torch.tensor([prompt + audio])).logits[0, len(prompt) - 1 : -1]
        for position in range(7 * (length - 1) + 1):
            columns = family.layout.columns(position % 7)
            code = codes[row].flatten()[position]
            ours.append(logits[row].flatten(0, 1)[position].log_softmax(-1)[code])
            theirs.append(whole[position][columns].log_softmax(-1)[code])
    torch.stack(ours).sum().backward()
    torch.stack(theirs).sum().backward()
    expected = dict(stock.named_parameters())
    for name, parameter in family.module.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-4, rtol=1e-4)


def test_a_teacher_in_bf16_gives_logits_that_are_not_rounded_to_it(folder):
    family, samples = family_of(folder), samples_of(3)
    family.module.to(torch.bfloat16)
    weight = family.module.head_weights()[0].double()
    for step in family.rollout(samples, policy_of(family, samples), 1.0):
        states = torch.cat(step.branches.cond.hidden["backbone"], 1).double()
        exact = torch.einsum("bsd,svd->bsv", states, weight)
        torch.testing.assert_close(step.logits.double(), exact, atol=1e-5, rtol=1e-5)
    codes = family.reference_codes(samples[0]).unsqueeze(0)
    with torch.no_grad():
        scores = family.score(samples[:1], codes, torch.tensor([codes.shape[1]]), cfg_scale=1.0)
    exact = torch.einsum(
        "btsd,svd->btsv", scores.branches.cond.hidden["backbone"][0].double(), weight
    )
    torch.testing.assert_close(scores.logits.double(), exact, atol=1e-5, rtol=1e-5)


def test_an_end_ends_a_rollout_where_it_is_drawn_and_not_where_it_is_only_likeliest(folder):
    """As transformers' generate does; NeMo's rule for codes drawn in parallel is another one."""
    family, samples = family_of(folder), samples_of(6)
    end = family.layout.end_code
    with torch.no_grad():
        family.module.head.weight[END] *= 4  # an end is often the likeliest
    rolled = roll(family, samples, 1.0, temperature=8.0)
    passed = 0
    for row, length in enumerate(rolled.lengths.tolist()):
        codes, likeliest = rolled.codes[row, :length], rolled.logits[row, :length].argmax(-1)
        passed += int((likeliest[1 : length - 1] == end).any(-1).sum())
        assert not (codes[: length - 1] == end).any()
        assert length == LIMIT or (codes[-1] == end).any()
    assert passed, "the test needs timesteps that went on though an end was the likeliest"


def test_an_audit_leaves_out_what_stands_behind_an_end(folder):
    family, samples = family_of(folder), samples_of(3)
    found = predictions(family, samples, 2.0)
    # Every code of the recording, and of its last timestep the one end that counts.
    assert [len(logprobs) for logprobs in found] == [len(s["codes"]) + 1 for s in samples]
    assert audit(family, samples, 2.0, found).predictions == sum(
        len(s["codes"]) + 1 for s in samples
    )


def test_a_dataset_whose_frames_are_in_another_order_is_refused(folder):
    config = CausalLMConfig.model_validate(settings(folder))
    load_family("causal_lm").build(config, FACTS | {"slots": SLOTS}, seed=0)
    with pytest.raises(UserError, match=r"list the codes .*\(1, 0\), \(0, 0\).* give the order"):
        load_family("causal_lm").build(
            config, FACTS | {"slots": (SLOTS[1], SLOTS[0], *SLOTS[2:])}, seed=0
        )
