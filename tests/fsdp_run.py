"""One process of a run with an FSDP2 target, started by `torch.distributed.run`; prints its text as a line of JSON."""

import json

import torch
import torch.distributed as dist
from models import learned, prompt, tiny_target
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

NEW_TOKENS = 20
FIELDS = {"num_key_value_heads": 1}  # cannot be shared out over two processes, and need not


def prompt_of(rank: int) -> torch.Tensor:
    """A prompt of its own for every process, of its own length."""
    return prompt(8 + rank, seed=rank)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    target = tiny_target(**FIELDS)
    draft = learned(target, draft_vocab_size=40)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*target.model.layers, target):
        fully_shard(module, mesh=mesh)
    output = target.generate(
        prompt_of(rank),
        assistant_model=draft,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
    )
    seen = {"rank": rank, "tokens": output.sequences.tolist(), "reason": output.speculation_stats.fallback_reason}
    print("\n" + json.dumps(seen), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
