"""One process of a tensor-parallel run, started by `torch.distributed.run`; prints its texts as one line of JSON.

Usage: `python -m torch.distributed.run --nproc_per_node 2 tests/tensor_parallel_run.py FOLDER`, where FOLDER holds
`target`, drafts `draft*` and `prompts.pt`.
"""

import itertools
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from longspec_hf import LongSpecDraftModel, decoding

NEW_TOKENS = 24


def uneven_clock(rank: int) -> Callable[[], float]:
    """A clock of its own for every process: between two looks pass 0 to 1 seconds."""
    passed = itertools.accumulate(iter(random.Random(rank).random, None))
    return lambda: next(passed)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    target = AutoModelForCausalLM.from_pretrained(
        folder / "target", distributed_config=DistributedConfig(tp_plan="auto"), dtype=torch.float32
    )
    decoding.time = SimpleNamespace(perf_counter=uneven_clock(dist.get_rank()))
    prompts = torch.load(folder / "prompts.pt")
    for path in sorted(folder.glob("draft*")):
        draft = LongSpecDraftModel.from_pretrained(path).to(target.device)
        if path.name == "draft_differing" and dist.get_rank() == 1:
            torch.nn.init.normal_(draft.mlp.down_proj.weight)  # proposes other tokens than the first process's
        for name, ids in prompts.items():
            inputs = {"input_ids": ids.to(target.device), "attention_mask": (ids != 0).long().to(target.device)}
            torch.manual_seed(0)
            sampling = name == "sampled"
            output = target.generate(
                **inputs,
                assistant_model=draft,
                max_new_tokens=NEW_TOKENS,
                do_sample=sampling,
                return_dict_in_generate=True,
            )
            stats = output.speculation_stats
            cache = output.get("cache") or output.get("past_key_values")
            seen = {
                "rank": dist.get_rank(),
                "draft": path.name,
                "prompt": name,
                "tokens": output.sequences.tolist(),
                "rounds": stats.rounds,
                "reason": stats.fallback_reason,
                "heads": cache.layers[-1].keys.shape[1],
            }
            print("\n" + json.dumps(seen), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
