"""Half-straightening on handwritten digits, 8x8, offline: an EDM teacher, students on parts of its time axis.

python -m launch.reflow --config=configs/half_straightening_digits.py --workdir=workdir/half_straightening_digits
"""

from configs import base


def get_config():
    """Return the experiment: students start from the teacher; noise half [0, 0.5], data half [0.5, 1]."""
    c = base.get_config()
    c.log_every, c.save_every, c.sample_every = 50, 1000, 0
    c.net = {"name": "mlp", "width": 128, "depth": 2, "preconditioning": {"name": "edm", "sigma_data": 0.75}}
    with c.ignore_type():
        c.method = {"name": "edm", "sigma_data": 0.75, "time": {"name": "noise_level", "mean": -0.6, "std": 1.2}}
    c.coupling, c.batch_size, c.steps, c.learning_rate = "independent", 256, 10_000, 1e-3
    c.beta2, c.ema = 0.999, 0.999
    c.straighten = base.straighten(c, steps=4000, learning_rate=5e-4, warmup=0)
    c.sampling = {"seeds": 4, "samples": 1250}
    c.samplers = {"euler": (2, 10, 18)}
    return base.finish(c)
