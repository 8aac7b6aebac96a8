"""Data sets and the input pipeline that turns arrays into batches."""

from fmjax.data import densities, images
from fmjax.data.arrays import arrays
from fmjax.data.batches import batches, in_memory, mean, prefetch
from fmjax.data.cifar10 import cifar10
from fmjax.data.dataset import Dataset, Examples, Rows, dataset, is_labels, kind_of
from fmjax.data.densities import draw_checkerboard, draw_eight_gaussians, draw_two_moons
from fmjax.data.digits import digits
from fmjax.data.folder import folder
from fmjax.data.huggingface import huggingface
from fmjax.data.imagenet import imagenet32, imagenet64
from fmjax.data.mnist import fashion_mnist, mnist
from fmjax.data.plans import point_mass, point_mass_moments
from fmjax.data.splits import describe_data
from fmjax.data.tfds import tfds
from fmjax.data.toys import checkerboard, eight_gaussians, two_moons
from fmjax.data.units import Units, standardise

__all__ = [
    "Dataset", "Examples", "Rows", "Units", "arrays", "batches", "checkerboard", "cifar10", "dataset", "densities",
    "describe_data", "digits", "draw_checkerboard", "draw_eight_gaussians", "draw_two_moons", "eight_gaussians",
    "fashion_mnist", "folder", "huggingface", "imagenet32", "imagenet64", "images", "in_memory", "is_labels",
    "kind_of", "mean", "mnist", "point_mass", "point_mass_moments", "prefetch", "standardise", "tfds", "two_moons",
]  # fmt: skip
