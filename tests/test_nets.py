"""What every network must satisfy: derivatives in time, a second time that starts at zero, rows apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.keys import as_keys
from fmjax.nets import adapters, dit, embedding, mlp, song_unet, unet

CLASSES = 3
CASES = {
    "mlp": (mlp.MLP, {"width": 16, "depth": 2}, (5,)),
    "unet": (unet.UNet, {"channels": 4, "multipliers": (1, 2), "blocks": 0, "heads": 1}, (4, 4, 2)),
    "song_unet": (
        song_unet.SongUNet,
        {"channels": 4, "multipliers": (2,), "blocks": 0},  # levels and encoders: test_nets_song_unet
        (4, 4, 2),
    ),
    "dit": (dit.DiT, {"width": 16, "depth": 2, "heads": 2}, (4, 4, 2)),
}
SMOOTH = {
    "mlp": {},
    "unet": {"middle": False},
    "song_unet": {"middle": False},
    "dit": {"patch": 4, "depth": 1},
}  # without attention, whose softmax jax computes in float32: see test_nets_unet and test_nets_dit
SLOW = ("song_unet",)  # parts that differ from the U-Net: test_nets_song_unet
pytestmark = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)


@functools.cache
def initial(name):
    """The parameters that a network starts from: float32, whatever its options."""
    module, sizes, shape = CASES[name]
    model = adapters.from_linen(module(**sizes, classes=CLASSES))
    key = jax.random.key(0, impl="rbg")  # compiles in a third of the time
    with jax.enable_x64(False):
        return jax.tree.map(np.asarray, model.init(key, jnp.zeros((3, *shape)), jnp.zeros(3, "int32")))


@functools.cache
def jitted(name, **options):
    module, sizes, _ = CASES[name]
    return jax.jit(adapters.from_linen(module(**(sizes | options), classes=CLASSES)).net)


@functools.cache
def make(name, *, jump=False, dtype="float32", **options):
    """A jitted network, parameters moved from their initial values (the jump's: if asked), and a batch of arguments."""
    module, sizes, shape = CASES[name]
    model = adapters.from_linen(module(**(sizes | options), classes=CLASSES, dtype=dtype))
    kind, rng = "float64" if dtype == "float64" else "float32", np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, *shape)), kind)
    s, t = np.linspace(0.1, 0.5, 3, dtype=kind), np.linspace(0.9, 0.6, 3, dtype=kind)
    args = (x, jnp.asarray(s), jnp.asarray(t), jnp.array([0, 2, 1]))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, args[3])

    def moved(path, a):
        noise = 0.3 * rng.standard_normal(a.shape)
        return np.asarray(a if "jump" in jax.tree_util.keystr(path) and not jump else a + noise, kind)

    first = initial(name)
    if jax.tree.map(np.shape, first) != jax.tree.map(np.shape, shapes):  # a smaller network (SMOOTH)
        first = jax.tree.map(lambda a: np.zeros(a.shape), shapes)
    return jitted(name, dtype=dtype, **options), jax.tree_util.tree_map_with_path(moved, first), args


def far(a, b, gap=0.01):
    """Whether every row of one differs from the same row of the other."""
    return (np.abs(np.asarray(a) - np.asarray(b)).reshape(len(a), -1).max(1) > gap).all()


def test_the_second_time_starts_at_zero_whatever_the_other_weights(name):
    """So at initialisation ``X_{s,t}`` is one Euler step; with a trained jump only the diagonal stays what it was."""
    net, params, (x, s, t, cond) = make(name)
    velocity = net(params, x, s, s, cond)
    assert far(velocity, np.zeros(x.shape)) and far(velocity, net(params, x, t, t, cond))
    np.testing.assert_array_equal(net(params, x, s, t, cond), velocity)
    _, trained, _ = make(name, jump=True)
    np.testing.assert_array_equal(net(trained, x, s, s, cond), velocity)
    assert far(net(trained, x, s, t, cond), velocity)
    assert far(net(trained, x, s, t, cond), net(trained, x, t, s, cond))


def test_only_training_off_the_diagonal_changes_the_jump(name):
    net, params, (x, s, t, cond) = make(name)
    grad = jax.jit(jax.grad(lambda p, t: jnp.sum(net(p, x, s, t, cond) ** 2)))
    on, off = (grad(params, t)["TwoTimes_0"]["jump"]["kernel"] for t in (s, t))
    assert (on == 0).all() and (off != 0).any()


def test_it_starts_at_zero_and_keeps_the_shape_and_type_of_x(name):
    net, params, (x, s, t, cond) = make(name)
    out = net(initial(name), x, s, t, cond)
    assert out.shape == x.shape and out.dtype == x.dtype and (out == 0).all()
    assert far(net(params, x, s, t, cond), out)


