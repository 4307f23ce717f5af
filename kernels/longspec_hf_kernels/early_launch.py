"""Kernels brought in while their predecessor still runs (programmatic dependent launch, CUDA 12.3, Hopper).

A kernel launched so must wait for its predecessor before it reads what others have written, or writes at all; what it
may do before is to set itself up and to fetch what never changes. It comes in once every program of the predecessor
has released it, or ended. Each kernel here waits in every program, so a chain of them ends in order.
"""


def overlapped(wanted: bool) -> dict[str, bool]:
    """Launch options of a kernel that is brought in early and waits for its predecessor."""
    return {"launch_pdl": True} if wanted else {}
