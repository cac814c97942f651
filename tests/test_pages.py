"""The report as a reader meets it: in a browser without a network, on a phone and on a desk, and in both colour schemes."""

import json
import re
import shutil
import subprocess
from html import unescape
from importlib.resources import files
from itertools import product

import pytest

from ranksearch.tracking.report import report_html
from ranksearch.tracking.view import View
from ranksearch.trial.result import TrialResult
from tests.conftest import simulated

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LISTENS = """<script>
window.problems = [];
addEventListener("error", (event) => problems.push(event.message));
console.error = (...said) => problems.push(said.join(" "));
</script>"""
ASKS = """<!DOCTYPE html><body>
<iframe id="w390" src="report.html" style="width:390px;height:844px;border:0"></iframe>
<iframe id="w1400" src="report.html" style="width:1400px;height:900px;border:0"></iframe>
<iframe id="paper" src="report.html" style="width:1400px;height:900px;border:0"></iframe>
<script>
function seen(frame) {
  const page = frame.contentDocument, part = (name) => page.querySelector(name).getBoundingClientRect();
  const wide = [...page.querySelectorAll(".wide")].filter((box) => box.clientWidth);
  return {
    problems: frame.contentWindow.problems, width: page.documentElement.scrollWidth,
    ship: part(".ship").bottom, verdict: part("#verdict").bottom,
    clipped: wide.filter((box) => box.scrollWidth > box.clientWidth + 1).length, tables: wide.length,
    fetched: frame.contentWindow.performance.getEntriesByType("resource").map((entry) => entry.name),
    figures: page.querySelectorAll(".main-svg").length,
    empty: page.querySelectorAll(".plotly-graph-div:not(.drawn)").length,
    cut: [...page.querySelectorAll(".plotly-graph-div.drawn")].filter((box) => box.clientWidth
      && box.querySelector(".main-svg").getBoundingClientRect().right > box.parentElement.getBoundingClientRect().right + 1).length,
    beyond: [...page.querySelectorAll(".plotly-graph-div.drawn")].filter((box) => box.clientWidth
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
    folded = page.replace('<div class="slices">', '<details><div class="slices">', 1)  # what follows is folded, too
    (tmp_path / "report.html").write_text(folded.replace("<head>", f"<head>{LISTENS}", 1))
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
    phone, desk = seen["w390"], seen["w1400"]
    for frame in (phone, desk):
        assert frame["problems"] == []
        assert not [name for name in frame["fetched"] if not name.startswith(("file:", "data:", "blob:"))]
        assert frame["figures"] >= 6
        assert frame["beyond"] == 0
        assert frame["cut"] == 0
    paper = seen["paper"]
    assert (paper["empty"], paper["cut"], paper["problems"]) == (
        0,
        0,
        [],
    )  # what is folded away is drawn on paper, as wide as it is
    assert phone["empty"] > 0
    assert phone["width"] <= 390  # no sideways scrolling
    assert phone["ship"] <= 844  # the first screen says which net to ship
    assert desk["verdict"] <= 900
    assert desk["tables"] >= 2
    assert desk["clipped"] == 0


def luminance(colour: str) -> float:
    """Relative luminance of `#rgb` or `#rrggbb`, as the Web Content Accessibility Guidelines define it."""
    digits = colour.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    shares = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_text_colour_stands_out_in_both_schemes():
    template = files("ranksearch.tracking").joinpath("report.html.j2").read_text()
    schemes = [dict(re.findall(r"--(\w+): (#\w+)", rule)) for rule in re.findall(r":root \{([^}]*)\}", template)]
    assert len(schemes) == 2
    for scheme, text, ground in product(schemes, ("ink", "quiet", "link", "bad"), ("paper", "box")):
        light, dark = sorted((luminance(scheme[text]), luminance(scheme[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)
