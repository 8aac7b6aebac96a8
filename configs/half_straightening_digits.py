"""Half-straightening on handwritten digits, 8x8, offline: an EDM teacher, students on parts of its time axis.

python -m launch.reflow --config=configs/half_straightening_digits.py --workdir=workdir/half_straightening_digits

A CPU core, shared with other work: 13 minutes (teacher 1, students 6, comparison 5). FD-small and paired error with one
step in the noise half and nine in the data half: 4.37 +- 0.08 and 0.0019 where the noise half is straight (gated); the
other way round 7.86 +- 0.07 and 0.0125 where the data half is; the teacher's ten even Euler steps 5.65 and 0.0032.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """All fields of the experiment; any can be changed by ``--config.FIELD=VALUE``."""
    c = ConfigDict()
    c.seed = 0
    c.data = {"name": "digits", "validation": 0.1, "test": 0.2}
    c.flip = False
    c.classes, c.label_dropout, c.guidance = 0, 0.0, 1.0
    c.negatives = config_dict.placeholder(str)
    c.path = "linear"
    c.init, c.teacher = config_dict.placeholder(str), config_dict.placeholder(str)
    c.fsdp = False
    c.log_every, c.save_every, c.sample_every, c.keep = 50, 1000, 0, 2

    # the teacher: EDM with levels of noise for pixels of standard deviation 0.75
    c.net = {"name": "mlp", "width": 128, "depth": 2, "preconditioning": {"name": "edm", "sigma_data": 0.75}}
    c.method = {"name": "edm", "sigma_data": 0.75, "time": {"name": "noise_level", "mean": -0.6, "std": 1.2}}
    c.weighting, c.coupling = config_dict.placeholder(str), "independent"
    c.batch_size, c.steps, c.target = 256, 10_000, "self"
    c.learning_rate, c.warmup, c.schedule = 1e-3, 100, "cosine"
    c.clip, c.beta2, c.weight_decay, c.ema = 1.0, 0.999, 0.0, 0.999
    same = "weighting coupling batch_size schedule clip beta2 weight_decay ema".split()

    # students start from the teacher; noise half [0, 0.5], data half [0.5, 1]
    c.straighten = {name: c[name] for name in same}
    c.straighten.update({"method": {"name": "straighten"}, "target": "frozen", "seed": 0})
    c.straighten.update({"steps": 4000, "learning_rate": 5e-4, "warmup": 0})
    c.straighten.update({"bounds": (0.0, 0.5, 1.0), "full": True, "sharing": ("shared", "retained", "told", "gated")})
    c.straighten.parts = {"noise half": (0,), "data half": (1,), "both halves": (0, 1)}
    c.straighten.update({"grid": "edm", "grid_steps": 40, "solver": "heun", "examples": 20_000})
    c.straighten.update({"allocations": ((1, 1), (1, 9), (9, 1), (9, 9)), "reference_steps": 80})
    c.straighten.update({"baselines": (2, 10, 18), "probes": 1024})

    c.sampling = {"seeds": 4, "samples": 1250, "euler": (2, 10, 18)}
    return c.lock()
