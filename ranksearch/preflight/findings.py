"""What is wrong with a cluster, from facts to findings. Pure values, without Ray.

A report holds `driver` (the facts of its machine), `nodes` (facts of each, with its `name`, Ray's `offers`, the `offset_s` of its clock and
the `round_trip_s` over which that was measured; or `silent` if it did not answer), and `stores` (what the driver cannot reach).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ranksearch.cluster.mps import ABSENT, AVAILABLE, CONTROL, OTHERS

OK, WARNING, ERROR = "ok", "warning", "error"
LEVELS = (OK, WARNING, ERROR)

LOW_MEMORY_MIB, LOW_DISK_MIB, NO_DISK_MIB = 2048, 2048, 200
"""Below these, memory or a disk is said to be low. A worker that has imported torch takes 700 MiB."""
LOW_FILES = 4096
SKEW_S, MUCH_SKEW_S = 2.0, 300.0
FREE_SHARE = 0.5
"""The share of a GPU's memory that must be free; with less, somebody else is at work there."""

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    level: str
    check: str
    where: str
    """Nodes, or `driver`, or `all nodes`."""
    what: str
    mend: str = ""

    def sentence(self) -> str:
        return f"{self.where}: {self.what}. {self.mend}".strip()


def judge(report: Facts) -> list[Finding]:
    """One finding per check that is fine, else one per problem; the worst first."""
    checks = (
        _answers,
        _results,
        _versions,
        _data,
        _stores,
        _clocks,
        _cpus,
        _memory,
        _gpus,
        _sharing,
        _disks,
        _shared_memory,
        _files,
    )
    found = []
    for check in checks:
        name = check.__name__.strip("_").replace("_", " ")
        wrong = [Finding(level, name, where, what, mend) for level, where, what, mend in check(report)]
        found += wrong or [Finding(OK, name, _everywhere(report), _FINE[name])]
    return sorted(found, key=lambda finding: -LEVELS.index(finding.level))


_FINE = {
    "answers": "answers",
    "results": "reads and writes the place of results",
    "versions": "the same versions as the driver's",
    "data": "holds the data that the space needs",
    "stores": "MLflow and Optuna's storage can be reached",
    "clocks": "clocks agree",
    "cpus": "Ray offers no more CPUs than there are",
    "memory": "enough memory is free",
    "gpus": "Ray's GPUs are there, and free",
    "sharing": "no GPU that trials could share",
    "disks": "enough disk is free",
    "shared memory": "Ray's object store fits into /dev/shm",
    "files": "enough files may be open",
}

Wrong = Iterator[tuple[str, str, str, str]]
"""(level, where, what, how to mend it)."""


def _everywhere(report: Facts) -> str:
    names = [node["name"] for node in report["nodes"]]
    return names[0] if len(names) == 1 else f"all {len(names)} nodes"


def _answering(report: Facts) -> list[Mapping[str, Any]]:
    return [node for node in report["nodes"] if "silent" not in node]


def _answers(report: Facts) -> Wrong:
    for node in report["nodes"]:
        if "silent" in node:
            yield (
                ERROR,
                node["name"],
                f"did not answer ({node['silent']})",
                "Repair or remove that node, or wait until it is up.",
            )


def _results(report: Facts) -> Wrong:
    place, stores = report["results"], report["stores"]
    if stores["results"] is not None:
        yield (
            ERROR,
            "driver",
            stores["results"],
            "Name another place with storage.results, or another folder with --runs.",
        )
        return
    refused = [node for node in _answering(report) if node["results"]["error"] is not None]
    for node in refused:
        mend = "Make credentials and mounts the same on every node."
        yield ERROR, node["name"], f"{place}: {node['results']['error']}", mend
    apart = [node["name"] for node in _answering(report) if node not in refused and not node["results"]["shared"]]
    if apart:
        what = f"{'does' if len(apart) == 1 else 'do'} not share {place} with the driver: the nets of trials there would be lost"
        mend = "Set storage.results to a place that every node reaches (s3://…, gs://…, a shared folder), or put --runs on shared storage."
        yield ERROR, ", ".join(apart), what, mend


def _versions(report: Facts) -> Wrong:
    own = report["driver"]["versions"]
    for node in _answering(report):
        for name, version in node["versions"].items():
            if version == own[name]:
                continue
            hard = name == "ranksearch" or (name == "python" and _minor(version) != _minor(own[name]))
            means = (
                "its trials would run other code" if name == "ranksearch" else "results may differ, or fail to be read"
            )
            what = f"{name} {version or 'is not installed'}, but {own[name] or 'none'} on the driver: {means}"
            yield (
                ERROR if hard else WARNING,
                node["name"],
                what,
                "Install the same environment on every node (constraints.txt).",
            )


def _minor(version: str | None) -> list[str]:
    return (version or "").split(".")[:2]


def _data(report: Facts) -> Wrong:
    for node in [{"name": "driver", "missing": report["missing"]}, *_answering(report)]:
        if node["missing"]:
            what = f"{', '.join(node['missing'])} {'is' if len(node['missing']) == 1 else 'are'} missing"
            yield ERROR, node["name"], what, "Put the data there, or name their folder with `data:` or RANKSEARCH_DATA."


