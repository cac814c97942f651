"""The preflight: asks this machine, or every node of a cluster, for its facts, before anything is spent on a search.

`facts.py` runs on every node, `findings.py` judges. Without a cluster, Ray is not even imported.
"""

from __future__ import annotations

import shutil
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranksearch.data.folder import data_folder
from ranksearch.errors import RanksearchError, UsageError, first_line
from ranksearch.places.place import Place, PlaceError, Remote, text_of
from ranksearch.places.urls import (
    CONNECT_SECONDS,
    DATABASES,
    DRIVER_HINT,
    FROM_ENVIRONMENT,
    backend_of,
    check_apart,
    database_url,
    shown,
    without_password,
)
from ranksearch.preflight.facts import TOKEN, clock, missing, node_facts, read_token, write_token
from ranksearch.preflight.findings import ERROR, OK, WARNING, Facts, Finding, judge
from ranksearch.tracking.store import is_server, store_uri
from ranksearch.words import Log

if TYPE_CHECKING:
    from ranksearch.space.space import Space

NODE_SECONDS = 60.0
"""How long to wait for a node, whose first worker process takes seconds to start."""
STORE_SECONDS = 2.0
DRIVERS_DATA = {"cifar10": ("cifar-10-batches-py",), "imagefolder": ("train", "val")}
"""Task -> the parts of the data folder that the driver reads."""


def examine(space: Space | None, runs: Path, *, cluster: bool) -> Facts:
    """Facts of this machine and, with `cluster`, of every node of the Ray cluster that this process has joined."""
    results: Place = runs.absolute()
    if space is not None and space.storage.results is not None:
        results = Remote(space.storage.results)
    probe, token = results / f".preflight-{uuid.uuid4().hex[:12]}", uuid.uuid4().hex
    refused = write_token(probe, TOKEN, token)
    question = {"probe": text_of(probe), "token": token, "answer": None}
    try:
        driver = node_facts(question | {"data": []})
        if refused is None and not driver["results"]["sees"]:
            refused = driver["results"]["error"] or f"{results} does not give back what was written there"
        if cluster:
            nodes = _ask_nodes(question | {"data": _data_of_nodes(space)})
            for node in nodes:
                if "silent" not in node:
                    node["results"]["shared"] = node["results"]["sees"] and _sees(probe, node["id"], token)
        else:
            nodes = [driver | {"name": driver["host"], "results": driver["results"] | {"shared": True}}]
    finally:
        _clear(probe)
    stores = {"results": refused, "mlflow": _mlflow(space, runs), "optuna": _optuna(space, runs)}
    needed = _data_of_driver(space)
    return {
        "results": str(results), "driver": driver, "nodes": nodes, "stores": stores, "missing": missing(needed),
    }  # fmt: skip


def preflight(space: Space, runs: Path, log: Log) -> None:
    """Examines the cluster that this process has joined; logs each warning, or one line if all is well.

    Raises:
        UsageError: something would make trials fail or lose their nets.
    """
    report = examine(space, runs, cluster=True)
    found = judge(report)
    errors = [finding.sentence() for finding in found if finding.level == ERROR]
    if errors:
        raise UsageError("The cluster is not ready; nothing was started.\n" + "\n".join(errors))
    for finding in found:
        if finding.level == WARNING:
            log(f"warning: {finding.sentence()}")
    if all(finding.level == OK for finding in found):
        log(f"preflight: {len(report['nodes'])} nodes are ready, and share {report['results']}")


def as_record(report: Facts, found: list[Finding]) -> dict[str, Any]:
    """What `ranksearch doctor --json` prints."""
    worst = found[0].level if found else OK
    return {"status": worst, "findings": [vars(finding) for finding in found], **report}


# Nodes ---------------------------------------------------------------------------------------------------------------


