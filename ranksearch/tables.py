"""The records and tables of the verbs `layers`, `check` and `latency`: what is known of a space before it is searched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from ranksearch.allocate.budget import cost_value, shown
from ranksearch.allocate.curve_making import cost_curves
from ranksearch.allocate.curves import Curves
from ranksearch.allocate.damage import MEASURES, Damage
from ranksearch.compress import dense_cost
from ranksearch.console import table
from ranksearch.costs import NS_PER_MS
from ranksearch.data.folder import data_folder
from ranksearch.deploy.latency_table import LatencyTable
from ranksearch.deploy.stopwatch import Stopwatch
from ranksearch.errors import RanksearchError, first_line
from ranksearch.lowering import LOWERINGS, Rank
from ranksearch.lowering.contract import sides
from ranksearch.search.allocated import Allocated
from ranksearch.search.budgets import budgets_of, check_feasible_space
from ranksearch.search.direct import Direct
from ranksearch.search.groups import grouping_of, groups_of
from ranksearch.search.parametrize import Searched
from ranksearch.search.predicting import usual
from ranksearch.search.workbench import open_net, with_latency
from ranksearch.space.space import Space
from ranksearch.store.latency_file import open_table
from ranksearch.store.where import LATENCY
from ranksearch.study.latency import dense_layers_ms
from ranksearch.tasks import model_reference
from ranksearch.trial.recipe import searched_settings
from ranksearch.words import number


def layer_rows(space: Space, log: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Every layer with its shape, costs, measured milliseconds, break-even ranks and, where it stays dense, the reason.

    Milliseconds are null where measuring would take more than seconds; a break-even rank, one per lowering and cost, is null where the
    lowering refuses the layer. Modules with weights that cannot be lowered are listed with their reasons.
    """
    _, net = open_net(space)
    rules, stopwatch = space.layers.as_rules(), Stopwatch(space.latency.as_setting())
    try:
        ms = dense_layers_ms(net.layers, stopwatch)
    except (RanksearchError, RuntimeError) as error:
        log(f"the layers were not timed: {first_line(error)}")
        ms = {}
    rows = []
    for layer in net.layers:
        allowed = rules.for_layer(layer.name, layer.shared_with).lowerings or ()
        even = {
            name: {
                cost: lowering.break_even_rank(layer.spec, cost, layer.in_sizes[0])
                if lowering.supports(layer.spec)
                else None
                for cost in ("macs", "params", "size")
            }
            for name, lowering in LOWERINGS.items()
            if lowering.has_rank
        }
        rows.append(
            {
                "name": layer.name,
                "weight_shape": list(layer.spec.weight_shape),
                "stride": list(layer.spec.stride),
                "groups": layer.spec.groups,
                "in_size": list(layer.in_sizes[0]),
                "out_size": list(layer.spec.out_size(layer.in_sizes[0])),
                "uses": len(layer.in_sizes),
                "shared_with": list(layer.shared_with),
                "macs": layer.macs,
                "params": layer.spec.params,
                "dense_ms": ms.get(layer.name),
                "lowerings": [name for name in allowed if LOWERINGS[name].supports(layer.spec)],
                "stays_dense": rules.why_dense(layer),
                "break_even_rank": even,
            }
        )
    cost = dense_cost(net)
    skipped = [{"name": name, "reason": reason} for name, reason in net.skipped]
    total = {"macs": cost.macs, "params": cost.params, "size_bytes": cost.size_bytes}
    reference = model_reference(space.task, space.model)
    return {
        "model": space.model,
        "task": space.task,
        "net": reference,
        "total": total,
        "measured_with": stopwatch.key if ms else None,
        "layers": rows,
        "skipped": skipped,
    }


