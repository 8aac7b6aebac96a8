"""A transformer on tokens of discrete data, which can leave out the token of the site that it predicts."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fmjax.nets import base
from fmjax.nets.embedding import TwoTimes, condition


class TokenNet(base.Checked):
    """Map integer states ``[B, ...]`` to logits ``[B, ..., tokens]`` by attention over all sites.

    A block is ``h + attention(norm(h), keys)`` and ``h + mlp(norm(h) (1 + a) + b)``, with ``a`` and ``b`` linear in the
    embedding of the times. A hollow network starts at the positions alone, and in every block a site reads the embedded
    tokens of the *other* sites only, so that its logits do not depend on its own token, whatever the depth. The output
    starts at zero.

    Attributes:
        tokens: number of tokens of the data; the network also takes the mask, the token after these.
        width: width of the blocks, divisible by ``heads``.
        depth: number of blocks.
        heads: number of attention heads.
        hollow: whether the logits of a site must not depend on the token of that site.
        classes: number of labels; 0: the network takes no condition.
        dtype: type of the computation.

    >>> import jax, jax.numpy as jnp
    >>> from fmjax import nets
    >>> model = nets.from_linen(TokenNet(tokens=3, width=8, depth=1, heads=2))
    >>> params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), int))
    >>> jax.eval_shape(model.net, params, jnp.zeros((2, 4), int), 0.0, 0.0).shape
    (2, 4, 3)
    """

    tokens: base.Classes = 2
    width: base.Width = 128
    depth: base.Depth = 3
    heads: base.Outputs = 4
    hollow: bool = False
    classes: base.Classes = 0
    dtype: base.Dtype = "float32"

    @nn.compact
    def __call__(
        self, x: Int[Array, "b ..."], s: Float[Array, " b"], t: Float[Array, " b"], cond=None, *, train: bool = False
    ) -> Array:
        """Return the logits ``[B, ..., tokens]``."""
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"x={x.dtype}{list(x.shape)}: this network takes tokens, integers. Take 'mlp' for floats.")
        dense = lambda features, **kw: nn.Dense(features, dtype=self.dtype, **kw)
        norm = lambda h: nn.LayerNorm(use_bias=False, use_scale=False, dtype=self.dtype)(h)
        e = nn.silu(condition(TwoTimes(self.width)(s, t), cond, classes=self.classes))
        shape, sites = x.shape, int(np.prod(x.shape[1:]))
        place = self.param("positions", nn.initializers.normal(0.3), (sites, self.width))
        embedded = nn.Embed(self.tokens + 1, self.width, dtype=self.dtype, name="tokens_in")(x.reshape(len(x), sites))
        embedded = embedded + place
        h = jnp.broadcast_to(place, embedded.shape) if self.hollow else embedded
        mask = ~jnp.eye(sites, dtype=bool)[None, None] if self.hollow else None
        heads = lambda y: y.reshape(*y.shape[:2], self.heads, self.width // self.heads)
        for i in range(self.depth):
            memory = embedded if self.hollow else norm(h)
            q = heads(dense(self.width, name=f"query_{i}")(norm(h)))
            k, v = (heads(dense(self.width, name=f"{name}_{i}")(memory)) for name in ("key", "value"))
            y = jax.nn.dot_product_attention(q, k, v, mask=mask).reshape(h.shape)
            h += dense(self.width, name=f"out_{i}")(y)
            a, b = jnp.split(dense(2 * self.width, name=f"film_{i}")(e)[:, None], 2, -1)
            y = nn.gelu(dense(2 * self.width, name=f"up_{i}")(norm(h) * (1 + a) + b))
            h += dense(self.width, name=f"down_{i}")(y)
        logits = nn.Dense(self.tokens, kernel_init=nn.initializers.zeros, name="output")(norm(h))
        return logits.reshape(*shape, self.tokens)