def _ask_nodes(question: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The facts of every live node, by one task each. The tasks take no CPU, so that a full cluster answers too."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    facts_of, clock_of = ray.remote(node_facts), ray.remote(clock)

    def on(node: Mapping[str, Any], function: Any) -> Any:
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        return function.options(num_cpus=0, max_retries=0, scheduling_strategy=place)

    alive = [node for node in ray.nodes() if node["Alive"]]
    asked = [on(node, facts_of).remote({**question, "answer": node["NodeID"]}) for node in alive]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=NODE_SECONDS)
    found = []
    for name, node, task in zip(_names(alive), alive, asked, strict=True):
        facts = {"name": name, "id": node["NodeID"], "offers": node["Resources"]}
        try:
            if task not in answered:
                ray.cancel(task, force=True)
                raise TimeoutError(f"not within {NODE_SECONDS:.0f} s")
            facts |= ray.get(task, timeout=NODE_SECONDS)
            started = time.time()  # the worker is running by now, so this measures only the way there and back
            there = ray.get(on(node, clock_of).remote(), timeout=NODE_SECONDS)
            ended = time.time()
            facts |= {"offset_s": there - (started + ended) / 2, "round_trip_s": ended - started}
        except (RayError, RuntimeError, TimeoutError, ImportError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            facts["silent"] = next(
                (line for line in lines if "ModuleNotFoundError" in line), lines[0] if lines else repr(error)
            )
        found.append(facts)
    return found


def _names(nodes: list[Mapping[str, Any]]) -> list[str]:
    """Host and address of each node; if several nodes share them, also the beginning of Ray's id."""
    plain = [f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in nodes]
    return [
        name if plain.count(name) == 1 else f"{name[:-1]}, node {node['NodeID'][:6]})"
        for name, node in zip(plain, nodes, strict=True)
    ]


def _sees(probe: Place, name: str, token: str) -> bool:
    """Whether the driver sees what a node wrote."""
    try:
        return read_token(probe, name) == token
    except OSError:
        return False


def _clear(probe: Place) -> None:
    if isinstance(probe, Path):
        shutil.rmtree(probe, ignore_errors=True)
        return
    with suppress(PlaceError):  # a place that cannot be reached holds nothing to clear
        probe.remove_folder()


# Data and stores -----------------------------------------------------------------------------------------------------


def _data_of_driver(space: Space | None) -> list[str]:
    """What the driver must find before a study: the task's data, and a checkpoint if one is named."""
    if space is None:
        return []
    folder = data_folder(space.data).absolute()
    named = [] if space.checkpoint in ("auto", "train") else [str(Path(space.checkpoint).expanduser().absolute())]
    return [str(folder / name) for name in DRIVERS_DATA.get(space.task, ())] + named


def _data_of_nodes(space: Space | None) -> list[str]:
    """What every node reads itself: the files of a task that is not held in memory. The driver sends the rest."""
    if space is None:
        return []
    from ranksearch.tasks import TASKS

    kind, folder = TASKS.get(space.task), data_folder(space.data).absolute()
    return [str(folder / name) for name in DRIVERS_DATA[space.task]] if kind is not None and kind.reads_files else []


def _mlflow(space: Space | None, runs: Path) -> str | None:
    """Why MLflow's store cannot be reached; None if it can be, or is a file that will be made."""
    try:
        uri = store_uri(runs, space.tracking.uri if space is not None else None)
    except UsageError as error:
        return str(error)
    if is_server(uri):
        if not uri.startswith("http"):
            return None  # a hosted server, which has no page to ask
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=STORE_SECONDS).close()
        except urllib.error.HTTPError:
            return None  # it answers
        except (OSError, ValueError) as error:
            return f"{without_password(uri)}: {getattr(error, 'reason', error)}"
        return None
    kind = backend_of(uri)
    return _unreachable(uri) if kind in DATABASES and kind != "sqlite" else None


def _optuna(space: Space | None, runs: Path) -> str | None:
    """Why the database of `storage.optuna` cannot be reached, or is also MLflow's; None if all is well or there is no such key."""
    if space is None or space.storage.optuna is None:
        return None
    where = space.storage.optuna
    if said := _unreachable(where):
        return said if said.startswith("storage.optuna") else f"storage.optuna: {said}"
    try:
        check_apart(database_url(where), store_uri(runs, space.tracking.uri))
    except UsageError as error:
        return str(error)
    return None


def _unreachable(where: str) -> str | None:
    """Why a database cannot be connected to."""
    import sqlalchemy

    try:
        url = database_url(where)
        if url.get_backend_name() == "sqlite":
            folder = Path(url.database or ".").parent
            return None if folder.is_dir() else f"there is no folder {folder}"
        engine = sqlalchemy.create_engine(url, connect_args={"connect_timeout": CONNECT_SECONDS})
        engine.connect().close()
        engine.dispose()
    except RanksearchError as error:
        return str(error)
    except ImportError as error:
        return f"{error}: {DRIVER_HINT}"
    except sqlalchemy.exc.SQLAlchemyError as error:
        named = where if where.startswith(FROM_ENVIRONMENT) else shown(url)
        return f"{named}: {first_line(error)}"
    return None
