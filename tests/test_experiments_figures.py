import base64
import io
import math

import numpy as np
import pytest
from PIL import Image

from fmjax.experiments import charts, examples, figures, report
from fmjax.storage import images


def decode(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def colour(picture: np.ndarray, hexadecimal: str) -> int:
    """How many pixels are opaque and of exactly this colour."""
    rgb = [int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5)]
    return int((picture == [*rgb, 255]).all(-1).sum())


def rows(*values: tuple[str, int, float, float]) -> list[report.Row]:
    return report.in_order(
        report.Row(f"{family} at {nfe}", family, nfe, 0, {"W2": (m, se)}) for family, nfe, m, se in values
    )


def test_a_grid_holds_each_pixel_as_its_formula_says():
    x = np.array([-1.0, -0.5, 0.0, 0.999, 1.0, 1.7, -3.0, 1 / 255], np.float32).reshape(2, 2, 2, 1)
    sheet = images.image_grid(x, columns=2)
    assert sheet.shape == (40 + 4, 2 * 40 + 6, 3) and sheet.dtype == np.uint8
    want = [0, 64, 128, 255, 255, 255, 0, 128]  # floor(127.5 x + 128), clipped
    for i, value in enumerate(want):
        image, row, column = i // 4, i % 4 // 2, i % 2
        top, left = 2 + 20 * row, 2 + 42 * image + 20 * column
        assert (sheet[top : top + 20, left : left + 20] == value).all()
    between = np.ones(sheet.shape[:2], bool)
    between[2:42, 2:42] = between[2:42, 44:84] = False
    assert (sheet[between] == 128).all()


def test_a_grid_returns_the_bytes_that_images_were_made_from():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 50, 60, 3), dtype=np.uint8)  # large: one pixel each
    sheet = images.image_grid(pixels / 127.5 - 1, columns=3)
    got = np.stack([sheet[2:52, 2 + 62 * i : 62 + 62 * i] for i in range(3)])
    np.testing.assert_array_equal(got, pixels)


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (4, 2), (7, 3), (12, 4), (64, 8), (100, 10), (18, 6), (32, 8)])
def test_a_grid_has_full_rows_where_a_divisor_is_near_the_root(n, columns):
    assert images.image_grid(np.zeros((n, 48, 48, 1))).shape[1] == columns * 50 + 2


@pytest.mark.parametrize(
    ("x", "columns", "words"),
    [
        (np.zeros((2, 8, 8)), None, r"give images \[n, H, W, C\]"),
        (np.zeros((2, 8, 8, 2)), None, "C = 1 or 3"),
        (np.zeros((0, 8, 8, 1)), None, "C = 1 or 3"),
        (np.zeros((2, 8, 8, 1), np.uint8), None, r"uint8 \[2, 8, 8, 1\]"),
        (np.full((2, 8, 8, 1), np.nan), None, "128 of 128 values that are not finite"),
        (np.zeros((2, 8, 8, 1)), 0, "columns=0 must be 1 or more"),
    ],
)
def test_a_grid_refuses_what_is_no_image(x, columns, words):
    with pytest.raises(ValueError, match=words):
        images.image_grid(x, columns=columns)


def test_a_saved_png_is_the_grid_and_a_failed_one_leaves_the_old(tmp_path):
    x = np.random.default_rng(1).uniform(-1, 1, (6, 8, 8, 3))
    path = images.save_png(tmp_path / "x.png", x, columns=3)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), images.image_grid(x, columns=3))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not finite"):
        images.save_png(path, x * np.nan)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("half", [0, 1, 3, 20])
def test_the_moving_mean_is_that_of_the_window(half):
    y = np.random.default_rng(2).standard_normal(17)
    want = [y[max(0, i - half) : i + half + 1].mean() for i in range(17)]
    np.testing.assert_allclose(figures.moving_mean(y, half), want, atol=1e-14)
    inside = slice(half, 17 - half)
    if half < 8:
        np.testing.assert_allclose(figures.moving_mean(np.arange(17.0), half)[inside], np.arange(17.0)[inside])


def test_a_family_shares_its_colour_with_the_corrected_one_and_data_have_none():
    got = figures.colours(rows(("euler", 1, 1, 0), ("rk4", 4, 1, 0), ("rk4 + corrections", 5, 1, 0), ("data", 0, 1, 0)))
    assert got == {"euler": 0, "rk4": 1, "rk4 + corrections": 1, "data": None}


def test_a_chart_is_drawn_in_the_colours_of_each_scheme():
    p = figures.distance_chart("W2", rows(("euler", 1, 3, 0.1), ("euler", 4, 2, 0.1), ("rk4", 4, 1, 0.1)), "words")
    light, dark = decode(p.light), decode(p.dark)
    for picture, theme, other in ((light, charts.LIGHT, charts.DARK), (dark, charts.DARK, charts.LIGHT)):
        assert picture.shape == (2 * p.height, 2 * p.width, 4)
        assert colour(picture, theme.colours[0]) > 500 and colour(picture, theme.colours[1]) > 100
        assert not any(colour(picture, c) for c in other.colours)
        assert (picture[[0, 0, -1, -1], [0, -1, 0, -1], 3] == 0).all()  # transparent: the card's colour shows
    assert p.alt == "words"


