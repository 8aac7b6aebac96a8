"""Names, options and places outside the package become objects; what cannot is refused in one line."""

import inspect
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import discover

from fmjax import checks, methods, nets, paths, sampling, times
from fmjax.checks import Positive
from fmjax.experiments import build, places, specs
from fmjax.experiments.specs import COUPLING, DATA, METHOD, METRIC, NET, PATH, PRECONDITIONER, SOLVER, WEIGHTING
from fmjax.keys import as_keys
from fmjax.types import Batch, Method

ml_collections = pytest.importorskip("ml_collections")


def net(params, x, s, t, cond=None, key=None):
    return params * x


def test_names_resolve_in_the_package_of_their_kind():
    assert specs.resolve(METHOD, "lagrangian", field="method")[0] is methods.lagrangian
    assert specs.resolve(NET, "mlp", field="net")[0] is nets.MLP
    assert specs.resolve(NET, "song_unet", field="net")[0] is nets.SongUNet
    assert specs.resolve(PATH, "trigonometric", field="path")[0] is paths.trigonometric
    assert specs.resolve(SOLVER, "rk38", field="solver")[0] is sampling.rk38
    assert set(specs.offers(METHOD)) == set(discover())


@pytest.mark.parametrize(
    ("kind", "name", "near", "offered"),
    [
        (METHOD, "langrangian", "lagrangian", "align_your_flow"),
        (METHOD, "common", None, "align_your_flow"),
        (NET, "unett", "unet", "mlp"),
        (NET, "adapters", None, "dit"),
        (PATH, "trig", "trigonometric", "linear"),
        (PATH, "endpoints", None, "linear"),
        (SOLVER, "rk5", "rk4", "ddim"),
        (SOLVER, "sample", None, "ddim"),
        (DATA, "digit", "digits", "checkerboard"),
        (METRIC, "sliced_w2", "sliced_w2_to", "energy_to"),
        (WEIGHTING, "adaptiv", "adaptive", "adaptive"),
        (PRECONDITIONER, "edn", "edm", "edm"),
    ],
)
def test_unknown_names_and_helpers_are_refused(kind, name, near, offered):
    with pytest.raises(ValueError, match=f"^field='{name}'") as caught:
        specs.resolve(kind, name, field="field")
    line = str(caught.value)
    assert len(line) <= checks.LENGTH and "\n" not in line and offered in line
    assert near is None or f"did you mean {near!r}?" in line


@pytest.mark.parametrize(("spec", "field"), [({"width": 3}, "net={'width': 3}"), ({"name": 3}, "net.name=3")])
def test_a_mapping_without_a_name_is_refused(spec, field):
    with pytest.raises(ValueError, match=f"^{field}"):
        specs.parse(spec, field="net")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"widht": 3}, "net.widht=3.*did you mean 'width'"),
        ({"parent": None}, "net.parent=None"),
        ({"width": "3"}, "net.width='3'"),
        ({"width": True}, "net.width=True"),
        ({"width": 3.0}, "net.width=3.0"),
        ({"width": 0}, "net.width=0"),
        ({"width": -1}, "net.width=-1"),
        ({"dropout": "a"}, "net.dropout='a'"),
        ({"dropout": float("nan")}, "net.dropout=nan"),
        ({"dtype": 16}, "net.dtype=16"),
        ({"dtype": "float31"}, "net.dtype='float31'"),
        ({"depth": 10**11}, "net.depth=100000000000"),
    ],
)
def test_options_are_checked_by_name_type_and_range(options, field):
    with pytest.raises(ValueError, match=f"^{field}") as caught:
        build.net({"name": "mlp", **options})
    assert len(str(caught.value)) <= checks.LENGTH


def test_entries_of_a_sequence_are_checked():
    with pytest.raises(ValueError, match=r"net.multipliers\[1\]=1.5"):
        build.net({"name": "unet", "multipliers": [1, 1.5]})
    with pytest.raises(ValueError, match="net.multipliers=2"):
        build.net({"name": "unet", "multipliers": 2})


