"""Convert a file of weights into a run folder, or write the network of a run folder to a file.

  python -m launch.convert --source=X.pkl --workdir=W [--shape=32,32,3]     # an EDM snapshot
  python -m launch.convert --source=X.pt --workdir=W --options='{"size": 32, "head_channels": 64}'    # torchcfm
  python -m launch.convert --workdir=W --to=X.safetensors

Nothing in a file is executed. Other runs start from W by --config.init=W, or learn from it by --config.teacher=W
--config.target=frozen; launch.sample --workdir=W samples it.
"""

from fmjax.experiments import command_line, convert
from fmjax.experiments.command_line import Option

OPTIONS = (
    Option("workdir", str, None, "the run folder"),
    Option("source", str, None, "the file to convert: .pkl, .pt, .pth, .ckpt or .safetensors"),
    Option("to", str, None, "the .safetensors file to write"),
    Option("kind", str, None, "what the file must be (default: found from its names)", convert.KINDS),
    Option("part", str, None, "the entry of a checkpoint that is the state dict, e.g. net_model"),
    Option("shape", str, None, "shape of one example, e.g. 32,32,3, for samples from the folder alone"),
    Option("options", str, "{}", "options of the converter, as JSON"),
)


def main(argv=None):
    """Convert."""
    command_line.run_plain(convert.main, __doc__, *OPTIONS, argv=argv)


if __name__ == "__main__":
    main()
