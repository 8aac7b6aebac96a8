"""Half-straightening on MNIST, 28x28, with a small transformer: a teacher by OT-CFM, fitted to a CPU.

python -m launch.reflow --config=configs/half_straightening_mnist.py --workdir=workdir/half_straightening_mnist
    --config.data.source_dir=FOLDER                # of the four original files; otherwise TFDS downloads them (12 MB)

A CPU core, shared with other work: 40 minutes (teacher 14, trajectories 2, students 15, comparison 10). FD-small and
paired error with two evaluations: 41.68 +- 0.02 and 0.0177 where both halves are straight (gated), one reflow 46.0 and
0.0228, the teacher 69.9 and 0.0503.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """All fields of the experiment; any can be changed by ``--config.FIELD=VALUE``."""
    c = ConfigDict()
    c.seed = 0
    c.data = {"name": "mnist", "source_dir": config_dict.placeholder(str)}
    c.data.update({"data_dir": config_dict.placeholder(str), "verify": True, "stream": False})
    c.flip = False
    c.classes, c.label_dropout, c.guidance = 0, 0.0, 1.0
    c.negatives = config_dict.placeholder(str)
    c.path = "linear"
    c.init, c.teacher = config_dict.placeholder(str), config_dict.placeholder(str)
    c.fsdp = False
    c.log_every, c.save_every, c.sample_every, c.keep = 50, 250, 0, 2

    # the teacher; 16 tokens an image
    c.net = {"name": "dit", "width": 128, "depth": 4, "heads": 4, "patch": 7}
    c.method, c.weighting = "flow_matching", config_dict.placeholder(str)
    c.coupling = "minibatch_ot"
    c.batch_size, c.steps, c.target = 64, 5000, "self"
    c.learning_rate, c.warmup, c.schedule = 2e-3, 100, "cosine"
    c.clip, c.beta2, c.weight_decay, c.ema = 1.0, 0.999, 0.0, 0.998
    same = "weighting coupling batch_size schedule clip beta2 weight_decay ema".split()

    # students start from the teacher; noise half [0, 0.5], data half [0.5, 1]
    c.straighten = {name: c[name] for name in same}
    c.straighten.update({"method": {"name": "straighten"}, "target": "frozen", "seed": 0})
    c.straighten.update({"steps": 800, "learning_rate": 5e-4, "warmup": 0})
    c.straighten.update({"bounds": (0.0, 0.5, 1.0), "full": True, "sharing": ("shared", "retained", "gated")})
    c.straighten.parts = {"noise half": (0,), "data half": (1,), "both halves": (0, 1)}
    c.straighten.update({"grid": "even", "grid_steps": 20, "solver": "heun", "examples": 4000})
    c.straighten.update({"allocations": ((1, 1), (1, 9), (9, 1), (9, 9)), "reference_steps": 40})
    c.straighten.update({"baselines": (2, 10, 18), "probes": 128})

    c.sampling = {"seeds": 3, "samples": 250, "euler": (2, 10, 18)}
    return c.lock()
