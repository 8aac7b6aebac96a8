"""Measurements: ``python -m launch.bench --suite=sampler [--repeats=15] [--into=docs/results/PAGE.md]``.

A suite is a function ``name(repeats) -> list[dict]`` that returns the rows of a table; the modules of ``launch/bench/``
list their suites in ``SUITES``. Repeats of the compared programs are interleaved, so that a busy moment of the machine
affects all of them, and medians are reported. ``--into`` puts the table between the lines ``<!-- SUITE -->`` and
``<!-- end -->`` of a file.
"""

import importlib
import os
import platform
import time
from pathlib import Path

import jax
from absl import app, flags

from launch.bench.measure import markdown

NAMES = ("compiled", "corrected", "costs", "learned", "maps", "mismatch", "nets", "pushed", "runs", "straightened")
MODULES = [importlib.import_module(f"launch.bench.{name}") for name in NAMES]
SUITES = {suite.__name__: suite for module in MODULES for suite in module.SUITES}

FLAGS = flags.FLAGS
flags.DEFINE_enum("suite", None, sorted(SUITES), "What to measure.", required=True)
flags.DEFINE_integer("repeats", 15, "Interleaved repeats per measurement.", lower_bound=1)
flags.DEFINE_string("into", None, "Also put the table into this file, between its marks.")


def main(_):
    """Run the suite and print its table."""
    name, before, after = FLAGS.suite, f"<!-- {FLAGS.suite} -->\n", "<!-- end -->"
    text = Path(FLAGS.into).read_text() if FLAGS.into else before + after
    if before not in text:
        raise SystemExit(f"error: {FLAGS.into} has no line {before.strip()}")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}, load {os.getloadavg()[0]:.1f}"
    table = markdown(SUITES[name](FLAGS.repeats))
    when = f"jax {jax.__version__}; {time.strftime('%Y-%m-%d')}"
    command = f"`python -m launch.bench --suite={name} --repeats={FLAGS.repeats}`; {machine}; {when}"
    print(f"{command}\n\n{table}")
    if FLAGS.into:
        head, rest = text.split(before, 1)
        Path(FLAGS.into).write_text(f"{head}{before}\n{command}\n\n{table}\n\n{after}{rest.split(after, 1)[1]}")


if __name__ == "__main__":
    app.run(main)
