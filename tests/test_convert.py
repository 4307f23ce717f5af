"""Drafts in the published layout: what is converted, the numbers that come out, what is refused."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from layer_numbers import PackageNumbers, given_for
from models import learned, prompt, tiny_target
from published_layout import FOLDER, KEPT_ROWS, independent_numbers, write_draft
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from longspec_hf import LongSpecDraftConfig, LongSpecDraftModel, convert_checkpoint
from longspec_hf.convert import UNUSED
from longspec_hf.published import PUBLISHED_PAIRS

EXACT = 1e-9  # fp64; rotary tables are fp32 on both sides, by the same operations
STORED = 1e-5  # computed in fp64, kept in fp32: values up to 30
UP = "mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path, target):
    """A draft in the published layout for the tiny Llama, in one safetensors file."""
    write_draft(tmp_path / "published", target.config)
    return tmp_path / "published"


def rewrite(folder, change):
    """Put what `change` makes of the draft's tensors in their place."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shards(folder, save, suffix):
    """Cut the draft's file into two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"part-{number % 2}{suffix}" for number, name in enumerate(tensors)}
    for part in set(weight_map.values()):
        save({name: tensors[name] for name in tensors if weight_map[name] == part}, folder / part)
    (folder / f"weights{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_bin(folder, name="pytorch_model.bin"):
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()


def hub_cache(cache, name, folder):
    """Move `folder` to where the Hub's client keeps the repository `name`."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    (root / "snapshots").mkdir()
    folder.rename(root / "snapshots" / ("0" * 40))


def same_tensors(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_number_equals_the_independent_layers(tmp_path, family):
    """Training forward, prefill, steps, trees and the window's edge, biases in both variants."""
    target = tiny_target(family, torch.float64, max_position_embeddings=32768)
    tensors = write_draft(tmp_path / "published", target.config)
    given = given_for(target)
    expected = independent_numbers(tensors, target, given)
    found = PackageNumbers(convert_checkpoint(tmp_path / "published", dtype=target.dtype), target, given).all()
    assert len(expected) == 55 and found.keys() == expected.keys() | {"next_round_hidden_in_training"}
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].reshape(value.shape), value, atol=EXACT, rtol=EXACT, msg=lambda m, n=name: f"{n}: {m}"
        )
    torch.testing.assert_close(
        found["next_round_hidden_in_training"][0], expected["next_round_hidden"], atol=EXACT, rtol=EXACT
    )


def test_every_number_equals_the_stored_ones(tmp_path):
    """Numbers kept in `tests/data`, so that the two writings of the layer cannot change together."""
    target = AutoModelForCausalLM.from_pretrained(FOLDER / "target", dtype=torch.float64).eval()
    given, expected = load_file(FOLDER / "given.safetensors"), load_file(FOLDER / "expected.safetensors")
    given |= {name: value for name, value in given_for(target).items() if name not in given}
    found = PackageNumbers(convert_checkpoint(FOLDER / "draft", dtype=torch.float64), target, given).all()
    assert len(expected) > 30
    for name, value in expected.items():
        rows = found[name] if name.endswith("loss") else found[name][0, -KEPT_ROWS:]
        torch.testing.assert_close(rows.float(), value, atol=STORED, rtol=STORED, msg=lambda m, n=name: f"{n}: {m}")