def test_numpy_numbers_are_numbers():
    model = build.net({"name": "mlp", "width": np.int64(8), "depth": np.int32(1)})
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 3)))
    assert 8 in {n for leaf in jax.tree.leaves(shapes) for n in leaf.shape}


def test_a_network_from_a_config_is_the_network_with_those_options(key):
    config = ml_collections.ConfigDict({"name": "unet", "channels": 8, "multipliers": [1, 2], "heads": 2, "dropout": 0})
    params = jax.eval_shape(build.net(config.lock()).init, key, jnp.ones((2, 8, 8, 1)))
    assert params["input"]["kernel"].shape == (3, 3, 1, 8) and params["down_1"]["kernel"].shape[-1] == 8
    assert params["output"]["kernel"].shape == (3, 3, 8, 1) and "down_2" not in params


def test_a_path_reaches_the_methods_that_take_one(key):
    path, x1 = build.path("trigonometric"), jax.random.normal(key, (4, 3))
    batch, keys = Batch(x1, x0=jnp.zeros_like(x1)), as_keys(key, 4)
    built = build.method("flow_matching", net, path=path)
    _, aux = jax.jit(built.loss)(jnp.float32(0.0), None, batch, keys)
    _, u = paths.with_velocity(path, batch.x0, x1, aux["t"])
    np.testing.assert_allclose(aux["per_example"], jnp.mean(u**2, 1), rtol=1e-6)
    with pytest.raises(ValueError, match="^method.path='linear'"):
        build.method({"name": "flow_matching", "path": "linear"}, net, path=path)


def test_missing_options_and_a_factorys_own_refusal():
    with pytest.raises(ValueError, match="^method: .*'sigma'"):
        build.method("score_corrector", net)
    with pytest.raises(ValueError, match="sigma"):
        build.method({"name": "score_corrector", "sigma": 0}, net)


def test_a_time_distribution_is_a_spec_with_options(key):
    keys = as_keys(key, 512)
    time = specs.checked(methods.flow_matching, {"time": {"name": "logit_normal", "mean": 3}}, field="method")["time"]
    np.testing.assert_array_equal(time(keys), times.logit_normal(keys, mean=3.0))
    pair = specs.checked(methods.mean_flow, {"pair": "two_times"}, field="method")["pair"]
    assert pair is times.two_times  # where the default is a functools.partial
    for spec, field in [
        ("ordered_pair", "method.time='ordered_pair'"),
        ("logit", "method.time='logit'.*did you mean 'logit_normal'"),
        ({"name": "logit_normal", "men": 1.0}, "method.time.men=1.0.*did you mean 'mean'"),
    ]:
        with pytest.raises(ValueError, match=f"^{field}"):
            build.method({"name": "flow_matching", "time": spec}, net)


def test_a_fraction_that_follows_the_progress_is_a_spec(key):
    grid, fraction = {"name": "grid_pair", "steps": 8, "rounds": 4}, {"name": "sigmoid_fraction", "rate": 10}
    batch = Batch(jnp.ones((4, 2)), progress=jnp.array([0.0, 0.3, 0.6, 0.9]))
    for spec in ({"name": "progressive", "pair": grid}, {"name": "alpha_flow", "pair": grid, "fraction": fraction}):
        method = build.method({**spec, "diagonal": 0.0}, net)
        _, aux = method.loss(jnp.float32(1.0), jnp.float32(1.0), batch, as_keys(key, 4))
        np.testing.assert_allclose(aux["t"] - aux["s"], [1 / 8, 1 / 4, 1 / 2, 1], rtol=1e-6)


@pytest.mark.parametrize("value", [3, 0.5, None, True, (), [1], float("nan")])
def test_plain_values_are_no_specs(value):
    for build_part in (build.path, build.net, build.coupling, build.step, build.data):
        with pytest.raises(ValueError, match=r"^f=.*: not a "):
            build_part(value, field="f")
    with pytest.raises(ValueError, match=r"^f=.*: not a method"):
        build.method(value, net, field="f")


