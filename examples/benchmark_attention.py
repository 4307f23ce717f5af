"""Time hybrid tree attention and its alternatives on one GPU, beside what the card itself can do.

    python examples/benchmark_attention.py --csv attention.csv --plot attention.png

Medians of CUDA-graph replays over several K/V sets, which together exceed the L2 cache; launch cost is
excluded. The floor is the larger of K/V bytes over a measured copy rate and arithmetic over a measured
matmul rate. Every backend's result is compared with the definition in fp64.
"""

from __future__ import annotations

import argparse
import csv
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from longspec_hf_kernels import hybrid_tree_attention_reference, pack_ancestor_bits
from longspec_hf_kernels.flash_attention import has_flash_attn, hybrid_tree_attention_flash
from longspec_hf_kernels.triton_attention import hybrid_tree_attention_triton

SHAPES = {"qwen2.5-7b": (28, 4, 128), "llama-3-8b": (32, 8, 128), "vicuna-7b": (32, 32, 128)}
PAPER = "paper (torch flash)"
PAPER_PACKAGE = "paper (flash-attn)"
DTYPE = torch.bfloat16
MIN_SET_BYTES = 2**28  # K/V sets rotated over: several times the L2 cache of any card
MIN_CALLS = 16  # in a graph, whose own launch takes some microseconds
REPLAYS = 15
SETTLE_SECONDS = 0.5  # after the checks


@dataclass
class Problem:
    """One shape, prefix and tree, with several K/V sets `[1, Hkv, N + T, D]` to rotate over."""

    query: torch.Tensor
    sets: list[tuple[torch.Tensor, torch.Tensor]]
    prefix: int
    visible: torch.Tensor

    def __post_init__(self) -> None:
        self.prefix_lens = torch.tensor([self.prefix], dtype=torch.int32, device=self.query.device)
        self.bits = pack_ancestor_bits(self.visible.unsqueeze(0))
        self.depths = self.visible.sum(1, keepdim=True).T - 1
        self.scale = self.query.shape[-1] ** -0.5
        self.mask = F.pad(self.visible, (self.prefix, 0), value=True)

    @property
    def kv_bytes(self) -> int:
        return 2 * self.sets[0][0].numel() * self.query.element_size()

    @property
    def flops(self) -> int:
        _, heads, nodes, size = self.query.shape
        return 4 * heads * nodes * (self.prefix + nodes) * size


def random_tree(nodes: int) -> torch.Tensor:
    """Visibility `[T, T]` of a random tree."""
    generator = torch.Generator().manual_seed(nodes)
    visible = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        visible[node] |= visible[int(torch.randint(node, (1,), generator=generator))]
    return visible


