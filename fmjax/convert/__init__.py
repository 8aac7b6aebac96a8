"""Public PyTorch checkpoints as parameters of fmjax's networks; reading a file executes nothing in it."""

from fmjax.convert import edm, parts, torchcfm, weights

__all__ = [
    "edm", "parts", "torchcfm", "weights",
]  # fmt: skip
