"""Files that survive a kill: atomic files with digests, the lock of a folder, checkpoints, record shards."""

from fmjax.storage import checkpoint, columns, files, images, lock, shards, untrusted
from fmjax.storage.files import DamagedFile
from fmjax.storage.lock import Lost, Owned, owned

__all__ = [
    "DamagedFile", "Lost", "Owned", "checkpoint", "columns", "files", "images", "lock", "owned", "shards",
    "untrusted",
]  # fmt: skip
