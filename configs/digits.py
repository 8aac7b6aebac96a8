"""Handwritten digits, 8x8, offline: a flow by OT-CFM, its marginals, correctors and a two-time flow map.

python -m launch.pipeline --config=configs/digits.py --workdir=workdir/digits   # the whole road
python -m launch.train --config=configs/digits.py --workdir=workdir/flow        # the flow alone
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """All fields of the experiment; any can be changed by ``--config.FIELD=VALUE``."""
    c = ConfigDict()
    c.seed = 0
    c.data = {"name": "digits", "validation": 0.1, "test": 0.2}
    c.flip = False
    c.classes, c.label_dropout, c.guidance = 0, 0.0, 1.0  # 10, 0.1 and 2.0: a conditional flow, guided in its pictures
    c.negatives = config_dict.placeholder(str)  # 'any', 'other_label': what the contrastive method needs
    c.path = "linear"
    # runs whose averaged parameters training starts from, and whose are the target of target='frozen'
    c.init, c.teacher = config_dict.placeholder(str), config_dict.placeholder(str)
    c.fsdp = False
    c.log_every, c.save_every, c.sample_every, c.keep = 25, 500, 1000, 2

    # the flow
    c.net = {"name": "mlp", "width": 256, "depth": 4}
    c.method, c.weighting = "flow_matching", config_dict.placeholder(str)  # 'adaptive', 'learned'
    c.coupling = "minibatch_ot"
    c.batch_size, c.steps, c.target = 128, 4500, "self"
    c.learning_rate, c.warmup, c.schedule = 2e-3, 100, "cosine"
    c.clip, c.beta2, c.weight_decay, c.ema = 1.0, 0.99, 0.0, 0.995
    same = "weighting coupling batch_size target warmup schedule clip beta2 weight_decay ema".split()
    train = {name: c[name] for name in same}

    # its marginals on the solver's grid: backward ones of the training data, as many forward ones as seeds x samples
    c.solver, c.solver_steps, c.backward_map = "rk4", 8, "reverse"

    # correctors: the score of the backward marginals, and a robust classifier of backward against forward ones
    score = {"method": {"name": "score_corrector", "sigma": 0.2}, "steps": 1500, "learning_rate": 2e-3}
    robust = {"method": {"name": "classifier_corrector", "eps": 0.5, "steps": 3}, "steps": 600, "learning_rate": 1e-3}
    c.correctors = {"score": {**train, **score}, "classifier": {**train, **robust, "weight_decay": 0.05}}
    c.correctors.score.net = {"name": "mlp", "width": 256, "depth": 4}
    c.correctors.classifier.net = {"name": "mlp", "width": 128, "depth": 3, "logit": True}

    # the flow map, from the flow's averaged parameters
    c.flow_map = {**train, "method": {"name": "lagrangian", "diagonal": 0.75}, "steps": 2000, "learning_rate": 1e-3}

    # what is drawn and compared
    c.sampling = {"seeds": 4, "samples": 400, "euler": (4, 8, 16, 32), "rk4": (2, 4, 8), "flow_map": (1, 2, 4)}
    # corrections: steps of the sampler's own grid, numbers picked by hand from a small grid, on other noise
    rk4, jump = {"solver": "rk4", "steps": 8}, {"solver": "flow_map", "steps": 4}
    push = lambda by, alpha, beta=0.0: {"by": by, "alpha": alpha, "beta": beta}
    c.corrections = {
        "start": {**rk4, "at": (0,), **push("score", 0.5, 0.4)},
        "end": {**rk4, "at": (8,), **push("score", 0.5)},
        "three": {**rk4, "at": (0, 4, 8), **push("score", 0.1, 0.1)},
        "all": {**rk4, "at": tuple(range(9)), **push("score", 0.1, 0.1)},
        "apart_end": {**rk4, "at": (8,), **push("classifier", 0.1)},
        "apart_three": {**rk4, "at": (0, 4, 8), **push("classifier", 0.03)},
        "drift": {**rk4, "at": (8,), **push("drift", 0.5), "bandwidth": 1.0},
        "map_start": {**jump, "at": (0,), **push("score", 0.5, 0.4)},
        "map_end": {**jump, "at": (4,), **push("score", 0.5)},
        "map_three": {**jump, "at": (0, 2, 4), **push("score", 0.1, 0.1)},
        "map_apart": {**jump, "at": (4,), **push("classifier", 0.1)},
        "map_drift": {**jump, "at": (4,), **push("drift", 0.5), "bandwidth": 1.0},
        "map_restart": {**jump, "at": (3,), "by": "restart", "to": 0.25},
    }
    return c.lock()
