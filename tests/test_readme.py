"""The README's example runs as it stands and samples the distribution that it was trained on."""

import re
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).parents[1] / "README.md"
if not README.exists():
    pytest.skip("needs the repository's README", allow_module_level=True)
(LEARNED,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_readme_is_short():
    assert README.read_text().count("\n") <= 150


def test_the_example_learns_the_eight_gaussians():
    """Nearly all samples lie within three standard deviations of a mode, and every mode has its eighth."""
    names = {}
    exec(compile(LEARNED, str(README), "exec"), names)
    x = np.asarray(names["x"])
    angle = np.arange(8) * np.pi / 4
    modes = 2.0 * np.stack([np.cos(angle), np.sin(angle)], 1)
    distance = np.linalg.norm(x[:, None] - modes, axis=-1)
    assert x.shape == (4096, 2)
    assert (distance.min(1) < 3 * 0.2).mean() > 0.9  # exact: 1 - exp(-9/2) = 0.989
    fractions = np.bincount(distance.argmin(1), minlength=8) / len(x)
    assert np.abs(fractions - 1 / 8).max() < 0.03
