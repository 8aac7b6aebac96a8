"""The checkerboard, points in the plane: a flow by OT-CFM with an MLP.

python -m launch.train --config=configs/checkerboard.py --workdir=workdir/checkerboard
python -m launch.evaluate --workdir=workdir/checkerboard
"""

from configs import base


def get_config():
    """Return the experiment."""
    c = base.get_config()
    c.data = {"name": "checkerboard", "train": 100_000, "test": 10_000, "seed": 0}
    c.log_every, c.save_every, c.sample_every = 100, 2000, 0
    c.net = {"name": "mlp", "width": 256, "depth": 3}
    c.batch_size, c.steps, c.learning_rate, c.warmup, c.ema = 256, 8000, 1e-3, 200, 0.999
    c.sampling = {"seeds": 3, "samples": 5000}
    c.samplers = {"euler": (2, 4, 8, 16, 100), "rk4": (4, 16)}
    return base.finish(c)
