"""A target sharded over two processes (gloo) and its draft, whole in both, give the text of the unsharded target."""

import json
import os
import subprocess
from pathlib import Path

import fsdp_run
import pytest
import torch
from models import learned, prompt, tiny_target
from processes import ROOT
from tensor_parallel_run import NEW_TOKENS

from longspec_hf import LongSpecDraftConfig
from longspec_hf.tensor_parallel import _check_heads

DRAFTS = {
    "draft_whole_vocabulary": {},
    "draft_small_vocabulary": {"draft_vocab_size": 40},
    "draft_paced": {"fallback_to_plain": True},
    "draft_differing": {},
}


def run_twice(python: Path, script: str, *arguments: object, **environment: str) -> list[dict]:
    """What two processes of a script of this folder print as lines of JSON; `python` is what runs them."""
    places = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launch, ROOT / "tests" / script, *arguments],
        env={**os.environ, "PYTHONPATH": places, "PYTHON_EXEC": str(python), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def run_sharded(python: Path, folder: Path, **environment: str) -> list[dict]:
    """What both processes report, see `tensor_parallel_run`."""
    return run_twice(python, "tensor_parallel_run.py", folder, **environment)


def make_pair(folder, device: str = "cpu", **sizes: int) -> dict[str, torch.Tensor]:
    """Write a target, its drafts and prompts; the texts of the unsharded target alone."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    target = tiny_target("qwen3", initializer_range=0.2, **heads, **sizes).to(device)
    target.save_pretrained(folder / "target")
    for name, fields in DRAFTS.items():
        learned(target, **fields).save_pretrained(folder / name)
    padded = torch.cat([torch.nn.functional.pad(prompt(9, seed=2), (11, 0)), prompt(20, seed=3)])
    prompts = {"greedy": prompt(30), "sampled": prompt(12, seed=1), "batch": padded}
    torch.save(prompts, folder / "prompts.pt")
    plain = {}
    for name, ids in prompts.items():
        torch.manual_seed(0)
        inputs = {"input_ids": ids.to(device), "attention_mask": (ids != 0).long().to(device)}
        plain[name] = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=name == "sampled")
    return plain


def check_texts(seen: list[dict], plain: dict[str, torch.Tensor]) -> None:
    """Both processes give the texts `plain`, in the same number of rounds."""
    assert len(seen) == 2 * len(DRAFTS) * len(plain)
    for one in seen:
        assert one["reason"] is None or "did not pay" in one["reason"]
        assert one["heads"] == 2
        assert one["rounds"] > 0
        assert one["tokens"] == plain[one["prompt"]].tolist(), (one["rank"], one["draft"], one["prompt"])
    rounds = {(one["draft"], one["prompt"]): one["rounds"] for one in seen if one["rank"] == 0}
    for one in seen:
        assert one["rounds"] == rounds[one["draft"], one["prompt"]]


def test_two_processes_commit_what_one_does(warm, tmp_path):
    plain = make_pair(tmp_path)
    check_texts(run_sharded(warm, tmp_path, CUDA_VISIBLE_DEVICES=""), plain)


def test_heads_that_cannot_be_shared_out_are_refused():
    config = LongSpecDraftConfig(num_attention_heads=8, num_key_value_heads=2)
    _check_heads(config, 2)
    with pytest.raises(ValueError, match=r"`num_key_value_heads` of the target \(8 and 2\)"):
        _check_heads(config, 4)


def test_a_target_sharded_by_fsdp_is_decoded_plainly(warm):
    """Its heads are whole: it is not taken for a target sharded by them."""
    target = tiny_target(**fsdp_run.FIELDS)
    seen = run_twice(warm, "fsdp_run.py", CUDA_VISIBLE_DEVICES="")
    assert sorted(one["rank"] for one in seen) == [0, 1]
    for one in seen:
        ids = fsdp_run.prompt_of(one["rank"])
        plain = target.generate(ids, max_new_tokens=fsdp_run.NEW_TOKENS, do_sample=False)
        assert one["tokens"] == plain.tolist()
        assert "FSDP2" in one["reason"] and "`tp_plan`" in one["reason"]
