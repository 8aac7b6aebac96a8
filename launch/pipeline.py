"""Run the pipeline: flow, marginals, correctors, flow map, samples, comparison, report. Run it again to continue.

python -m launch.pipeline --config=configs/digits.py --workdir=workdir/digits
"""

from fmjax.experiments import command_line, pipeline


def main(argv=None):
    """Run the pipeline."""
    command_line.run(pipeline.main, __doc__, argv=argv)


if __name__ == "__main__":
    main()
