import base64
import csv
import html.parser
import io
import math
import urllib.parse

import matplotlib
import numpy as np
import pytest
import scipy.stats
from PIL import Image

from fmjax.experiments import report
from fmjax.experiments.report import Contents, Row, Verdict
from fmjax.experiments.spending import Spent, TrainingTime

HOSTILE = "<script>alert('x')</script> & \"quoted\" $x_1^{"


def contents(**changes) -> Contents:
    rng = np.random.default_rng(0)
    rows = [
        Row("data row", "data", 0, 0, {"FD": (2.0, 0.1), "W2": (0.1, 0.01)}),
        Row("map corrected", "flow map + corrections", 3, 1, {"FD": (4.0, 0.1)}),
        Row("map", "flow map", 2, 0, {"FD": (5.0, 0.1), "W2": (0.5, 0.0)}),
        Row("rk4 corrected", "rk4 + corrections", 43, 3, {"FD": (2.0, 0.1), "W2": (0.3, math.nan)}),
        Row("rk4 long", "rk4", 80, 0, {"FD": (3.0, 0.2), "W2": (0.25, 0.01)}),
        Row("rk4", "rk4", 40, 0, {"FD": (3.5, 0.2), "W2": (0.3, 0.01)}),
        Row("mine", "another", 7, 0, {"FD": (math.nan, 0.2), "W2": (math.inf, 0.01)}),
        Row("euler", "euler", 10, 0, {"FD": (6.0, 0.2), "W2": (0.9, 0.01)}),
    ]
    verdicts = [
        Verdict("rk4 corrected", "rk4", "FD", -1.5, 0.2, "helps"),
        Verdict("rk4 corrected", "rk4", "W2", 0.0, 0.1, "no difference seen"),
        Verdict("map corrected", "map", "FD", -1.0, 0.1, "helps"),
    ]
    given = {
        "title": "A run",
        "summary": ["The first sentence."],
        "rows": rows,
        "verdicts": verdicts,
        "grids": {"images": rng.uniform(-1, 1, (4, 8, 8, 1)), "points": rng.standard_normal((50, 2))},
        "trajectories": {
            "image path": rng.uniform(-1, 1, (3, 2, 8, 8, 3)),
            "point path": rng.standard_normal((5, 9, 2)),
        },
        "curves": {"flow stage": (np.arange(50), np.exp(-np.arange(50) / 9.0))},
        "gaps": {"energy": (np.linspace(0, 1, 4), np.ones(4), np.zeros(4))},
        "facts": {"seed": "7", "config": "x = 1\n" * 50},
        "notes": ["A closing note."],
    }
    return Contents(**(given | changes))


PLAIN = {"grids": {}, "trajectories": {}, "curves": {}, "gaps": {}}  # pictures take time


class Page(html.parser.HTMLParser):
    """Tags with their attributes, the visible text, and the table's cells."""

    def __init__(self, text: str):
        super().__init__()
        self.source = text
        self.tags, self.words, self.cells, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source", "br", "link", "base", "input"):
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("th", "td"):
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)
        if {"th", "td"} & set(self.open):
            self.cells[-1][-1] += ("*" if "strong" in self.open else "") + data

    def handle_startendtag(self, tag, attrs):  # of SVG
        self.tags.append((tag, dict(attrs)))

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(report.render(contents()))


def test_the_page_leads_nowhere_outside_itself(page):
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "srcset", "href", "action", "data", "poster"):
            value = attrs.get(name) or "#"
            offered = ("data:text/csv;charset=utf-8,", "data:application/json;charset=utf-8,")
            inside = ("#", "data:image/png;base64,") + offered * ("download" in attrs)
            assert value.startswith(inside), f"{tag} {name}={value[:40]}"
    assert not any("src" in attrs for attrs in page.all("script"))
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "img-src data:" in policy
    assert not any(words in page.source for words in ("http:", "https:", "url(", "@import"))
    assert not page.open, "a tag stays open"


