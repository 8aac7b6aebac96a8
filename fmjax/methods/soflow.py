"""SoFlow: discrete Eulerian flow maps of a short first step."""

from __future__ import annotations

from fmjax import paths, times
from fmjax.methods.alpha_flow import alpha_flow
from fmjax.types import Method, Net


def soflow(
    net: Net,
    *,
    path: paths.Path | None = None,
    time=times.uniform,
    pair=times.ordered_pair,
    diagonal: float = 0.75,
    share=times.exponential_fraction,
) -> Method:
    """``|X_{s,t}(I_s) - sg X_{m,t}(I_s + (m - s) dI_s)|^2 / (m - s)^2`` (arXiv 2512.15657).

    It is ``alpha_flow`` with the weight ``a^-2``, ``a = (m - s) / (t - s)`` falling from 0.1 to 0.002 as the training
    goes on. The paper's times: ``time`` logit-normal of mean 0.2, std 1, ``pair=times.two_times``. Raises as
    ``alpha_flow`` does.
    """
    return alpha_flow(net, path=path, time=time, pair=pair, diagonal=diagonal, share=share, power=2.0)
