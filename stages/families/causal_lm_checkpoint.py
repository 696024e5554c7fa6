"""Folders of language models: read strictly, written so that stock transformers opens them."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stages.errors import UserError
from stages.families.causal_lm_network import head_error
from stages.families.causal_lm_prompts import PromptReader
from stages.families.hugging_face import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    reading,
    transformers,
)
from stages.publish import publish_file, replace_file

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
OURS = ("architecture", "base", "condition_dropout", "config", "facts")
"""Keys of config.json that only foretell reads."""
IDLE = (
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
"""Keys of transformers' that predictions do not depend on."""
ATTENTION = "sdpa"
HEAD_TOLERANCE = 1e-2
"""Largest share by which a model's own logits may differ from its head times its states."""

logger = logging.getLogger(__name__)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the screen, where ours are."""
    talk = transformers.utils.logging
    level, bars = talk.get_verbosity(), talk.is_progress_bar_enabled()
    talk.set_verbosity_error()
    talk.disable_progress_bar()
    try:
        yield
    finally:
        talk.set_verbosity(level)
        if bars:
            talk.enable_progress_bar()


def read_model_config(folder: Path) -> PreTrainedConfig:
    """Read the configuration of a model folder.

    Raises UserError when there is none, for weights that are quantized already, and for layers that
    see less than all that is before them.
    """
    fault = f"no language model can be read from {folder}"
    advice = "give the folder of a model whose kind transformers itself knows"
    with reading(folder, fault, advice):
        # Without the last word transformers would ask at the terminal whether to run the code.
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for key in OURS:  # transformers takes every key for a setting of its own
        vars(config).pop(key, None)
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        raise UserError(
            f"{folder / CONFIG_FILE} has max_position_embeddings {positions!r}, where the number "
            "of ids stands that the model takes at most: give a model that has one"
        )
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        raise UserError(
            f"{folder} holds weights that are quantized already ({quantized}): give the model as "
            "it was before, and say in `quantization` how it is kept in memory"
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None)  # some say it without naming layers
    if window is not None and window < positions:
        kinds.add(f"sliding_window {window}")
    if kinds:
        raise UserError(
            f"{folder} has layers of {sorted(kinds)}; foretell decodes models whose layers all "
            "attend to everything before"
        )
    return config


def load_model(folder: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """Read a model folder onto the CPU, in evaluation mode; no code of the folder's is run.

    Raises UserError when weights are missing, left over, damaged or pickled.
    """
    config = read_model_config(folder)
    fault = f"the weights in {folder} cannot be read"
    advice = "give a folder of safetensors that belong to its config.json"
    with reading(folder, fault, advice), quiet():
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, use_safetensors=True,
            attn_implementation=ATTENTION, output_loading_info=True, trust_remote_code=False,
            ignore_mismatched_sizes=True,  # or they are told in a log alone
        )  # fmt: skip
    faults = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    faults += [f"{name} is unknown" for name in sorted(report["unexpected_keys"])]
    faults += [
        f"{name} has shape {tuple(found)}, not {tuple(wanted)}"
        for name, found, wanted in sorted(report["mismatched_keys"])
    ]
    if faults:
        raise UserError(
            f"the weights in {folder} do not fit its config.json: {'; '.join(faults)}. Give the "
            "configuration that they were trained with"
        )
    return _checked(model, folder)


def fresh_model(folder: Path, *, seed: int) -> PreTrainedModel:
    """Build the model of a folder's configuration on the CPU, fp32, with weights of `seed`."""
    config = read_model_config(folder)
    fault = f"no language model can be built of {folder}"
    advice = "correct its config.json"
    with reading(folder, fault, advice), torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    return _checked(model.float(), folder)


def _checked(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Refuse a model whose logits are more than a linear head on its last states."""
    model.eval()
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise UserError(f"{folder} has no linear output head, which predictions are computed with")
    error = head_error(model)
    if error > HEAD_TOLERANCE:
        raise UserError(
            f"the logits of {folder} are not its output head times its last states (they differ "
            f"by {error:.1%}): models that scale or cap them are not supported"
        )
    return model


def computing(model: PreTrainedModel) -> dict[str, Any]:
    """Settings of a model that its predictions depend on."""
    settings: dict[str, Any] = model.config.to_dict()
    return {name: value for name, value in settings.items() if name not in IDLE}


def write_description(
    path: Path, description: Mapping[str, Any], model: PreTrainedModel | None
) -> None:
    """Write config.json: what foretell reads, and for a whole model what transformers reads."""
    known = {} if model is None else model.config.to_dict()
    known.pop("_name_or_path", None)  # where it came from, which is no setting
    text = json.dumps({**known, **description}, indent=2, sort_keys=True) + "\n"
    replace_file(path / CONFIG_FILE, text.encode())


def write_tokenizer(path: Path, reader: PromptReader) -> None:
    """Write the tokenizer's files into a model folder, each whole."""
    with tempfile.TemporaryDirectory() as folder:
        reader.tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            if file.is_file():
                replace_file(path / file.name, file.read_bytes())


def write_weights(path: Path, model: PreTrainedModel) -> None:
    """Write model.safetensors into a model folder; tied weights are there once."""
    once: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        once.setdefault(tensor.data_ptr(), (name, tensor.contiguous()))
    with publish_file(path / WEIGHTS_FILE) as draft:
        save_file(dict(once.values()), draft, metadata={"format": "pt"})
