"""The report: one file that fetches nothing, holds every row, and is safe with any name."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from tests.compare.results_of import make_ladder, make_results

from assay.cli.compare import _print
from assay.compare import figures
from assay.compare.block_diagram import draw_diagram
from assay.compare.curves import smooth
from assay.compare.report import (
    draw,
    embedded,
    losses_csv,
    page,
    page_data,
    read_series,
    warnings,
)
from assay.compare.scaling import Ladder, study
from assay.errors import AssayError
from assay.spec import presets

EVIL = '</script><img src=x onerror="alert(1)">$x_1$ & <!--'


class Reader(HTMLParser):
    """Cells of each table, attributes that fetch, scripts by type, ids."""

    def __init__(self):
        super().__init__()
        self.tables, self.fetching, self.scripts, self.ids = {}, [], {}, []
        self.text, self.inside, self.tags, self.in_cell = [], None, [], False

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            if name in attributes:
                self.fetching.append((tag, attributes[name]))
        if tag == "table":
            self.tables[attributes.get("id")] = self.rows = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True
        elif tag == "script":
            self.inside = attributes.get("type", "text/javascript")
            self.scripts.setdefault(self.inside, []).append("")

    def handle_endtag(self, tag):
        if tag == "script":
            self.inside = None
        elif tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[self.inside][-1] += data
            return
        self.text.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data


def read(html):
    reader = Reader()
    reader.feed(html)
    return reader


@pytest.fixture(scope="module")
def results():
    return make_results()


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    return draw(results, out), out


@pytest.fixture(scope="module")
def html(written):
    return written[0].report.read_text()


def test_the_answer_comes_first_and_every_row_is_there(html, results):
    found = read(html)
    words = " ".join(found.text).split()
    text = " ".join(words)
    assert text.index(results.sentence) < text.index("Variants")
    names = [row[0] for row in found.tables["rows"][1:]]
    assert names == [row.name for row in sorted(results.rows, key=lambda row: row.rank)]
    assert names[0] == "moe"  # the best first
    for row in results.rows:
        shown = next(r for r in found.tables["rows"][1:] if r[0] == row.name)
        assert f"{row.val_bpb_mean:.4f}" in shown
        low, high = row.val_bpb_ci95
        assert f"{low:.4f} to {high:.4f}" in shown
    _, *lines = found.tables["pairs"]  # two a pair: its numbers, and why
    for pair, shown, why in zip(results.pairs, lines[::2], lines[1::2], strict=True):
        assert pair.verdict in shown
        assert why == [pair.reason]
        assert f"{pair.difference:+.4f}" in shown
    assert results.environment.command in text
    assert "seeds are few" in text


def test_nothing_is_fetched(html):
    found = read(html)
    assert found.fetching == []
    assert "link" not in found.tags
    assert "iframe" not in found.tags
    assert "default-src 'none'" in html  # and a browser would not let it
    ours = html.replace(max(read(html).scripts["text/javascript"], key=len), "")
    assert not re.search(r"https?:|@import|url\(|//cdn", ours)


def test_each_figure_has_a_place_and_the_data_are_in_the_page(html, results):
    found = read(html)
    wanted = {"curves", "forest", "experts-0", "data", *(f"pareto-{c}" for c in figures.COSTS)}
    assert wanted <= {*found.ids}
    assert len(found.ids) == len({*found.ids})
    (text,) = found.scripts["application/json"]
    data = json.loads(text)
    assert data == page_data(results)
    assert [series["name"] for series in data["curves"][0]["series"]] == ["dense", "gqa", "moe"]
    assert {*data["curves"][0]["series"][0]["axes"]} == {"tokens", "flops", "seconds"}
    script = found.scripts["text/javascript"][-1]
    for name in set(re.findall(r'at\("([a-z-]+)"\)', script)) - {"series", "scaling", "isoflops"}:
        assert name in found.ids
    assert "smoothed: moving average, weight" in script


def test_a_band_holds_the_mean_of_its_runs(results):
    data = page_data(results)
    axes = data["curves"][0]["series"][0]["axes"]["tokens"]
    runs = [run for run in results.runs if run.variant == "dense"]
    last = np.mean([run.curve[-1].train_loss for run in runs])
    assert axes["mean"][-1] == pytest.approx(last)
    assert axes["low"][-1] < last < axes["high"][-1]
    assert axes["n"] == 3


def test_curves_that_cross_are_listed(html, results):
    rows = read(html).tables["crossings"][1:]
    assert ["dense", "moe"] in [row[:2] for row in rows]
    assert not any({"dense", "gqa"} == {*row[:2]} for row in rows)


def test_any_name_is_safe(tmp_path):
    """A name that would end the script, begin a comment, be mathematics or HTML."""
    hostile = make_results(names=(EVIL, "b", "c<b>"), sentence=EVIL, points=12)
    text = page(page_data(hostile), hostile)
    found = read(text)
    assert found.fetching == []
    assert "img" not in found.tags
    assert json.loads(found.scripts["application/json"][0])["rows"][0]["name"] == EVIL
    assert any(row[0] == EVIL for row in found.tables["rows"])
    assert figures.draw_figures(page_data(hostile), tmp_path)
    assert embedded({"a": "</script>"}).count("<") == 0


def test_no_name_is_hidden_from_a_legend(tmp_path):
    """Matplotlib leaves out labels that begin with an underscore."""
    runs = [{"name": name, "x": [0, 1], "y": [2, 1], "index": [0, 1]} for name in ("_a", "b")]
    figures.draw_series(runs, "step", tmp_path)
    drawn = (tmp_path / "losses.svg").read_text()
    assert "<!--  _a -->" in drawn
    assert "<!-- b -->" in drawn


def test_every_figure_is_a_png_and_an_svg(written):
    drawn, out = written
    names = {path.name for path in drawn.figures}
    stems = ["train_loss-tokens", "train_loss-flops", "train_loss-seconds", "val_bpb-tokens"]
    for stem in [*stems, "differences", "pareto", "experts-0", "losses"]:
        assert {f"{stem}.png", f"{stem}.svg"} <= names
    for path in drawn.figures:
        assert path.parent == out / "figures"
        if path.suffix == ".png":
            assert path.read_bytes()[:4] == b"\x89PNG"
        else:
            ElementTree.parse(path)
    left = [p.name for p in out.rglob("*") if p.name.startswith(".")]
    assert not left


@pytest.mark.parametrize(
    ("anytime", "reach", "says"),
    [
        ((-0.0468, 0.01), 1.05 * 0.0468, ""),  # just past the others: the axis goes there
        ((None, 0.01), 1.3 * 0.036, "filled arrow: infinite"),
        ((-0.5, 0.01), 1.3 * 0.036, "open arrow: too long to be shown"),
    ],
)
def test_an_arrow_is_drawn_only_where_an_interval_leaves_the_figure(anytime, reach, says):
    pair = {"a": "a", "b": "b", "ci95": (-0.036, -0.01), "anytime95": anytime}
    pair |= {"difference": -0.02, "verdict": "better"}
    assert figures.forest_reach([pair], 0.0) == pytest.approx(reach)
    data = {"pairs": [pair], "margin": 0.0, "reach": reach, "unit": "bits per byte"}
    drawn = figures._forest(data)
    assert drawn.get_suptitle().partition("\n")[2] == says
    marks = [line.get_marker() for line in drawn.axes[0].lines]
    assert ("<" in marks) == bool(says)


def test_losses_come_back_from_the_csv(results, written):
    drawn, out = written
    series, x = read_series(out / "losses.csv")
    assert x == "Step"
    assert drawn.series == tuple(run["name"] for run in series)
    assert [run["name"] for run in series] == [run.name for run in results.runs]
    assert series[0]["y"] == [p.train_loss for p in results.runs[0].curve]
    assert series[0]["x"] == [p.step for p in results.runs[0].curve]


def test_runs_of_several_lengths_share_a_csv(tmp_path):
    results = make_results()
    runs = list(results.runs)
    runs[0] = runs[0].replace(curve=runs[0].curve[:20])
    text = losses_csv(results.replace(runs=tuple(runs)))
    (tmp_path / "l.csv").write_text(text)
    series, _ = read_series(tmp_path / "l.csv")
    assert [len(run["y"]) for run in series] == [20] + [60] * 8


# ---------------------------------------------------------------------------- states


def test_an_unfinished_comparison_has_a_report(results):
    runs = tuple(
        run.replace(status="planned", curve=(), val_bpb=None, val_loss=None, experts=None)
        for run in results.runs
    )
    rows = tuple(
        row.replace(
            seeds=(),
            val_bpb_mean=None,
            val_bpb_ci95=(None, None),
            val_bpb_anytime95=(None, None),
            rank=None,
        )
        for row in results.rows
    )
    early = results.replace(runs=runs, rows=rows, pairs=(), complete=False)
    found = read(page(page_data(early), early))
    assert "0 of 9 runs are done" in " ".join(found.text)
    assert len(found.tables["rows"]) == 4
    assert "forest" not in found.ids


def test_failed_runs_and_flags_are_warned_of(results):
    runs = list(results.runs)
    runs[0] = runs[0].replace(status="failed", error="the loss became nan at step 40")
    rows = [
        row.replace(flags=("weighs by priority: training sees the future",))
        if row.name == "moe"
        else row
        for row in results.rows
    ]
    rows[0] = rows[0].replace(seeds=(1, 2))
    found = read(page(page_data(r := results.replace(runs=tuple(runs), rows=tuple(rows))), r))
    text = " ".join(found.text)
    assert "the loss became nan at step 40" in text
    assert "training sees the future" in text
    assert "2 of 3 planned seeds" in text


def test_one_seed_says_that_its_intervals_are_infinite():
    one = make_results(seeds=(0,))
    found = read(page(page_data(one), one))
    assert "infinite" in found.tables["rows"][1]
    assert "3 of 3 anytime-valid intervals are infinite" in " ".join(found.text)


def test_scaling_fits_are_shown(results, tmp_path):
    c = np.repeat(np.geomspace(1e12, 1e14, 4), 2)
    n = np.sqrt(c / 120)
    noise = np.exp(0.002 * np.random.default_rng(0).standard_normal(8))
    ladders = {
        "dense": Ladder.of(n, 20 * n, c, (1 + 60 * c**-0.15) * noise),
        "moe": Ladder.of(n[:2], 20 * n[:2], c[:2], [2.0, 1.9]),
    }
    fitted = results.replace(scaling=study(ladders, 1e16, resamples=6))
    data = page_data(fitted)
    found = read(page(data, fitted))
    assert found.tables["fits"][1][0] == "dense"
    assert "a miss of" in found.tables["fits"][1][3]
    assert "moe has no fit" in " ".join(found.text)
    names = {path.name for path in figures.draw_figures(data, tmp_path)}
    assert "scaling.svg" in names


def test_a_ladder_is_in_its_order_and_its_last_rung_is_drawn(tmp_path, capsys):
    ladder = make_ladder()
    data = page_data(ladder)
    assert data["budget"] == "100G to 900G tokens"
    assert [e["name"] for e in data["experts"] if e["shown"]] == ["moe@n540-c9e+11"]
    found = read(page(data, ladder))
    assert [place for place in found.ids if place.startswith("experts-")] == ["experts-8"]
    assert not any("missed the largest" in text for text in data["warnings"])
    apart = ladder.scaling["outlook"]["predicted"] | {"moe": 1.0, "dense": 1.0001}
    doubted = ladder.scaling | {"outlook": ladder.scaling["outlook"] | {"predicted": apart}}
    (told,) = (w for w in warnings(ladder.replace(scaling=doubted)) if "missed the largest" in w)
    assert "the first two variants are 0.0001 apart" in told
    names = [row[0] for row in found.tables["rows"][1:]]
    assert names[:3] == ["moe@n50-c1e+11", "dense@n50-c1e+11", "moe@n80-c1e+11"]
    assert "IsoFLOP: N ~ C^" in found.tables["fits"][1][2]
    drawn = {path.name: path for path in figures.draw_figures(data, tmp_path)}
    assert sum(name.startswith("experts-") for name in drawn) == 2 * 9
    legend = drawn["isoflops.svg"].read_text()  # an entry a variant, whatever its rungs
    assert [legend.count(f"<!-- {name} -->") for name in ("dense", "moe")] == [1, 1]
    legend = drawn["train_loss-tokens.svg"].read_text()
    assert [legend.count(f"<!-- {name} -->") for name in ("dense", "moe")] == [1, 1]
    _print(ladder, Path("runs/ladder"))
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    assert told.count("a miss of") == 2
    assert "At 1e+14 FLOPs, by the fits:" in told


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_every_preset_has_a_diagram(name):
    spec = presets.get(name).model
    svg = draw_diagram(spec.model_dump(mode="json"))
    if spec.decoder.num_layers:
        assert f"&#215; {-(-spec.decoder.num_layers // len(spec.decoder.pattern))}<" in svg
    root = ElementTree.fromstring(svg)
    width, height = (float(v) for v in root.get("viewBox").split()[2:])
    for box in root.iter("rect"):
        assert float(box.get("x")) + float(box.get("width")) <= width
        assert float(box.get("y")) + float(box.get("height")) <= height


def test_no_spec_no_diagram():
    assert draw_diagram({}) == ""


# ---------------------------------------------------------------------------- a CSV


WANDB = """"Step","MOE-9M - loss","MOE-9M - loss__MIN","eager-shadow-28 - loss","8Trnsfrmr - lr"
0,5.0,4.9,6.0,1
10,4.0,3.9,,1
20,3.5,3.4,4.5,1
30,,,4.0,1
40,,,NaN,1
"""


def test_a_wandb_export_is_drawn(tmp_path):
    (tmp_path / "export.csv").write_text(WANDB)
    drawn = draw(tmp_path / "export.csv", tmp_path / "out", animate=True)
    assert drawn.series == ("MOE-9M", "eager-shadow-28")
    names = {path.name for path in drawn.figures}
    assert names == {"losses.png", "losses.svg", "losses.gif"}
    assert (tmp_path / "out/figures/losses.gif").read_bytes()[:4] == b"GIF8"
    found = read(drawn.report.read_text())
    data = json.loads(found.scripts["application/json"][0])
    assert data["series"][0]["x"] == [0, 10, 20]  # the trailing gap is dropped
    assert data["series"][1]["y"] == [6.0, 4.5, 4.0]
    assert data["series"][1]["index"] == [0, 2, 3]  # rows of the file, for the axis above
    assert [row[0] for row in found.tables["features"][1:]] == ["MOE-9M", "eager-shadow-28"]
    assert "raw index" in found.scripts["text/javascript"][-1]


def test_only_an_earlier_drawing_is_overwritten(tmp_path):
    export, other, mine = tmp_path / "export.csv", tmp_path / "other", tmp_path / "mine"
    export.write_text(WANDB)
    for _ in range(2):
        draw(export, tmp_path)
    other.mkdir()
    for name in ("report.html", "figures"):
        (other / name).write_text("not Assay's")
        with pytest.raises(AssayError, match=f"{name}: it is there already"):
            draw(export, other)
        assert (other / name).read_text() == "not Assay's"
        (other / name).unlink()
    mine.mkdir()
    (mine / "results.json").write_text("a comparison")
    with pytest.raises(AssayError, match="it holds a comparison"):
        draw(export, mine)
    assert [path.name for path in mine.iterdir()] == ["results.json"]


def test_the_second_axis_has_the_raw_index(tmp_path):
    (tmp_path / "export.csv").write_text(WANDB)
    series, _ = read_series(tmp_path / "export.csv")
    figure, ax = figures._series_axes(series, "Step")
    figure.draw_without_rendering()
    (second,) = ax.child_axes
    assert second.get_xlabel() == "raw index"
    low, high = second.get_xlim()
    bottom = ax.get_xlim()
    assert low == pytest.approx(bottom[0] / 10)  # ten steps a row
    assert high == pytest.approx(bottom[1] / 10)


def test_without_steps_the_row_is_the_place(tmp_path):
    (tmp_path / "a.csv").write_text("a - loss,b - loss\n3,4\n2,3\n,2\n")
    series, x = read_series(tmp_path / "a.csv")
    assert x == "row"
    assert [run["x"] for run in series] == [[0, 1], [0, 1, 2]]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "none; at least one must be named"),
        ("Step,loss\n1,2\n", "'Step', 'loss'; at least one must be named '<run> - loss'"),
        ("Step,a - loss\n1,\n", "hold no numbers"),
    ],
    ids=["empty", "no column", "no value"],
)
def test_a_csv_without_losses_says_what_it_found(tmp_path, text, sentence):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(AssayError, match=re.escape(sentence)):
        draw(tmp_path / "bad.csv", tmp_path / "out")


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(AssayError, match="no such file or folder"):
        draw(tmp_path / "nothing", tmp_path)
    with pytest.raises(AssayError, match=re.escape("results.json")):
        draw(tmp_path, tmp_path)


def test_a_report_is_drawn_from_the_file_and_again(tmp_path):
    results = make_results(names=("dense", "gqa"), points=12)
    (tmp_path / "results.json").write_text(results.to_json())
    first = draw(tmp_path, tmp_path)
    text = first.report.read_bytes()
    svg = {path: path.read_bytes() for path in first.figures if path.suffix == ".svg"}
    again = draw(tmp_path / "results.json", tmp_path)
    assert again.report.read_bytes() == text
    assert {path: path.read_bytes() for path in svg} == svg


def test_the_pages_smoothing_is_the_one_that_is_documented():
    """The script's loop, as Python: kept beside `smooth` so that neither changes alone."""
    from importlib import resources

    script = (resources.files("assay.compare") / "page" / "report.js").read_text()
    assert "total = weight * total + v; count = weight * count + 1;" in script
    np.testing.assert_allclose(smooth([1.0, 3.0], 0.5), [1.0, (0.5 + 3) / 1.5])
