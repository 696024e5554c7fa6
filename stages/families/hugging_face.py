"""What is used of transformers and peft, and how what they raise of a folder is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.errors import UserError
from stages.silence import silenced

with silenced():
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from peft import LoraConfig as PeftLoraConfig
    from peft import PeftModel, get_peft_model, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import get_pattern_key
    from safetensors import SafetensorError
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerFast,
    )
    from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

__all__ = [
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "LlamaConfig",
    "LlamaForCausalLM",
    "LoraLayer",
    "PeftLoraConfig",
    "PeftModel",
    "PreTrainedConfig",
    "PreTrainedModel",
    "PreTrainedTokenizerFast",
    "get_pattern_key",
    "get_peft_model",
    "inject_adapter_in_model",
    "reading",
    "transformers",
]

UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError,
    SafetensorError, StrictDataclassError, TypeError, ValueError,
)  # fmt: skip
"""What transformers raises of files that do not say what it expects."""


@contextmanager
def reading(folder: Path, fault: str, advice: str) -> Iterator[None]:
    """Turn whatever transformers raises of a model folder into a UserError of one line.

    What is no folder would be taken for a name of the hub, and is refused.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder here: give that of a model as transformers has it, or put the "
            "model there"
        )
    try:
        yield
    except UNREADABLE as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{fault}: {told}; {advice}") from error
