"""Figure of the anchor-offset ablation: tau over context of two drafts trained alike, with and without the offset.

    python examples/plot_anchor_offset.py --with-offset docs/benchmarks/training_with_anchor_offset.csv \
        --without-offset docs/benchmarks/training_without_anchor_offset.csv \
        --output docs/benchmarks/training_anchor_offset.png

The CSV files are of `examples/evaluate_tau.py measure` on texts of its `prompts --contexts`; bars are standard errors
over texts. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def tau_by_context(path: str) -> dict[int, tuple[float, float]]:
    """Tau over all texts of each context, with the standard error of the texts' tau."""
    groups: dict[int, list[tuple[int, int]]] = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault(int(row["prompt_tokens"]), []).append((int(row["committed"]), int(row["rounds"])))
    result = {}
    for context, pairs in sorted(groups.items()):
        each = [committed / rounds for committed, rounds in pairs]
        error = statistics.stdev(each) / len(each) ** 0.5
        result[context] = (sum(c for c, _ in pairs) / sum(r for _, r in pairs), error)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Plot the anchor-offset ablation.")
    parser.add_argument("--with-offset", required=True)
    parser.add_argument("--without-offset", required=True)
    parser.add_argument("--output", required=True)
    args = parser.parse_args(arguments)
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for label, path in (("with anchor offset", args.with_offset), ("plain positions", args.without_offset)):
        taus = tau_by_context(path)
        print(label, {context: f"{tau:.3f} +- {error:.3f}" for context, (tau, error) in taus.items()})
        axes.errorbar(
            list(taus), [tau for tau, _ in taus.values()], [e for _, e in taus.values()], marker="o", label=label
        )
    axes.set(xlabel="context (tokens)", ylabel="tau, beam [4,16,16,16,16]", ylim=(1, None))
    axes.legend()
    figure.tight_layout()
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=120)


if __name__ == "__main__":
    main()
