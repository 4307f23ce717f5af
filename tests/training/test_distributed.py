"""Training in two processes over gloo, started as the examples are (C93, C94), equals training in one."""

import json
import os
import subprocess
from importlib.util import find_spec
from types import SimpleNamespace

import distributed_run
import pytest
import torch
from models import tiny_target
from processes import ROOT
from runs import small_draft, small_trainer
from safetensors.torch import load_file

from longspec_hf import LongSpecDraftModel
from longspec_hf.training import AnchorOffsetCollator
from longspec_hf.training.processes import check_sharding, check_target

SAME_SUM = 1e-4  # fp32 sums over processes in another order, four steps of AdamW
MUON = 5e-3  # it orthogonalises in bf16
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
RUNS = {
    "plain": {**EVALUATED, "draft_vocab_size": 16},
    "resumed": {**EVALUATED, "draft_vocab_size": 16, "resume": "plain/checkpoint-2"},
    "muon": {"muon": True, "gradient_accumulation_steps": 2, "shift_groups": 2},
    "budget": {"max_train_seconds": 0.5, "max_steps": 100_000, "logging_steps": 10},
}


def launched(python, config: str, folder, runs: dict, **environment: str) -> dict[str, list[dict]]:
    """What both processes, which `python` runs, saw of each run."""
    path = [ROOT, ROOT / "kernels", ROOT / "tests", ROOT / "tests" / "training"]
    places = os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {
        "PYTHONPATH": places,
        "PYTHON_EXEC": str(python),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **environment,
    }
    settings = ["--config_file", ROOT / "examples" / "accelerate" / config, "--main_process_port", 0]
    script = [ROOT / "tests" / "training" / "distributed_run.py", folder, json.dumps(runs)]
    command = [python, "-m", "accelerate.commands.launch", *settings, "--mixed_precision", "no", *script]
    result = subprocess.run(
        [*map(str, command)], env={**os.environ, **variables}, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return {
        name: [torch.load(folder / f"{name}.rank{rank}.pt", weights_only=False) for rank in (0, 1)] for name in runs
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same runs in this process, with twice the batch."""
    folder = tmp_path_factory.mktemp("alone")
    whole = {"per_device_train_batch_size": 8}
    return {
        name: distributed_run.train(
            folder / name, **{**RUNS[name], **whole, "shift_groups": 2 * RUNS[name].get("shift_groups", 1)}
        )
        for name in ("plain", "muon")
    }


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two(request, warm, tmp_path_factory):
    """Both processes' views of all runs, and the folder they wrote."""
    folder = tmp_path_factory.mktemp(request.param)
    return SimpleNamespace(kind=request.param, folder=folder, **launched(warm, f"{request.param}.yaml", folder, RUNS))


@pytest.mark.parametrize(("name", "tolerance"), [("plain", SAME_SUM), ("muon", MUON)])
def test_two_processes_are_one_with_twice_the_batch(two, alone, name, tolerance):
    for seen in getattr(two, name):
        assert seen["losses"] == pytest.approx(alone[name]["losses"], rel=tolerance)
        for wanted, found in zip(alone[name]["logged"], seen["logged"], strict=True):
            assert found["positions"] == wanted["positions"]
            assert (found["ce"], found["kl"]) == pytest.approx((wanted["ce"], wanted["kl"]), rel=tolerance)
        for tensor, weights in alone[name]["weights"].items():
            torch.testing.assert_close(seen["weights"][tensor], weights, rtol=tolerance, atol=tolerance)


def test_both_processes_end_with_the_same_draft_and_an_untouched_target(two):
    """C94: sharded or not, the target is whole, and no parameter of it has a gradient."""
    for first, second in (two.plain, two.muon, two.budget):
        assert bool(first["sharded"]) is (two.kind == "fsdp2")
        assert first["steps"] == second["steps"]
        assert first["rates"] == second["rates"]
        for name, tensor in first["weights"].items():
            assert torch.equal(tensor, second["weights"][name])
        for seen in (first, second):
            assert seen["target_is_whole"]
            assert not seen["target_has_gradients"]


def test_tau_counts_every_text_once(two, alone):
    assert alone["plain"]["tau"]
    for seen in two.plain:
        assert seen["tau"] == alone["plain"]["tau"]


def test_evaluation_losses_count_every_row_once(two, alone):
    """Six rows in batches of eight: the second process has copies only."""
    assert len(alone["plain"]["eval"]) == 2
    for seen in two.plain:
        assert seen["eval"] == pytest.approx(alone["plain"]["eval"], rel=SAME_SUM)


def test_what_is_written_is_the_whole_draft(two):
    for folder in (two.folder / "plain", two.folder / "plain" / "checkpoint-4"):
        saved = load_file(folder / "model.safetensors")
        assert saved.keys() == two.plain[0]["weights"].keys()
        for name, tensor in two.plain[0]["weights"].items():
            assert torch.equal(saved[name], tensor)
    exported = LongSpecDraftModel.from_pretrained(two.folder / "plain" / "export")
    assert exported.dtype == torch.bfloat16
    for name, tensor in exported.named_parameters():
        assert torch.equal(tensor, two.plain[0]["weights"][name].bfloat16())


def test_a_resumed_run_goes_on_as_if_never_interrupted(two):
    assert two.resumed[0]["losses"] == two.plain[0]["losses"]
    for name, tensor in two.plain[1]["weights"].items():
        assert torch.equal(two.resumed[1]["weights"][name], tensor)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
@pytest.mark.parametrize("config", ["deepspeed_zero2.yaml", "deepspeed_zero3.yaml"])
def test_deepspeed_trains_saves_and_resumes(warm, config, alone, tmp_path):
    """C93: frozen weights are neither lost nor partitioned."""
    for name in ("plain", "resumed"):
        first, second = launched(warm, config, tmp_path, {name: RUNS[name]}, DS_ACCELERATOR="cpu")[name]
        assert first["target_is_whole"] and second["target_is_whole"]
        assert first["losses"] == pytest.approx(alone["plain"]["losses"], rel=SAME_SUM)
        for name, tensor in first["weights"].items():
            assert torch.equal(tensor, second["weights"][name])
            torch.testing.assert_close(tensor, alone["plain"]["weights"][name], rtol=SAME_SUM, atol=SAME_SUM)
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == alone["plain"]["weights"].keys()


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
@pytest.mark.parametrize("how", ["argument", "launcher"])
def test_deepspeed_that_is_not_installed_is_refused(tmp_path, monkeypatch, how):
    """C93."""
    if how == "launcher":
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"`deepspeed` is asked for, but the package is not installed"):
        small_trainer(tmp_path, **({"deepspeed": {"zero_optimization": {"stage": 3}}} if how == "argument" else {}))


FSDP = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "state_dict_type": "FULL_STATE_DICT"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fsdp_version": 1}, "`fsdp_version` must be 2, got 1"),
        ({"cpu_ram_efficient_loading": True}, "`fsdp_cpu_ram_efficient_loading` is on"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "`fsdp_state_dict_type` must be FULL_STATE_DICT"),
    ],
)
def test_fsdp_that_loses_weights_is_refused(changed, message):
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**FSDP)))
    draft = small_draft(tiny_target())
    check_sharding(draft, True, accelerator)
    accelerator.state.fsdp_plugin = SimpleNamespace(**{**FSDP, **changed})
    with pytest.raises(ValueError, match=message):
        check_sharding(draft, False, accelerator)