def triton(problem: Problem, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return hybrid_tree_attention_triton(
        problem.query,
        key,
        value,
        problem.prefix_lens,
        problem.bits,
        key_depths=problem.depths,
        scale=problem.scale,
    )


def paper(problem: Problem, key: torch.Tensor, value: torch.Tensor, package: bool = False) -> torch.Tensor:
    return hybrid_tree_attention_flash(
        problem.query,
        key,
        value,
        problem.prefix_lens,
        problem.bits,
        scale=problem.scale,
        host_lens=[problem.prefix],
        package=package,
    )


def paper_with_package(problem: Problem, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return paper(problem, key, value, package=True)


def eager(problem: Problem, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Repeated K/V heads, an explicit mask and an fp32 softmax, as eager attention in transformers."""
    group = problem.query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = problem.query @ key.transpose(2, 3) * problem.scale
    scores = scores.masked_fill(~problem.mask, float("-inf"))
    return torch.softmax(scores, -1, dtype=torch.float32).to(key.dtype) @ value


def sdpa(problem: Problem, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        problem.query, key, value, attn_mask=problem.mask, scale=problem.scale, enable_gqa=True
    )


def rotated(call: Callable[..., object], sets: list[tuple[torch.Tensor, torch.Tensor]]) -> list[Callable[[], object]]:
    """`call` on one K/V set after the other, `MIN_CALLS` times at least."""
    rounds = -(-MIN_CALLS // len(sets))
    return [functools.partial(call, *pair) for pair in sets] * rounds


@functools.cache
def compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex(problem: Problem) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """FlexAttention with the tree as a block mask, built once as a caller would."""
    from torch.nn.attention.flex_attention import create_block_mask

    visible, prefix = problem.visible, problem.prefix

    def mask(_batch: torch.Tensor, _head: torch.Tensor, node: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return (row < prefix) | visible[node, (row - prefix).clamp(min=0)]

    heads, nodes = problem.query.shape[1:3]
    block_mask = create_block_mask(mask, 1, 1, nodes, prefix + nodes, device=str(problem.query.device))
    most_rows = block_mask.BLOCK_SIZE[0]
    # The kernel for short queries makes the nodes of a group of heads one tile of rows; more rows than a block
    # of the mask has leave it without a configuration ("No choices exist for backend", seen on PyTorch 2.11).
    too_many = nodes * heads // problem.sets[0][0].shape[1] > most_rows
    options = {"BLOCK_M": most_rows} if too_many else {}

    def run(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return compiled_flex()(
            problem.query,
            key,
            value,
            block_mask=block_mask,
            scale=problem.scale,
            enable_gqa=True,
            kernel_options=options,
        )

    return run


BACKENDS = {
    "triton": triton,
    PAPER: paper,
    **({PAPER_PACKAGE: paper_with_package} if has_flash_attn() else {}),
    "eager": eager,
    "sdpa + mask": sdpa,
}


def backend(name: str, problem: Problem) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The function of `(key, value)` called `name`."""
    return flex(problem) if name == "flex" else functools.partial(BACKENDS[name], problem)


def compiles(name: str, problem: Problem) -> bool:
    """Whether a backend runs here at all: FlexAttention has no kernel for some shapes, which its first call says."""
    try:
        backend(name, problem)(*problem.sets[0])
    except Exception as error:  # compilers have many; none may end the run
        print(f"{name} left out: {type(error).__name__}: {first_line(error)}")
        return False
    return True


def first_line(error: BaseException) -> str:
    """The first line of what an error, or the one behind it, has to say."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def capture(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of all `calls`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:  # compiles, and takes memory, outside the capture
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return graph


def median_microseconds(*runs: list[Callable[[], object]]) -> list[float]:
    """For each of `runs`, a list of calls: the median over replays of its graph, per call.

    The graphs take turns, so that a change of the card's clocks meets all of them.
    """
    graphs = [capture(calls) for calls in runs]
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(REPLAYS):
        for graph, calls, found in zip(graphs, runs, times, strict=True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) * 1000 / len(calls))
    return [statistics.median(found) for found in times]


def measure_ceilings() -> tuple[float, float]:
    """`(copy rate in bytes read and written per second, matmul rate in FLOP/s)` of this card, now."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    # PyTorch's copy and a plain element-wise kernel: the better one is what this card can do.
    copies = [functools.partial(target.copy_, source), functools.partial(torch.neg, source, out=target)]
    copy = 2 * source.nbytes / min(median_microseconds(*([call] for call in copies))) * 1e6
    del source, target
    side = 8192
    a, b = torch.randn(2, side, side, device="cuda", dtype=DTYPE)
    out = torch.empty_like(a)
    return copy, 2 * side**3 / median_microseconds([functools.partial(torch.mm, a, b, out=out)] * 4)[0] * 1e6


def make_problem(buffers: torch.Tensor, heads: int, prefix: int, nodes: int) -> Problem:
    """A problem over `buffers [sets, 2, 1, Hkv, capacity, D]`."""
    query = torch.randn(1, heads, nodes, buffers.shape[-1], device="cuda", dtype=DTYPE)
    sets = [(pair[0, :, :, : prefix + nodes], pair[1, :, :, : prefix + nodes]) for pair in buffers]
    return Problem(query, sets, prefix, random_tree(nodes).cuda())


def relative_errors(problem: Problem, names: list[str]) -> list[float]:
    """||out - ref|| / ||ref|| of each backend against the definition in fp64."""
    wide = [t.double() for t in (problem.query, *problem.sets[0])]
    expected = hybrid_tree_attention_reference(*wide, problem.prefix_lens, problem.bits, scale=problem.scale)
    outs = [backend(name, problem)(*problem.sets[0]).double() for name in names]
    return [float((out - expected).norm() / expected.norm()) for out in outs]


def measure(problem: Problem, names: list[str], copy: float, matmul: float) -> list[dict[str, object]]:
    """One row per backend: microseconds, the floor's, and their ratio."""
    floor = max(problem.kv_bytes / copy, problem.flops / matmul) * 1e6
    calls = [backend(name, problem) for name in names]
    times = median_microseconds(*(rotated(call, problem.sets) for call in calls))
    return [
        {"backend": name, "us": round(took, 2), "floor_us": round(floor, 2), "x_floor": round(took / floor, 3)}
        for name, took in zip(names, times, strict=True)
    ]


def run(args: argparse.Namespace) -> list[dict[str, object]]:
    """Measure everything asked for, printing as it goes."""
    import triton as triton_package

    copy, matmul = measure_ceilings()
    common = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_package.__version__,
        "dtype": str(DTYPE).removeprefix("torch."),
        "copy_TB_s": round(copy / 1e12, 3),
        "matmul_TFLOP_s": round(matmul / 1e12, 1),
    }
    print(", ".join(f"{name} {value}" for name, value in common.items()))
    print(f"{'shape':<12}{'N':>7}{'T':>4}  {'backend':<20}{'us':>10}{'x floor':>9}{'x paper':>9}  error")
    rows: list[dict[str, object]] = []
    for shape in args.shapes:
        heads, kv_heads, size = SHAPES[shape]
        for prefix in args.lengths:
            capacity = prefix + max(args.nodes)
            count = max(2, -(-MIN_SET_BYTES // (4 * kv_heads * capacity * size)))
            buffers = torch.randn(count, 2, 1, kv_heads, capacity, size, device="cuda", dtype=DTYPE)
            measured = []
            for nodes in args.nodes:
                slow = nodes in args.slow_nodes and prefix in (args.slow_lengths or args.lengths)
                names = [name for name in args.backends if slow or name in ("triton", PAPER, PAPER_PACKAGE)]
                problem = make_problem(buffers, heads, prefix, nodes)
                names = [name for name in names if name != "flex" or compiles(name, problem)]
                measured.append((nodes, names, problem, measure(problem, names, copy, matmul)))
                torch.cuda.empty_cache()
            # Checked afterwards: fp64 products heat the card, and what is timed next would be slower.
            for nodes, names, problem, found in measured:
                base = next((row["us"] for row in found if row["backend"] == PAPER), None)
                for row, error in zip(found, relative_errors(problem, names), strict=True):
                    gain = round(base / row["us"], 2) if base else ""
                    where = {"shape": shape, "prefix": prefix, "nodes": nodes}
                    print(
                        f"{shape:<12}{prefix:>7}{nodes:>4}  {row['backend']:<20}{row['us']:>10}{row['x_floor']:>9}"
                        f"{gain:>9}  {error:.1e}",
                        flush=True,
                    )
                    rows.append(common | where | row | {"x_paper": gain, "error": f"{error:.1e}"})
            time.sleep(SETTLE_SECONDS)
            measured.clear()
            del buffers
    return rows


def plot(rows: list[dict[str, object]], nodes: int, path: Path) -> None:
    """Times over prefix length at `nodes` tree nodes, one panel per shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, panels = pyplot.subplots(1, len(shapes), figsize=(4.6 * len(shapes), 4), squeeze=False)
    for panel, shape in zip(panels[0], shapes, strict=True):
        chosen = [row for row in rows if row["shape"] == shape and row["nodes"] == nodes]
        for name in dict.fromkeys(row["backend"] for row in chosen):
            points = sorted((row for row in chosen if row["backend"] == name), key=lambda row: row["prefix"])
            panel.plot([row["prefix"] for row in points], [row["us"] for row in points], marker="o", label=name)
        floor = sorted({(row["prefix"], row["floor_us"]) for row in chosen})
        panel.plot(*zip(*floor, strict=True), color="black", linestyle=":", label="floor")
        panel.set(title=f"{shape}, {nodes} nodes", xlabel="prefix rows", xscale="log", yscale="log")
        ticks = [prefix for prefix, _ in floor]
        panel.set_xticks(ticks, [f"{prefix // 1024}k" for prefix in ticks])
        panel.minorticks_off()
    panels[0][0].set_ylabel("microseconds")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(f"Hybrid tree attention, {rows[0]['device']}, {rows[0]['dtype']}, batch 1")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*BACKENDS, "flex"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384, 32768, 65536, 131072])
    parser.add_argument("--nodes", nargs="+", type=int, default=[1, 16, 32, 64, 65, 80], help="tree sizes")
    parser.add_argument("--backends", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--slow-nodes", nargs="*", type=int, default=[64], help="tree sizes at which eager, SDPA and FlexAttention run"
    )
    parser.add_argument("--slow-lengths", nargs="*", type=int, help="prefixes at which they do; all by default")
    parser.add_argument("--plot-nodes", type=int, default=64)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU: torch.cuda.is_available() is False")
    rows = run(args)
    for path in (args.csv, args.plot):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    if args.plot:
        plot(rows, args.plot_nodes, args.plot)


if __name__ == "__main__":
    main()
