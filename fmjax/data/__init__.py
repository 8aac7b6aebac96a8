"""Data sets and the input pipeline that turns arrays into batches."""

from fmjax.data import densities, images
from fmjax.data.arrays import arrays
from fmjax.data.batches import batches, in_memory, mean, prefetch
from fmjax.data.cifar10 import cifar10
from fmjax.data.dataset import Dataset, Examples, Rows, dataset, is_labels, kind_of
from fmjax.data.densities import draw_checkerboard, draw_eight_gaussians, draw_two_moons
from fmjax.data.digits import digits
from fmjax.data.imagenet import imagenet32, imagenet64
from fmjax.data.mnist import fashion_mnist, mnist
from fmjax.data.toys import checkerboard, eight_gaussians, two_moons

__all__ = [
    "Dataset", "Examples", "Rows", "arrays", "batches", "checkerboard", "cifar10", "dataset", "densities", "digits",
    "draw_checkerboard", "draw_eight_gaussians", "draw_two_moons", "eight_gaussians", "fashion_mnist", "imagenet32",
    "imagenet64", "images", "in_memory", "is_labels", "kind_of", "mean", "mnist", "prefetch", "two_moons",
]  # fmt: skip