def test_each_output_is_a_network_with_its_part_of_the_last_layer(name):
    net, params, args = make(name, outputs=2)
    both = net(params, *args)
    c = args[0].shape[-1]
    assert both.shape == (*args[0].shape[:-1], 2 * c)
    for i in range(2):
        part = lambda a, i=i: a.reshape(*a.shape[:-1], -1, 2, c)[..., i, :].reshape(*a.shape[:-1], -1)
        one = make(name)[0](params | {"output": jax.tree.map(part, params["output"])}, *args)
        np.testing.assert_allclose(np.asarray(both)[..., i * c : (i + 1) * c], one, rtol=1e-5, atol=1e-5)
        assert far(one, np.zeros(one.shape))


def test_derivatives_in_time_match_finite_differences(name, x64):
    net, params, (x, s, t, cond) = make(name, jump=True, dtype="float64", **SMOOTH[name])
    f = jax.jit(lambda s, t, ds, dt: jax.jvp(lambda s, t: net(params, x, s, t, cond), (s, t), (ds, dt)))
    h = 1e-5  # the error of a central difference is h^2 / 6 of a third derivative below 16^3
    s, t, zero, one = np.asarray(s), np.asarray(t), np.zeros(3), np.ones(3)
    for ds, dt in ((zero, one), (one, zero)):
        _, rate = f(s, t, ds, dt)
        up, down = (np.asarray(f(s + e * ds, t + e * dt, ds, dt)[0]) for e in (h, -h))
        np.testing.assert_allclose(rate, (up - down) / (2 * h), atol=1e-6 * np.abs(rate).max(), rtol=1e-5)
        assert np.abs(rate).max() > 0.1


def test_the_gradient_of_a_derivative_in_time_matches_differences(name, x64):
    """What every flow-map loss computes: a gradient in the parameters through ``jax.jvp`` in ``t`` and ``x``."""
    net, params, (x, s, t, cond) = make(name, jump=True, dtype="float64", **SMOOTH[name])

    @jax.jit
    @jax.value_and_grad
    def loss(p):
        _, dy = jax.jvp(lambda x, t: net(p, x, s, t, cond), (x, t), (jnp.cos(x), jnp.ones_like(t)))
        return jnp.mean(dy**2)

    towards = jax.tree.map(lambda a: np.sin(np.arange(a.size, dtype=a.dtype)).reshape(a.shape), params)
    slope = sum(jax.tree.leaves(jax.tree.map(lambda a, b: np.vdot(a, b), loss(params)[1], towards)))
    h = 1e-6
    move = lambda h: jax.tree.map(lambda a, b: a + h * b, params, towards)
    assert float(slope) == pytest.approx(float((loss(move(h))[0] - loss(move(-h))[0]) / (2 * h)), rel=1e-5)


def test_no_row_of_a_batch_depends_on_another(name):
    net, params, (x, s, t, cond) = make(name, jump=True)
    whole = net(params, x, s, t, cond)
    whole, other = np.asarray(whole), [np.array(a) for a in (x, s, t, cond)]
    for a, value in zip(other, (7.0, 0.0, 1.0, 3), strict=True):
        a[1] = value
    changed = np.asarray(net(params, *map(jnp.asarray, other)))
    np.testing.assert_allclose(changed[[0, 2]], whole[[0, 2]], rtol=1e-5, atol=1e-5)
    assert np.abs(changed[1] - whole[1]).max() > 0.1
    back = [jnp.asarray(np.asarray(a)[::-1]) for a in (x, s, t, cond)]
    np.testing.assert_allclose(np.asarray(net(params, *back))[::-1], whole, rtol=1e-5, atol=1e-5)


def test_every_class_and_the_null_class_has_its_own_embedding(name):
    net, params, (x, s, t, _) = make(name)
    outs = lambda params: [net(params, x, s, t, jnp.asarray([label] * 3)) for label in range(CLASSES + 1)]
    plain = outs(params)
    assert all(far(plain[i], plain[j]) for i in range(4) for j in range(i))
    table = params["Embed_0"]["embedding"]
    swapped = outs(params | {"Embed_0": {"embedding": table[[1, 0, 3, 2]]}})
    np.testing.assert_array_equal(swapped, [plain[i] for i in (1, 0, 3, 2)])


