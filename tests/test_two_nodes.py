"""Two nodes of a real Ray cluster, the second of which has a folder of studies of its own: what is not shared fails at once."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import DRILLS
from tests.two_nodes import Nodes, skip_without_mounts

SCRIPT = """
import json, sys
from pathlib import Path
import ranksearch
from ranksearch import api
from ranksearch.errors import UsageError

space, address, runs, shared = sys.argv[1:]
lines, found = [], {}

class Listening(api.Silent):
    def log(self, message):
        lines.append(message)

def search(*settings, **options):
    short = ["recipe.steps=20", "recipe.bn_batches=2", "tracking.models=false", "search.max_failures=1"]
    return api.search(
        space, settings=[*short, *settings], trials=4, runs=runs, address=address, observer=Listening(), **options
    )

try:
    search()
except UsageError as error:
    found["refused"] = str(error)
found["made"] = sorted(path.name for path in Path(runs).iterdir())
study = search(f"storage.results={shared}", name="shared")
found["shared"] = [[row["trial"], row["status"], row["reason"]] for row in study.trials]
found["home"] = sorted(str(path.relative_to(study.folder)) for path in (study.folder / "trials").glob("*/*"))
found["lines"] = lines
api.preflight = lambda *args, **kwargs: None  # as if the second node had joined later
study = search(name="late")
found["late"] = [[row["trial"], row["status"], row["reason"]] for row in study.trials]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    skip_without_mounts()
    folder = tmp_path_factory.mktemp("apart")
    for name in ("runs", "shared"):
        (folder / name).mkdir()
    nodes = Nodes(folder, hidden=[folder / "runs"])
    yield folder, nodes
    nodes.stop()


def run(nodes, folder, *command):
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=os.environ | nodes.environment, capture_output=True, text=True, timeout=240
    )  # fmt: skip


@DRILLS
def test_doctor_asks_every_node_and_names_the_one_that_does_not_share(apart):
    folder, nodes = apart
    done = run(nodes, folder, "-m", "ranksearch", "doctor", "--address", nodes.address, "--json")
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)
    assert len(said["nodes"]) == 2
    for node in said["nodes"]:
        assert node["versions"] == said["driver"]["versions"]
        assert node["offers"]["CPU"] == 1
        assert abs(node["offset_s"]) <= node["round_trip_s"]  # one machine, one clock
    (wrong,) = [finding for finding in said["findings"] if finding["level"] == "error"]
    (far,) = [node for node in said["nodes"] if not node["results"]["shared"]]
    assert (wrong["check"], wrong["where"]) == ("results", far["name"])
    assert "storage.results" in wrong["mend"]
    assert not [path for path in (folder / "runs").iterdir() if path.name.startswith(".preflight")]


@DRILLS
def test_a_search_is_refused_runs_with_a_shared_place_and_loses_no_net_silently(apart, digits_yaml):
    folder, nodes = apart
    (folder / "script.py").write_text(SCRIPT)
    done = run(nodes, folder, "script.py", digits_yaml, nodes.address, folder / "runs", folder / "shared")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "does not share" in found["refused"]
    assert "nothing was started" in found["refused"]
    assert found["made"] == []
    assert [status for _, status, _ in found["shared"]] == ["complete"] * 4
    assert len(found["home"]) == 8
    assert any("2 nodes are ready" in line or "warning: " in line for line in found["lines"])
    lost = [reason for _, status, reason in found["late"] if status == "failed"]
    assert lost
    assert all("does not share this place" in reason for reason in lost)
    assert {status for _, status, _ in found["late"]} == {"failed", "complete"}
