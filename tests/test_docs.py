"""The pages of the site: their code runs, their commands exist, their links and stored outputs are up to date."""

import importlib
import importlib.util
import inspect
import re
import shlex
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import fmjax
from fmjax.experiments import command_line

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
if not (DOCS / "conf.py").exists():
    pytest.skip("needs the repository's docs", allow_module_level=True)
sys.path.append(str(DOCS / "extensions"))
faces, literate, tables = (importlib.import_module(name) for name in ("faces", "literate", "tables"))
SCRIPTS = literate.scripts()
WRITTEN = {script.with_suffix(".md") for script in SCRIPTS}  # pages that the build of the site writes
PAGES = sorted(set(DOCS.rglob("*.md")) - WRITTEN)
blocks = lambda text, kind: re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
name_of = lambda path: str(path.relative_to(ROOT))
ELSEWHERE = (DOCS / "start" / "quickstart.md", DOCS / "howto" / "own_data.md")  # the latter: test_docs_own.py
CODE = [page for page in PAGES if blocks(page.read_text(), "python") and page not in ELSEWHERE]


@pytest.mark.parametrize("page", CODE, ids=name_of)
def test_the_code_of_a_page_runs(page, capsys):
    """The blocks of a page run one after the other; what a page claims is asserted there."""
    names = {"__name__": "page"}
    for code in blocks(page.read_text(), "python"):
        exec(compile(code, str(page), "exec"), names)
    assert "nan" not in capsys.readouterr().out
    if page.stem == "diffusion":  # an exact network of N(0, diag(0.5, 1.5)^2): the sampler gives its spread
        assert abs(np.asarray(names["x"]).std(0) / [0.5, 1.5] - 1).max() < 5 / np.sqrt(2 * len(names["x"]))
        assert len(names["best"]) == 7 and names["best"][-1] == names["fine"][-1]


def test_the_quickstart_shows_the_code_of_the_readme():
    (shown,) = blocks(ELSEWHERE[0].read_text(), "python")
    assert shown in blocks((ROOT / "README.md").read_text(), "python")  # tests/test_readme.py runs it


def commands():
    """Every ``python -m launch.NAME ...`` of the pages, the scripts and the README: ``(page, words)``."""
    for page in [*PAGES, *SCRIPTS, ROOT / "README.md"]:
        text = re.sub(r"^# ?", "", page.read_text(), flags=re.MULTILINE) if page.suffix == ".py" else page.read_text()
        for code in blocks(text, "bash"):
            for line in re.sub(r"\\\n\s*", "", code).splitlines():
                if match := re.search(r"python -m (launch\..*)", line.split("  #")[0]):
                    yield page, shlex.split(match[1])


def check_command(words):
    """Parse a command as its module does; every config field must exist."""
    module = importlib.import_module(words[0])
    plain = words[0] in ("launch.convert", "launch.report")
    extra = [] if plain else [command_line.WORKDIR, command_line.TRUST, command_line.DEBUG]
    _, rest = command_line._parse(
        "", [*getattr(module, "OPTIONS", ()), *extra], getattr(module, "named", list)(words[1:])
    )
    spec = importlib.util.spec_from_file_location("some_config", ROOT / "configs" / "digits.py")
    config = importlib.util.module_from_spec(spec)
    command_line.find_configs()
    spec.loader.exec_module(config)
    fields = set(command_line.field_names(config.get_config())) | {"data.path", "data.source_dir", "data.data_dir"}
    for word in rest:
        name = word.partition("=")[0].removeprefix("--config").lstrip(".")
        if not name:
            assert (ROOT / word.partition("=")[2]).is_file(), word
        else:
            assert name in fields, word


@pytest.mark.parametrize("name", sorted({words[0] for _, words in commands()} - {"launch.bench", "launch.language"}))
def test_the_commands_of_the_pages_exist(name):
    found = [words for _, words in commands() if words[0] == name]
    assert found
    for words in found:
        check_command(words)


