"""The Inception network of 2015 whose third pooling gives the features of FID, KID and the Inception score.

It differs from later Inception networks: average pools leave the padding out, and the last block has a maximum pool.
The batch norms are folded into the convolutions (``fmjax.convert.extractors``).
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.checks import Positive, check_fields

SIZE = 299  # pixels on a side of an image


class Inception(nn.Module):
    """The network; ``__call__`` returns the features of pool 3 and the logits without bias.

    Attributes:
        classes: the number of logits.
        thin: a divisor of all widths; 1 is the published network.
    """

    classes: Positive = 1008
    thin: Positive = 1

    def __post_init__(self):
        """Check the fields."""
        check_fields(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "n h w 3"]) -> tuple[Float[Array, "n features"], Float[Array, "n classes"]]:
        """Return features and logits of images.

        Args:
            x: images ``[n, h, w, 3]``, at least 75 pixels on a side; the published network has 299, scaled by
                ``(u - 128) / 128``.

        Returns:
            Features ``[n, 2048]`` and logits ``[n, classes]``.
        """
        c = self._conv
        x = c("Conv2d_1a_3x3", x, 32, (3, 3), stride=2)
        x = c("Conv2d_2a_3x3", x, 32, (3, 3))
        x = c("Conv2d_2b_3x3", x, 64, (3, 3), (1, 1))
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = c("Conv2d_3b_1x1", x, 80)
        x = c("Conv2d_4a_3x3", x, 192, (3, 3))
        x = nn.max_pool(x, (3, 3), (2, 2))
        for name, pooled in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = self._block_a(f"Mixed_{name}", x, pooled)
        x = self._block_b("Mixed_6a", x)
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x = self._block_c(f"Mixed_{name}", x, width)
        x = self._block_d("Mixed_7a", x)
        x = self._block_e("Mixed_7b", x, _average)
        x = self._block_e("Mixed_7c", x, _maximum)
        features = x.mean((1, 2))
        return features, nn.Dense(self.classes, use_bias=False, precision="highest", name="fc")(features)

    def _conv(self, name, x, width, kernel=(1, 1), padding=(0, 0), stride=1):
        pads = tuple((p, p) for p in padding)
        width = max(1, width // self.thin)
        return nn.relu(nn.Conv(width, kernel, (stride, stride), pads, precision="highest", name=name)(x))

    def _chain(self, block, x, *layers):
        """Apply convolutions one after the other, each given by name, width, kernel, padding and stride."""
        for name, *rest in layers:
            x = self._conv(f"{block}.{name}", x, *rest)
        return x

    def _block_a(self, b, x, pooled):
        single = self._chain(b, x, ("branch1x1", 64))
        five = self._chain(b, x, ("branch5x5_1", 48), ("branch5x5_2", 64, (5, 5), (2, 2)))
        three = self._chain(
            b, x, ("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, (3, 3), (1, 1)),
            ("branch3x3dbl_3", 96, (3, 3), (1, 1)),
        )  # fmt: skip
        pool = self._chain(b, _average(x), ("branch_pool", pooled))
        return jnp.concatenate([single, five, three, pool], -1)

    def _block_b(self, b, x):
        three = self._chain(b, x, ("branch3x3", 384, (3, 3), (0, 0), 2))
        double = self._chain(
            b, x, ("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, (3, 3), (1, 1)),
            ("branch3x3dbl_3", 96, (3, 3), (0, 0), 2),
        )  # fmt: skip
        return jnp.concatenate([three, double, nn.max_pool(x, (3, 3), (2, 2))], -1)

    def _block_c(self, b, x, width):
        wide, tall = ((1, 7), (0, 3)), ((7, 1), (3, 0))
        single = self._chain(b, x, ("branch1x1", 192))
        seven = self._chain(
            b, x, ("branch7x7_1", width), ("branch7x7_2", width, *wide), ("branch7x7_3", 192, *tall)
        )  # fmt: skip
        double = self._chain(
            b, x, ("branch7x7dbl_1", width), ("branch7x7dbl_2", width, *tall), ("branch7x7dbl_3", width, *wide),
            ("branch7x7dbl_4", width, *tall), ("branch7x7dbl_5", 192, *wide),
        )  # fmt: skip
        pool = self._chain(b, _average(x), ("branch_pool", 192))
        return jnp.concatenate([single, seven, double, pool], -1)

    def _block_d(self, b, x):
        three = self._chain(b, x, ("branch3x3_1", 192), ("branch3x3_2", 320, (3, 3), (0, 0), 2))
        seven = self._chain(
            b, x, ("branch7x7x3_1", 192), ("branch7x7x3_2", 192, (1, 7), (0, 3)),
            ("branch7x7x3_3", 192, (7, 1), (3, 0)), ("branch7x7x3_4", 192, (3, 3), (0, 0), 2),
        )  # fmt: skip
        return jnp.concatenate([three, seven, nn.max_pool(x, (3, 3), (2, 2))], -1)

    def _block_e(self, b, x, pool):
        wide, tall = ((1, 3), (0, 1)), ((3, 1), (1, 0))
        single = self._chain(b, x, ("branch1x1", 320))
        three = self._chain(b, x, ("branch3x3_1", 384))
        double = self._chain(b, x, ("branch3x3dbl_1", 448), ("branch3x3dbl_2", 384, (3, 3), (1, 1)))
        parts = [
            self._chain(b, y, (f"{name}{end}", 384, *shape))
            for name, y in (("branch3x3_2", three), ("branch3x3dbl_3", double))
            for end, shape in (("a", wide), ("b", tall))
        ]
        return jnp.concatenate([single, *parts, self._chain(b, pool(x), ("branch_pool", 192))], -1)


def _average(x: Array) -> Array:
    return nn.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)), count_include_pad=False)


def _maximum(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)))
