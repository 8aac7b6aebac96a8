"""Builds the marginals of the flow that launch.train left in W: ``python -m launch.marginals --config=C --workdir=W``.

Forward ones from noise, backward ones from the training data, on the grid of the config (``--config.solver_steps=10``,
``--config.solver=flow_map`` for a learned map), into W/marginals. Size and time are told first; run it again to go on
after a kill. ``FMJAX_DISTRIBUTED=1`` joins several processes, each of which builds its share.
"""

import functools

from absl import app, flags
from ml_collections import config_flags

from fmjax.experiments import command_line, marginals
from fmjax.training import sharding

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.", required=True)
DIRECTION = flags.DEFINE_enum("direction", "both", ["both", "forward", "backward"], "Which marginals.")
OUT = flags.DEFINE_string("out", None, "Where to, by default W/marginals: another grid needs another folder.")
STEPS = flags.DEFINE_multi_integer("steps", None, "An index of the grid to store, repeated; by default all.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "The numbers that are stored.")
TOL = flags.DEFINE_float("tol", 1e-4, "The residual at which an inverse step has converged, relative rms.")
flags.mark_flag_as_required("config")


def main(_):
    """Builds."""
    command_line.in_one_line(sharding.start)
    how = {"out": OUT.value, "steps": STEPS.value, "dtype": DTYPE.value, "tol": TOL.value}
    command_line.in_one_line(
        functools.partial(marginals.main, direction=DIRECTION.value, **how), CONFIG.value, WORKDIR.value
    )


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