def test_a_command_that_does_not_exist_is_seen():
    for bad in ("launch.train --wrkdir=W", "launch.train --workdir=W --config.stepz=3", "launch.tune --config=no.py"):
        with pytest.raises((SystemExit, AssertionError)):
            check_command(bad.split())


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_links_and_pictures_lead_to_files(page):
    text = re.sub(r"^```(?!\{image\}).*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r"^```\{image\} (\S+)", text, re.MULTILINE)
    for target in targets:
        path = (page.parent / target).resolve()
        made = path in WRITTEN or path.parent == DOCS / "api" or path.parent == DOCS / "results" / "figures"
        assert re.match(r"https?://|mailto:", target) or made or path.exists(), f"{page}: {target}"


def test_every_figure_of_the_results_has_a_table_and_a_drawing():
    for page in (DOCS / "results").glob("*.md"):
        shown = re.findall(r"^```\{image\} figures/(\w+)\.png", page.read_text(), re.MULTILINE)
        found = tables.tables(page.read_text())
        assert set(shown) == tables.figures_of(found) and set(found) <= set(tables.FIGURES), page  # each has one


def test_the_tables_of_the_results_are_suites_with_their_command():
    bench = importlib.import_module("launch.bench.__main__")
    for page in (DOCS / "results").glob("*.md"):
        for suite, body in re.findall(r"<!-- (\w+) -->\n(.*?)<!-- end -->", page.read_text(), re.DOTALL):
            assert suite in bench.SUITES
            command, machine = re.match(r"\n`(.*?)`; (.*)", body).groups()
            assert f"--suite={suite} " in command and re.search(r"cores, .*jax \d.*; \d{4}-\d\d-\d\d", machine), suite


def test_numbers_of_a_table_are_read():
    assert tables.number("3.4 ± 0.1") == (3.4, 0.1)
    assert tables.number("−0.5 ± 0.2") == (-0.5, 0.2)
    assert tables.number("19.8 ± 0.4 / 0.0328") == (19.8, 0.4)
    assert tables.number("(3 ± 6) × 10⁻⁵") == pytest.approx((3e-5, 6e-5))
    assert tables.number("diverged")[0] != tables.number("diverged")[0]
    (rows,) = tables.tables("<!-- a -->\n\n`x`\n\n| b | c |\n| --- | --- |\n| 1 | 2 |\n\n<!-- end -->").values()
    assert rows == [{"b": "1", "c": "2"}]


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_the_stored_outputs_of_a_script_belong_to_its_code(script):
    record = literate.read(script)
    assert record["digest"] == literate.digest(script), f"run python docs/extensions/literate.py {script.stem}"
    assert record["processor_seconds"] < 180
    assert all((literate.STORED / name).exists() for names in record["pictures"] for name in names)


def test_a_script_becomes_a_page_with_its_outputs(tmp_path, monkeypatch):
    script = tmp_path / "small.py"
    script.write_text("# %% [markdown]\n# # Title\n\n# %%\nprint(1 + 1)\n\n# %%\nx = 3\n")
    monkeypatch.setattr(literate, "STORED", tmp_path / "stored")
    assert not literate.is_fresh(script)
    literate.store(script, *literate.execute(script))
    page = literate.render(script)
    assert literate.is_fresh(script) and page.startswith("# Title") and "\n2\n" in page
    script.write_text(script.read_text().replace("1 + 1", "1 + 2"))
    assert not literate.is_fresh(script)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_a_script_prints_what_is_stored(script, as_users_call):
    """Words stay equal; numbers may differ by rounding on another machine."""
    texts, pictures, *_ = literate.execute(script)
    record = literate.read(script)
    words = lambda text: re.sub(r"[-+]?\d[\d.e+-]*", "0", text).split()
    assert [len(p) for p in pictures] == [len(p) for p in record["pictures"]]
    if jax.__version__ == record["jax"]:
        assert [words(t) for t in texts] == [words(t) for t in record["text"]]


def test_every_package_has_a_page_of_reference():
    """What ``fmjax`` exports, the pages that are written, and the pages in the contents are the same."""
    contents = blocks((DOCS / "api" / "index.md").read_text(), "{toctree}")[0].split()
    assert set(contents[2:]) == set(faces.PACKAGES)
    modules = {f"fmjax.{name}" for name in fmjax.__all__ if inspect.ismodule(getattr(fmjax, name))}
    elsewhere = {"fmjax.interpolants", "fmjax.predictions", "fmjax.fractions"}  # on the pages of paths and times
    assert modules - set(faces.PACKAGES) == elsewhere | {"fmjax.experiments"}  # the laboratory: commands and how-to


def test_every_command_is_in_the_reference():
    text = (DOCS / "api" / "index.md").read_text()
    commands = {file.stem for file in (ROOT / "launch").glob("*.py")} - {"__init__", "language"} | {"bench"}
    assert set(re.findall(r"`python -m launch\.(\w+)`", text)) == commands


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    sphinx = pytest.importorskip("sphinx.cmd.build")
    assert sphinx.main(["--fail-on-warning", "--keep-going", "-q", str(DOCS), str(tmp_path)]) == 0
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 60
    outside = re.compile(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?:https?:)?//", re.IGNORECASE)
    assert not [page for page in pages if outside.search(page.read_text())]
