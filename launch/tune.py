"""Tunes the corrections of a run of launch.pipeline: ``python -m launch.tune --config=C --workdir=W --by=score``.

Which steps to correct and how strongly, for a sampler of the run (``--solver=rk4 --steps=8``, or ``flow_map``), chosen
on noise of its own: W/tuning. It prints what the config's ``corrections`` take; run it again to go on after a kill.
"""

import functools

from absl import app, flags
from ml_collections import config_flags

from fmjax.experiments import command_line, tune

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.", required=True)
BY = flags.DEFINE_string("by", "score", "The corrector, of the config's correctors.")
SOLVER = flags.DEFINE_string("solver", "rk4", "The sampler's solver, or flow_map.")
STEPS = flags.DEFINE_integer("steps", 8, "Its steps.", lower_bound=1)
METRIC = flags.DEFINE_string("metric", None, "The distance to make small, by default the first of the run's.")
MOST = flags.DEFINE_integer("most", 3, "The most corrections.", lower_bound=1)
SEEDS = flags.DEFINE_integer("seeds", 4, "Runs of samples that a value is the mean of.", lower_bound=1)
ALPHA = flags.DEFINE_multi_float("alpha", [], "A strength to try, repeated; by default some.")
BETA = flags.DEFINE_multi_float("beta", [], "A noise to try, repeated; by default shares of a score's noise level.")
flags.mark_flag_as_required("config")


def main(_):
    """Tunes."""
    how = {"by": BY.value, "solver": SOLVER.value, "steps": STEPS.value, "metric": METRIC.value, "most": MOST.value}
    run = functools.partial(tune.main, seeds=SEEDS.value, alphas=ALPHA.value, betas=BETA.value, **how)
    command_line.in_one_line(run, CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