def test_adapters_under_fsdp_and_muon_under_deepspeed_are_refused():
    fsdp = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**FSDP)))
    with pytest.raises(ValueError, match="`model` is a Linear, expected a plain draft"):
        check_sharding(torch.nn.Linear(1, 1), False, fsdp)
    deepspeed = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace()))
    check_sharding(small_draft(tiny_target()), False, deepspeed)
    with pytest.raises(ValueError, match="`muon` needs whole matrices"):
        check_sharding(small_draft(tiny_target()), True, deepspeed)


def test_targets_that_lack_a_part_are_refused(tmp_path):
    """C93: before anything is made of them."""
    target = tiny_target()
    target.hf_device_map = {"": "cpu", "lm_head": "disk"}
    check_target(target, processes=1)
    with pytest.raises(ValueError, match="`target_model` is split over"):
        check_target(target, processes=2)
    target = tiny_target()
    target.lm_head.to("meta")
    with pytest.raises(ValueError, match="`target_model` has a head that is offloaded"):
        small_trainer(tmp_path, target, small_draft(tiny_target(), draft_vocab_size=16))
    target = tiny_target()
    target.lm_head.weight = torch.nn.Parameter(torch.empty(0))
    target.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match="`target_model` was partitioned by ZeRO-3"):
        small_trainer(tmp_path, target, small_draft(tiny_target(), draft_vocab_size=16))


def test_offsets_of_two_processes_are_those_of_one():
    rows = [{"input_ids": list(range(1, 10))} for _ in range(8)]
    whole = AnchorOffsetCollator(max_position=500, seed=3)
    parts = [AnchorOffsetCollator(max_position=500, seed=3, process_index=i, num_processes=2) for i in (0, 1)]
    for _ in range(3):
        halves = [part(rows[:4])["position_ids"] for part in parts]
        positions = whole(rows)["position_ids"]
        assert torch.equal(torch.cat(halves), positions)
        assert len({tuple(row) for row in positions.tolist()}) == 8
