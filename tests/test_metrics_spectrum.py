"""The radial spectrum against Parseval's sum, waves of one frequency and white noise."""

import numpy as np
import pytest

from fmjax.metrics import spectrum


def test_the_powers_add_up_to_the_mean_square():
    x = np.random.default_rng(0).standard_normal((5, 8, 12, 3))
    _, power = spectrum.radial(x)
    assert power.sum() == pytest.approx(np.mean(x**2), rel=1e-12)


@pytest.mark.parametrize(("across", "down"), [(0, 0), (1, 0), (0, 3), (3, 4), (8, 8)])
def test_a_wave_lies_in_the_ring_of_its_frequency(across, down):
    i, j = np.meshgrid(np.arange(16), np.arange(16), indexing="ij")
    wave = np.cos(2 * np.pi * (down * i + across * j) / 16)[None, :, :, None]
    frequency, power = spectrum.radial(np.concatenate([wave, 2 * wave]))
    ring = round(np.hypot(across, down))
    assert frequency[ring] == ring / 16
    assert power[ring] == pytest.approx(np.mean(wave**2) * 2.5) and power.sum() == pytest.approx(power[ring])
    assert spectrum.low_fraction(frequency, power) == pytest.approx(float(ring < 3.2))
    assert spectrum.low_fraction(frequency, power, below=0.15) == pytest.approx(float(ring < 2.4))


def test_rings_are_of_the_shorter_side():
    """A wave down 8 rows and one across 12 columns are both nearest to the multiple 1 of 1/8 cycle a pixel."""
    i, j = np.meshgrid(np.arange(8), np.arange(12), indexing="ij")
    for phase in (i / 8, j / 12):
        frequency, power = spectrum.radial(np.cos(2 * np.pi * phase)[None, :, :, None])
        assert frequency[1] == 1 / 8 and power[1] == pytest.approx(0.5) and power.sum() == pytest.approx(0.5)


def test_white_noise_has_the_power_of_the_number_of_modes():
    x = np.random.default_rng(1).standard_normal((4000, 8, 8, 1))
    _, power = spectrum.radial(x)
    frequencies = np.fft.fftfreq(8) * 8
    count = np.bincount(np.rint(np.hypot(frequencies[:, None], frequencies[None])).astype(int).ravel())
    assert count.sum() == 64
    # |F x|^2 of white noise is exponential: a relative error of 1 / sqrt(images x modes), at most doubled by symmetry
    np.testing.assert_allclose(power, count / 64, rtol=4 * np.sqrt(2 / 4000))


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"^x=\(3, 2\): "):
        spectrum.radial(np.zeros((3, 2)))
