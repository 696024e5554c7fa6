"""What is used of transformers and peft, imported without what they tell of yet other packages."""

from __future__ import annotations

from stages.silence import silenced

with silenced():
    import transformers
    from peft import LoraConfig as PeftLoraConfig
    from peft import PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import get_pattern_key
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
    "transformers",
]
