"""Files that survive a kill: checkpoints, record shards, atomic writes."""

from fmjax.storage import checkpoint, files, images, shards

__all__ = [
    "checkpoint", "files", "images", "shards",
]  # fmt: skip
