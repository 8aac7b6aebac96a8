"""Decode image files of any mode and size to one shape: what ``folder``, ``tfds`` and ``huggingface`` do alike."""

from __future__ import annotations

import io
import math
from typing import Annotated, Any, Literal

import numpy as np

from fmjax.checks import Range

FORMATS = ("PNG", "JPEG", "WEBP")
PIXELS = 2**26  # of one file: a small file can unpack to gigabytes
Channels = Literal[1, 3]
Size = Annotated[int, Range(1, 4096)]


def decode_image(file: Any, *, size: int | None, channels: int) -> np.ndarray:
    """Decode an image file.

    The orientation that a camera notes is applied. 16-bit grey is rounded to 8 bits. Transparent pixels are shown on
    white. Colours become grey, or grey becomes three equal channels, as ``channels`` says.

    Args:
        file: an open file, or its bytes.
        size: height and width of the result; see ``fit_image``. ``None`` keeps the size.
        channels: 1 for grey, 3 for colours.

    Returns:
        The image ``[H, W, channels]``, uint8.

    Raises:
        ValueError: for another format, a damaged file, or an image of more than ``PIXELS`` pixels.

    >>> from PIL import Image
    >>> buffer = io.BytesIO()
    >>> Image.new("LA", (3, 2), (40, 0)).save(buffer, "png")
    >>> decode_image(buffer.getvalue(), size=None, channels=3).tolist()[0][0]
    [255, 255, 255]
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
            if math.prod(image.size) > PIXELS:
                raise ValueError(f"it has {image.size[0]} x {image.size[1]} pixels, more than {PIXELS}")
            return fit_image(image, size=size, channels=channels)
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:  # what Pillow raises
        raise ValueError(f"it is damaged, or no {', '.join(FORMATS)} file ({type(error).__name__})") from error


def fit_image(image: Any, *, size: int | None, channels: int) -> np.ndarray:
    """Return an image of Pillow as pixels of one size and number of channels.

    An image of another size is resized (bicubic) so that its shorter side is ``size``, and its middle is taken. An
    image of this size keeps its pixels to the bit.

    Args:
        image: the image of Pillow, or an array ``[H, W]`` or ``[H, W, C]``, uint8.
        size: height and width of the result; ``None`` keeps the size.
        channels: 1 for grey, 3 for colours.

    Returns:
        The image ``[H, W, channels]``, uint8.

    Raises:
        ValueError: for pixels of another type.

    >>> fit_image(np.zeros((4, 6), np.uint8), size=2, channels=3).shape
    (2, 2, 3)
    """
    from PIL import Image, ImageOps

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ValueError(f"it has pixels of {image.dtype}, not uint8")
        image = Image.fromarray(image[..., 0] if image.shape[-1:] == (1,) and image.ndim == 3 else image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _of_16_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and image.size != (size, size):
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    pixels = np.asarray(image)
    return pixels[..., None] if channels == 1 else pixels


def _of_16_bits(image: Any) -> Any:
    """Return an image of grey levels 0..65535 as one of 0..255: ``round(level / 257)``."""
    from PIL import Image

    levels = np.asarray(image)
    if image.mode == "F" or levels.min(initial=0) < 0 or levels.max(initial=0) > 65535:
        raise ValueError(f"its mode {image.mode} holds other levels than 8 or 16 bits")
    return Image.fromarray(((levels.astype(np.int64) * 2 + 257) // 514).astype(np.uint8))
