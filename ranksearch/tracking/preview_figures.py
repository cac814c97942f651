"""Figures of a preview: accuracy against cost for each allocator, and which rank the solver keeps where, as PNG and as HTML.

Colours are Okabe & Ito's, markers differ as well; the heat-map's colours (cividis) are read the same by colour-blind readers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ranksearch.search.front import describe_budgets
from ranksearch.tracking.figures import BLACK, BLUE, GREY, ORANGE

Record = dict[str, Any]

STYLES = {
    "solver": (BLUE, "D", "diamond"),
    "uniform": (ORANGE, "o", "circle"),
    "energy": ("#009E73", "s", "square"),
    "minimax": ("#CC79A7", "^", "triangle-up"),
    "evbmf": ("#E69F00", "v", "triangle-down"),
    "stable_rank": ("#56B4E9", "P", "cross"),
    "random": (GREY, "x", "x"),
    "greedy": ("#8C6D00", "*", "star"),
}
"""Allocator -> colour, matplotlib's marker, plotly's marker."""
SHORT = {"im2col": "i", "channel": "c", "spatial": "s", "tucker2": "t", "cp": "cp", "svd": "v", "dense": ""}
ANNOTATED = 45
"""Layers up to which every cell says its rank."""


def _lines(record: Record) -> dict[str, list[Record]]:
    """Allocator -> its plans by rising cost."""
    found: dict[str, list[Record]] = {}
    for row in sorted(record["plans"], key=lambda row: row[record["cost_ratio"]]):
        found.setdefault(row["allocator"], []).append(row)
    return {name: found[name] for name in STYLES if name in found}


def _shown(record: Record) -> str:
    """The allocator of the heat-map: the solver, or the first there is."""
    names = list(_lines(record))
    return "solver" if "solver" in names else names[0]


def _sides(rank: Any) -> list[int]:
    return rank if isinstance(rank, list) else list(rank) if isinstance(rank, tuple) else [rank]


def kept_ranks(record: Record) -> tuple[list[str], list[float], list[list[float]], list[list[str]]]:
    """(layers, levels, rank as a share of the lowering's largest useful one [layer][level], text of each cell); 1 is dense."""
    rows = {row["level"]: row for row in record["plans"] if row["allocator"] == _shown(record)}
    levels, layers = sorted(rows), record["layers"]
    shares, texts = [], []
    for layer in layers:
        share_row, text_row = [], []
        for level in levels:
            plan = rows[level]["plan"]["layers"].get(layer["name"], {"lowering": "dense"})
            lowering = plan["lowering"]
            if lowering == "dense":
                share_row.append(1.0)
                text_row.append("")
                continue
            rank, largest = _sides(plan["rank"]), _sides(layer["largest_rank"][lowering])
            share = sum(r / most for r, most in zip(rank, largest, strict=True)) / len(rank)
            share_row.append(min(1.0, share))
            text_row.append(f"{SHORT.get(lowering, lowering)} {'·'.join(map(str, rank))}")
        shares.append(share_row)
        texts.append(text_row)
    return [layer["name"] for layer in layers], levels, shares, texts


def _title(record: Record) -> str:
    return f"{record['space']}: {record['task']}/{record['model']}, decomposed without training"


def _axis(record: Record) -> str:
    return f"{'MACs' if record['cost'] in ('macs', 'flops') else record['cost']} (% of dense)"


def preview_png(record: Record, path: Path) -> None:
    """Two panels: accuracy (%) against cost (% of dense) by allocator; kept rank by layer and budget."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    layers, levels, shares, texts = kept_ranks(record)
    height = max(4.8, 0.19 * len(layers) + 1.3)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, height), dpi=130, layout="constrained", width_ratios=[1, 1.1]
    )
    for name, rows in _lines(record).items():
        colour, marker, _ = STYLES[name]
        left.plot(
            [100 * r[record["cost_ratio"]] for r in rows], [r["val_accuracy"] for r in rows],
            color=colour, marker=marker, markersize=6, linewidth=2 if name == "solver" else 1.2, label=name,
            zorder=3 if name == "solver" else 2,
        )  # fmt: skip
    left.scatter([100], [record["dense"]["val_accuracy"]], color=BLACK, marker="*", s=130, label="dense net", zorder=4)
    if (limit := record["own_level"]) is not None:
        left.axvline(limit, color=BLACK, linestyle="--", linewidth=1, label=f"budget {describe_budgets(record)}")
    left.set(xlabel=_axis(record), ylabel="validation accuracy (%), BN re-estimated", title="accuracy by allocator")
    left.grid(alpha=0.25)
    left.legend(loc="lower right", fontsize=8)
    image = right.imshow(shares, aspect="auto", cmap="cividis", vmin=0, vmax=1)
    right.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
    right.set_yticks(range(len(layers)), layers, fontsize=7)
    right.set(
        xlabel=f"budget: {record['cost']} (% of dense)",
        title=f"rank kept by {_shown(record)} (empty: dense)",
    )
    if len(layers) <= ANNOTATED:
        for i, row in enumerate(texts):
            for j, text in enumerate(row):
                light = shares[i][j] < 0.55
                right.text(j, i, text, ha="center", va="center", fontsize=6, color="white" if light else BLACK)
    figure.colorbar(image, ax=right, label="share of the lowering's largest useful rank")
    legend = ", ".join(
        f"{short} {name}" for name, short in SHORT.items() if short not in ("", name) and _used(record, name)
    )
    figure.suptitle(f"{_title(record)}   ({legend})" if legend else _title(record), fontsize=10)
    figure.savefig(path)
    plt.close(figure)


def _used(record: Record, lowering: str) -> bool:
    return any(
        plan["lowering"] == lowering
        for row in record["plans"] if row["allocator"] == _shown(record)
        for plan in row["plan"]["layers"].values()
    )  # fmt: skip


def preview_html(record: Record, path: Path) -> None:
    """The same, with each plan's summary and each cell's rank under the pointer; self-contained, about 5 MB with its script."""
    from plotly.subplots import make_subplots

    from ranksearch.compress import RankPlan

    layers, levels, shares, texts = kept_ranks(record)
    figure = make_subplots(
        1,
        2,
        subplot_titles=("accuracy by allocator", f"rank kept by {_shown(record)} (1: dense)"),
        horizontal_spacing=0.16,
    )
    for name, rows in _lines(record).items():
        colour, _, symbol = STYLES[name]
        figure.add_scatter(
            x=[100 * r[record["cost_ratio"]] for r in rows], y=[r["val_accuracy"] for r in rows], mode="lines+markers",
            name=name, line={"color": colour, "width": 3 if name == "solver" else 1.5},
            marker={"symbol": symbol, "size": 9, "color": colour}, row=1, col=1,
            hovertext=[f"{name} at {r['level']:g} %<br>{RankPlan.from_dict(r['plan']).summary()}" for r in rows],
            hoverinfo="text+x+y",
        )  # fmt: skip
    figure.add_scatter(
        x=[100], y=[record["dense"]["val_accuracy"]], mode="markers", name="dense net", row=1, col=1,
        marker={"color": BLACK, "symbol": "star", "size": 14},
    )  # fmt: skip
    if (limit := record["own_level"]) is not None:
        figure.add_vline(x=limit, line_dash="dash", line_color=BLACK, annotation_text="budget", row=1, col=1)
    figure.add_heatmap(
        z=shares, x=[f"{level:g}" for level in levels], y=layers, colorscale="Cividis", zmin=0, zmax=1, row=1, col=2,
        hovertext=[[text or "dense" for text in row] for row in texts], hovertemplate="%{y} at %{x} %: %{hovertext}<extra></extra>",
        colorbar={"title": "share of<br>largest<br>useful rank"},
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", row=1, col=2)
    figure.update_xaxes(title_text=_axis(record), row=1, col=1)
    figure.update_yaxes(title_text="validation accuracy (%), BN re-estimated", row=1, col=1)
    figure.update_xaxes(title_text=f"budget: {record['cost']} (% of dense)", type="category", row=1, col=2)
    figure.update_layout(
        title=_title(record), template="plotly_white", height=max(520, 17 * len(layers) + 200),
        legend={"x": 0.40, "y": 0, "xanchor": "right", "yanchor": "bottom"},
    )  # fmt: skip
    figure.write_html(path, include_plotlyjs=True)
