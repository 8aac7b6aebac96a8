"""Data sets and the input pipeline that turns arrays into batches."""

from fmjax.data import images
from fmjax.data.arrays import Rows, Splits, batches, in_memory, mean, prefetch
from fmjax.data.checkerboard import checkerboard
from fmjax.data.cifar10 import cifar10
from fmjax.data.digits import digits
from fmjax.data.fashion_mnist import fashion_mnist
from fmjax.data.imagenet32 import imagenet32
from fmjax.data.imagenet64 import imagenet64, original, read_npz, read_tar
from fmjax.data.mnist import mnist
from fmjax.data.toy import eight_gaussians, two_moons

__all__ = [
    "Rows", "Splits", "batches", "checkerboard", "cifar10", "digits", "eight_gaussians", "fashion_mnist",
    "imagenet32", "imagenet64", "images", "in_memory", "mean", "mnist", "original", "prefetch", "read_npz",
    "read_tar", "two_moons",
]  # fmt: skip