def test_every_picture_decodes_to_its_stated_size_and_says_what_it_shows(page):
    images = page.all("img")
    assert len(images) == 2 + 2 + 3 + 1 + 1  # charts, grids, trajectories and a film, gap, curve
    dark = 0
    for attrs in images:
        picture = Image.open(io.BytesIO(base64.b64decode(attrs["src"].split(",")[1])))
        picture.load()
        scale = picture.width / int(attrs["width"])
        assert scale in (1, 2) and picture.height == scale * int(attrs["height"])
        assert len(attrs["alt"]) > 20
    for attrs in page.all("source"):
        assert attrs["media"] == "(prefers-color-scheme: dark)"
        Image.open(io.BytesIO(base64.b64decode(attrs["srcset"].split(",")[1]))).load()
        dark += 1
    assert dark == 6  # all but the sheets of images


def test_all_contents_appear(page):
    for words in (
        "A run", "The first sentence.", "A closing note.", "images", "points", "image path", "point path", "flow stage",
        "seed", "config", "300 characters", "rk4 corrected", "data row", "FD", "W2",
    ):  # fmt: skip
        assert words in page.text
    assert "the smallest is 2.00 ± 0.10 for rk4 corrected at 43 NFE" in page.all("img")[0]["alt"]


def test_links_of_the_contents_reach_their_sections(page):
    targets = [a["href"][1:] for a in page.all("a") if "download" not in a]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and set(targets) <= set(ids) and len(targets) == 10
    sections = [attrs["id"] for attrs in page.all("section")]
    assert [target for target in targets if target != "main"] == sections  # the contents list the sections in order


def test_everything_given_is_escaped():
    hostile = contents(
        title=HOSTILE,
        summary=[HOSTILE],
        rows=[Row(HOSTILE, HOSTILE, 4, 0, {HOSTILE: (1.0, 0.1)}), Row("b", "rk4", 4, 0, {HOSTILE: (2.0, 0.1)})],
        verdicts=[Verdict(HOSTILE, "b", HOSTILE, -1.0, 0.1, "helps")],
        grids={HOSTILE: np.zeros((1, 8, 8, 1))},
        trajectories={HOSTILE: np.zeros((2, 1, 8, 8, 1))},
        curves={HOSTILE: ([1, 2], [1.0, 2.0])},
        gaps={HOSTILE: ([0, 1], [1.0, 2.0], [0, 0])},
        facts={HOSTILE: HOSTILE, "long": HOSTILE * 10},
        notes=[HOSTILE],
        advice=[HOSTILE],
        choices=[HOSTILE],
        first=[HOSTILE],
        differences=[(HOSTILE, HOSTILE)],
        neighbours={HOSTILE: (np.zeros((1, 8, 8, 1)), np.zeros((1, 8, 8, 1)), HOSTILE)},
        costs={HOSTILE: Spent(4, 1e6, 0.5)},
        trainings=[TrainingTime(HOSTILE, 10, 1.5)],
        command=HOSTILE,
        config=HOSTILE,
    )
    parsed = Page(report.render(hostile))
    assert len(parsed.all("script")) == 1
    assert parsed.text.count(HOSTILE) >= 20 + 10
    alts = [attrs["alt"] for attrs in parsed.all("img")]
    assert len(alts) == 9 and all(HOSTILE in alt for alt in alts)


def test_equal_contents_give_equal_bytes(tmp_path):
    """Whatever settings of matplotlib the caller has."""
    first = report.write_report(tmp_path / "a.html", contents())
    with matplotlib.rc_context({"savefig.bbox": "tight", "font.size": 20, "axes.facecolor": "red"}):
        second = report.write_report(tmp_path / "b.html", contents())
    assert first.read_bytes() == second.read_bytes()
    other = report.write_report(tmp_path / "c.html", contents(notes=["Another note."], **PLAIN))
    assert other.read_bytes() != first.read_bytes()


def test_rows_stand_by_family_then_cost_and_data_are_last(page):
    names = [cells[0].strip() for cells in page.cells[1:9]]
    assert names == ["euler", "rk4", "rk4 long", "rk4 corrected", "map", "map corrected", "mine", "data row"]


