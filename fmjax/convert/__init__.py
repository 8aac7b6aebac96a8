"""Public PyTorch checkpoints as parameters of fmjax's networks; reading a file executes nothing in it."""

from fmjax.convert import edm, torchcfm, weights

__all__ = [
    "edm", "torchcfm", "weights",
]  # fmt: skip
