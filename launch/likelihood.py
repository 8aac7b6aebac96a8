"""Compute the log-likelihood of held-out data under the flow of a run: bits per dimension, or nats per example.

python -m launch.likelihood --workdir=W [--split=test] [--count=200]
"""

from fmjax.experiments import command_line, likelihood
from fmjax.experiments.command_line import Option

OPTIONS = (
    Option("split", str, "test", "the examples: test, validation or train", choices=("test", "validation", "train")),
    Option("count", int, None, "the first examples of the split (default: all)"),
    Option("seed", int, 0, "seed of the dequantisation noise and of the probes"),
)


def main(argv=None):
    """Compute the log-likelihood."""
    command_line.run(likelihood.main, __doc__, *OPTIONS, argv=argv)


if __name__ == "__main__":
    main()