def test_bold_is_the_smallest_finite_mean_of_the_samplers(page):
    bold = [(cells[0].strip(), page.cells[0][i]) for cells in page.cells for i, c in enumerate(cells) if c[:1] == "*"]
    assert bold == [("rk4 long", "W2"), ("rk4 corrected", "FD")]  # the data's 0.1 and 2.0 do not compete
    shown = {cells[0].strip(): cells[1:] for cells in page.cells[1:9]}
    assert shown["mine"] == ["7", "0", "n/a", "∞"]
    assert shown["map corrected"] == ["3", "1", "4.00 ± 0.10", "n/a"]
    assert shown["data row"][:2] == ["–", "–"]


def test_the_corrections_have_a_row_each_with_relative_changes(page):
    head, *rows = page.cells[9:]
    assert [cell.split()[0].strip(",") for cell in head] == ["Sampler", "NFE", "NFE", "FD", "W2"]
    shown = {cells[0].strip(): [cell.replace("\u2212", "-") for cell in cells[1:]] for cells in rows}
    assert shown["map corrected"] == ["3", "2", "-20.0 ± 2.0 %", "–"]  # FD 5.0 without, 1.0 ± 0.1 less with


def test_the_csv_of_the_page_has_every_row(page):
    (link,) = [a for a in page.all("a") if "download" in a]
    rows = list(csv.DictReader(io.StringIO(urllib.parse.unquote(link["href"].split(",", 1)[1]))))
    assert {row["sampler"]: row["NFE"] for row in rows} == {r.name: str(r.nfe) for r in contents().rows}
    assert next(row for row in rows if row["sampler"] == "map corrected")["FD mean"] == "4.0"


def test_the_first_look_is_data_beside_the_best_sampler():
    images = np.zeros((2, 8, 8, 1))
    given = contents(
        grids={"test data": images, "rk4 corrected": images, "rk4": images}, trajectories={}, curves={}, gaps={}
    )
    source = report.render(given)
    look = source[source.index('<section id="look"') : source.index('<section id="distances"')]
    shown = [f"in a grid: {name}." in look for name in ("test data", "rk4 corrected", "rk4")]
    assert shown == [True, True, False]  # of the smallest FD; the others stand in the section of samples


def test_verdicts_stand_in_groups_and_those_of_one_comparison_together():
    more = contents(**PLAIN)
    more = more._replace(verdicts=[*more.verdicts, Verdict("rk4 corrected", "rk4 long", "W2", 0.05, 0.01, "harms")])
    text = Page(report.render(more)).text.replace("\u00a0", " ")
    counts = "lower the distance in 2 of 4 comparisons, raise the distance in 1, and make no significant"
    assert f"{counts} difference in 1." in text
    helps, nothing, harms = (
        text.index(words) for words in ("▼ Helps in 2", "= No difference seen in 1", "▲ Harms in 1")
    )
    assert helps < nothing < harms
    assert "rk4 corrected (43 NFE) against rk4 (40 NFE): FD is lower by 1.50 ± 0.20." in text[helps:nothing]
    assert "map corrected (3 NFE) against map (2 NFE): FD is lower by 1.00 ± 0.10." in text[helps:nothing]
    assert "W2 differs by 0.00 ± 0.10." in text[nothing:harms]
    assert "W2 is higher by 0.050 ± 0.010." in text[harms:]
    both = [v._replace(verdict="helps", difference=-0.5) for v in contents().verdicts[:2]]
    assert "FD is lower by 0.50 ± 0.20; W2 is lower by 0.50 ± 0.10." in Page(
        report.render(contents(verdicts=both, **PLAIN))
    ).text.replace("\u00a0", " ")


def test_the_count_line_reads_as_a_sentence():
    assert "in 0 of 0 comparisons, raise the distance in 0," in report.count_line([])
    assert "in 1 of 1 comparison, raise the distance in 0," in report.count_line(contents().verdicts[:1])


