"""Evaluates the flow of a config that launch.train left in W: ``python -m launch.evaluate --config=C --workdir=W``.

Draws ``cfg.sampling``'s samplers and compares them with held-out data: evaluation.json and report.html in W. Other
samplers than the training's: ``--config.sampling.euler="(2, 4)"``, ``--config.guidance=2.0``.
"""

from absl import app, flags
from ml_collections import config_flags

from fmjax.experiments import command_line, evaluate

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.", required=True)
flags.mark_flag_as_required("config")


def main(_):
    """Evaluates."""
    command_line.in_one_line(evaluate.main, CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
