"""Draw samples of a run. Run it again to continue a killed one.

  python -m launch.sample --workdir=W --count=5000 --out=samples.npz
  python -m launch.sample --workdir=W --count=36 --out=grid.png --label=3 --guidance=2
  python -m launch.sample --workdir=W --count=1000 --out=images/ --solver=rk4 --solver_steps=8 \\
      --corrections='{"at": [0, 4, 8], "by": "score", "alpha": 0.1, "beta": 0.1}'
"""

from fmjax.experiments import command_line, sample
from fmjax.experiments.command_line import Option

OPTIONS = (
    Option("count", int, 36, "number of samples"),
    Option("out", str, "samples.npz", "FILE.npz (arrays x and cond), FILE.png (one picture), or a folder of images"),
    Option("seed", int, 0, "seed of the noise"),
    Option("label", str, None, "one label, a number or a class's name (default: labels one after the other)"),
    Option("cond", str, None, "FILE.npy, or FILE.npz with cond or y: conditions that are arrays, one row a sample"),
    Option("guidance", float, None, "guidance scale (default: the config's)"),
    Option("solver", str, None, "a solver, or flow_map (default: flow_map where there is one, else rk4)"),
    Option("solver_steps", int, None, "its number of steps (default: 16, of a flow map 4)"),
    Option("corrections", str, None, "JSON of a correction"),
)


def main(argv=None):
    """Draw samples."""
    command_line.run(sample.main, __doc__, *OPTIONS, argv=argv)


if __name__ == "__main__":
    main()