def test_an_empty_part_is_left_out():
    empty = {"summary": [], "rows": [], "verdicts": [], "notes": []}
    empty |= {"grids": {}, "trajectories": {}, "curves": {}, "gaps": {}, "facts": {}}
    parsed = Page(report.render(contents(**empty)))
    assert not parsed.all("section") and not parsed.all("img") and not parsed.all("table")
    assert {a["id"] for a in Page(report.render(contents(**(empty | {"notes": ["a"]})))).all("section")} == {"notes"}


def test_a_failed_report_leaves_the_old_one(tmp_path, monkeypatch):
    path = report.write_report(tmp_path / "report.html", contents(**PLAIN))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not in rows"):
        report.write_report(path, contents(rows=[]))
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        with pytest.raises(OSError, match="the disk is full"):
            report.write_report(path, contents(title="Another", **PLAIN))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="make it before writing report.html"):
        report.write_report(tmp_path / "no" / "report.html", contents())


@pytest.mark.parametrize(
    ("mean", "se", "text"),
    [
        (0.827, 0.119, "0.83 ± 0.12"),  # the three cases of the Particle Data Group's rule
        (0.827, 0.367, "0.8 ± 0.4"),
        (0.827, 0.954, "0.8 ± 1.0"),
        (1234.5, 35.4, "1234 ± 35"),
        (1234.5, 36.0, "1230 ± 40"),
        (-0.0004, 0.0123, "0.000 ± 0.012"),
        (-0.5, 0.1, "−0.50 ± 0.10"),
        (0.5, math.nan, "0.500 ± n/a"),
        (0.5, 0.0, "0.500 ± 0"),
        (0.0, 0.0, "0 ± 0"),
        (math.nan, 0.1, "n/a"),
        (math.inf, math.nan, "∞"),
        (-math.inf, 0.1, "−∞"),
        (3.21e-6, 1.2e-7, "(3.21 ± 0.12) × 10⁻⁶"),
        (4.5e7, 4.4e6, "(4.5 ± 0.4) × 10⁷"),
    ],
)
def test_a_mean_is_rounded_to_the_place_of_its_error(mean, se, text):
    assert report.plus_minus(mean, se) == text


def test_a_mean_is_never_rounded_by_more_than_a_third_of_its_error():
    rng = np.random.default_rng(1)
    for mean, se in zip(
        rng.standard_normal(500) * 10 ** rng.uniform(-4, 4, 500), 10 ** rng.uniform(-3, 2, 500), strict=True
    ):
        if 1e-4 <= max(abs(mean), se) < 1e6 and se > 1e-6 * abs(mean):
            shown, error = report.plus_minus(float(mean), float(se)).replace("−", "-").split(" ± ")
            # the coarsest case is one digit of 3.55: half a unit is 1/7.1 of the error
            assert abs(float(shown) - mean) <= se / 7 and abs(float(error) - se) <= se / 7


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
def test_verdicts_are_those_of_scipys_paired_test(seeds):
    rng, kinds = np.random.default_rng(seeds), []
    for shift in np.linspace(-2, 2, 41):
        without = rng.normal(5, 1, seeds)
        with_ = without + shift + rng.normal(0, 0.7, seeds)
        v = report.verdict("a", "b", "W2", list(with_), list(without))
        test = scipy.stats.ttest_rel(with_, without)
        kinds.append(v.verdict)
        assert v.verdict == (
            report.VERDICTS[0 if test.statistic < 0 else 2] if test.pvalue < 0.05 else report.VERDICTS[1]
        )
        np.testing.assert_allclose([v.difference, v.difference / v.se], [(with_ - without).mean(), test.statistic])
        assert report.verdict("b", "a", "W2", without, with_).difference == -v.difference
    assert set(kinds) == set(report.VERDICTS)


def test_a_true_null_is_called_a_difference_in_one_case_of_twenty():
    rng, n = np.random.default_rng(7), 4000
    a, b = rng.standard_normal((2, n, 4))
    called = sum(
        report.verdict("a", "b", "W2", x, y).verdict != "no difference seen" for x, y in zip(a, b, strict=True)
    )
    assert abs(called / n - 0.05) < 4 * math.sqrt(0.05 * 0.95 / n)


