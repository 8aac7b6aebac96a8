"""Build the forward and backward marginals of a trained flow. Run it again to continue.

python -m launch.marginals --workdir=W [--direction=backward] [--config.solver_steps=16]
"""

from fmjax.experiments import command_line, marginals
from fmjax.experiments.command_line import Option

OPTIONS = (
    Option(
        "direction", str, "both", "forward (from noise), backward (from data), or both", ("forward", "backward", "both")
    ),
    Option("out", str, None, "folder of the sets (default: marginals in the run folder)"),
    Option("keep", int, None, "index of the time grid to store; by default all are stored", repeated=True),
    Option("dtype", str, "float32", "of the stored numbers", ("float32", "float16", "bfloat16")),
    Option("tol", float, 1e-4, "largest residual of an inverse step"),
)


def main(argv=None):
    """Build the sets."""
    command_line.run(marginals.main, __doc__, *OPTIONS, argv=argv)


if __name__ == "__main__":
    main()
