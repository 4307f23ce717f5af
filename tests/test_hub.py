"""Pairs by Hub name: from a cache, from a server, and pushed to one. Each in a process of its own environment."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_server import FakeHub, etag, serve
from processes import run_python
from saved_pairs import save_tiny_pair
from transformers import AutoModelForCausalLM

from longspec_hf import LongSpecDraftModel

GENERATE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
import longspec_hf
target = AutoModelForCausalLM.from_pretrained("org/target").eval()
tokenizer = AutoTokenizer.from_pretrained("org/target")
draft = AutoModelForCausalLM.from_pretrained("org/draft")
assert type(draft) is longspec_hf.LongSpecDraftModel
inputs = tokenizer("w7 w8 w9", return_tensors="pt")
settings = {"max_new_tokens": 20, "do_sample": False}
out = target.generate(**inputs, assistant_model=draft, return_dict_in_generate=True, **settings)
assert out.speculation_stats.rounds > 0
print(json.dumps([out.sequences.tolist(), [tensor.double().sum().item() for tensor in draft.state_dict().values()]]))
"""
PIPELINE = """
from transformers import pipeline
pipe = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=draft)
text = pipe("w7 w8 w9", **settings)[0]["generated_text"]
assert text.replace(" ", "") == tokenizer.decode(out.sequences[0], skip_special_tokens=True).replace(" ", "")
"""
PUSH = """
from longspec_hf.remote_code import export_with_remote_code
import torch, longspec_hf, sys
from longspec_hf.pairs import load_pair
draft = longspec_hf.LongSpecDraftModel.from_pretrained(sys.argv[1])
print(draft.push_to_hub("org/pushed"))
again = longspec_hf.LongSpecDraftModel.from_pretrained("org/pushed")
assert all(torch.equal(a, b) for a, b in zip(draft.state_dict().values(), again.state_dict().values(), strict=True))
export_with_remote_code("org/pushed", sys.argv[2])
try:
    load_pair(draft="org/none")
except ValueError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def expected(pair):
    """Ids and sums that loading the folders gives."""
    model = AutoModelForCausalLM.from_pretrained(pair[0]).eval()
    layer = LongSpecDraftModel.from_pretrained(pair[1])
    ids = model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=20, do_sample=False)
    return [ids.tolist(), [tensor.double().sum().item() for tensor in layer.state_dict().values()]]


def lay_out_cache(cache, name, folder, commit="c" * 40):
    """What a download of `name` would have left."""
    root = cache / f"models--{name.replace('/', '--')}"
    for part in ("refs", "blobs", f"snapshots/{commit}"):
        (root / part).mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for path in folder.iterdir():
        blob = root / "blobs" / etag(path.name, path.read_bytes())
        shutil.copy(path, blob)
        (root / "snapshots" / commit / path.name).symlink_to(Path("../../blobs") / blob.name)


def test_from_a_cache_without_a_network(warm_torch, pair, expected, tmp_path):
    for name, folder in zip(("org/target", "org/draft"), pair, strict=True):
        lay_out_cache(tmp_path / "cache", name, folder)
    settings = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    (line,) = run_python(GENERATE + PIPELINE, tmp_path, python=warm_torch, **settings)
    assert json.loads(line) == expected


def test_from_a_server_and_then_from_the_cache_it_filled(warm_torch, pair, expected, tmp_path):
    hub = FakeHub()
    for name, folder in zip(("org/target", "org/draft"), pair, strict=True):
        hub.add_folder(name, folder)
    with serve(hub):
        assert json.loads(*run_python(GENERATE, tmp_path, python=warm_torch, HF_ENDPOINT=hub.url)) == expected
    downloads = [
        line for line in hub.requests if line.startswith("GET") and line.endswith("draft/resolve/main/config.json")
    ]
    assert len(downloads) <= 1
    assert sum(line.startswith("GET") and line.endswith("model.safetensors") for line in hub.requests) == 2
    assert (tmp_path / "hub" / "models--org--draft" / "refs" / "main").read_text() == hub.commit("org/draft")
    # The server is gone now.
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}
    assert json.loads(*run_python(GENERATE, tmp_path, python=warm_torch, **settings)) == expected


def test_push_and_load_again_and_what_is_not_there(warm_torch, pair, tmp_path):
    with serve(FakeHub()) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_x", "HF_HUB_DISABLE_XET": "1"}
        url, message = run_python(PUSH, tmp_path, pair[1], tmp_path / "exported", python=warm_torch, **settings)
    assert url == f"{hub.url}/org/pushed/commit/{hub.commit('org/pushed')}"
    assert message.startswith("`draft` must be a Hub id or a folder of a model, got 'org/none': ")
    pushed = hub.repos["org/pushed"]
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == pushed["model.safetensors"]
    assert {"config.json", "model.safetensors"} <= set(pushed)
    assert json.loads(pushed["config.json"])["model_type"] == "longspec"
    assert len(hub.objects) == 1  # the weights, and only they, went as a large file