def test_configuration(folder, target):
    draft = convert_checkpoint(folder)
    assert not draft.training and draft.device.type == "cpu"
    config = draft.config
    expected = LongSpecDraftConfig.from_target(target.config)
    for name in ("vocab_size", "hidden_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "intermediate_size"):
        assert getattr(config, name) == getattr(expected, name)
    assert config.attention_bias and not config.use_target_final_norm and not config.qk_norm
    assert config.sliding_window == 513  # 512 tokens before the query and the query's own
    assert config.target_name_or_path is None
    assert convert_checkpoint(folder, window=4).config.sliding_window == 5
    assert not convert_checkpoint(folder, tiny_target("qwen3")).config.qk_norm


@pytest.mark.parametrize("layout", ["bin", "shards", "bin shards", "odd name", "hub", "hub bin", "hub shards"])
def test_sources(tmp_path, folder, layout):
    expected = convert_checkpoint(folder)
    if layout == "odd name":
        (folder / "model.safetensors").rename(folder / "draft.safetensors")
    elif layout == "bin shards":
        shards(folder, torch.save, ".bin")
    elif "shards" in layout:
        shards(folder, save_file, ".safetensors")
    elif "bin" in layout:
        as_bin(folder)
        torch.save({"learning_rate": 1.0}, folder / "training_args.bin")
    if "hub" not in layout:
        assert same_tensors(convert_checkpoint(folder), expected)
        return
    hub_cache(tmp_path, "sail/longspec-QwQ-32B-Preview", folder)
    name, options = "sail/longspec-QwQ-32B-Preview", {"cache_dir": tmp_path, "local_files_only": True}
    draft = convert_checkpoint(name, **options)
    assert same_tensors(draft, expected)
    assert draft.config.target_name_or_path == "Qwen/QwQ-32B-Preview"
    with pytest.raises(ValueError, match=r"`source` must be a folder or a Hub repository.*revision v2"):
        convert_checkpoint(name, revision="v2", **options)


def test_only_the_needed_files_are_fetched(tmp_path, folder, monkeypatch):
    """`.bin` files of a repository are fetched only where it has no safetensors."""
    local = tmp_path / "local"
    local.mkdir()

    def fetch(name, allow_patterns, **options):
        for path in folder.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, local)
        return str(local)

    monkeypatch.setattr("longspec_hf.checkpoint_files.snapshot_download", fetch)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "README.md").touch()
    expected = convert_checkpoint("org/draft")
    assert sorted(path.name for path in local.iterdir()) == ["config.json", "model.safetensors"]
    as_bin(folder)
    (local / "model.safetensors").unlink()
    assert same_tensors(convert_checkpoint("org/draft"), expected)


def test_the_file_of_the_usual_name_is_taken_of_whatever_kind(tmp_path, folder, monkeypatch):
    expected = convert_checkpoint(folder)
    as_bin(folder)
    save_file({"x": torch.ones(1)}, folder / "other.safetensors")
    assert same_tensors(convert_checkpoint(folder), expected)
    shards_of_bin = tmp_path / "shards"
    write_draft(shards_of_bin, AutoConfig.from_pretrained(folder))
    shards(shards_of_bin, torch.save, ".bin")
    save_file({"x": torch.ones(1)}, shards_of_bin / "other.safetensors")
    assert same_tensors(convert_checkpoint(shards_of_bin), expected)

    def fetch(name, allow_patterns, **options):
        (tmp_path / "local").mkdir(exist_ok=True)
        for path in folder.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, tmp_path / "local")
        return str(tmp_path / "local")

    monkeypatch.setattr("longspec_hf.checkpoint_files.snapshot_download", fetch)
    assert same_tensors(convert_checkpoint("org/draft"), expected)


@pytest.mark.parametrize("prefix", ["model.layers.0.", "draft_model.", "module.mlp."])
def test_a_prefix_is_cut_off(folder, prefix):
    expected = convert_checkpoint(folder)
    rewrite(folder, lambda tensors: {prefix + name: value for name, value in tensors.items()})
    assert same_tensors(convert_checkpoint(folder), expected)


@pytest.mark.parametrize("kind", ["model", "configuration", "folder", "hub"])
def test_target(tmp_path, folder, kind):
    target = tiny_target(rms_norm_eps=3e-4)  # the one beside the draft has another
    target.save_pretrained(tmp_path / "target")
    (folder / "config.json").unlink()
    options = {}
    if kind == "hub":
        hub_cache(tmp_path, "org/target", tmp_path / "target")
        options = {"cache_dir": tmp_path, "local_files_only": True}
    given = {"model": target, "configuration": target.config, "folder": tmp_path / "target", "hub": "org/target"}
    draft = convert_checkpoint(folder, given[kind], **options)
    assert draft.config.rms_norm_eps == 3e-4
    if kind == "hub":
        assert draft.config.target_name_or_path == "org/target"


def test_biases_follow_the_tensors(folder, caplog):
    every = convert_checkpoint(folder)
    assert every.config.attention_bias and every.cross_attn.q_proj.bias.abs().sum() > 0
    rewrite(folder, lambda tensors: {n: v for n, v in tensors.items() if n != "cross_attn.q_proj.bias"})
    with caplog.at_level(logging.WARNING, logger="longspec_hf"):
        some = convert_checkpoint(folder)
    assert "to zero" in caplog.text and "cross_attn.q_proj.bias" in caplog.text
    assert (some.cross_attn.q_proj.bias == 0).all()
    assert torch.equal(some.self_attn.q_proj.bias, every.self_attn.q_proj.bias)
    # Biases of the unused projections do not count.
    rewrite(folder, lambda tensors: {n: v for n, v in tensors.items() if "bias" not in n or n in UNUSED})
    none = convert_checkpoint(folder)
    assert not none.config.attention_bias and none.self_attn.q_proj.bias is None


