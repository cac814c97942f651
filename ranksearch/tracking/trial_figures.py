"""The figures of a trial, as charts: training curve, validation accuracy by phase, energy removed per projection."""

from __future__ import annotations

from ranksearch.front.row import Row
from ranksearch.pareto import hypervolume
from ranksearch.tracking.chart import BLUE, GREEN, GREY, ORANGE, PINK, Chart, HeatMap, Plot, Series
from ranksearch.trial.metric import Metric


def trial_charts(row: Row, metric: Metric) -> dict[str, Chart]:
    """Name -> chart of a trial: training curve, validation accuracy by phase, removed energy per projection."""
    charts: dict[str, Chart] = {}
    if row["losses"]:
        charts["training"] = training_chart(row)
    if row["history"]:
        charts["phases"] = phases_chart(row, metric)
    if any("macs_ratio" in entry for entry in row["history"]):
        charts["levels"] = levels_chart(row, metric)
    if any(record["removed_energy"] for record in row["projections"]):  # none if every layer stays dense
        charts["removed_energy"] = removed_energy_chart(row)
    return charts


def training_chart(row: Row) -> Plot:
    """Training loss over the steps, and what each recorded projection did to it."""
    losses = row["losses"]
    series = [
        Series("training loss", [e["step"] for e in losses], [e["train_loss"] for e in losses], BLUE, "", "straight")
    ]
    for name, colour, marker in (("before", GREEN, "triangle"), ("after", ORANGE, "inverted")):
        found = [(p["step"], p[f"loss_{name}"]) for p in row["projections"] if p[f"loss_{name}"] is not None]
        if found:
            series.append(
                Series(f"{name} a projection, one batch", [s for s, _ in found], [v for _, v in found], colour, marker)
            )
    return Plot(f"trial {row['trial']}: training curve", "optimizer step", "training loss", series)


def phases_chart(row: Row, metric: Metric) -> Plot:
    """Validation accuracy after each phase; several may end at one step."""
    history = row["history"]
    y, names = [entry["val_accuracy"] for entry in history], [entry["phase"] for entry in history]
    hover = [f"{e['phase']}, step {e['step']}: {metric.text(e['val_accuracy'])}" for e in history]
    series = [Series("validation", list(range(1, len(y) + 1)), y, PINK, "circle", "dotted", hover=hover, labels=names)]
    return Plot(
        f"trial {row['trial']}: {metric.name} by phase", "scores in their order", f"validation {metric.heading}", series, counted=True
    )  # fmt: skip


LOOKS = (GREY, PINK, ORANGE, GREEN, BLUE)
"""Colours of the looks at a front while it trains; the last look has the last colour."""


def levels_chart(row: Row, metric: Metric) -> Plot:
    """The front of a nested run at each look while it trains: validation accuracy against MACs, with its hypervolume."""
    seen = [entry for entry in row["history"] if "macs_ratio" in entry]
    steps = sorted({entry["step"] for entry in seen})
    series = []
    for order, step in enumerate(steps):
        points = sorted((e["macs_ratio"], e["val_accuracy"]) for e in seen if e["step"] == step)
        volume = hypervolume([[1 - metric.share(value), ratio] for ratio, value in points], [1.0, 1.0])
        colour = LOOKS[max(0, len(LOOKS) - len(steps) + order)]
        x, y = ([100 * ratio for ratio, _ in points], [value for _, value in points])
        hover = [f"step {step}, {100 * ratio:.0f} % of the MACs: {metric.text(value)}" for ratio, value in points]
        series.append(Series(f"step {step}: hypervolume {volume:.3f}", x, y, colour, "circle", "dotted", hover=hover))
    return Plot(
        f"trial {row['trial']}: the front while it trains", "MACs (% of dense)", f"validation {metric.heading}", series
    )


def removed_energy_chart(row: Row) -> HeatMap:
    """Share of ||W||² that each recorded projection removed, per layer; a logarithmic scale."""
    records = row["projections"]
    layers = list(dict.fromkeys(name for record in records for name in record["removed_energy"]))
    values = [[r["removed_energy"].get(name) or None for r in records] for name in layers]
    found = [v for line in values for v in line if v is not None]
    low = max(min(found, default=1e-6), 1e-8)
    columns = [str(record["step"]) for record in records]
    return HeatMap(
        f"trial {row['trial']}: energy removed per projection", "optimizer step", layers, columns,
        [[max(v, low) if v is not None else None for v in line] for line in values],
        texts=[["" for _ in records] for _ in layers],
        hover=[
            [f"{name}, step {step}: {'nothing' if v is None else f'{v:.2e}'}" for step, v in zip(columns, line, strict=True)]
            for name, line in zip(layers, values, strict=True)
        ],
        scale="removed share of ||W||²", low=low, high=max(max(found, default=1e-3), 2 * low), log=True,
    )  # fmt: skip
