"""Compare the reports of two run folders on one page: W2 against W1.

python -m launch.report W1 W2 [--out=side_by_side.html]
"""

import sys

from fmjax.experiments import command_line, side_by_side
from fmjax.experiments.command_line import Option

OPTIONS = (
    Option("run", str, [], "a run folder; two words without a name are the same", repeated=True),
    Option("out", str, side_by_side.PAGE, "the HTML file to write"),
)


def named(words):
    """Return the words of a command line with ``--run=`` before the folders."""
    return [word if word.startswith("-") else f"--run={word}" for word in map(str, words)]


def main(argv=None):
    """Compare two runs."""
    words = named(sys.argv[1:] if argv is None else argv)
    command_line.run_plain(side_by_side.main, __doc__, *OPTIONS, argv=words)


if __name__ == "__main__":
    main()
