"""Trains the flow of a config: ``python -m launch.train --config=configs/digits.py --workdir=W [--config.steps=10]``.

The workdir gets config.json, environment.json, metrics.jsonl, tensorboard/, checkpoints/ and samples/; run it again to
resume. ``FMJAX_DISTRIBUTED=1`` joins the processes of a TPU pod or a GPU cluster.
"""

from absl import app, flags
from ml_collections import config_flags

from fmjax.experiments import assemble, command_line
from fmjax.training import sharding

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.", required=True)
flags.mark_flag_as_required("config")


def main(_):
    """Trains."""
    command_line.in_one_line(sharding.start)
    command_line.in_one_line(assemble.fit, CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
