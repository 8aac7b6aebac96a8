"""Images on disk are the images, a pixel a pixel, grey ones grey."""

import numpy as np
import pytest
from PIL import Image

from fmjax.storage import images


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_an_image_is_stored_in_its_own_channels(channels, mode, tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (5, 7, channels))
    file = images.save_image(tmp_path / "x.png", (levels / 127.5 - 1).astype(np.float32))
    with Image.open(file) as stored:
        assert stored.mode == mode
        np.testing.assert_array_equal(np.asarray(stored).reshape(levels.shape), levels)
