"""A real `mlflow server`: killed in mid-study, its models loaded elsewhere, its pages in a browser."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

import ranksearch
from ranksearch.api import Silent, search, sync
from ranksearch.tracking.runs import final_metrics
from ranksearch.tracking.store import NOTED
from ranksearch.tracking.ui import Page
from tests.browser import CHROMIUM, Browser
from tests.conftest import free_ports
from tests.test_mirror import assert_holds, runs_of


class Server:
    """MLflow's server over a SQLite file, with artifacts that it serves itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (self.port,) = free_ports(1)
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process = None
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        command += ["--artifacts-destination", (self.folder / "artifacts").as_uri()]
        with open(self.folder / "server.log", "a") as log:
            environment = os.environ | {
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"
            }  # ten processes that nothing here asks for
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


class KillsTheServer(Silent):
    """Shoots at the store when it holds a trial and three have ended."""

    def __init__(self, server) -> None:
        self.server, self.lines = server, []

    def row(self, study, row) -> None:
        if study.finished == 3:
            client = MlflowClient(self.server.uri)
            while not (found := client.get_experiment_by_name("digits_resnet8")) or not client.search_runs(
                [found.experiment_id], "tags.`ranksearch.kind` = 'trial'"
            ):
                time.sleep(0.1)
            self.server.kill()

    def log(self, message) -> None:
        self.lines.append(message)