def _stores(report: Facts) -> Wrong:
    stores = report["stores"]
    if stores["mlflow"] is not None:
        mend = "Start it; what it misses meanwhile is logged at the end, or by `ranksearch sync`."
        yield WARNING, "driver", f"MLflow's store cannot be reached: {stores['mlflow']}", mend
    if stores["optuna"] is not None:
        yield ERROR, "driver", stores["optuna"], "Make it reachable: without it no trial can be proposed or recorded."


def _clocks(report: Facts) -> Wrong:
    for node in _answering(report):
        if node.get("offset_s") is None:
            continue
        # an offset within half a round trip may be due to the way
        skew = max(0.0, abs(node["offset_s"]) - node["round_trip_s"] / 2)
        if skew > SKEW_S:
            side = "ahead of" if node["offset_s"] > 0 else "behind"
            means = (
                "stores such as S3 refuse requests with such a clock" if skew > MUCH_SKEW_S else "times in logs mislead"
            )
            what = f"its clock is {skew:.0f} s {side} the driver's: {means}"
            yield ERROR if skew > MUCH_SKEW_S else WARNING, node["name"], what, "Let NTP or chrony set it."


def _cpus(report: Facts) -> Wrong:
    for node in _answering(report):
        usable = min(node["cores"], node["quota"] or node["cores"])
        offered = node.get("offers", {}).get("CPU", 0)
        if offered > usable + 0.5:
            what = f"Ray offers {offered:g} CPUs, but only {usable:g} can be used: trials would slow each other down"
            yield WARNING, node["name"], what, f"Start Ray there with --num-cpus {max(1, int(usable))}."
        threads = node["threads"] or ""
        if threads.isdecimal() and int(threads) > max(1, usable):
            what = f"OMP_NUM_THREADS is {threads}, for {usable:g} usable CPUs"
            yield WARNING, node["name"], what, "Unset it: a trial takes resources.cpus_per_trial threads."


def _memory(report: Facts) -> Wrong:
    for node in _answering(report):
        if node["memory_mib"] is not None and node["memory_mib"] < LOW_MEMORY_MIB:
            what = (
                f"{node['memory_mib']} MiB of memory are free, but a trial's process takes 700 MiB and its net's memory"
            )
            yield (
                WARNING,
                node["name"],
                what,
                "End what else runs there, or raise resources.cpus_per_trial, so that fewer trials run at once.",
            )


def _gpus(report: Facts) -> Wrong:
    for node in _answering(report):
        offered, found = node.get("offers", {}).get("GPU", 0), node["gpus"]
        if offered > len(found):
            what = f"Ray offers {offered:g} GPUs, but nvidia-smi finds {len(found)}"
            yield WARNING, node["name"], what, "Make sure that the GPU's driver is loaded there, and restart Ray."
        for number, gpu in enumerate(found):
            if gpu["free_mib"] < FREE_SHARE * gpu["total_mib"]:
                what = f"GPU {number} ({gpu['name']}) has {gpu['free_mib']} of {gpu['total_mib']} MiB free"
                yield WARNING, node["name"], what, "Another process is at work there: end it, or leave that GPU out."


SHARING = {
    ABSENT: f"there is no {CONTROL}: trials that share a GPU take turns",
    OTHERS: "somebody's CUDA MPS is running: trials that share a GPU go through it, side by side",
    AVAILABLE: "CUDA MPS is started for a study whose trials share a GPU: side by side",
}


def _sharing(report: Facts) -> Wrong:
    """How GPUs are shared; this is information, not a problem."""
    found: dict[str, list[str]] = {}
    for node in _answering(report):
        if node["gpus"]:
            found.setdefault(node["mps"], []).append(node["name"])
    for state, names in found.items():
        yield OK, _everywhere(report) if len(names) == len(report["nodes"]) else ", ".join(names), SHARING[state], ""


def _disks(report: Facts) -> Wrong:
    for node in _answering(report):
        for what_for, free in node["disk_mib"].items():
            if free is not None and free < LOW_DISK_MIB:
                level = ERROR if free < NO_DISK_MIB else WARNING
                what = f"{free} MiB are free on the disk of its {what_for} files"
                yield (
                    level,
                    node["name"],
                    what,
                    "Make room: Ray's logs and spilled objects, or nets and states, go there.",
                )


def _shared_memory(report: Facts) -> Wrong:
    for node in _answering(report):
        store = node.get("offers", {}).get("object_store_memory", 0) / 2**20
        if node["shm_mib"] is not None and store > node["shm_mib"]:
            what = f"Ray's object store of {store:.0f} MiB does not fit into /dev/shm ({node['shm_mib']} MiB): it is on disk, and slow"
            yield (
                WARNING,
                node["name"],
                what,
                "In Docker, raise --shm-size; or start Ray with a smaller --object-store-memory.",
            )


def _files(report: Facts) -> Wrong:
    for node in _answering(report):
        if 0 < node["files"] < LOW_FILES:
            what = f"a process may open {node['files']} files, but Ray's need thousands"
            yield WARNING, node["name"], what, f"Run ulimit -n 65536 before Ray is started (at least {LOW_FILES})."
