"""What `foretell doctor` found, for a terminal of 80 columns without colour."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from pipeline.doctor import Ability, Device, Diagnosis
from pipeline.packages import Package

WIDTH = 80
NAME_WIDTH = 12
TITLES = {
    "family": "Model families", "audio-codec": "Audio codecs", "image-encoder": "Image encoders",
    "images": "Images", "quantization": "Quantization", "judge": "Judges of evaluate",
    "voices": "Voices of the demo corpus", "tensorboard": "Training log", "device": "Devices",
    "object-storage": "Object storage", "slurm": "Cluster", "file": "Files",
}  # fmt: skip


def diagnosis_text(found: Diagnosis) -> str:
    """Return all that was found, what is wrong with its reason, and what to type."""
    lines = ["Machine", *_machine(found)]
    of_config = any(ability.key for ability in found.abilities)
    for extra, packages in found.packages.items():
        lines += [] if of_config and extra else _packages(extra, packages)
    kinds = dict.fromkeys(ability.name.split(" ")[0] for ability in found.abilities)
    for kind in kinds:
        of_kind = [a for a in found.abilities if a.name.split(" ")[0] == kind]
        lines += ["", TITLES[kind], *(line for ability in of_kind for line in _ability(ability))]
    return "\n".join([*lines, "", *_verdict(found)])


def _machine(found: Diagnosis) -> Iterator[str]:
    python = found.python
    yield from _row("python", f"{python.installed}" + ("" if python.ok else f": {_fault(python)}"))
    built = f", built for CUDA {found.cuda}" if found.cuda else ", built for the CPU alone"
    yield from _row("torch", f"{found.torch}{built}" if found.torch else "cannot be imported")
    yield from _row("cores", str(found.cores))
    for device in found.devices:
        yield from _row("device", _device(device))
    yield from _row("free disk", f"{_size(found.free_bytes)} for {found.runs}/")
    yield from _row("slurm", "yes" if found.slurm is None else f"no: {found.slurm}")
    yield from _row("s3", found.object_storage)


def _device(device: Device) -> str:
    types = [name for name in ("bf16", "fp8") if getattr(device, name)]
    fast = f"multiplies {' and '.join(types)}" if types else "no fast bf16 or fp8"
    return f"{device.name}, {_size(device.memory_bytes)}, {fast}"


def _packages(extra: str, packages: Iterable[Package]) -> Iterator[str]:
    """Yield what is not as it should be, or one line where all is."""
    wrong = [package for package in packages if not package.ok]
    yield from ["", "Packages"] if not extra else []
    name = extra or "base"
    if not wrong:
        versions = (f"{package.name} {package.installed}" for package in packages)
        yield from _row(name, ", ".join(versions) if extra else "all there")
    else:
        yield from _row(name, "; ".join(map(_fault, wrong)))


def _fault(package: Package) -> str:
    if package.installed is None:
        return f"{package.name} is missing"
    return f"{package.name} {package.installed} is there, {package.wanted} is needed"


def _ability(ability: Ability) -> Iterator[str]:
    name = ability.name.partition(" ")[2].removesuffix(" on auto")
    asked = f" ({ability.key})" if ability.key else ""
    if ability.ok:
        yield from _row(name, f"yes{asked}")
        return
    without = "; the run goes on without it" if ability.optional else ""
    yield from _row(name, f"no{asked}: {ability.reason}{without}")


def _verdict(found: Diagnosis) -> Iterator[str]:
    missing = [ability for ability in found.abilities if not ability.ok]
    if found.ok:
        of_config = any(ability.key for ability in found.abilities)
        yield "All is here that this configuration needs." if of_config else "The base works."
    else:
        names = ", ".join(a.name.removesuffix(" on auto") for a in missing if not a.optional)
        yield from textwrap.wrap(f"Missing: {names or 'packages of the base, see above'}.", WIDTH)
    if found.install:
        yield "To install what is missing, type what you need of:"
        yield from (f"  {command}" for command in found.install)


def _row(name: str, text: str) -> list[str]:
    """Return a name and what is said of it, wrapped; a long name has a line of its own."""
    lead, indent = f"  {name:<{NAME_WIDTH}} ", " " * (NAME_WIDTH + 3)
    lines = textwrap.wrap(
        indent + text,
        WIDTH,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    if len(name) > NAME_WIDTH:
        return [f"  {name}", *lines]
    return [lead + lines[0][len(lead) :], *lines[1:]]


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
