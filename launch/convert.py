"""Weights of others as a run of ours, and ours as a file.

``python -m launch.convert --source=X.pkl --workdir=W`` makes a workdir of an EDM snapshot (``.pkl``), a torchcfm
checkpoint (``.pt``; ``--options='{"size": 32, "head_channels": 64}'``, what its weights do not tell), either as
``.safetensors``, or of what ``python -m launch.convert --workdir=W --to=X.safetensors`` wrote. Nothing in a file is
executed. It prints the fields of a config whose runs start from W: ``--config.init=W``, or are taught by it,
``--config.teacher=W --config.target=frozen``; ``launch.evaluate --workdir=W`` evaluates it as it is.
"""

import json

from absl import app, flags

from fmjax.experiments import command_line, convert

SOURCE = flags.DEFINE_string("source", None, "The file to convert: .pkl, .pt, .pth, .ckpt or .safetensors.")
TO = flags.DEFINE_string("to", None, "The .safetensors file to write, instead.")
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.", required=True)
KIND = flags.DEFINE_enum("kind", None, convert.KINDS, "What the file must be; by default what its names tell.")
PART = flags.DEFINE_string("part", None, "The entry of a checkpoint that is the state dict, e.g. net_model.")
OPTIONS = flags.DEFINE_string("options", "{}", "Options of the converter, as JSON.")


def convert() -> None:
    """What the flags ask for."""
    if (SOURCE.value is None) == (TO.value is None):
        raise ValueError("give --source=FILE to convert it into the workdir, or --to=FILE to write that of the workdir")
    if TO.value is not None:
        return print(f"{convert.export(WORKDIR.value, TO.value):,} parameters in {TO.value}")
    try:
        options = json.loads(OPTIONS.value)
    except ValueError as error:
        raise ValueError(f"--options={OPTIONS.value} is no JSON: {error}") from error
    told = convert.convert(SOURCE.value, WORKDIR.value, kind=KIND.value, part=PART.value, options=options)
    print(f"{told['parameters']:,} parameters of kind {told['kind']} in {WORKDIR.value}; a config for them has")
    print(f'    c.net = {told["net"]}\n    c.classes = {told["classes"]}\n    c.path = "linear"')


if __name__ == "__main__":
    app.run(lambda _: command_line.in_one_line(convert))
