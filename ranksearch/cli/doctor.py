"""The verb that looks at this machine, or a cluster, before a search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ranksearch.cli.options import DEFAULT_RUNS, Address, Json, Runs, SettingFlags, Trust, app, print_json


@app.command(rich_help_panel="Clusters")
def doctor(
    space: Annotated[
        Path | None,
        typer.Argument(metavar="[SPACE.yaml]", help="Also look at what a search of this space needs: data, stores."),
    ] = None,
    setting: SettingFlags = None,
    address: Address = None,
    trust: Trust = False,
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Look for what would go wrong, on this machine or on every node of a cluster: versions, storage, data, clocks, memory, disks.

    Exit code 0 without errors (there may be warnings), else 1.

    Example: ranksearch doctor search_spaces/cifar10_resnet20.yaml --address auto
    """
    from ranksearch.cluster.address import check_address
    from ranksearch.preflight.doctor import as_record, examine
    from ranksearch.preflight.findings import ERROR, judge

    resolved = None
    if space is not None:
        from ranksearch.space.reading import read_space

        resolved = read_space(space, settings=setting or (), trust=trust)
    check_address(address)
    if address is not None:
        from ranksearch.cluster.connection import connect

        connect(address)
    report = examine(resolved, runs, cluster=address is not None)
    found = judge(report)
    if as_json:
        print_json(as_record(report, found))
    else:
        from ranksearch.result_tables import print_findings

        print_findings(report, found)
    if any(finding.level == ERROR for finding in found):
        raise typer.Exit(1)
