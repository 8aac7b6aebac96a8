"""Every field of an experiment with its default; the other configs change some of these fields."""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """Return all fields with their defaults: a flow of handwritten digits, its marginals, correctors and flow map."""
    c = ConfigDict()
    c.seed = 0  # seed of parameters, batches and samples
    c.data = {"name": "digits"}  # a data set of fmjax.data, or "package.module:factory"
    c.flip = False  # mirror half of the training images
    c.conditional = False  # condition the network on the labels (or other conditions) of the data
    c.label_dropout = 0.0  # fraction of the examples trained without their condition; guidance needs 0.1 or so
    c.guidance = 1.0  # scale of classifier-free guidance when sampling; 1 is no guidance
    c.negatives = config_dict.placeholder(str)  # 'any' or 'other_label': the negatives of the contrastive method
    c.path = "linear"  # an interpolant of fmjax.paths
    c.source = {"name": "gaussian_noise"}  # what the flow starts from, of fmjax.sources, or "data" with a data set
    c.init = config_dict.placeholder(str)  # run folder whose averaged parameters training starts from
    c.teacher = config_dict.placeholder(str)  # run folder whose averaged parameters are the target of target='frozen'
    c.fsdp = False  # split parameters, optimiser and average over the devices

    c.log_every = 25  # steps between records of the losses
    c.save_every = 500  # steps between checkpoints
    c.sample_every = 1000  # steps between pictures of samples; 0 draws none
    c.keep = 2  # checkpoints kept

    # training of the flow; all other stages have the same fields
    c.net = {"name": "mlp", "width": 256, "depth": 4}  # a network of fmjax.nets
    c.method = "flow_matching"  # a method of fmjax.methods
    c.weighting = config_dict.placeholder(str)  # 'adaptive' or 'learned'
    c.coupling = "minibatch_ot"  # how source and data are paired, of fmjax.couplings
    c.batch_size = 128  # examples per step, over all devices
    c.steps = 4500  # number of optimiser steps
    c.target = "self"  # parameters of the teacher in the loss: 'self', 'ema', 'frozen' or 'both'
    c.learning_rate = 2e-3  # the peak rate
    c.warmup = 100  # steps until the peak rate is reached
    c.schedule = "cosine"  # learning rate after the warm-up: 'cosine' or 'constant'
    c.clip = 1.0  # largest norm of the gradient
    c.beta2 = 0.99  # Adam's decay of the second moment
    c.weight_decay = 0.0  # of leaves with two axes or more
    c.ema = 0.995  # decay of the averaged parameters, which all samplers use

    # marginals p_n (from noise) and q_n (from data) on the grid of a solver
    c.solver = "rk4"  # a solver of fmjax.sampling, or 'flow_map'
    c.solver_steps = 8  # number of uniform steps
    c.backward_map = "reverse"  # for q_n: 'reverse' solves the ODE backwards, 'inverse' inverts each step

    c.forward_examples = 1600  # examples of p_n; q_n has the training data

    c.correctors = {}  # name -> stage(c, ...): networks trained on the marginals
    c.flow_map = {}  # stage(c, ...): a few-step map that starts from the flow

    # samples that are drawn and compared
    c.sampling = {"seeds": 4, "samples": 400, "bootstrap": 0}  # runs; samples per run; resamples for the error of 1 run
    c.samplers = {"euler": (4, 8, 16, 32)}  # solver -> numbers of steps, or name -> {"solver", "steps", "grid"}
    c.corrections = {}  # name -> {"solver", "steps", "at", "by", ...}: a sampler corrected at the steps 'at'
    c.metrics = ()  # measures of fmjax.metrics, alone or with options; () for the defaults of the kind of data
    c.straighten = {}  # straighten(c, ...): students on parts of the time axis (launch.reflow)
    return c


def finish(c: ConfigDict) -> ConfigDict:
    """Return the config, locked, with a score corrector and a Lagrangian flow map if the config has none."""
    with c.ignore_type():
        c.correctors = c.correctors or {"score": score(c)}
        c.flow_map = c.flow_map or lagrangian(c)
    return c.lock()


TRAINING = (
    "coupling", "batch_size", "steps", "target", "learning_rate", "warmup", "schedule", "clip", "beta2",
    "weight_decay", "ema",
)  # fmt: skip


def stage(c: ConfigDict, **changes) -> dict:
    """Return the fields of a training stage: the flow's fields with ``changes``; ``net=None`` is the flow's network."""
    fields = {"net": None, "weighting": None, **{name: c[name] for name in TRAINING}}
    text = lambda: config_dict.placeholder(str)  # one per field: a common placeholder would be one value
    return {name: text() if value is None else value for name, value in {**fields, **changes}.items()}


def score(c: ConfigDict, **changes) -> dict:
    """Return a corrector that learns the score of the backward marginals, with the network of the flow."""
    method = {"name": "score_corrector", "sigma": 0.2}
    fields = {"net": c.net.to_dict(), "method": method, "weighting": None, "steps": max(1, c.steps // 3)}
    return stage(c, **{**fields, "learning_rate": c.learning_rate, **changes})


def lagrangian(c: ConfigDict, **changes) -> dict:
    """Return a flow map learned from the flow by Lagrangian self-distillation."""
    method = {"name": "lagrangian", "diagonal": 0.75}
    fields = {"method": method, "weighting": None, "steps": max(1, c.steps // 2), "learning_rate": c.learning_rate / 2}
    return stage(c, **{**fields, **changes})


def straighten(c: ConfigDict, **changes) -> dict:
    """Return the fields of half-straightening: a training stage, and the students that are trained and compared."""
    fields = {
        "seed": 0,  # seed of the trajectories and of the students
        "bounds": (0.0, 0.5, 1.0),  # bounds of the segments of the time axis
        "parts": {"noise half": (0,), "data half": (1,), "both halves": (0, 1)},  # which segments are straightened
        "sharing": ("shared", "retained", "conditioned", "gated"),  # how a student treats the kept segments
        "full": True,  # also train a full reflow
        "grid": "edm",  # time grid of the teacher: 'edm' or 'even'
        "grid_steps": 40,
        "solver": "heun",
        "examples": 20_000,  # number of trajectories
        "allocations": ((1, 1), (1, 9), (9, 1), (9, 9)),  # Euler steps in each segment
        "reference_steps": 80,  # steps of the solver for the samples of the paired errors
        "baselines": (2, 10, 18),  # numbers of evaluations of other samplers of the teacher
        "probes": 1024,  # examples for the straightness measures
    }
    return stage(c, **{"method": {"name": "straighten"}, "target": "frozen", **fields, **changes})
