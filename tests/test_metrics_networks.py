"""Inception and DINOv2 from weight files: numpy versions and the authors' networks on the same random weights."""

import hashlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from feature_networks import dinov2, dinov2_net, dinov2_state, inception, inception_state
from PIL import Image

from fmjax import metrics
from fmjax.convert import weights
from fmjax.convert.extractors import dinov2_parameters, inception_parameters
from fmjax.metrics import extractors, feature_references, resizing
from fmjax.metrics.inception import Inception

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (3, 32, 32, 3)).astype(np.float32)
PICTURES = BYTES / 127.5 - 1


def data(x=PICTURES):
    split = SimpleNamespace(x=x, cond=None)
    return SimpleNamespace(train=split, kind="image", levels=256, classes=0)


def relative(a, b):
    return np.abs(np.asarray(a) - b).max() / np.abs(b).max()


@pytest.mark.parametrize("size", [28, 40, 299, 400])
def test_the_clean_resize_is_pillows(size):
    """Pillow's bicubic filter in floats, channel by channel, as clean-fid uses it."""
    x = RNG.integers(0, 256, (1, 300, 300, 2)).astype(np.float32) if size == 299 else BYTES[:1, :, :, :2]
    ours = np.asarray(metrics.resize(jax.numpy.asarray(x), size, way="clean"))[0]
    for c in range(2):
        theirs = np.asarray(Image.fromarray(x[0, :, :, c], "F").resize((size, size), Image.BICUBIC)).clip(0, 255)
        np.testing.assert_allclose(ours[..., c], theirs, atol=0.02)


@pytest.mark.parametrize("size", [20, 75, 299])
def test_the_legacy_resize_interpolates_from_the_corner(size):
    """Pixel by pixel: the source of a pixel is its index times the ratio of sizes, and the border is repeated."""
    x, last = BYTES[0, :, :, 0].astype(np.float64), 31
    expected = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            (a, u), (b, v) = (divmod(k * 32 / size, 1) for k in (i, j))
            a, b = int(a), int(b)
            rows = [x[min(r, last), b] * (1 - v) + x[min(r, last), min(b + 1, last)] * v for r in (a, a + 1)]
            expected[i, j] = rows[0] * (1 - u) + rows[1] * u
    ours = metrics.resize(jax.numpy.asarray(BYTES[:1]), size, way="legacy")[0, :, :, 0]
    np.testing.assert_allclose(ours, expected, atol=2e-2)


def test_inception_is_the_network_in_numpy():
    """Images so large that the last pools see 3 x 2 places."""
    state = inception_state()
    x = jax.numpy.asarray(RNG.normal(size=(2, 139, 107, 3)), np.float32)
    features, logits = Inception(classes=10, thin=16).apply({"params": inception_parameters(state)}, x)
    theirs = inception(state, x)
    assert features.shape[1] == theirs[0].shape[1] > 100
    assert relative(features, theirs[0]) < 1e-5 and relative(logits, theirs[1]) < 1e-5


def test_dinov2_is_the_network_in_numpy():
    state = dinov2_state(width=128)
    net, params = dinov2_net(state)
    assert (net.depth, net.heads, net.patch) == (2, 2, 14)
    x = jax.numpy.asarray(RNG.normal(size=(2, 42, 42, 3)), np.float32)
    assert relative(net.apply({"params": params}, x), dinov2(state, x)) < 1e-5


