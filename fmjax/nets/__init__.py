"""Networks, and adapters from the modules of other libraries."""

from fmjax.nets import embedding, preconditioning, remat, state
from fmjax.nets.adapters import (
    Model,
    from_equinox,
    from_linen,
    from_nnx,
    one_time,
    trigonometric_velocity,
    with_encoder,
)
from fmjax.nets.dit import DiT
from fmjax.nets.encoder import Encoder
from fmjax.nets.mlp import MLP
from fmjax.nets.plain import Plain
from fmjax.nets.song_unet import SongUNet
from fmjax.nets.temporal_net import TemporalNet
from fmjax.nets.token_net import TokenNet
from fmjax.nets.unet import UNet

__all__ = [
    "DiT", "Encoder", "MLP", "Model", "Plain", "SongUNet", "TemporalNet", "TokenNet", "UNet", "embedding",
    "from_equinox", "from_linen", "from_nnx", "one_time", "preconditioning", "remat", "state",
    "trigonometric_velocity", "with_encoder",
]  # fmt: skip
