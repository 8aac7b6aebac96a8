"""torchcfm's U-Net with its weights converted computes what torchcfm computes; a state dict that is none is refused.

``torchcfm_unet.npz`` holds, for each of ``RECORDED``, the names and shapes of torchcfm's state dict and its output in
float32; weights and inputs are those of ``draw`` and ``inputs``, so that none need be stored. With torchcfm installed:

    PYTHONPATH=tests:. python -c "import test_convert_torchcfm as t; t.record()"
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.convert import torchcfm
from fmjax.nets.adapters import from_linen
from fmjax.nets.unet import UNet

FILE = Path(__file__).parent / "torchcfm_unet.npz"
# name: (shape of an image, torchcfm's arguments, converter's arguments)
RECORDED = {
    "cifar-like": (
        (3, 8, 8),
        {"num_channels": 32, "num_res_blocks": 2, "channel_mult": (1, 2), "num_heads": 2, "attention_resolutions": "4"},
        {"heads": 2},
    ),
    "labels": (
        (1, 8, 8),
        {"num_channels": 32, "num_res_blocks": 1, "channel_mult": (2, 1), "attention_resolutions": "8",
         "class_cond": True, "num_classes": 3},
        {"heads": 1},
    ),
    "adm-like": (
        (2, 8, 8),
        {"num_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2, 3), "num_head_channels": 16,
         "attention_resolutions": "4,2", "resblock_updown": True, "use_scale_shift_norm": True, "learn_sigma": True,
         "use_new_attention_order": True},
        {"head_channels": 16, "new_attention_order": True},
    ),
}  # fmt: skip
LIVE = {
    "mnist example": (
        (1, 28, 28),
        {"num_channels": 32, "num_res_blocks": 1, "class_cond": True, "num_classes": 10},
        {"heads": 1},
    ),
    "cifar10 example": (
        (3, 32, 32),
        {"num_channels": 128, "num_res_blocks": 2, "channel_mult": (1, 2, 2, 2), "num_heads": 4,
         "num_head_channels": 64, "attention_resolutions": "16", "dropout": 0.1},
        {"heads": 4, "head_channels": 64},
    ),
}  # fmt: skip


def draw(shapes, seed=0):
    """Uniform weights of variance one over the fan-in, norms about one, from raw bits, the same in every version."""
    state = {}
    for i, (name, shape) in enumerate(shapes.items()):
        u = np.random.PCG64(1000 * seed + i).random_raw(int(np.prod(shape))) / 2.0**64
        a = np.sqrt(3) * (2 * u.reshape(shape) - 1)
        if name.endswith("bias"):
            a = 0.3 * a
        elif len(shape) == 1:
            a = 1 + 0.3 * a
        elif "label" not in name:
            a = a / np.sqrt(np.prod(shape[1:]))
        state[name] = a.astype(np.float32)
    return state


def inputs(shape, classes):
    """Two images, their times and labels."""
    u = np.random.PCG64(7).random_raw(2 * int(np.prod(shape))) / 2.0**64
    x = (np.sqrt(12) * (u - 0.5)).reshape(2, *shape).astype(np.float32)
    return x, np.array([0.25, 0.875], np.float32), np.array([classes - 1, 0]) if classes else None


def theirs(shape, options):
    """torchcfm's network with drawn weights: the shapes of its state dict, and its output."""
    import torch
    from torchcfm.models.unet.unet import UNetModelWrapper

    net = UNetModelWrapper(dim=shape, **options).eval()
    shapes = {name: tuple(a.shape) for name, a in net.state_dict().items()}
    net.load_state_dict({name: torch.tensor(a) for name, a in draw(shapes).items()})
    x, t, y = (None if a is None else torch.tensor(a) for a in inputs(shape, options.get("num_classes", 0)))
    with torch.no_grad():
        return shapes, net(t, x, y).numpy()


def record():
    """Writes ``torchcfm_unet.npz``."""
    outputs = {}
    for name, (shape, options, _) in RECORDED.items():
        shapes, outputs[name] = theirs(shape, options)
        outputs[f"{name} shapes"] = json.dumps(shapes)
    np.savez_compressed(FILE, **outputs)


def ours(shapes, shape, options, converting):
    params, fields = torchcfm.unet(draw(shapes), size=shape[-1], **converting)
    x, t, y = inputs(shape, options.get("num_classes", 0))
    y = None if y is None else jnp.asarray(y)
    x = jnp.asarray(x.transpose(0, 2, 3, 1))
    net = jax.jit(from_linen(UNet(**fields)).net, compiler_options={"xla_backend_optimization_level": 0})
    out = net(params, x, t, t, y)
    return np.asarray(out).transpose(0, 3, 1, 2), params, fields