def test_the_embedding_of_places_is_interpolated_as_the_authors_do():
    """Keys' kernel with a = -3/4, place by place; the scale is (patches + 0.1) over the size, the border repeated."""

    def kernel(t, a=-0.75):
        t = abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    state = dinov2_state(grid=37)
    old = state["pos_embed"][0, 1:].reshape(37, 37, 64)
    places = dinov2_parameters(state, patches=16)[0]["pos_embed"]
    assert places.shape == (1, 257, 64) and (places[:, 0] == state["pos_embed"][:, 0]).all()
    grid = places[0, 1:].reshape(16, 16, 64)
    for i, j in ((0, 0), (3, 9), (15, 0), (15, 15), (7, 12)):
        y, x = ((k + 0.5) * 37 / 16.1 - 0.5 for k in (i, j))
        around = lambda v: range(int(np.floor(v)) - 1, int(np.floor(v)) + 3)
        inside = lambda k: min(max(k, 0), 36)
        total = sum(kernel(y - p) * kernel(x - q) * old[inside(p), inside(q)] for p in around(y) for q in around(x))
        np.testing.assert_allclose(grid[i, j], total, atol=1e-5)
    ours = dinov2_parameters(dinov2_state(grid=16), patches=16)[0]["pos_embed"]
    assert (ours == dinov2_state(grid=16)["pos_embed"]).all()


@pytest.fixture
def small_inception(monkeypatch, tmp_path):
    """An extractor of a thin network on enlargements to 79 pixels, its file and its state dict."""
    monkeypatch.setattr(extractors, "Inception", lambda classes: Inception(classes=classes, thin=16))
    monkeypatch.setattr(extractors, "INCEPTION_SIZE", 79)
    state = inception_state()
    weights.write(tmp_path / "inception.safetensors", state)
    return tmp_path / "inception.safetensors", state


def test_the_extractor_rounds_resizes_and_scales_as_published(small_inception):
    file, state = small_inception
    net = extractors.inception(data(), weights=str(file))
    shifted = PICTURES + RNG.uniform(-0.4, 0.4, PICTURES.shape) / 127.5  # less than half a grey level
    enlarged = np.asarray(resizing.resize(jax.numpy.asarray(BYTES), 79, way="legacy"))
    theirs = inception(state, (enlarged - 128) / 128)
    assert relative(metrics.embed(net, shifted), theirs[0]) < 1e-5
    assert relative(net.logits(PICTURES), theirs[1]) < 1e-5
    assert (net.name, net.levels, net.slow) == ("inception-legacy", 256, True)
    assert net.weights == hashlib.sha256(file.read_bytes()).hexdigest()
    clean = extractors.inception(data(), weights=str(file), resize="clean")
    assert clean.name == "inception-clean" and relative(metrics.embed(clean, PICTURES), theirs[0]) > 1e-3


def test_grey_images_get_three_colours_and_blocks_do_not_show(small_inception, monkeypatch):
    file, _ = small_inception
    monkeypatch.setattr(extractors, "BLOCK", 2)
    grey = PICTURES[..., :1]
    colours = metrics.embed(extractors.inception(data(), weights=str(file)), grey.repeat(3, -1))
    np.testing.assert_array_equal(metrics.embed(extractors.inception(data(grey), weights=str(file)), grey), colours)


def test_only_the_public_weights_give_a_distance_named_fid(small_inception, monkeypatch, tmp_path):
    file, _ = small_inception
    statistics = tmp_path / "reference.npz"
    d = inception_state()["fc.weight"].shape[1]
    np.savez(statistics, mu=np.zeros(d), sigma=np.eye(d))
    build = lambda resize="legacy": feature_references.frechet_to(
        data(), data().train, statistics=str(statistics),
        features=lambda d: extractors.inception(d, weights=str(file), resize=resize),
    ).name  # fmt: skip
    assert build() == "FD[inception-legacy]"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(feature_references, "FID_WEIGHTS", digest)
    assert (build(), build("clean")) == ("FID[legacy]", "FID[clean]")


def test_the_dinov2_extractor_reads_a_file_and_normalises_colours(tmp_path):
    state = dinov2_state(depth=1, grid=16)
    weights.write(tmp_path / "vit.safetensors", state)
    net = extractors.dinov2(data(), weights=str(tmp_path / "vit.safetensors"))
    enlarged = np.asarray(resizing.resize(jax.numpy.asarray(BYTES[:1]), 224)) / 255
    theirs = dinov2(state, (enlarged - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])
    assert net.name == "dinov2-64-clean" and relative(metrics.embed(net, PICTURES[:1]), theirs) < 1e-4


