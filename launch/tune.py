"""Choose where and how strongly a finished run is corrected. Run it again to continue.

python -m launch.tune --workdir=W --by=score --solver=rk4 --solver_steps=8
"""

from fmjax.experiments import command_line, tune
from fmjax.experiments.command_line import Option

OPTIONS = (
    Option("by", str, "score", "the corrector"),
    Option("solver", str, "rk4", "the sampler's solver, or flow_map"),
    Option("solver_steps", int, 8, "the sampler's number of steps"),
    Option("metric", str, None, "the distance to make small (default: the first of the config)"),
    Option("most", int, 3, "largest number of corrections"),
    Option("seeds", int, 4, "runs that a value is the mean of"),
    Option("alpha", float, None, "candidate correction strength (default 0.1, 0.25, ...)", repeated=True),
    Option("beta", float, None, "candidate noise level (default: multiples of a score's noise level)", repeated=True),
)


def main(argv=None):
    """Tune."""
    command_line.run(tune.main, __doc__, *OPTIONS, argv=argv)


if __name__ == "__main__":
    main()
