"""The report as a reader meets it: in a browser without a network, on a phone and on a desk, and in both colour schemes."""

import json
import re
import subprocess
from html import unescape
from importlib.resources import files
from itertools import product

import pytest

from ranksearch.tracking.report import report_html
from ranksearch.tracking.view import View
from ranksearch.trial.result import TrialResult
from tests.browser import CHROMIUM
from tests.conftest import simulated
from tests.test_figures import contrast

LISTENS = """<script>
window.problems = [];
addEventListener("error", (event) => problems.push(event.message));
console.error = (...said) => problems.push(said.join(" "));
</script>"""
ASKS = """<!DOCTYPE html><body>
<iframe id="w390" src="report.html" style="width:390px;height:844px;border:0"></iframe>
<iframe id="w1400" src="report.html" style="width:1400px;height:900px;border:0"></iframe>
<iframe id="dark" src="dark.html" style="width:1400px;height:900px;border:0"></iframe>
<iframe id="paper" src="dark.html" style="width:1400px;height:900px;border:0"></iframe>
<script>
const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
function luminance(colour) {
  const linear = parts(colour).slice(0, 3).map((part) => part / 255).map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}
function contrasts(page) {  // of every text of a figure that stands on the page itself, not in a cell
  const style = (part) => page.defaultView.getComputedStyle(part), ground = luminance(style(page.body).backgroundColor);
  const texts = [...page.querySelectorAll(".plotly-graph-div svg text")].filter((text) => text.textContent.trim());
  return texts.filter((text) => !text.closest(".heatmaplayer ~ .scatterlayer")).map((text) => {
    const colours = [luminance(style(text).fill), ground];
    return (Math.max(...colours) + 0.05) / (Math.min(...colours) + 0.05);
  });
}
function seen(frame) {
  const page = frame.contentDocument, part = (name) => page.querySelector(name).getBoundingClientRect();
  const wide = [...page.querySelectorAll(".wide")].filter((box) => box.clientWidth);
  return {
    problems: frame.contentWindow.problems, width: page.documentElement.scrollWidth,
    ship: part(".ship").bottom, verdict: part("#verdict").bottom,
    clipped: wide.filter((box) => box.scrollWidth > box.clientWidth + 1).length, tables: wide.length,
    fetched: frame.contentWindow.performance.getEntriesByType("resource").map((entry) => entry.name),
    figures: page.querySelectorAll(".main-svg").length,
    ground: luminance(frame.contentWindow.getComputedStyle(page.body).backgroundColor), texts: contrasts(page),
    tallest: Math.max(...[...page.querySelectorAll(".figure")].map((box) => box.clientHeight)),
    empty: page.querySelectorAll(".plotly-graph-div:not([data-look])").length,
    cut: [...page.querySelectorAll(".plotly-graph-div[data-look]")].filter((box) => box.clientWidth
      && box.querySelector(".main-svg").getBoundingClientRect().right > box.parentElement.getBoundingClientRect().right + 1).length,
    beyond: [...page.querySelectorAll(".plotly-graph-div[data-look]")].filter((box) => box.clientWidth
      && box.querySelector(".main-svg").getBoundingClientRect().right > page.documentElement.clientWidth).length,
  };
}
function drawn() {  // virtual time does not wait for what unpacks the script: reading a file takes real time
  const request = new XMLHttpRequest();
  request.open("GET", "report.html", false);
  request.send();
  return [...document.querySelectorAll("iframe")].every((frame) => frame.contentDocument.querySelector("body.figures-drawn"));
}
const asking = setInterval(() => {
  if (!drawn()) return;
  clearInterval(asking);
  document.getElementById("paper").contentWindow.dispatchEvent(new Event("beforeprint"));
  const found = Object.fromEntries([...document.querySelectorAll("iframe")].map((frame) => [frame.id, seen(frame)]));
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
}, 100);
</script></body>
"""


@pytest.fixture
def page(make, bench):
    """The report of ten simulated trials, one of which failed; front and layers were timed."""
    study = make(trials=10)
    while (candidate := study.ask(bench)) is not None:
        if candidate.number == 3:
            study.tell(3, TrialResult("failed", candidate.seed, 0.0, reason="ValueError: no\nmore"))
        else:
            study.tell(candidate.number, simulated(candidate, bench))
    rows = study.front
    study.note_latencies({row.trial: (0.5 + 0.01 * i, 0.8) for i, row in enumerate(rows)}, measured_with="a CPU; eager")
    layers = {layer.name: 0.1 for layer in bench.net.layers}
    study.note_layer_times(layers, {str(row.trial): layers for row in rows}, measured_with="a CPU; eager")
    study.conclude()
    return report_html(View.of(study), study.importances())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_report_whole_on_a_phone_and_on_a_desk(page, tmp_path):
    folded = page.replace('<p class="quiet">The numbers', "<details><p>The numbers", 1)  # what follows is folded, too
    light = folded.replace("<head>", f"<head>{LISTENS}", 1)
    (tmp_path / "report.html").write_text(light)
    (tmp_path / "dark.html").write_text(light.replace("(prefers-color-scheme: dark)", "(min-width: 0)"))
    (tmp_path / "asks.html").write_text(ASKS)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-sync", "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [CHROMIUM, *options, "--window-size=1900,1000", "--virtual-time-budget=120000", "--dump-dom", (tmp_path / "asks.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    said = re.search("FOUND({.*})END", unescape(done.stdout), re.DOTALL)
    assert said, done.stderr[-2000:]
    seen = json.loads(said[1])
    phone, desk, dark, paper = (seen[name] for name in ("w390", "w1400", "dark", "paper"))
    assert (phone["ground"], desk["ground"], paper["ground"]) == (1, 1, 1)  # paper is white, whatever the scheme
    assert dark["ground"] < 0.02
    for frame in (phone, desk, dark, paper):
        assert len(frame["texts"]) > 100
        assert min(frame["texts"]) >= 4.5
    for frame in (phone, desk, dark):
        assert frame["problems"] == []
        assert not [name for name in frame["fetched"] if not name.startswith(("file:", "data:", "blob:"))]
        assert frame["figures"] >= 6
        assert frame["beyond"] == 0
        assert frame["cut"] == 0
    assert (paper["empty"], paper["cut"], paper["problems"]) == (
        0,
        0,
        [],
    )  # what is folded away is drawn on paper, as wide as it is
    assert paper["tallest"] <= 700  # a figure fits the page, 186 mm of A4 across, and is not split
    assert phone["empty"] > 0
    assert phone["width"] <= 390  # no sideways scrolling
    assert phone["ship"] <= 844  # the first screen says which net to ship
    assert desk["verdict"] <= 900
    assert desk["tables"] >= 2
    assert desk["clipped"] == 0


def test_every_text_colour_stands_out_in_both_schemes():
    template = files("ranksearch.tracking").joinpath("report.html.j2").read_text()
    schemes = [dict(re.findall(r"--(\w+): (#\w+)", rule)) for rule in re.findall(r":root[^{]*\{([^}]*)\}", template)]
    assert len(schemes) == 2
    for scheme, text, ground in product(schemes, ("ink", "quiet", "link", "bad"), ("paper", "box")):
        assert contrast(scheme[text], scheme[ground]) >= 4.5, (text, ground)