def test_a_guided_net_at_scale_one_is_the_net_without_guidance(name):
    """Before training it is that net at every scale."""
    net, params, (x, s, t, cond) = make(name)
    module, sizes, _ = CASES[name]
    guided = adapters.from_linen(module(**sizes, classes=CLASSES, guided=True))
    shapes = jax.eval_shape(guided.init, jax.random.key(0), x, cond)
    width = shapes["Embed_0"]["embedding"].shape[1]
    assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, params) | {"scale": {"kernel": (64, width)}}
    out = jax.jit(lambda w, cond: guided.net(params | {"scale": {"kernel": w}}, x, s, t, cond))
    trained = np.asarray(0.3 * np.random.default_rng(1).standard_normal((64, width)), "f")
    scales, ones = jnp.array([0.5, 2.0, 8.0]), jnp.array([1.0, 1.0, 1.0])
    plain = net(params, x, s, t, cond)
    near = functools.partial(np.testing.assert_allclose, desired=plain, rtol=1e-5, atol=1e-5)
    near(out(trained, (cond, ones)))
    near(out(trained, cond))
    near(out(0 * trained, (cond, scales)))
    assert far(out(trained, (cond, scales)), plain)
    for build, conditions, message in (
        (module(**sizes, classes=CLASSES), (cond, scales), "guided=False: .* Set guided=True"),
        (module(**sizes, guided=True), (cond, scales), "guided=True: .* Set classes"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(adapters.from_linen(build).init, jax.random.key(0), x, conditions)


def test_dropout_is_on_exactly_when_a_key_is_given(name):
    args = make(name)[2]
    keys, others = (as_keys(jax.random.key(seed), 3) for seed in (3, 4))
    net, params, _ = make(name, dropout=0.5)
    plain = np.asarray(net(params, *args))
    np.testing.assert_array_equal(plain, make(name)[0](params, *args))
    first = np.asarray(net(params, *args, keys))
    np.testing.assert_array_equal(first, net(params, *args, keys))
    assert np.abs(first - plain).max() > 0.01
    assert np.abs(np.asarray(net(params, *args, others)) - first).max() > 0.01
    np.testing.assert_array_equal(make(name)[0](params, *args, keys), plain)


def test_dropout_drops_the_inside_of_a_residual_block(name):
    """With everything dropped the network is the one whose last weights in each block are zero."""
    net, params, args = make(name, dropout=1.0)
    last = {"mlp": ("down_",), "unet": ("second",), "song_unet": ("second",), "dit": ("'out'", "'down'")}[name]
    kernel = lambda path: any(n in path for n in last) and "kernel" in path
    zero = lambda path, a: 0 * a if kernel(jax.tree_util.keystr(path)) else a
    gone = net(jax.tree_util.tree_map_with_path(zero, params), *args)
    assert far(gone, net(params, *args))
    np.testing.assert_allclose(net(params, *args, as_keys(jax.random.key(3), 3)), gone, rtol=1e-5, atol=1e-5)


def products(jaxpr):
    """The operand types of every matrix product and convolution of a program, calls included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield {str(v.aval.dtype) for v in eqn.invars}
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)  # what jax.checkpoint holds is open already
            if hasattr(inner, "eqns"):
                yield from products(inner)


def test_half_precision_applies_to_the_computation_alone(name):
    """Parameters and the embedding of the times stay float32, the result is near that of float32 and not the same."""
    _, params, args = make(name)
    module, sizes, _ = CASES[name]
    module = module(**sizes, classes=CLASSES, dtype="bfloat16")
    fresh = jax.eval_shape(adapters.from_linen(module).init, jax.random.key(0), args[0], args[3])
    assert {a.dtype for a in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    only = lambda m, method: isinstance(m, embedding.TwoTimes)
    capture = {"capture_intermediates": only, "mutable": "intermediates"}
    see = lambda *args: module.apply({"params": params}, *args, **capture)
    half, seen = jax.jit(see)(*args)
    see_full = lambda *args: module.clone(dtype="float32").apply({"params": params}, *args, **capture)
    full, whole = jax.jit(see_full)(*args)
    kinds = list(products(jax.make_jaxpr(see)(*args).jaxpr))
    assert len(kinds) > 9 and kinds.count({"float32"}) == 4  # source, jump and mix of the times; the output
    assert kinds.count({"bfloat16"}) == len(kinds) - 4
    assert half.dtype == jnp.float32
    half, full = np.asarray(half), np.asarray(full)
    error = np.linalg.norm(half - full) / np.linalg.norm(full)
    assert 1e-5 < error < 2.0**-8 * 8  # a rounding of 2^-9 in each of some dozens of operations, added in squares
    (e,), (want,) = (caught["intermediates"]["TwoTimes_0"]["__call__"] for caught in (seen, whole))
    assert e.dtype == jnp.float32
    np.testing.assert_allclose(e, want, rtol=1e-6, atol=1e-6)
