"""Train a stage of a config, by default the flow.

  python -m launch.train --config=configs/digits.py --workdir=W [--config.steps=10]   # the flow
  python -m launch.train --workdir=W --stage=correctors.score                         # another stage of that run
  python -m launch.train --workdir=NEW --config=C --fork=OLD                          # from another run's whole state

The run folder gets config.json, environment.json and a folder a stage with metrics.jsonl, tensorboard/,
checkpoints/ and samples/. Run a command again to continue. FMJAX_DISTRIBUTED=1 joins the processes of a TPU pod or a
GPU cluster.
"""

from fmjax.experiments import command_line, train
from fmjax.experiments.command_line import Option

OPTIONS = (
    Option("stage", str, "flow", "flow, marginals, correctors.NAME, flow_map, trajectories or straighten.NAME"),
    Option("fork", str, None, "run folder whose whole state of the stage a new run starts from"),
)


def main(argv=None):
    """Train."""
    command_line.run(train.main, __doc__, *OPTIONS, argv=argv)


if __name__ == "__main__":
    main()
