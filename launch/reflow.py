"""Half-straighten a flow: a teacher, its trajectories, students on parts of the time axis, and a comparison.

python -m launch.reflow --config=configs/half_straightening_digits.py --workdir=W
"""

from fmjax.experiments import command_line, reflow


def main(argv=None):
    """Train teacher and students, and compare."""
    command_line.run(reflow.main, __doc__, argv=argv)


if __name__ == "__main__":
    main()