def test_one_seed_or_a_diverged_one_decides_nothing():
    one = report.verdict("a", "b", "W2", [1.0], [9.0])
    assert one[:4] == ("a", "b", "W2", -8.0) and math.isnan(one.se) and one.verdict == "no difference seen"
    for bad in (math.nan, math.inf):
        assert report.verdict("a", "b", "W2", [1.0, bad], [9.0, 9.0]).verdict == "no difference seen"
    assert report.verdict("a", "b", "W2", [1.0, 2.0], [1.0, 2.0]) == Verdict(
        "a", "b", "W2", 0.0, 0.0, report.VERDICTS[1]
    )
    assert report.verdict("a", "b", "W2", [1.0, 2.0], [2.0, 3.0]).verdict == "helps"  # without any spread
    for with_, without in (([1.0], [1.0, 2.0]), ([], [])):
        with pytest.raises(ValueError, match="of the same seeds in the same order"):
            report.verdict("a", "b", "W2", with_, without)


def wrong(**changes):
    return lambda: report.check_contents(contents(**changes))


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (wrong(rows=[Row("a", "rk4", 4, 0, {})] * 2), "two rows are named 'a'"),
        (wrong(rows=[Row("a", "rk4", 0, 0, {})], verdicts=[]), "a sampler needs nfe >= 1"),
        (wrong(rows=[Row("a", "rk4", 4, -1, {})], verdicts=[]), "corrections >= 0"),
        (wrong(rows=[Row("a", "rk4", 4, 0, {"W2": (1.0, -0.1)})], verdicts=[]), "standard error -0.1 is negative"),
        (wrong(verdicts=[Verdict("rk4 corected", "rk4", "FD", -1, 1, "helps")]), "nearest: 'rk4 corrected'"),
        (wrong(verdicts=[Verdict("map corrected", "map", "W2", -1, 1, "helps")]), "which has FD"),
        (wrong(verdicts=[Verdict("map", "rk4", "FD", -1, 1, "better")]), "one of helps, no difference seen, harms"),
        (wrong(verdicts=[Verdict("map", "rk4", "FD", 1.5, 1, "helps")]), "'map' helps by a difference of 1.5 in FD"),
        (wrong(verdicts=[Verdict("map", "rk4", "FD", -1.5, 1, "harms")]), "helping ones are negative"),
        (wrong(grids={"g": np.zeros(4)}), r"grid 'g'=\[4\]: not a kind of samples"),
        (wrong(grids={"g": np.zeros((4, 0))}), r"grid 'g'=\[4, 0\]: not a kind of samples"),
        (wrong(grids={"g": np.zeros((4, 8, 8, 2))}), r"grid 'g' is float64 \[4, 8, 8, 2\]; give images"),
        (wrong(grids={"g": np.full((4, 2), np.inf)}), "grid 'g' has 8 of 8 values that are not finite"),
        (wrong(trajectories={"t": np.zeros((4, 3, 3))}), r"trajectory 't' has shape .* points are \[T, n, 2\]"),
        (wrong(trajectories={"t": np.zeros((4, 8, 8, 1))}), r"trajectory 't' .* give images \[T, n, H, W, C\]"),
        (wrong(curves={"c": ([1, 2], [1.0])}), r"curve 'c' has shapes .* give \(step, loss\)"),
        (wrong(curves={"c": ([], [])}), "one length n >= 1"),
        (wrong(gaps={"g": ([0], [1.0])}), r"give \(t_n, distance, se\)"),
        (wrong(gaps={"g": ([0], [1.0], [-1.0])}), "negative standard error; give zeros"),
    ],
)  # fmt: skip
def test_contents_that_cannot_be_shown_are_refused_with_a_sentence(attempt, words):
    with pytest.raises(ValueError, match=words):
        attempt()


def test_good_contents_pass_the_check():
    report.check_contents(contents())
