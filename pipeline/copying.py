"""What `foretell copy` says."""

from __future__ import annotations

from store.copying import Copied


def copy_text(result: Copied) -> str:
    """Return what was copied, and what was not."""
    lines = [
        f"{result.shards} shards copied ({result.bytes:,} bytes), {result.there} were there before"
    ]
    if result.missing:
        lines.append(f"{result.missing} planned shards are in neither: finish the rollout")
    lines += [
        f"shard {shard} is there in other bytes, and was left alone: `foretell verify` tells "
        "whether it is sound"
        for shard in result.differing
    ]
    return "\n".join(lines)
