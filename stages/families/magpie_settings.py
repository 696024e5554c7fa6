"""NeMo's configuration of a MagpieTTS model: read, changed, and held to what is supported."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from stages.errors import UserError
from stages.families.magpie_tokenizers import (
    check_files,
    check_tokenizers,
    name_tokenizers,
)
from stages.families.nemo_archive import (
    REFUSALS,
    archive_names,
    check_class,
    read_config,
)
from stages.model_config import MagpieConfig

MODEL_MODULE = "nemo.collections.tts.models.magpietts"
MODEL_CLASSES = (
    f"{MODEL_MODULE}.MagpieTTSModel",
    "nemo.collections.tts.models.magpietts_cfg_distillation.OnlineCFGDistillation",
    "nemo.collections.tts.models.magpietts_preference_optimization.MagpieTTSModelOnlinePO",
    "nemo.collections.tts.models.magpietts_preference_optimization.MagpieTTSModelOfflinePO",
)
"""What a .nemo may say it is: the model, or a way to train it, whose weights are the same."""
DATA_KEYS = (
    "train_ds", "validation_ds", "test_ds", "text_context_remapping_json",
    "text_context_remapping_prob",
)  # fmt: skip
DISTILLATION_KEYS = (
    "teacher_model_path", "max_decoder_steps", "rollout_temperature", "rollout_topk",
    "use_kv_cache_during_rollout", "distillation_cfg_scale", "distillation_temperature", "alpha",
    "beta", "truncation_threshold", "truncation_weight", "moe_loss_weight",
    "distill_local_transformer", "lt_loss_weight", "lt_distillation_start_step",
    "lt_distillation_ramp_len", "init_from_nemo_model", "init_from_ptl_ckpt", "init_strict",
)  # fmt: skip
"""Settings of NeMo's online distillation, which are no part of a model."""
OPTIONAL_KEYS = (
    "use_moe", "decoder.use_moe", "decoder.num_experts", "decoder.top_k_experts",
    "decoder.router_jitter_noise", "decoder.routing_strategy", "router_load_balancing_loss_coeff",
    "router_z_loss_coeff", "frame_stacking_factor", "local_transformer_type",
    "local_transformer_n_layers", "local_transformer_n_heads", "local_transformer_hidden_dim",
    "codecmodel_path", "cfg_unconditional_prob",
)  # fmt: skip
"""Keys that NeMo has defaults for, so that a configuration may lack what `overrides` sets."""

PARTS = ("encoder", "context_encoder", "decoder")
SIZES = (
    "embedding_dim", "frame_stacking_factor", "local_transformer_n_layers",
    "local_transformer_n_heads", "local_transformer_hidden_dim", "decoder.xa_d_memory",
    "decoder.xa_n_heads", "decoder.xa_d_head", "decoder.num_experts", "decoder.top_k_experts",
    *(
        f"{part}.{size}"
        for part in PARTS
        for size in (
            "n_layers", "d_model", "d_ffn", "sa_n_heads", "kernel_size", "max_length_causal_mask"
        )
    ),
)  # fmt: skip
"""Settings that count something of which there must be one at least."""
SHARES = (
    "cfg_unconditional_prob",
    *(f"{part}.{rate}" for part in PARTS for rate in ("p_dropout", "p_dropout_out")),
)


def read_model_config(path: Path) -> DictConfig:
    """Read NeMo's configuration of a MagpieTTS model from a .nemo, or from a .yaml.

    What belongs to its training data and to online distillation is left out. Raises UserError when
    it cannot be read, is another model's, or would run code or read files of others.
    """
    if path.suffix == ".nemo":
        config = read_config(path)
        check_class(path, config, "a MagpieTTS model", *MODEL_CLASSES)
    else:
        config = _read_yaml(path)
    name_tokenizers(config)
    for key in (*DATA_KEYS, *DISTILLATION_KEYS, "target"):
        config.pop(key, None)
    config.train_ds = config.validation_ds = None
    # NeMo refuses a model without these, which only its own training reads.
    for key, value in {"prior_scaling_factor": None, "prior_end_step": 0}.items():
        config.setdefault(key, value)
    config.setdefault("prior_scaledown_start_step", 0)
    _check_supported(path, config)
    if path.suffix == ".nemo":
        check_files(path, config, archive_names(path))
    return config


