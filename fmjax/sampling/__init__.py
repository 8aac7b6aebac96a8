"""Samplers: the scan over a time grid, solver steps, time grids, guidance and likelihood."""

from fmjax.sampling.adaptive import checked_solve, diffrax_solver, from_diffrax, integrate
from fmjax.sampling.conversions import as_flow, denoiser, velocity_of
from fmjax.sampling.costs import Cost, cost, evaluations
from fmjax.sampling.diffusion import ddim, edm_heun, reverse_diffusion
from fmjax.sampling.explicit import Tableau, euler, heun, midpoint, rk4, rk38, runge_kutta, tableau
from fmjax.sampling.exponential import dpmpp_2m, dpmpp_2s, dpmpp_3m, unipc
from fmjax.sampling.fixed_point import anderson, inverse
from fmjax.sampling.grid_search import best_steps, curvature, even_grid, jump_costs, steps_per_segment
from fmjax.sampling.grids import (
    check_at,
    check_grid,
    default_grid,
    edm_grid,
    log_snr_grid,
    per_step,
    same_times,
    steps_at,
    uniform_grid,
)
from fmjax.sampling.guidance import added, at_scale, autoguidance, classifier_free, density_ratio, interval
from fmjax.sampling.guided_training import autoguided_teacher, guided_teacher, label_dropout, random_scale
from fmjax.sampling.jumps import (
    Channel,
    flow_rates,
    generator_rows,
    jump_corrector,
    reverse_rates,
    tau_leaping,
    token_bound,
)
from fmjax.sampling.likelihood import (
    Density,
    bits_per_dim,
    checked_density,
    dequantise,
    divergence,
    draw_probes,
    flow_map_log_density,
    hutchinson,
    log_density,
)
from fmjax.sampling.log_det import push_with_log_det
from fmjax.sampling.multistep import initial_noise, ipndm
from fmjax.sampling.sample import SampleInfo, renoised, sample, source_sample, with_memory
from fmjax.sampling.shifted_grids import resolution_grid, shifted_grid
from fmjax.sampling.stochastic import draw_noise, euler_maruyama, memoryless, stochastic_heun

__all__ = [
    "Channel", "Cost", "Density", "SampleInfo", "Tableau", "added", "anderson", "as_flow", "at_scale",
    "autoguidance", "autoguided_teacher", "best_steps", "bits_per_dim", "check_at", "check_grid",
    "checked_density", "checked_solve", "classifier_free", "cost", "curvature", "ddim", "default_grid",
    "denoiser", "density_ratio", "dequantise", "diffrax_solver", "divergence", "dpmpp_2m", "dpmpp_2s",
    "dpmpp_3m", "draw_noise", "draw_probes", "edm_grid", "edm_heun", "euler", "euler_maruyama", "evaluations",
    "even_grid", "flow_map_log_density", "flow_rates", "from_diffrax", "generator_rows", "guided_teacher",
    "heun", "hutchinson", "initial_noise", "integrate", "interval", "inverse", "ipndm", "jump_corrector",
    "jump_costs", "label_dropout", "log_density", "log_snr_grid", "memoryless", "midpoint", "per_step",
    "push_with_log_det", "random_scale", "renoised", "resolution_grid", "reverse_diffusion", "reverse_rates",
    "rk38", "rk4", "runge_kutta", "same_times", "sample", "shifted_grid", "source_sample", "steps_at",
    "steps_per_segment", "stochastic_heun", "tableau", "tau_leaping", "token_bound", "uniform_grid", "unipc",
    "velocity_of", "with_memory",
]  # fmt: skip
