"""The whole road of a config: ``python -m launch.pipeline --config=configs/digits.py --workdir=W``.

Flow, marginals, corrector, flow map, samples, comparison: metrics.json and report.html in the workdir. Run it again to
resume.
"""

from absl import app, flags
from ml_collections import config_flags

from fmjax.experiments import command_line, pipeline
from fmjax.training import sharding

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.", required=True)
flags.mark_flag_as_required("config")


def main(_):
    """Runs the pipeline."""
    command_line.in_one_line(sharding.start)
    command_line.in_one_line(pipeline.main, CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
