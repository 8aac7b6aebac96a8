"""Samplers: the scan over a time grid, solvers, diffusion samplers, grids, guidance and likelihood."""

from fmjax.sampling.diffusion import (
    as_flow,
    ddim,
    denoiser,
    dpmpp_2m,
    edm_heun,
    initial_noise,
    ipndm,
    reverse_diffusion,
    velocity_of,
)
from fmjax.sampling.fixed_point import solve
from fmjax.sampling.grids import (
    best_steps,
    check_grid,
    curvature,
    edm_grid,
    even_grid,
    jump_costs,
    log_snr_grid,
    per_step,
    steps_at,
    steps_per_segment,
    uniform_grid,
)
from fmjax.sampling.guidance import (
    added,
    at_scale,
    autoguidance,
    autoguided_teacher,
    classifier_free,
    density_ratio,
    guided_teacher,
    interval,
    label_dropout,
    random_scale,
)
from fmjax.sampling.likelihood import (
    Density,
    bits_per_dim,
    dequantise,
    divergence,
    draw_probes,
    flow_map_log_density,
    hutchinson,
    log_density,
)
from fmjax.sampling.sample import Cost, check_at, cost, renoised, same_times, sample, with_memory
from fmjax.sampling.solvers import (
    Tableau,
    diffrax_solver,
    draw_noise,
    euler,
    euler_maruyama,
    from_diffrax,
    heun,
    integrate,
    inverse,
    memoryless,
    midpoint,
    nfe,
    rk4,
    rk38,
    runge_kutta,
    stochastic_heun,
    tableau,
)

__all__ = [
    "Cost", "Density", "Tableau", "added", "as_flow", "at_scale", "autoguidance", "autoguided_teacher",
    "best_steps", "bits_per_dim", "check_at", "check_grid", "classifier_free", "cost", "curvature", "ddim",
    "denoiser", "density_ratio", "dequantise", "diffrax_solver", "divergence", "dpmpp_2m", "draw_noise",
    "draw_probes", "edm_grid", "edm_heun", "euler", "euler_maruyama", "even_grid", "flow_map_log_density",
    "from_diffrax", "guided_teacher", "heun", "hutchinson", "initial_noise", "integrate", "interval", "inverse",
    "ipndm", "jump_costs", "label_dropout", "log_density", "log_snr_grid", "memoryless", "midpoint", "nfe",
    "per_step", "random_scale", "renoised", "reverse_diffusion", "rk38", "rk4", "runge_kutta", "same_times",
    "sample", "solve", "steps_at", "steps_per_segment", "stochastic_heun", "tableau", "uniform_grid", "velocity_of",
    "with_memory",
]  # fmt: skip
