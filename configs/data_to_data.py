"""From two moons to eight Gaussians: a flow between two data sets, by OT-CFM with an MLP.

python -m launch.train --config=configs/data_to_data.py --workdir=workdir/data_to_data
python -m launch.evaluate --workdir=workdir/data_to_data    # evaluation.html shows the source and the samples

Sliced W2 to test data 0.066 ± 0.009 after 8 Euler steps, of training data 0.057 ± 0.007. The source, trajectories and
samples: docs/static/data_to_data.png.
"""

from configs import base


def get_config():
    """Return the experiment."""
    c = base.get_config()
    c.data = {"name": "eight_gaussians", "train": 20_000, "validation": 5000, "test": 5000}
    c.source = {"name": "data", "data": {"name": "two_moons", "train": 20_000, "validation": 5000, "test": 5000}}
    c.log_every, c.save_every, c.sample_every = 100, 1000, 1000
    c.net = {"name": "mlp", "width": 128, "depth": 3}
    c.batch_size, c.steps, c.learning_rate, c.warmup, c.ema = 256, 4000, 1e-3, 200, 0.99
    c.sampling = {"seeds": 3, "samples": 2000}
    c.samplers = {"euler": (2, 4, 8, 32), "rk4": (8,)}
    return base.finish(c)
