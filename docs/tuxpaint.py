"""Turn Debian's tuxpaint-stamps-default into a recorded folder: `tuxpaint.py PACKAGE LANGUAGE OUT`.

PACKAGE is the unpacked package. Beside each picture `name.png` lie its names in many languages,
`name.txt` (lines `fr.utf8=Une pomme.`), and recordings of them, `name_desc_fr.ogg`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def main(package: Path, language: str, out: Path) -> None:
    """Copy the recordings of a language to OUT/wavs and name them in OUT/metadata.csv."""
    stamps = package / "usr" / "share" / "tuxpaint" / "stamps"
    (out / "wavs").mkdir(parents=True)
    with (out / "metadata.csv").open("w", encoding="utf-8") as table:
        for audio in sorted(stamps.rglob(f"*_desc_{language}.ogg")):
            clip = audio.name.removesuffix(f"_desc_{language}.ogg")
            clip_id = "-".join((*audio.parent.relative_to(stamps).parts, clip))
            text = text_of(audio.with_name(f"{clip}.txt"), language)
            shutil.copyfile(audio, out / "wavs" / f"{clip_id}.ogg")
            table.write(f"{clip_id}|{text}|{text}|{language}\n")


def text_of(path: Path, language: str) -> str:
    """The line of a language in a text file; empty where there is none, which prepare rejects."""
    if not path.exists():
        return ""
    marker = f"{language}.utf8="
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [line.removeprefix(marker) for line in lines if line.startswith(marker)]
    return found[0].replace("|", " ") if found else ""


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
