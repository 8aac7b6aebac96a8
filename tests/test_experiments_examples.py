"""Pictures of examples: differences, nearest training examples, pairs of entries, marginals, films."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from fmjax.experiments import charts, examples, players


def decode(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_differences_of_images_have_three_rows_and_are_scaled_by_the_largest():
    y = np.zeros((2, 8, 8, 1))
    x = y + np.array([0.1, -0.2]).reshape(2, 1, 1, 1)
    figure = examples.difference_figure("fix", "plain", x, y)
    sheet = decode(figure.light)[..., 0]
    assert (figure.width, figure.height) == (2 * 42 + 2, 3 * 42 + 2)
    centre = lambda row, column: sheet[22 + 42 * row, 22 + 42 * column]
    levels = [np.floor(127.5 * v + 128) for v in (0, 0, 0.1, -0.2, 0.5, -1.0)]
    assert [centre(r, c) for r in range(3) for c in range(2)] == levels
    assert f"{np.sqrt((0.01 + 0.04) / 2):.3g}" in figure.remark and "±" not in figure.alt


@pytest.mark.parametrize("shape", [(20, 2), (20, 6), (20, 12, 1)])
def test_differences_of_other_kinds_state_their_size(shape):
    x = np.random.default_rng(0).standard_normal(shape)
    figure = examples.difference_figure("fix", "plain", x + 0.25, x)
    assert "Root mean square difference: 0.25." in figure.remark and decode(figure.dark)[..., 3].any()


def test_the_nearest_training_example_is_the_nearest():
    rng = np.random.default_rng(0)
    train = rng.standard_normal((30, 4, 4, 1))
    at, distance = examples.nearest_training(train[[7, 3]] + 0.01, train)
    assert list(at) == [7, 3]
    np.testing.assert_allclose(distance, 0.04, rtol=1e-6)  # 16 pixels
    x = rng.standard_normal((5, 4, 4, 1))
    brute = [min(np.linalg.norm(a - b) for b in train) for a in x]
    np.testing.assert_allclose(examples.nearest_training(x, train)[1], brute)


def test_neighbours_stand_below_their_samples():
    x, near = np.full((2, 8, 8, 1), 0.5), np.full((2, 8, 8, 1), -0.5)
    sheet = decode(examples.neighbour_figure("rk4", x, near, "Remark.").light)[..., 0]
    assert [sheet[22, 22], sheet[64, 22]] == [191, 64]


def test_vectors_are_drawn_as_pairs_over_the_data():
    rng = np.random.default_rng(0)
    data, x = rng.standard_normal((300, 5)), rng.standard_normal((100, 5)) + 1
    figure = examples.sample_figure("rk4", x, [], data)
    assert "pairs of 4 of 5 entries" in figure.alt and figure.remark == "The first 4 of 5 entries; grey: data."
    blue = lambda picture: (picture[..., 2].astype(int) - picture[..., 0] > 60) & (picture[..., 3] > 60)
    drawn = blue(decode(figure.light))
    height, width = drawn.shape
    assert drawn[height // 2 :, : width // 2].any()  # below the diagonal
    assert not drawn[: height // 4, int(0.45 * width) :].any()  # above the diagonal


def test_marginals_are_drawn_forward_above_and_backward_below():
    ts = np.linspace(0, 1, 9)
    p, q = np.zeros((40, 9, 2)), np.ones((30, 9, 2))
    figure = examples.marginal_figure("both", ts, p, q)
    assert "at 6 times" in figure.alt
    picture = decode(figure.light)
    half = picture.shape[0] // 2
    paint = lambda part, c: (part[..., :3] == [int(c[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum()
    above, below = charts.LIGHT.colours[1], charts.LIGHT.colours[0]
    assert paint(picture[:half], above) > 0 == paint(picture[half:], above)
    assert paint(picture[half:], below) > 0 == paint(picture[:half], below)
    assert examples.marginal_figure("series", ts, np.zeros((4, 9, 6, 1)), np.ones((4, 9, 6, 1))).remark


def test_a_film_has_its_frames_side_by_side():
    x = np.broadcast_to(np.linspace(-1, 1, 50).reshape(-1, 1, 1, 1, 1), (50, 3, 8, 8, 1))
    film = players.player("path", x)
    sheet = decode(film.film.light)[..., 0]
    assert film.frames == players.FRAMES == len(film.times) and film.times[0] == 0 and film.times[-1] == 49
    assert sheet.shape == (film.film.height, film.frames * film.film.width)
    shades = [sheet[22, 22 + i * film.film.width] for i in range(film.frames)]
    assert shades == [np.floor(127.5 * x[t, 0, 0, 0, 0] + 128).clip(0, 255) for t in film.times]


def test_points_move_in_one_frame_with_the_second_axis_upwards():
    x = np.array([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 1.0]]])
    frames = [[tuple(map(float, p.split(","))) for p in f.split(" ")] for f in players.player("p", x).points.split(";")]
    assert frames == [[(10.0, 290.0), (290.0, 290.0)], [(10.0, 10.0), (290.0, 10.0)]]


def test_labels_of_points_do_not_cover_each_other():
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure((7, 5))
    axes = figure.add_subplot()
    points = np.stack([np.full(15, 32.0), np.linspace(1.0, 1.2, 15)], 1)  # crowded
    axes.scatter(*points.T)
    axes.set(xlim=(1, 64), ylim=(0.5, 2.0))
    names = [f"score at {i}" for i in range(15)]
    charts.place_labels(axes, points, names, ["black"] * 15)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the leading lines
    assert [text.get_text() for text in sorted(axes.texts, key=lambda t: names.index(t.get_text()))] == names
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
