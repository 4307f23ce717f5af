"""Compile every kernel for a GPU that need not be there: `python compile_kernels.py 90` for compute capability 9.0.

Prints the names of the kernels compiled, one a line, and of those missing. Launches go as far as the machine code;
nothing runs. The Hopper kernel is left out: it is for one version of Triton.
"""

import importlib
import sys

import torch
from longspec_hf_kernels import linear_configs, triton_configs
from longspec_hf_kernels.fused_tree import GATHER_TRITON
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

CAPABILITY = int(sys.argv[1])
MODULES = [
    "commit_rows_kernel",
    "flash_attention",
    "fused_beam_kernel",
    "fused_children_kernel",
    "fused_gate_kernel",
    "fused_linear_kernel",
    "fused_norm_kernel",
    "fused_projection",
    "fused_projection_kernel",
    "fused_rotary_kernel",
    "fused_state_kernel",
    "fused_tree_kernel",
    "fused_walk_kernel",
    "triton_attention",
    "triton_kernels",
]
HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 28, 4, 128, 3584
LONG = torch.long


class NoDevice:
    """Stands in for the driver: says what to compile for."""

    def get_current_target(self):
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def compile_only(compiled):
    """Let launches compile, and note what."""
    driver.set_active(NoDevice())
    run = jit.JITFunction.run

    def warm_up(self, *args, grid, warmup, **options):
        compiled.add(self.fn.__name__)
        return run(self, *args, grid=grid, warmup=True, **options)

    jit.JITFunction.run = warm_up


def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(*shape, dtype=dtype)


def launch_all(kernels, limits):
    """Launches of the shapes of Qwen2.5-7B, few rows and many."""
    one, lengths = zeros(1, 1, dtype=LONG), zeros(1, dtype=torch.int32)
    norm, keys = zeros(HIDDEN), zeros(1, KV_HEADS, 4096, HEAD_DIM)
    weights = [zeros(HIDDEN, HIDDEN), zeros(KV_HEADS * HEAD_DIM, HIDDEN), zeros(KV_HEADS * HEAD_DIM, HIDDEN)]
    biases, wide = [zeros(len(weight)) for weight in weights], zeros(2 * HIDDEN, HIDDEN)
    for rows in (1, 64):
        x, rotary, ids = zeros(1, rows, HIDDEN), zeros(1, rows, HEAD_DIM), zeros(1, rows, dtype=LONG)
        bits, many, few = ids.unsqueeze(-1), zeros(1, rows, 20000), zeros(1, min(rows, 16), 20000)
        query = zeros(1, rows, HEADS, HEAD_DIM).transpose(1, 2)
        config = linear_configs.choose_linear(rows, HIDDEN, HIDDEN, limits, split=True)
        gated = linear_configs.choose_linear(rows, 2 * HIDDEN, HIDDEN, limits, gated=True)
        plain = linear_configs.choose_linear(rows, 2 * HIDDEN, HIDDEN, limits)
        store = (rotary, rotary, keys, keys, lengths)
        kernels["fused_projection"].project_rotate_and_store(x, weights, biases, *store, head_dim=HEAD_DIM)
        kernels["fused_projection"].project_rotate(x, weights[0], None, rotary, rotary, head_dim=HEAD_DIM)
        narrow = (zeros(1, rows, len(weights[1])), zeros(1, rows, len(weights[2])))
        kernels["fused_rotary_kernel"].rotate_and_store_triton(x, *narrow, *store, head_dim=HEAD_DIM)
        kernels["fused_linear_kernel"].gated_linear_triton(x, wide, wide, gated)
        kernels["fused_linear_kernel"].linear_triton(x, wide, plain)
        kernels["fused_linear_kernel"].linear_add_rms_norm_triton(x, weights[0], x, norm, 1e-6, config)
        kernels["fused_norm_kernel"].embed_rms_norm_triton(weights[0], ids, norm, 1e-6)
        kernels["fused_gate_kernel"].silu_and_multiply_triton(x, x)
        attend = kernels["triton_attention"].hybrid_tree_attention_triton
        for window in (None, 512):
            options = {"depths": ids, "key_depths": ids, "scale": 0.1, "window": window}
            attend(query, keys, keys, lengths, bits, hopper=False, **options)
        lse = zeros(1, HEADS, rows, dtype=torch.float32)
        flash = kernels["flash_attention"]
        flash.prefix_attention = lambda *args, query=query, lse=lse: (query, lse)
        flash.hybrid_tree_attention_flash(query, keys, keys, lengths, bits, scale=0.1)
        kernels["fused_walk_kernel"].greedy_walk_triton(ids, ids, ids == 0, many, 6)
        kernels["fused_beam_kernel"].best_children_triton(zeros(*few.shape[:2], dtype=torch.float32), few, 16)
    beam = (zeros(1, 68, dtype=LONG), zeros(1, 68, dtype=LONG), zeros(1, 68, dtype=torch.float32))
    children = (beam[2][:, :16], beam[0][:, :16], beam[1][:, :16])
    kernels["fused_children_kernel"].append_children_triton(
        beam, children, 4, 0, zeros(50, dtype=LONG), zeros(1, 16, 1, dtype=LONG), zeros(1, 16, 1, dtype=LONG)
    )
    if triton_configs.triton_version() >= GATHER_TRITON:
        widths, branch = (4, 16, 16, 16, 16), zeros(1, 32, dtype=LONG)
        kernels["fused_tree_kernel"].merge_tree_triton(one, *beam, widths, branch, one, 64, 5)
    addresses, visited = torch.tensor([keys.data_ptr()]), zeros(1, 6, dtype=LONG)
    kernels["commit_rows_kernel"].move_rows_triton(keys, addresses, 16, lengths, visited, lengths)
    table = zeros(500, HEAD_DIM)
    kernels["fused_state_kernel"].rotary_rows_triton(table, table, 5, one, one, 6)
    kernels["fused_state_kernel"].advance_triton(one, one, one, lengths, lengths, lengths, one)


def main():
    compiled = set()
    compile_only(compiled)
    recent = triton_configs.triton_version() >= triton_configs.DEPENDENT_LAUNCH_TRITON
    early = recent and CAPABILITY >= 90
    maps = recent and CAPABILITY == 90
    limits = triton_configs.DeviceLimits(132, 228 * 1024, dependent_launch=early, tensor_maps=maps)
    kernels = {name: importlib.import_module(f"longspec_hf_kernels.{name}") for name in MODULES}
    for module in kernels.values():
        if hasattr(module, "device_limits"):
            module.device_limits = lambda device: limits
    kernels["fused_projection"].projections_fit = lambda *tensors: True
    launch_all(kernels, limits)
    found = {name for module in kernels.values() for name, value in vars(module).items() if name.endswith("_kernel")}
    print("\n".join(sorted(compiled)))
    print("\n".join(f"missing {name}" for name in sorted(found - compiled)))


if __name__ == "__main__":
    main()