def print_layers(record: dict[str, Any]) -> None:
    # a lowering that saves no MACs anywhere (square tiles) has no column of its own
    names = [name for name in LOWERINGS if any(_saves_macs(row, name) for row in record["layers"])]
    columns = {"layer": "left", "weight": "left", "stride": "left", "out": "left", "MACs": "right", "params": "right"}
    columns |= {"ms": "right"} if record["measured_with"] else {}
    columns |= {f"{name} ≤": "right" for name in names}
    columns |= {"may become": "left"}
    rows = [
        [
            row["name"],
            "×".join(map(str, row["weight_shape"])),
            "×".join(map(str, row["stride"])) or "–",
            "×".join(map(str, row["out_size"])) or "–",
            number(row["macs"]),
            number(row["params"]),
            *([number(row["dense_ms"], ".3f")] if record["measured_with"] else []),
            *(_rank(row["break_even_rank"][name]["macs"]) for name in names),
            "dense alone" if row["stays_dense"] else " ".join(row["lowerings"]),
        ]
        for row in record["layers"]
    ]
    total = record["total"]
    empty = len(columns) - 6
    rows.append(["net", "", "", "", number(total["macs"]), number(total["params"]), *("" for _ in range(empty))])
    table(
        f"{record['net']}; '≤' is the largest rank with fewer MACs than dense",
        columns,
        rows,
        spare=("may become", "stride", "weight", "out", "params"),
    )
    if record["measured_with"]:
        print(f"ms: each layer by itself, dense, all its uses: {record['measured_with']}")
    for row in record["layers"]:
        if row["shared_with"]:
            print(f"one weight: {row['name']} and {', '.join(row['shared_with'])}")
        if row["stays_dense"]:
            print(f"stays dense: {row['name']}: {row['stays_dense']}")
    for entry in record["skipped"]:
        print(f"not lowered: {entry['name']}: {entry['reason']}")


def _saves_macs(row: dict[str, Any], name: str) -> bool:
    return name in row["lowerings"] and bool(row["break_even_rank"][name]["macs"])


def _rank(rank: Rank | None) -> str:
    """A rank for a table cell, such as `57` or `57·57`."""
    return "–" if rank is None else "·".join(map(str, sides(rank)))


