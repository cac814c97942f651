"""Figures of a front: the same picture as PNG (matplotlib) and as interactive HTML (plotly).

Colours are Okabe & Ito's, which colour-blind readers tell apart; front and other trials differ in shape as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ranksearch.compress import RankPlan
from ranksearch.search.front import describe_budgets

Record = dict[str, Any]

BLUE, ORANGE, GREY, BLACK = "#0072B2", "#D55E00", "#999999", "#000000"


def _hover(row: Record) -> str:
    """What the pointer shows over a trial."""
    test = f"<br>test {row['test_accuracy']:.2f} %" if row["test_accuracy"] is not None else ""
    mix = RankPlan.from_dict(row["plan"]).summary()
    return f"trial {row['trial']} ({row['allocator']})<br>validation {row['val_accuracy']:.2f} %{test}<br>{mix}"


def _split(front: Record, trials: list[Record]) -> tuple[list[Record], list[Record]]:
    """(the front by rising cost, the other complete trials)"""
    on_front = {row["trial"] for row in front["trials"]}
    others = [r for r in trials if r["status"] == "complete" and r["trial"] not in on_front]
    return sorted(front["trials"], key=lambda r: r["macs_ratio"]), others


def _mac_limit(front: Record) -> float | None:
    """The budget on MACs as a percentage of dense, where there is a relative one."""
    for cost in ("flops", "macs"):
        text = str(front["budgets"].get(cost, ""))
        if text.endswith("%"):
            return float(text[:-1])
    return None


def front_png(front: Record, trials: list[Record], path: Path) -> None:
    """Validation accuracy (%) against MACs (% of dense): front, other trials faint, dense net, budget."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    ordered, others = _split(front, trials)
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes.scatter(
        [100 * r["macs_ratio"] for r in others], [r["val_accuracy"] for r in others],
        color=GREY, alpha=0.6, marker="o", s=28, label="other trials",
    )  # fmt: skip
    axes.plot(
        [100 * r["macs_ratio"] for r in ordered], [r["val_accuracy"] for r in ordered],
        color=BLUE, marker="D", drawstyle="steps-post", label="front",
    )  # fmt: skip
    axes.scatter([100], [front["dense"]["val_accuracy"]], color=BLACK, marker="*", s=120, label="dense net", zorder=3)
    limit = _mac_limit(front)
    if limit is not None:
        axes.axvline(limit, color=ORANGE, linestyle="--", label=f"budget {describe_budgets(front)}")
    axes.set(
        xlabel="MACs (% of dense)",
        ylabel="validation accuracy (%)",
        title=f"{front['study']}: front of {len(trials)} trials",
    )
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


def front_html(front: Record, trials: list[Record], path: Path) -> None:
    """The same picture with the plan's summary under the pointer; self-contained, about 5 MB with its script."""
    import plotly.graph_objects as go

    ordered, others = _split(front, trials)
    figure = go.Figure()
    for rows, name, mode, marker in (
        (others, "other trials", "markers", {"color": GREY, "symbol": "circle", "opacity": 0.6}),
        (ordered, "front", "lines+markers", {"color": BLUE, "symbol": "diamond", "size": 10}),
    ):
        figure.add_scatter(
            x=[100 * r["macs_ratio"] for r in rows], y=[r["val_accuracy"] for r in rows], mode=mode, name=name,
            marker=marker, line={"shape": "hv", "color": BLUE}, hovertext=[_hover(r) for r in rows], hoverinfo="text+x+y",
        )  # fmt: skip
    figure.add_scatter(
        x=[100], y=[front["dense"]["val_accuracy"]], mode="markers", name="dense net",
        marker={"color": BLACK, "symbol": "star", "size": 14},
    )  # fmt: skip
    limit = _mac_limit(front)
    if limit is not None:
        figure.add_vline(x=limit, line_dash="dash", line_color=ORANGE, annotation_text="budget")
    figure.update_layout(
        title=f"{front['study']}: front of {len(trials)} trials", template="plotly_white",
        xaxis_title="MACs (% of dense)", yaxis_title="validation accuracy (%)",
    )  # fmt: skip
    figure.write_html(path, include_plotlyjs=True)
