"""Whether a student learns the guided teacher from a store, and whether we would see if not.

    python benchmarks/digits_proof.py --seeds 0 1 2

Runs configs/digits_cfg.yaml through the command line once per seed, and after it a control whose
keys collide: every variation of an image holds the predictions of its last one, which is what a
store keyed by (sample, timestep) alone would return. Systems draw 1,000 images from the same start
noise. Printed per seed, as ratios:

- `student`: mean square error of the student to the guided teacher over that of the unguided one;
- `unguided`: the same of the control that learns the store without guidance: 1;
- `collide`: the same of the control whose keys collide, above 1: worse than doing nothing;
- `frechet`: Fréchet distance of the student to the held-out images over the guided teacher's.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import yaml
from measure import report

from stages.report_schema import Report
from store import PredictionStore
from store.encoding import Array
from store.shard import Rollout

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "digits_cfg.yaml"
SMALL = {
    "fit.optimizer.steps": 800,
    "fit.optimizer.ema_decay": 0.99,
    "rollout.rows.slots": 4,
    "rollout.previews": None,
    "students.student.optimizer.steps": 200,
    "students.student.previews": None,
    "students.unguided.optimizer.steps": 100,
    "evaluate.samples": 200,
    "evaluate.steps": [6],
}
"""What makes two minutes of seven."""


def foretell(command: str, config: Path, *more: str) -> None:
    """Run a command of the command line; its messages go to the terminal."""
    subprocess.run(
        [sys.executable, "-m", "pipeline", command, str(config), *more],
        check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def collided(source: Path, path: Path) -> None:
    """Copy a store so that its rollouts hold the predictions of their sample's last variation."""
    store = PredictionStore.open(source)
    last: dict[str, int] = {}
    for sample_id, variation in store:
        last[sample_id] = max(variation, last.get(sample_id, variation))
    tables = {name: source / "tables" / name for name in store.manifest.tables}
    copy = PredictionStore.create(
        path, store.manifest.model_copy(update={"files": {}}), store.plan, store.samples,
        tables=tables,
    )  # fmt: skip
    for shard in copy.missing():
        with copy.writer(shard) as writer:
            for rollout in store.shard(shard):
                other = store[rollout.sample_id, last[rollout.sample_id]]
                writer.append(
                    rollout.sample_id, rollout.variation, overwritten(rollout, other),
                    stop_reason=rollout.stop_reason, weight=rollout.weight, seed=rollout.seed,
                    drawn=rollout.drawn,
                )  # fmt: skip
            writer.commit()


def overwritten(rollout: Rollout, other: Rollout) -> dict[str, Array]:
    """The arrays of a rollout with another one's predictions, and the checksums of these."""
    names = sorted(name for name in rollout.arrays if name.startswith("dense."))
    arrays = dict(rollout.arrays) | {name: other.arrays[name] for name in names}
    sums = []
    for timestep in range(len(rollout)):
        crc = 0
        for name in names:
            crc = google_crc32c.extend(crc, np.ascontiguousarray(arrays[name][timestep]).tobytes())
        sums.append(crc)
    arrays["row.target_crc"] = np.array(sums, np.uint32)
    return arrays


def control(document: dict[str, Any], folder: Path) -> Path:
    """Write the configuration of the run whose student learns from the collided store."""
    run = Path(document["runs"]) / document["name"]
    own = document | {
        "name": f"{document['name']}_collide",
        "dataset": str(run / "dataset"),
        "teacher": {"checkpoint": str(run / "teacher")},
        "store": str(run / "collided"),
        "students": {"collide": document["students"]["student"] | {"previews": None}},
        "evaluate": document["evaluate"]
        | {"guidance_scale": document["rollout"]["guidance"]["scale"]},
    }
    for section in ("prepare", "fit", "rollout"):
        del own[section]
    path = folder / f"{own['name']}.yaml"
    path.write_text(yaml.safe_dump(own), encoding="utf-8")
    return path


def changed(document: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Apply `a.b.c: value` to a configuration; sections that stand in several places come apart."""
    document = yaml.safe_load(yaml.safe_dump(document, default_flow_style=False))
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = document
        for section in sections:
            place[section] = dict(place.get(section) or {})
            place = place[section]
        place[name] = value
    return document


def prove(seed: int, folder: Path, changes: dict[str, Any]) -> dict[str, float]:
    """Run everything for one seed and return its ratios and CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    document = changed(
        yaml.safe_load(CONFIG.read_text(encoding="utf-8")),
        changes | {"name": f"digits_{seed}", "seed": seed, "runs": str(folder)},
    )
    path = folder / f"digits_{seed}.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    foretell("run", path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = folder / document["name"]
    shutil.rmtree(run / "collided", ignore_errors=True)
    collided(run / "store", run / "collided")
    worse = control(document, folder)
    foretell("run", worse)
    systems = Report.read(run / "report" / "report.json")
    others = Report.read(folder / f"{document['name']}_collide" / "report" / "report.json")
    error = {name: value(systems, name, "paired_mse") for name in ("teacher_unguided", "student")}
    unit = error["teacher_unguided"]
    return {
        "student": error["student"] / unit,
        "unguided": value(systems, "student_unguided", "paired_mse") / unit,
        "collide": value(others, "student_collide", "paired_mse") / unit,
        "frechet": value(systems, "student", "frechet")
        / value(systems, "teacher_guided", "frechet"),
        "accuracy": value(systems, "student", "accuracy"),
        "collide_accuracy": value(others, "student_collide", "accuracy"),
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def value(report: Report, system: str, metric: str) -> float:
    """A number of a report."""
    systems = report.systems
    return float(getattr(systems[system], metric).value)


def main() -> None:
    """Prove it for every seed and print the table and the worst case as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--small", action="store_true", help="minutes become seconds; for tests")
    parser.add_argument("--json", action="store_true", help="print the last line alone")
    parser.add_argument("--keep", type=Path, help="folder of the runs; a temporary one by default")
    options = parser.parse_args()
    changes = SMALL if options.small else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = {seed: prove(seed, folder, changes) for seed in options.seeds}
    if not options.json:
        print("seed   " + " ".join(f"{name:>16}" for name in next(iter(rows.values()))))
        for seed, row in rows.items():
            print(f"{seed:<6} " + " ".join(f"{number:>16.4g}" for number in row.values()))
    worst = {
        "student_over_unguided": max(row["student"] for row in rows.values()),
        "unguided_control": min(row["unguided"] for row in rows.values()),
        "colliding_keys": min(row["collide"] for row in rows.values()),
        "frechet_over_guided": max(row["frechet"] for row in rows.values()),
        "cpu_minutes": max(row["cpu_s"] for row in rows.values()) / 60,
    }
    report(__file__, worst, ["torch", "diffusers"])


if __name__ == "__main__":
    main()
