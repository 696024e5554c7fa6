"""A language model with Orpheus' ids, small and of random weights, to try everything on.

    python -m stages.families.causal_lm_tiny FOLDER

writes a Llama into FOLDER: configuration, tokenizer and weights. Its tokenizer reads bytes; every
id of special tokens and audio is Orpheus' own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from stages.families.causal_lm_checkpoint import quiet
from stages.families.hugging_face import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT_IDS = 128_256
"""Ids of Llama 3: what comes after them are Orpheus' own tokens."""
VOCABULARY = 156_940
"""Ids of Orpheus: 7 · 4096 of audio from 128266 on, and two that pad."""
SPECIAL = {
    "<|begin_of_text|>": 128_000,
    "<|eot_id|>": 128_009,
    **{f"<custom_token_{i}>": TEXT_IDS + i for i in range(10)},
}
"""The special tokens before the audio's, as Orpheus' tokenizer has them."""


def tiny_tokenizer(special: dict[str, int] = SPECIAL) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with special tokens at the ids given."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)} | special
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tiny_config(
    *,
    width: int = 192,
    layers: int = 4,
    heads: int = 4,
    key_value_heads: int = 2,
    feed_forward: int = 512,
    positions: int = 2048,
    vocabulary: int = VOCABULARY,
    tied: bool = True,
) -> LlamaConfig:
    """A Llama of a few layers, with grouped queries and tied embeddings as in Llama 3.2."""
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=feed_forward,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_value_heads,
        max_position_embeddings=positions, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def save_tiny(
    folder: Path,
    config: LlamaConfig,
    *,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> LlamaForCausalLM:
    """Write a model of random weights into a folder, and return it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with quiet():
        model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return model


def main(
    folder: Annotated[Path, typer.Argument(help="Folder to write into; it is made if need be.")],
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    width: Annotated[int, typer.Option(help="Width of the model, in features.")] = 192,
    layers: Annotated[int, typer.Option(help="Layers.")] = 4,
) -> None:
    """Write a Llama with Orpheus' ids, tokenizer included, into FOLDER."""
    model = save_tiny(folder, tiny_config(width=width, layers=layers), seed=seed)
    size = sum(parameter.numel() for parameter in model.parameters())
    typer.echo(f"{folder}: a Llama of {size / 1e6:.1f} million parameters")


if __name__ == "__main__":
    typer.run(main)
