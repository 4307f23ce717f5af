"""Kernels brought in while their predecessor still runs (programmatic dependent launch, CUDA 12.3, Hopper).

A kernel launched so must wait for its predecessor before it reads what others have written, or writes at all; what it
may do before is to set itself up and to fetch what never changes. It comes in once every program of the predecessor
has released it, or ended. Each kernel here waits in every program, so a chain of them ends in order.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_predecessor():
    """Until the kernels that write this one's inputs have finished, and what they wrote can be seen."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def release_successor():
    """The next kernel may be brought in; it waits for this grid before it reads."""
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


def overlapped(wanted: bool) -> dict[str, bool]:
    """Launch options of a kernel that is brought in early and waits for its predecessor."""
    return {"launch_pdl": True} if wanted else {}
