"""Compare the samplers of a config with test data, with the newest networks of a run folder.

python -m launch.evaluate --workdir=W [--config.guidance=2.0] [--config.samplers.euler="(4, 8)"]
"""

from fmjax.experiments import command_line, evaluate


def main(argv=None):
    """Evaluate."""
    command_line.run(evaluate.main, __doc__, argv=argv)


if __name__ == "__main__":
    main()