def test_a_refusal_of_a_factory_begins_with_the_field():
    with pytest.raises(ValueError, match="^flow_map.method.diagonal=2.0: "):
        build.method({"name": "lagrangian", "diagonal": 2.0}, net, field="flow_map.method")


def test_objects_stand_for_themselves(key):
    path = paths.vp()
    assert build.path(path) is path
    assert isinstance(build.method(methods.lagrangian, net, path=path), Method)
    model = build.net(nets.MLP(width=4, depth=1))
    assert model.init(key, jnp.ones((1, 2))) is not None
    assert build.step(sampling.rk4) is sampling.rk4
    method = methods.flow_matching(net)
    assert build.method(method, net) is method


@pytest.mark.parametrize("kind", [METHOD, NET, PATH, COUPLING, SOLVER, DATA, METRIC])
def test_every_default_passes_the_checks(kind):
    for factory in specs.offers(kind).values():
        options = specs.options_of(factory)
        defaults = {k: v for k, v in options.items() if v is not inspect.Parameter.empty}
        required = {k: 1.0 for k in options.keys() - defaults.keys() if kind in (METHOD, SOLVER)}
        if required or len(defaults) == len(options):
            values = specs.checked(factory, defaults | required, field="f")
            assert {k: v for k, v in values.items() if k in defaults} == defaults


OWN = """
    import flax.linen as nn
    from fmjax.checks import Positive

    class Small(nn.Module):
        width: Positive = 8

        @nn.compact
        def __call__(self, x, s, t, cond=None, *, train=False):
            return nn.Dense(x.shape[-1])(nn.tanh(nn.Dense(self.width)(x)))

    def wrong(network):
        return network
"""


def test_a_file_outside_the_package_gives_a_network(tmp_path, key):
    file = tmp_path / "own.py"
    file.write_text(textwrap.dedent(OWN))
    model = build.net({"name": f"{file}:Small", "width": 5})
    assert 5 in {n for leaf in jax.tree.leaves(model.init(key, jnp.ones((1, 2)))) for n in leaf.shape}
    for spec, field in [
        ({"name": f"{file}:Small", "width": 0}, "net.width=0"),
        (f"{file}:Smal", "net=.*did you mean 'Small'"),
        (f"{tmp_path / 'none.py'}:Small", "net=.*no file"),
    ]:
        with pytest.raises(ValueError, match=f"^{field}"):
            build.net(spec)
    with pytest.raises(ValueError, match="^method=.*net"):
        build.method(f"{file}:wrong", net)


def test_a_package_outside_gives_a_method(tmp_path, monkeypatch):
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("from fmjax.methods import flow_matching as mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(build.method("own_package:mine", net), Method)
    with pytest.raises(ValueError, match="^method='no_such_package:mine'"):
        build.method("no_such_package:mine", net)
    sys.modules.pop("own_package")


def test_places_outside_the_package_are_found_in_a_config():
    config = {"net": {"name": "pkg.nets:make"}, "method": "flow_matching", "metrics": ("a/b.py:far",), "seed": 0}
    assert dict(places.outside_places(config)) == {"net.name": "pkg.nets:make", "metrics.0": "a/b.py:far"}
    assert places.absolute(config)["metrics"][0].startswith("/")


def test_a_refusal_is_one_short_line():
    line = str(checks.Refusal("field", "x" * 5000, "wrong\n" * 100, "Do this"))
    assert len(line) <= checks.LENGTH and "\n" not in line and line.startswith("field='xxx")


def test_ranges_come_from_type_hints():
    def factory(*, width: Positive = 3):
        return width

    assert specs.call(factory, {"width": 2}, field="f") == 2
    with pytest.raises(ValueError, match="^f.width=0"):
        specs.call(factory, {"width": 0}, field="f")
