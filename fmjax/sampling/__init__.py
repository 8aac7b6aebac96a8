"""Samplers: the scan over a time grid, solver steps, time grids, guidance and likelihood."""

from fmjax.sampling.adaptive import checked_solve, diffrax_solver, from_diffrax, integrate
from fmjax.sampling.conversions import as_flow, denoiser, velocity_of
from fmjax.sampling.costs import Cost, cost, evaluations
from fmjax.sampling.diffusion import ddim, edm_heun, reverse_diffusion
from fmjax.sampling.explicit import Tableau, euler, heun, midpoint, rk4, rk38, runge_kutta, tableau
from fmjax.sampling.exponential import dpmpp_2m, dpmpp_2s, dpmpp_3m, unipc
from fmjax.sampling.fixed_point import anderson, inverse
from fmjax.sampling.folding import Folds, fold, folded, reflected
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
from fmjax.sampling.particles import (
    Weights,
    effective_sample_size,
    particle_keys,
    resample,
    systematic,
    weighted,
)
from fmjax.sampling.regularity import chord_deviation, component_fractions, jump_distance, length_ratio
from fmjax.sampling.sample import SampleInfo, renoised, sample, source_sample, with_memory
from fmjax.sampling.shifted_grids import resolution_grid, shifted_grid
from fmjax.sampling.steering import controlled, glass, posterior_velocity
from fmjax.sampling.stochastic import draw_noise, euler_maruyama, memoryless, stochastic_heun
from fmjax.sampling.tilts import Tilt, guided_tilt, power_product, reward_tilt

__all__ = [
    "Channel", "Cost", "Density", "Folds", "SampleInfo", "Tableau", "Tilt", "Weights", "added", "anderson",
    "as_flow", "at_scale", "autoguidance", "autoguided_teacher", "best_steps", "bits_per_dim", "check_at",
    "check_grid", "checked_density", "checked_solve", "chord_deviation", "classifier_free",
    "component_fractions", "controlled", "cost", "curvature", "ddim", "default_grid", "denoiser",
    "density_ratio", "dequantise", "diffrax_solver", "divergence", "dpmpp_2m", "dpmpp_2s", "dpmpp_3m",
    "draw_noise", "draw_probes", "edm_grid", "edm_heun", "effective_sample_size", "euler", "euler_maruyama",
    "evaluations", "even_grid", "flow_map_log_density", "flow_rates", "fold", "folded", "from_diffrax",
    "generator_rows", "glass", "guided_teacher", "guided_tilt", "heun", "hutchinson", "initial_noise",
    "integrate", "interval", "inverse", "ipndm", "jump_corrector", "jump_costs", "jump_distance",
    "label_dropout", "length_ratio", "log_density", "log_snr_grid", "memoryless", "midpoint", "particle_keys",
    "per_step", "posterior_velocity", "power_product", "push_with_log_det", "random_scale", "reflected",
    "renoised", "resample", "resolution_grid", "reverse_diffusion", "reverse_rates", "reward_tilt", "rk38",
    "rk4", "runge_kutta", "same_times", "sample", "shifted_grid", "source_sample", "steps_at",
    "steps_per_segment", "stochastic_heun", "systematic", "tableau", "tau_leaping", "token_bound",
    "uniform_grid", "unipc", "velocity_of", "weighted", "with_memory",
]  # fmt: skip
