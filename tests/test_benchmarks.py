"""Every benchmark ends with the one line of JSON that machines read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = {
    "measure", "peers", "magpie_shapes", "lm_shapes", "lm_rivals", "diffusion_shapes",
    "diffusion_rivals",
}  # fmt: skip
"""Modules of benchmarks/ that the scripts import; they are no benchmarks themselves."""
SMALL = {
    "bytes_per_position": ["--timesteps", "8", "--repeats", "1"],
    "capture_overhead": ["--timesteps", "3", "--shards", "1", "--repeats", "1"],
    "diffusion_rows": [
        "--widths",
        "8",
        "16",
        "--side",
        "16",
        "--samples",
        "2",
        "--steps",
        "1",
        "--repeats",
        "1",
        "--bytes-samples",
        "2",
        "--peers",
        "none",
    ],
    "guided_decoding": ["--batch-size", "2", "--timesteps", "3", "--repeats", "1"],
    "inspect_start": ["--shards", "3", "--rollouts", "2", "--gib", "0.001", "--repeats", "1"],
    "lm_guidance": [
        "--rollouts",
        "2",
        "--frames",
        "3",
        "--tiny-frames",
        "1",
        "--batch-size",
        "2",
        "--train-frames",
        "4",
        "--bytes-frames",
        "5",
        "--repeats",
        "1",
        "--students",
        "lora",
    ],
    "loss_overhead": ["--ways", "top_k", "--batches", "1", "--timesteps", "6", "--repeats", "1"],
    "magpie_bytes": ["--shape", "tiny", "--frames", "6"],
    "magpie_online": [
        "--shapes",
        "tiny",
        "--train-frames",
        "6",
        "--rollout-frames",
        "6",
        "--skip-memory",
    ],
    "quantized_linear": ["--inputs", "256", "--outputs", "128", "--repeats", "1"],
    "read_rate": ["--gib", "0.002", "--repeats", "1", "--lookups", "20", "--peers", "none"],
    "write_rate": ["--mib", "0.5", "--repeats", "1"],
}
"""Arguments that make each benchmark short; a new one must be named here."""
PROOFS = {"digits_proof"}
"""Benchmarks whose results a test of their own looks at."""
NEEDS = dict.fromkeys(
    ("magpie_bytes", "magpie_online"), ("nemo", "pip install 'foretell[magpie]'")
) | {
    "diffusion_rows": ("diffusers", "pip install 'foretell[diffusion]'"),
    "lm_guidance": ("peft", "pip install 'foretell[orpheus]'"),
    "quantized_linear": ("torchao", "pip install 'foretell[orpheus]'"),
}
"""What a benchmark compares with, and how to install it."""
REQUIRED = {
    "diffusion_rows": {
        "guided_value_rms_error",
        "capture_over_denoiser",
        "step_over_plain",
        "step_vs_two_models",
        "bytes_per_row",
    },
    "guided_decoding": {
        "incremental_over_recompute",
        "one_pass_over_guided",
        "half_depth_over_guided",
    },
    "read_rate": {
        "fast_vs_memmap",
        "compact_vs_memmap",
        "compact_bytes_vs_fast",
        "random_p50_vs_memmap",
        "random_p95_ms",
    },
    "magpie_bytes": {
        f"kilobytes_per_s_{target}_{group}"
        for target in ("top_k_64", "hidden_fp16", "hidden_compact", "full_fp16")
        for group in ("backbone", "local")
    },
    "magpie_online": {"train_step_speedup_6_tiny", "rollout_speedup_6_tiny"},
    "quantized_linear": {
        f"{way}_{dtype}_{measured}"
        for way in ("torchao_int8", "bitsandbytes_int4")
        for dtype in ("float32", "bfloat16")
        for measured in ("bytes", "error", "gradient_error", "1_rows", "512_rows_gradient")
    },
    "write_rate": {"fast_over_plain", "compact_over_plain", "compact_disk_over_plain"},
    "bytes_per_position": {
        "compact_k50_v2048_bytes",
        "compact_k64_v2048_bytes",
        "compact_k128_v2048_bytes",
        "compact_k50_v152k_bytes",
        "compact_k128_v152k_bytes",
        "sampled_n50_v152k_bytes",
        "hidden_d768_bytes",
    },
    "lm_guidance": {
        "rollout_vs_transformers",
        "step_over_ce",
        "memory_over_ce",
        "step_vs_two_models",
        "memory_vs_two_models",
        "slot_bytes_over_full_bytes",
    },
    "inspect_start": {"first_output_s", "end_s", "all_over_first", "all_over_some"},
    "loss_overhead": {"step_over_ce", "memory_over_ce"},
    "capture_overhead": {"rollout_over_generation"},
}
"""Names that each benchmark must measure, whatever is installed."""


def test_every_benchmark_is_tried():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - SHARED
    assert scripts == set(SMALL) | PROOFS
    assert set(SMALL) <= set(REQUIRED)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_last_line_names_benchmark_ratios_machine_and_command(name, require):
    if name in NEEDS:
        require(*NEEDS[name])
    script = ROOT / "benchmarks" / f"{name}.py"
    command = [sys.executable, "-W", "error", str(script), "--json", *SMALL[name]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    last = json.loads(line)
    assert last["benchmark"] == name
    assert set(last) == {"benchmark", "ratios", "machine", "command"}
    assert last["command"] == " ".join(["python", f"benchmarks/{name}.py", *SMALL[name]])
    assert REQUIRED[name] <= set(last["ratios"])
    assert all(ratio > 0 for ratio in last["ratios"].values())


@pytest.mark.slow
def test_a_missing_peer_is_an_error_that_says_how_to_install_it(tmp_path):
    # A folder before all others on the path hides what is installed.
    hidden = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda name, *rest: "
    hidden += "None if name == 'lmdb' else find(name, *rest)"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    command = [sys.executable, str(ROOT / "benchmarks" / "read_rate.py")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2
    assert "lmdb" in done.stderr
    assert "pip install -e '.[bench]'" in done.stderr
    assert not done.stdout