def test_a_chart_joins_a_family_but_not_its_corrected_samplers():
    joined = figures.distance_chart("W2", rows(("rk4", 1, 1, 0), ("rk4", 64, 2, 0)), "")
    apart = figures.distance_chart("W2", rows(("rk4 + corrections", 1, 1, 0), ("rk4 + corrections", 64, 2, 0)), "")
    paint = charts.LIGHT.colours[0]
    assert colour(decode(joined.light), paint) > 3 * colour(decode(apart.light), paint) > 0


def test_a_chart_leaves_out_what_is_not_finite():
    some = [("rk4", 4, 1.0, 0.1), ("rk4", 8, 2.0, math.nan)]
    with_nan = figures.distance_chart("W2", rows(*some, ("rk4", 16, math.nan, 0.1), ("rk4", 16, math.inf, 0.1)), "")
    assert decode(with_nan.light).any()
    curve = figures.loss_chart("flow", np.arange(5), [1.0, np.nan, 0.5, np.inf, 0.25])
    assert curve.remark == "2 non-finite values are left out."
    assert "from 0.75 at step 0 to 0.375 at step 4, smoothed" in curve.alt
    assert figures.loss_chart("flow", [1], [np.nan]).alt.endswith("without finite values.")


def test_names_are_not_read_as_mathematics():
    broken = report.Row("$x^{$", "$\\frac{$", 4, 0, {"$_{W2": (1.0, 0.1)})
    assert decode(figures.distance_chart("$_{W2", [broken, broken._replace(family="data", nfe=0)], "").light).any()
    assert decode(figures.gap_chart({"_$a^": ([0.0, 1.0], [1.0, 2.0], [0.0, 0.0])}).light).any()


def test_clouds_of_a_page_share_one_frame():
    rng = np.random.default_rng(3)
    near, far = rng.standard_normal((500, 2)), rng.standard_normal((500, 2)) + [40, 0]
    alone = decode(examples.sample_figure("near", near, [near]).light)
    together = decode(examples.sample_figure("near", near, [near, far]).light)
    spread = lambda picture: np.ptp(np.nonzero(touched(picture))[1])
    assert spread(together) < spread(alone) / 4
    outlier = np.concatenate([rng.uniform(size=(500, 2)), [[1e6, 0]]])
    assert examples.sample_figure("", outlier, [outlier]).remark == "1 of 501 points lie outside the frame."
    assert examples.sample_figure("", near * 0, [near * 0]).remark == ""


def touched(picture: np.ndarray) -> np.ndarray:
    """Where the points are: much bluer than red."""
    return (picture[..., 2].astype(int) - picture[..., 0] > 60) & (picture[..., 3] > 60)


def test_a_trajectory_has_an_example_a_row_and_time_to_the_right():
    levels = np.linspace(-1, 1, 6).reshape(3, 2, 1, 1, 1)
    x = np.broadcast_to(levels, (3, 2, 8, 8, 1)).copy()
    p = examples.trajectory_figure("path", x)
    sheet = decode(p.light)
    want = np.floor(127.5 * x[:, :, 0, 0, 0] + 128).clip(0, 255)
    got = [[sheet[10 + 42 * i, 10 + 42 * t, 0] for i in range(2)] for t in range(3)]
    np.testing.assert_array_equal(got, want)
    assert (p.width, p.height) == (3 * 42 + 2, 2 * 42 + 2) and "of" not in p.remark


def test_a_long_trajectory_is_thinned_and_keeps_both_ends():
    x = np.broadcast_to(np.linspace(-1, 1, 101).reshape(-1, 1, 1, 1, 1), (101, 1, 8, 8, 1))
    p = examples.trajectory_figure("path", x)
    shades = decode(p.light)[10, 10::42, 0]
    assert len(shades) == 16 and shades[0] == 0 and shades[-1] == 255 and (np.diff(shades.astype(int)) > 0).all()
    assert p.remark.endswith("16 of 101 times.")


def test_trajectories_of_points_mark_start_and_end():
    x = np.stack([np.zeros((20, 2)), np.full((20, 2), 5.0)])
    picture = decode(examples.trajectory_figure("lines", x).light)
    start, end = charts.LIGHT.colours[0], charts.LIGHT.colours[-1]
    assert colour(picture, start) and colour(picture, end)


def test_pictures_are_the_same_bytes_each_time():
    r = rows(("euler", 1, 3, 0.1), ("data", 0, 1, 0.1))
    assert figures.distance_chart("W2", r, "") == figures.distance_chart("W2", r, "")
    gap = {"W2": (np.linspace(0, 1, 5), np.ones(5), np.zeros(5))}
    assert figures.gap_chart(gap) == figures.gap_chart(gap)
