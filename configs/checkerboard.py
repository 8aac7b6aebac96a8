"""The checkerboard, points in the plane: a flow by OT-CFM with an MLP.

python -m launch.train --config=configs/checkerboard.py --workdir=workdir/checkerboard
python -m launch.evaluate --config=configs/checkerboard.py --workdir=workdir/checkerboard

Two CPU cores, shared with other work: 7 minutes, and 4 for the evaluation. Sliced W2 to the held-out points: 0.020 +-
0.003 with 2 to 100 Euler steps (training points: 0.0175 +- 0.0010). 7.3 +- 0.1 % of the points of 8 Euler steps lie
off the cells.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """All fields of the experiment; any can be changed by ``--config.FIELD=VALUE``."""
    c = ConfigDict()
    c.seed = 0
    c.data = {"name": "checkerboard", "train": 100_000, "validation": 10_000, "test": 10_000, "seed": 0}
    c.flip = False
    c.classes, c.label_dropout, c.guidance = 0, 0.0, 1.0
    c.negatives = config_dict.placeholder(str)  # 'any', 'other_label': what the contrastive method needs
    c.path = "linear"
    # runs whose averaged parameters training starts from, and whose are the target of target='frozen'
    c.init, c.teacher = config_dict.placeholder(str), config_dict.placeholder(str)
    c.fsdp = False
    c.log_every, c.save_every, c.sample_every, c.keep = 100, 2000, 0, 2

    c.net = {"name": "mlp", "width": 256, "depth": 3}
    c.method, c.weighting = "flow_matching", config_dict.placeholder(str)  # 'adaptive', 'learned'
    c.coupling = "minibatch_ot"
    c.batch_size, c.steps, c.target = 256, 8000, "self"
    c.learning_rate, c.warmup, c.schedule = 1e-3, 200, "cosine"
    c.clip, c.beta2, c.weight_decay, c.ema = 1.0, 0.99, 0.0, 0.999

    # what launch.evaluate draws
    c.sampling = {
        "seeds": 3,
        "samples": 5000,
        "euler": (2, 4, 8, 16, 100),
        "rk4": (4, 16),
        "flow_map": (1, 2, 4, 8, 16),
    }
    return c.lock()