@pytest.fixture(scope="module")
def recorded():
    with np.load(FILE) as file:
        return {name: (json.loads(str(file[f"{name} shapes"])), file[name]) for name in RECORDED}


@pytest.mark.parametrize("name", RECORDED)
def test_converted_weights_give_what_torchcfm_recorded(name, recorded):
    shapes, want = recorded[name]
    got, params, fields = ours(shapes, *RECORDED[name])
    assert want.std() > 0.2
    np.testing.assert_allclose(got, want, atol=1e-4)
    jump = params["TwoTimes_0"]["jump"]["kernel"]
    null = 4 * fields["channels"] if fields["classes"] else 0
    assert (jump == 0).all() and jump.shape == (64, 4 * fields["channels"])
    assert sum(a.size for a in jax.tree.leaves(params)) - jump.size - null == sum(map(np.prod, shapes.values()))


def test_the_cifar10_network_has_the_published_number_of_parameters(key):
    """35,746,307, what torchcfm's example prints, beside the second time's 64 x 512."""
    net = UNet(channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), head_channels=64, dropout=0.1,
               film=False, per_group=1, spectrum="slow")  # fmt: skip
    params = jax.eval_shape(from_linen(net).init, key, jnp.zeros((1, 32, 32, 3)))
    jump = params["TwoTimes_0"].pop("jump")["kernel"]
    assert jump.shape == (64, 512)
    assert sum(a.size for a in jax.tree.leaves(params)) == 35_746_307


@pytest.mark.parametrize("name", [*LIVE, *RECORDED])
def test_converted_weights_give_what_torchcfm_computes(name, recorded):
    pytest.importorskip("torchcfm", reason="the torch extra is not installed")
    case = {**RECORDED, **LIVE}[name]
    shapes, want = theirs(*case[:2])
    got, params, fields = ours(shapes, *case)
    np.testing.assert_allclose(got, want, atol=1e-4)
    if name in RECORDED:
        assert {n: tuple(s) for n, s in recorded[name][0].items()} == shapes
        np.testing.assert_allclose(recorded[name][1], want, atol=1e-5)
    if name == "cifar10 example":
        assert sum(map(np.prod, shapes.values())) == 35_746_307
        expected = {"channels": 128, "multipliers": (1, 2, 2, 2), "blocks": 2, "attention": (16,), "head_channels": 64}
        assert expected.items() <= fields.items()


def test_the_null_label_is_a_row_of_zeros_or_the_last_trained_row(recorded):
    state = draw(recorded["labels"][0])
    table = state["label_emb.weight"]
    params, fields = torchcfm.unet(state, size=8)
    assert fields["classes"] == 3
    np.testing.assert_array_equal(params["Embed_0"]["embedding"], [*table, 0 * table[0]])
    params, fields = torchcfm.unet(state, size=8, null_class=True)
    assert fields["classes"] == 2
    np.testing.assert_array_equal(params["Embed_0"]["embedding"], table)


def test_a_prefix_of_data_parallel_training_is_dropped(recorded):
    state = draw(recorded["cifar-like"][0])
    plain, fields = torchcfm.unet(state, size=8, heads=2)
    other, same = torchcfm.unet({f"module.{n}": a for n, a in state.items()}, size=8, heads=2)
    assert fields == same
    jax.tree.map(np.testing.assert_array_equal, plain, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("middle_block.0.in_layers.2.bias"), "state: 'middle_block.0.in_layers.2.bias' is missing"),
        (lambda s: s.clear(), r"state: 'time_embed.0.weight' is missing \(nothing left"),
        (lambda s: s.update({"ema.decay": 0.9}), "state: (ema.)?decay has no place"),
        (lambda s: s.update({"out.2.bias": np.zeros(5)}),
         r"\['output'\]\['bias'\] has shape \(5,\), and \(3,\)"),
        (lambda s: [s.pop(n) for n in [*s] if ".conv." in n or ".op." in n],
         "state: 'input_blocks.3.0.in_layers.* is missing"),
        (lambda s: [s.pop(n) for n in [*s] if n[:15] == "output_blocks.2"],
         r"has no place in UNet\(channels=32, multipliers=\(2,\)"),
        (lambda s: s.update({"time_embed.0.weight": np.zeros((96, 24))}), "state: a channel multiplier is 32/24"),
    ],
)  # fmt: skip
def test_what_is_no_such_network_is_refused_by_name(change, message, recorded):
    state = draw(recorded["cifar-like"][0])
    change(state)
    with pytest.raises(ValueError, match=message):
        torchcfm.unet(state, size=8, heads=2)