def _read_yaml(path: Path) -> DictConfig:
    try:
        document = OmegaConf.load(path)
        section = document.model if "model" in document else document
        content = OmegaConf.to_container(section, resolve=True)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read as NeMo's configuration: {error}") from error
    if not isinstance(content, dict) or "decoder" not in content:
        raise UserError(
            f"{path} is not the configuration of a MagpieTTS model: it has no section decoder, "
            "nor a section model with one"
        )
    return OmegaConf.create(content)


def overridden(config: DictConfig, settings: MagpieConfig) -> DictConfig:
    """Return NeMo's configuration with the keys of `overrides` changed.

    Raises UserError for a key that neither the configuration nor NeMo knows.
    """
    changed = config.copy()
    try:
        for key, value in settings.overrides.items():
            missing = OmegaConf.select(config, key, default=OPTIONAL_KEYS) is OPTIONAL_KEYS
            if missing and key not in OPTIONAL_KEYS:
                raise UserError(
                    f"model.overrides names {key!r}, which {settings.nemo} does not have: correct "
                    "it, or add the key to that configuration"
                )
            OmegaConf.update(changed, key, value, force_add=True)
        OmegaConf.resolve(changed)
    except REFUSALS as error:
        raise UserError(
            f"model.overrides does not fit the configuration in {settings.nemo}: {error}"
        ) from error
    _check_supported(settings.nemo, changed)
    return changed


def _check_supported(path: Path, config: DictConfig) -> None:
    """Refuse models that this family does not decode as NeMo would."""
    _check_sections(path, config)
    check_tokenizers(path, config)
    decoder = config.decoder
    wanted = {
        "model_type": (config.get("model_type"), ("decoder_ce",)),
        "decoder.kernel_size": (decoder.get("kernel_size"), (1,)),
        "decoder.has_xattn": (decoder.get("has_xattn"), (True,)),
        "decoder.is_causal": (decoder.get("is_causal", True), (True,)),
        "frame_stacking_factor": (config.get("frame_stacking_factor", 1), (1, 2, 4)),
        "vector_quantizer": (config.get("vector_quantizer"), (None,)),
    }
    if config.get("frame_stacking_factor", 1) != 1:
        # NeMo then takes a context for as long as it was before its frames were stacked.
        reads_text = config.get("use_text_conditioning_encoder", False)
        wanted["use_text_conditioning_encoder with stacked frames"] = (reads_text, (False, None))
    for key, (found, known) in wanted.items():
        if found not in known:
            listed = " or ".join(str(value) for value in known)
            raise UserError(
                f"{path} is a MagpieTTS model with {key}={found}, but the family magpie takes "
                f"{key}={listed}: use another checkpoint"
            )
    _check_values(path, config)
    _check_widths(path, config)


def _check_sections(path: Path, config: DictConfig) -> None:
    """Refuse a configuration whose parts are no sections."""
    for part in PARTS:
        found = config.get(part)
        if not isinstance(found, DictConfig):
            raise UserError(
                f"{path} describes a MagpieTTS model with {part}={found}, but it must be a section "
                "with the settings of that part"
            )


def _check_values(path: Path, config: DictConfig) -> None:
    """Refuse numbers that make no model."""
    for key in (*SIZES, *SHARES):
        value = OmegaConf.select(config, key)
        size = key in SIZES
        number = isinstance(value, int if size else int | float) and not isinstance(value, bool)
        if value is None or (number and (value >= 1 if size else 0 <= value <= 1)):
            continue
        raise UserError(
            f"{path} describes a MagpieTTS model with {key}={value}, but it must be "
            f"{'a whole number from 1 on' if size else 'a number from 0 to 1'}: correct it in "
            "the configuration or in model.overrides"
        )


def _check_widths(path: Path, config: DictConfig) -> None:
    """Refuse parts that cannot read each other, which NeMo finds out when it runs them."""
    width = config.get("embedding_dim")
    keys = ("encoder.d_model", "context_encoder.d_model", "decoder.d_model", "decoder.xa_d_memory")
    others = {key: OmegaConf.select(config, key) for key in keys}
    wrong = [f"{key}={found}" for key, found in others.items() if found != width]
    if wrong:
        raise UserError(
            f"{path} describes a MagpieTTS model with embedding_dim={width}, but "
            f"{', '.join(wrong)}: all of them must be equal, for its parts read each other's states"
        )