def check_record(space: Space, log: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Cost range of a valid space: dense, smallest, limit; layers and the numbers searched.

    Raises:
        UsageError: a rule that matches nothing, or budgets that cannot be met.
    """
    model, net = open_net(space)
    example, table = space.kind().example_input, open_table(space, None)
    curves = with_latency(cost_curves(net, space.layers.as_rules()), model, example, table, log)
    ranges = check_feasible_space(space, curves)
    dense, search = curves.dense, space.search
    limits: dict[str, int] = {}
    for budget in budgets_of(space, curves):
        # a limit on FLOPs is shown as one on MACs
        cost, value = (
            ("macs", budget.limit(dense) // 2) if budget.cost == "flops" else (budget.cost, budget.limit(dense))
        )
        limits[cost] = min(value, limits.get(cost, value))
    costs = {
        cost: {
            "dense": full,
            "smallest": low,
            "limit": limits.get(cost),
            "smallest_ratio": low / cost_value(dense, cost),
        }
        for cost, (low, full) in ranges.items()
    }
    groups = groups_of(curves, grouping_of(space))
    searched = list(searched_settings(space.recipe))
    return {
        "space": space.name, "valid": True, "task": space.task, "model": space.model,
        "net": model_reference(space.task, space.model), "costs": costs,
        "layers_lowered": sum(len(names) for names in groups.values()), "layers": len(net.layers),
        "groups": groups, "recipe_searched": searched, "trials": search.trials, "parametrization": search.parametrization,
        "sampler": search.sampler, "objectives": list(search.objectives), "searched": list(_searched(space, curves)),
    }  # fmt: skip


def _searched(space: Space, curves: Curves) -> Mapping[str, Any]:
    """Every parameter that a study of the space searches; nothing is measured, so the sensitivities are assumed to be known."""
    if space.search.parametrization == "direct":
        return Searched(Direct(space, curves), space.recipe).distributions
    space = usual(space)
    scales = {} if space.search.sensitivity == "none" else {o.layer.name: 1.0 for o in curves.layers}
    damage = Damage(MEASURES[space.search.measure], {}, scales)
    return Searched(Allocated(space, curves, damage), space.recipe).distributions


def print_check(record: dict[str, Any]) -> None:
    rows = [
        [cost, *(_shown(cost, r[key]) for key in ("dense", "limit", "smallest")), f"{100 * r['smallest_ratio']:.1f} %"]
        for cost, r in record["costs"].items()
    ]
    columns = {"cost": "left", "dense": "right", "budget": "right", "smallest": "right", "of dense": "right"}
    table(f"{record['space']}: valid; {record['net']}", columns, rows)
    print(
        f"{record['layers_lowered']} of {record['layers']} layers may be lowered, in {len(record['groups'])} groups "
        f"({', '.join(record['groups'])}). {record['parametrization']} search for {' and '.join(record['objectives'])} by "
        f"{record['sampler']}: {len(record['searched'])} numbers ({', '.join(record['searched'])}), {record['trials']} trials."
    )


def _shown(cost: str, value: int | None) -> str:
    return "–" if value is None else shown(cost, value)


def latency_record(space: Space, log: Callable[[str], None]) -> dict[str, Any]:
    """Every layer's time, up to which rank each lowering is faster, and the whole net's time; what is not known yet is measured."""
    model, net = open_net(space)
    table = LatencyTable(Stopwatch(space.latency.as_setting()), [data_folder(space.data) / LATENCY])
    curves = with_latency(cost_curves(net, space.layers.as_rules()), model, space.kind().example_input, table, log)
    assert curves.timing is not None
    rows = [
        {
            "name": o.layer.name, "weight_shape": list(o.layer.spec.weight_shape), "in_size": list(o.layer.in_sizes[0]),
            "uses": len(o.layer.in_sizes), "dense_ms": table.dense_ms(o.layer),
            "fastest_ms": min(float(table.times_ms(o.layer, c.lowering, [c.rank])[0]) for c in o.choices[1:]),
            "faster_up_to": {name: table.faster_below(o.layer, name) for name in o.lowerings},
        }
        for o in curves.layers
        if o.lowerings
    ]  # fmt: skip
    low, full = curves.smallest()["latency"], cost_value(curves.dense, "latency")
    return {
        "space": space.name, "task": space.task, "model": space.model, "setting": asdict(table.stopwatch.setting),
        "measured_with": table.key, "rank_step": table.step, "dense_ms": curves.dense.latency_ms, "smallest_ms": low / NS_PER_MS,
        "smallest_ratio": low / full, "dense_factor": curves.timing.factors[0], "chain_factor": curves.timing.factors[1], "layers": rows,
    }  # fmt: skip


def print_latency(record: dict[str, Any]) -> None:
    names = list(dict.fromkeys(name for row in record["layers"] for name in row["faster_up_to"]))
    columns = {"layer": "left", "weight": "left", "input": "left", "dense ms": "right", "fastest ms": "right"}
    rows = [
        [
            row["name"], "×".join(map(str, row["weight_shape"])), "×".join(map(str, row["in_size"])) or "–",
            f"{row['dense_ms']:.4f}", f"{row['fastest_ms']:.4f}", *(_rank(row["faster_up_to"].get(name)) for name in names),
        ]
        for row in record["layers"]
    ]  # fmt: skip
    table(
        f"{record['task']}/{record['model']}: {record['measured_with']}; '≤' is the largest measured rank that is faster than dense",
        columns | {f"{name} ≤": "right" for name in names},
        rows,
        spare=("weight", "input"),
    )
    print(
        f"The net takes {record['dense_ms']:.3f} ms; the fastest plan is predicted to take {record['smallest_ms']:.3f} ms "
        f"({100 * record['smallest_ratio']:.1f} %). Times are of layers by themselves; inside this net a dense one counts "
        f"{record['dense_factor']:.2f} times, a chain {record['chain_factor']:.2f} times that."
    )