@pytest.fixture(scope="module")
def studied(server, tmp_path_factory):
    """A study whose server was killed in the middle, and that was brought up to date when it was there again."""
    runs = tmp_path_factory.mktemp("runs")
    space = Path(__file__).parent.parent / "search_spaces" / "digits_resnet8.yaml"
    settings = ["recipe.steps=20", "recipe.bn_batches=2", f"tracking.uri={server.uri}", "tracking.register=true"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        observer = KillsTheServer(server)
        study = search(space, trials=5, settings=settings, runs=runs, inline=True, observer=observer)
        server.start()
        assert any("ranksearch sync" in line for line in observer.lines)
        _, parent, trials = runs_of(server.uri)
        assert len(trials) < 5
        assert parent.info.status == "RUNNING"
        sync("digits_resnet8", runs=runs)
        sync("digits_resnet8", runs=runs)  # once more changes nothing
    return study


def test_a_server_that_was_killed_holds_after_sync_what_the_folder_holds(studied, server):
    client, parent, trials = runs_of(server.uri)
    assert parent.info.status == "FINISHED"
    assert sorted(trials) == [row["trial"] for row in studied.trials]
    assert_holds(client, trials, studied)
    steps = sorted(m.step for m in client.get_metric_history(parent.info.run_id, "hypervolume"))
    assert steps == [1, 2, 3, 4, 5]
    stored = Path(client.download_artifacts(parent.info.run_id, "front.json", str(studied.folder / "trials")))
    assert json.loads(stored.read_text()) == json.loads((studied.folder / "front.json").read_text())


def test_the_nets_of_the_front_load_elsewhere_without_our_code_and_without_a_pickle(studied, server, tmp_path):
    client, _, trials = runs_of(server.uri)
    models = client.search_logged_models([trials[0].info.experiment_id])
    found = {int(model.tags["ranksearch.trial"]): model for model in models}
    assert len(models) == len(found) == len(studied.front)  # none twice
    assert set(found) == {row["trial"] for row in studied.front}
    for row in studied.front:
        model = found[row["trial"]]
        assert model.status == "READY"
        assert model.source_run_id == trials[row["trial"]].info.run_id
        assert {metric.key: metric.value for metric in model.metrics} == final_metrics(row, studied.metric)
    example = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    torch.save(example, tmp_path / "x.pt")
    uris = {"champion": "models:/digits_resnet8@champion"} | {str(n): f"models:/{m.model_id}" for n, m in found.items()}
    script = f"""
import sys, json, torch
sys.modules["ranksearch"] = None  # whoever imports it fails
import mlflow
x = torch.load("x.pt", weights_only=True)
for name, uri in json.loads({json.dumps(json.dumps(uris))}).items():
    torch.save(mlflow.pytorch.load_model(uri)(x).detach(), f"{{name}}.pt")
again = mlflow.pyfunc.load_model("models:/digits_resnet8@champion")
print(json.dumps(again.predict(x.numpy()).tolist()))
print(again.metadata.signature)
"""
    environment = os.environ | {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    best = studied.best()
    with torch.inference_mode():
        for name in uris:
            number = best["trial"] if name == "champion" else int(name)
            wanted = ranksearch.load(studied.trial_folder(number))(example)
            given = torch.load(tmp_path / f"{name}.pt", weights_only=True)
            assert (given - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    predicted, *signature = done.stdout.splitlines()
    assert json.loads(predicted) == torch.load(tmp_path / "champion.pt", weights_only=True).tolist()
    assert "Tensor('float32', (-1, 1, -1, -1))" in "".join(signature)  # a net that pools takes maps of any size


def test_stdout_is_kept_for_results(server, tmp_path):
    space = Path(__file__).parent.parent / "search_spaces" / "digits_resnet8.yaml"
    options = [
        "--trials",
        "1",
        "--name",
        "printed",
        "--inline",
        "--json",
        "--set",
        "recipe.steps=5",
        "--set",
        "tracking.models=false",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "ranksearch", "search", str(space), *options, "--set", f"tracking.uri={server.uri}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["study"] == "printed"


def test_the_best_net_is_registered_once(studied, server):
    client, _, trials = runs_of(server.uri)
    versions = client.search_model_versions("name = 'digits_resnet8'")
    assert len(versions) == 1
    champion = client.get_model_version_by_alias("digits_resnet8", "champion")
    assert champion.run_id == trials[studied.best()["trial"]].info.run_id


@pytest.fixture
def browser(tmp_path):
    found = Browser(tmp_path / "profile")
    yield found
    found.close()


def says(text: str) -> str:
    """JavaScript: whether the page shows a text."""
    return f"document.body && document.body.innerText.includes({json.dumps(text)})"


SHIP_AT = """[...document.querySelectorAll("h1,h2,h3,strong")].filter((part) => /ship t/i.test(part.textContent))
  .map((part) => [part.tagName, part.textContent, part.getBoundingClientRect().bottom])"""
"""JavaScript: [tag, text, where it ends from above] of what names the net to ship."""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_pages_show_the_study_in_a_browser(studied, server, browser, tmp_path):
    noted = json.loads((studied.folder / NOTED).read_text())
    assert noted["uri"] == server.uri
    page = Page("digits_resnet8", noted["experiment"], noted["parent"])
    wide = browser.open(f"{server.uri}{page.trials}", until=says("on_front"), width=3000, height=1400)
    for row in studied.trials:
        assert f"t{row['trial']:03d} " in wide
    run = browser.open(f"{server.uri}{page.front}", until=says("Ship trial"), width=1400, height=900)
    assert "best_within_budget" in run
    best = studied.best()["trial"]
    heading = next(part for part in browser.value(SHIP_AT) if part[0].startswith("H"))
    assert f"ship t{best:03d} " in heading[1]  # which net, its metric and cost: whatever MLflow puts beside its page
    assert heading[2] < 900
    browser.open(f"{server.uri}{page.front}", until=says("Ship trial"), width=1920, height=1080)
    sentence = next(part for part in browser.value(SHIP_AT) if part[0] == "STRONG")
    assert sentence[1].startswith(f"Ship trial {best}: ")
    assert sentence[2] < 1080
    assert browser.requested
    assert not [url for url in browser.requested if not url.startswith((server.uri, "about:", "data:", "blob:"))]
    assert not [
        said for said in browser.problems if "/ajax-api/" not in said
    ]  # MLflow's pages ask its server for what it has not
    ranksearch.report(str(studied.folder), output=tmp_path / "report.html")
    drawn = "document.body && document.body.classList.contains('figures-drawn')"
    report = browser.open((tmp_path / "report.html").as_uri(), until=drawn, width=1400, height=900)
    assert report.count("main-svg") >= 5  # what the page's script draws
    assert browser.problems == []
    assert "http" not in (tmp_path / "report.html").read_text().split("</script>")[-1]