def test_files_of_other_networks_and_programs_are_refused(tmp_path, small_inception):
    file, state = small_inception
    missing = tmp_path / "none.pth"
    with pytest.raises(ValueError, match="^weights=.*no such file"):
        extractors.inception(data(), weights=str(missing))
    (tmp_path / "program.pth").write_bytes(b"cos\nsystem\n(S'echo'\ntR.")
    with pytest.raises(ValueError, match="^weights=.*program.pth"):
        extractors.inception(data(), weights=str(tmp_path / "program.pth"))
    for change in ({"Mixed_9z.conv.weight": np.ones((1, 1, 1, 1), np.float32)}, {"fc.weight": None}):
        other = {k: a for k, a in (state | change).items() if a is not None}
        weights.write(tmp_path / "other.safetensors", other)
        with pytest.raises(ValueError, match=r"^weights=.*(Mixed_9z|fc\.weight)"):
            extractors.inception(data(), weights=str(tmp_path / "other.safetensors"))
    weights.write(
        tmp_path / "registers.safetensors", dinov2_state() | {"register_tokens": np.ones((1, 4, 64), np.float32)}
    )
    with pytest.raises(ValueError, match="^weights=.*register_tokens"):
        extractors.dinov2(data(), weights=str(tmp_path / "registers.safetensors"))
    with pytest.raises(ValueError, match="^weights=.*patch_embed"):
        extractors.dinov2(data(), weights=str(file))


def test_images_of_other_colours_and_other_data_are_refused(small_inception):
    with pytest.raises(ValueError, match="^channels=2: "):
        extractors.inception(data(PICTURES[..., :2]), weights=str(small_inception[0]))
    for factory in (extractors.inception, extractors.dinov2):
        points = SimpleNamespace(
            train=SimpleNamespace(x=np.ones((3, 2)), cond=None), kind="points", levels=None, classes=0
        )
        with pytest.raises(ValueError, match="^kind='points': "):
            factory(points, weights="x.pth")


def test_the_extractor_is_torch_fidelitys_network(tmp_path):
    """The published architecture in full, with random weights: pool 3 and the logits without bias, from bytes."""
    torch = pytest.importorskip("torch", reason="pip install torch torch-fidelity brings the network to compare with")
    theirs = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is not installed"
    )
    state = inception_state(thin=1, classes=1008)
    torch.save({k: torch.from_numpy(a.copy()) for k, a in state.items()}, tmp_path / "inception.pth")
    layers = ["2048", "logits_unbiased"]
    network = theirs.FeatureExtractorInceptionV3("i", layers, feature_extractor_weights_path=tmp_path / "inception.pth")
    with torch.no_grad():
        pool, logits = network(torch.from_numpy(BYTES.transpose(0, 3, 1, 2).astype(np.uint8)))
    net = extractors.inception(data(), weights=str(tmp_path / "inception.pth"))
    assert relative(metrics.embed(net, PICTURES), pool.numpy()) < 2e-5
    assert relative(net.logits(PICTURES), logits.numpy()) < 2e-5


def test_places_are_interpolated_as_torch_does():
    torch = pytest.importorskip("torch", reason="pip install torch brings the interpolation to compare with")
    state = dinov2_state(grid=37)
    grid = torch.from_numpy(state["pos_embed"][:, 1:].reshape(1, 37, 37, 64).transpose(0, 3, 1, 2))
    scale = float(16.1 / 37)
    theirs = torch.nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic").numpy()
    ours = dinov2_parameters(state, patches=16)[0]["pos_embed"][0, 1:].reshape(16, 16, 64)
    np.testing.assert_allclose(ours, theirs[0].transpose(1, 2, 0), atol=1e-5)