def test_unused_projections_are_dropped_and_may_be_absent(folder, caplog):
    with caplog.at_level(logging.INFO, logger="longspec_hf"):
        draft = convert_checkpoint(folder)
    assert all(name in caplog.text for name in UNUSED)
    rewrite(folder, lambda tensors: {name: value for name, value in tensors.items() if name not in UNUSED})
    assert same_tensors(convert_checkpoint(folder), draft)


def test_dtype(folder, tmp_path):
    exact = convert_checkpoint(folder)
    rewrite(folder, lambda tensors: {name: value.bfloat16() for name, value in tensors.items()})
    kept = convert_checkpoint(folder, output_dir=tmp_path / "kept")
    assert {value.dtype for value in kept.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(kept.mlp.up_proj.weight, exact.mlp.up_proj.weight.bfloat16())
    assert LongSpecDraftModel.from_pretrained(tmp_path / "kept").dtype == torch.bfloat16
    for dtype in (torch.float16, "float16", "torch.float16"):
        assert convert_checkpoint(folder, dtype=dtype).dtype == torch.float16
    rewrite(folder, lambda tensors: tensors | {UP: tensors[UP].float()})
    with pytest.raises(ValueError, match=r"`dtype` must be given.*bfloat16, torch\.float32"):
        convert_checkpoint(folder)
    assert convert_checkpoint(folder, dtype="float32").dtype == torch.float32


MISFITS = {
    "missing": (lambda t: {n: v for n, v in t.items() if n != UP}, rf"missing tensor `{UP}` of shape \(64, 32\)"),
    "shape": (lambda t: t | {UP: torch.zeros(3, 32)}, rf"`{UP}` has shape \(3, 32\), expected \(64, 32\)"),
    "unknown": (
        lambda t: t | {"self_attn.q_norm.weight": torch.ones(8)},
        r"unknown tensor `self_attn\.q_norm\.weight",
    ),
    "mlp bias": (lambda t: t | {"mlp.up_proj.bias": torch.ones(64)}, r"unknown tensor `mlp\.up_proj\.bias"),
    "bias shape": (
        lambda t: t | {"self_attn.k_proj.bias": torch.ones(5)},
        r"`self_attn\.k_proj\.bias` has shape \(5,\)",
    ),
    "integers": (lambda t: t | {UP: t[UP].to(torch.int8)}, rf"`{UP}` has dtype torch\.int8, expected a floating"),
    "two layers": (lambda t: t | {f"layers.1.{n}": v.clone() for n, v in t.items()}, r"prefixes '', 'layers\.1\.'"),
    "no layer": (lambda t: {"lm_head.weight": torch.ones(2)}, r"published LongSpec layout.*lm_head\.weight"),
    "many": (lambda t: t | {f"extra{i}": torch.ones(1) for i in range(30)}, r"`extra\d+` of shape \(1,\); 22 more\."),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_misfits_are_named_and_nothing_is_written(tmp_path, folder, kind):
    change, message = MISFITS[kind]
    rewrite(folder, change)
    with pytest.raises(ValueError, match=rf"`source`.*{message}"):
        convert_checkpoint(folder, output_dir=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_another_target_is_refused(folder):
    with pytest.raises(ValueError, match=rf"`{UP}` has shape \(64, 32\), expected \(96, 32\).*`target`"):
        convert_checkpoint(folder, tiny_target(intermediate_size=96))


def test_unreadable_sources_are_named(tmp_path, folder):
    def refused(message, source=folder, **arguments):
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(source, **arguments)

    refused(r"`source`.*got the file", folder / "model.safetensors")
    refused(r"`source` must be a folder.*'\S*nowhere'", tmp_path / "nowhere")
    refused(r"`source` must be a folder.*'no/where'", "no/where", local_files_only=True, cache_dir=tmp_path / "cache")
    as_bin(folder, "one.bin")
    torch.save({"a": 1}, folder / "two.bin")
    refused(r"`source`.*one checkpoint, got one\.bin, two\.bin")
    (folder / "one.bin").unlink()
    refused(r"`source` must hold tensors.*two\.bin")
    torch.save(ValueError, folder / "two.bin")
    refused(r"`source` has a file that cannot be read.*two\.bin")
    (folder / "two.bin").unlink()
    refused(r"`source`.*got none")
    (folder / "model.safetensors").write_bytes(b"half a file")
    refused(r"`source` has a file that cannot be read.*model\.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part.safetensors"}}')
    refused(r"`source`.*lacks part\.safetensors, which model\.safetensors\.index\.json names")
    (folder / "model.safetensors.index.json").write_text("[]")
    refused(r"`source` has an index without a `weight_map`")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "`dtype`.*'int8'"),
        ({"dtype": "nothing"}, "`dtype`.*'nothing'"),
        ({"dtype": 16}, "`dtype`.*16"),
        ({"window": 0}, "`window`.*0"),
        ({"window": True}, "`window`.*True"),
        ({"target": "/no/where"}, "`target`.*'/no/where'"),
    ],
)
def test_bad_arguments_are_named(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(folder, **arguments)


def test_no_configuration_beside_the_draft(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"`target` must be a model.*no configuration of a model in"):
        convert_checkpoint(folder)


def test_a_converted_draft_is_not_converted_again(tmp_path, folder):
    convert_checkpoint(folder, output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match=r"`source` must not be a converted draft.*from_pretrained"):
        convert_checkpoint(tmp_path / "out")
    for converted in (AutoConfig.from_pretrained(tmp_path / "out"), convert_checkpoint(folder)):
        with pytest.raises(ValueError, match=r"`target` must not be a converted draft"):
            convert_checkpoint(folder, converted)


def test_output_is_never_overwritten(tmp_path, folder):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for taken in (tmp_path / "full", tmp_path / "full" / "mine", folder):
        with pytest.raises(ValueError, match="`output_dir` must be empty or not there yet"):
            convert_checkpoint(folder, output_dir=taken)
    (tmp_path / "empty").mkdir()
    for free in (tmp_path / "empty", tmp_path / "new" / "deeper"):
        convert_checkpoint(folder, output_dir=free)
        assert sorted(path.name for path in free.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing(tmp_path, folder, monkeypatch, error):
    def interrupted(self, place, **kwargs):
        place.mkdir()
        (place / "config.json").write_text("half")
        raise error

    def rename_fails(self, place):
        raise error

    for owner, name, replacement in (
        (LongSpecDraftModel, "save_pretrained", interrupted),
        (Path, "rename", rename_fails),
    ):
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(owner, name, replacement)
            convert_checkpoint(folder, output_dir=tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["published"]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_old_layout_to_generation(tmp_path, family):  # C99
    target = tiny_target(family)
    write_draft(tmp_path / "published", target.config)
    for loader in (LongSpecDraftModel, LongSpecDraftConfig):
        with pytest.raises(ValueError, match=rf"'{family}'.*`longspec-hf convert`.*`longspec_hf\.convert_checkpoint`"):
            loader.from_pretrained(tmp_path / "published")
    converted = convert_checkpoint(tmp_path / "published", output_dir=tmp_path / "converted")
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype=target.dtype)
    assert isinstance(draft, LongSpecDraftModel) and same_tensors(draft, converted)
    assert draft.config.to_diff_dict() == converted.config.to_diff_dict()
    ids = prompt(30)
    plain = target.generate(ids, max_new_tokens=25, do_sample=False)
    out = target.generate(ids, max_new_tokens=25, do_sample=False, assistant_model=draft, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain)
    assert out.speculation_stats.drafted > 0


def test_old_tensors_beside_a_configuration_of_this_package(tmp_path, folder, target):  # C99
    learned(target).config.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"unexpected tensor `cross_attn\.k_proj\.weight`.*`longspec-hf convert`"):
        LongSpecDraftModel.from_pretrained(folder)


def test_published_pairs():
    assert len({pair.draft for pair in PUBLISHED_PAIRS}) == len({pair.target for pair in PUBLISHED_PAIRS}) == 6
    for pair in PUBLISHED_PAIRS:
        assert pair.draft == f"sail/longspec-{pair.target.split('/')[1]}"
        assert getattr(torch, pair.dtype).is_floating_point and pair.context_length >= 2**14
