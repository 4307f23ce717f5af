"""The figures of `longspec-hf bench` as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .ways import LONGSPEC


def plot(rows: list[dict[str, Any]], facts: dict[str, Any], path: Path) -> None:
    """Bars of tokens a second, a way each, side by side for every context; of the smallest batch.

    Args:
        rows: of the table of calls.
        facts: names `model` and `device`.
        path: where the picture goes, in the format its name says.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batch = min(row["batch"] for row in rows)
    rows = [row for row in rows if row["batch"] == batch]
    contexts = sorted({row["context"] for row in rows})
    figure, all_axes = plt.subplots(
        1, len(contexts), figsize=(3.5 + 3.5 * len(contexts), 2.6), squeeze=False, sharey=True
    )
    for context, axes in zip(contexts, all_axes[0], strict=True):
        shown = sorted((row for row in rows if row["context"] == context), key=lambda row: row["tokens_per_second"])
        colours = ["tab:blue" if row["way"] == LONGSPEC else "tab:gray" for row in shown]
        bars = axes.barh([row["way"] for row in shown], [row["tokens_per_second"] for row in shown], color=colours)
        axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
        axes.set(xlabel=f"tokens a second after {context} tokens")
        axes.margins(x=0.15)
        axes.tick_params(labelsize=8)
    figure.suptitle(f"{facts['model']}, batch {batch}, {facts['device']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
