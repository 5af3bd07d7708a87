"""Carrying out a plan: every byte of the output compared with a cut made here, by names alone."""

import copy
import hashlib
import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.architecture import HASH_COUNT_KEY
from models.checkpoint import INDEX, Checkpoint
from models.errors import InputError
from models.families import spec_of
from models.source_formats import Source
from reap.cut import Cut
from reap.plan import PrunePlan
from reap.prune import prune_checkpoint
from reap.quotas import planned_layers, quota_groups
from tests.kills import assert_same_after_kills
from tests.tiny import FAMILIES, read_all, reference_model, tiny_model
from tests.tiny_formats import FP8_BLOCKS, Tensors
from tests.tiny_layouts import is_mtp, text_of

ROOT = Path(__file__).parents[2]
EXPERT = re.compile(r"(.*layers\.(\d+)\..*\bexperts\.)(\d+)(\..*)")
STACKED = re.compile(
    r"(experts\.(gate_up|down)_proj(_blocks|_scales|_bias)?|block_sparse_moe\.(in|out)put_linear\..*)$"
)
ROUTER = re.compile(
    r"\.(mlp|ffn|mixer|feed_forward|block_sparse_moe)\.((gate|router)(\.wg|\.gate|\.layer|\.classifier"
    r")?\.(weight|bias|e_score_correction_bias)|(moe_statics\.)?e_score_correction_bias|expert_bias)$"
)


def open_source(path: Path) -> Source:
    checkpoint = Checkpoint.open(path)
    return Source(checkpoint, spec_of(checkpoint.config))


def plan_for(
    source: Source, *, mtp: str = "drop", groups: str = "keep", seed: int = 0
) -> PrunePlan:
    """Half of the experts of every layer, chosen at random, the same number from each group."""
    spec, chance = source.spec, random.Random(seed)
    parts = quota_groups(spec, groups)
    keep, size = spec.num_experts // 2, spec.num_experts // parts
    layers = {}
    for layer in planned_layers(spec, mtp):
        kept: list[int] = []
        for first in range(0, spec.num_experts, size):
            kept += sorted(chance.sample(range(first, first + size), keep // parts))
        layers[layer] = tuple(kept)
    return PrunePlan(
        criterion="reap",
        num_experts=spec.num_experts,
        keep=keep,
        layers=layers,
        mtp=mtp,
        groups=groups,
    )


def expected(tensors: Tensors, text: dict, plan: PrunePlan) -> Tensors:
    """The cut checkpoint, from names and shapes alone; keeps MTP exactly when it is pruned."""
    cut: Tensors = {}
    for name, tensor in tensors.items():
        if is_mtp(name, text) and plan.mtp == "drop":
            continue
        layer = re.search(r"layers\.(\d+)\.", name)
        kept = plan.layers.get(int(layer[1])) if layer else None
        expert = EXPERT.match(name)
        if kept is None:
            cut[name] = tensor
        elif expert:
            if int(expert[3]) in kept:
                cut[f"{expert[1]}{kept.index(int(expert[3]))}{expert[4]}"] = tensor
        elif STACKED.search(name):
            cut[name] = tensor[list(kept)]
        elif ROUTER.search(name):
            rows = list(kept)
            flat = tensor.squeeze(0) if tensor.ndim == 2 and tensor.shape[0] == 1 else tensor
            rows += range(plan.num_experts, flat.shape[0])  # LongCat's zero experts
            cut[name] = flat[rows].reshape(
                *tensor.shape[: tensor.ndim - flat.ndim], len(rows), *flat.shape[1:]
            )
        else:
            cut[name] = tensor
    return cut


def assert_same_tensors(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        bits = [t.contiguous().flatten().view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*bits), name


CASES = [(family, False) for family in FAMILIES] + [(family, True) for family in FP8_BLOCKS]


@pytest.mark.parametrize(("family", "fp8"), CASES)
def test_every_family_keeps_its_bytes_and_loads(tmp_path, family, fp8):
    path = tiny_model(family, tmp_path / "model", fp8=fp8, dtype="bfloat16", shards=3)
    source = open_source(path)
    plan = plan_for(source)
    manifest = prune_checkpoint(source, plan, tmp_path / "out", max_shard_bytes=200_000)
    out = tmp_path / "out"
    tensors = read_all(path)
    wanted = expected(tensors, text_of(source.checkpoint.config), plan)
    assert any(tensors[name].shape != tensor.shape for name, tensor in wanted.items())
    assert_same_tensors(read_all(out), wanted)

    config = json.loads((out / "config.json").read_text())
    before, after = text_of(source.checkpoint.config), text_of(config)
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    allowed = {*source.spec.architecture.moe.num_experts, HASH_COUNT_KEY}
    if source.spec.architecture.mtp is not None:
        allowed.add(source.spec.architecture.mtp.count)
    assert changed <= allowed
    assert list(before) == [key for key in after if key in before]  # order and unknown keys

    spec = spec_of(config)
    assert spec.num_experts == plan.keep
    assert spec.num_mtp_layers == 0
    assert all(spec.num_experts_of(layer) == plan.num_experts for layer in spec.hash_layers)
    assert manifest["total_size"] == sum(t.numel() * t.element_size() for t in wanted.values())
    reference_model(out, dtype=torch.bfloat16)  # transformers misses nothing and has nothing over


@pytest.mark.parametrize("family", ["deepseek_v32", "glm4_moe", "hy_v3"])
def test_numbered_mtp_layers_pruned_by_their_own_plan(tmp_path, family):
    path = tiny_model(family, tmp_path / "model", fp8=family in FP8_BLOCKS)
    source = open_source(path)
    plan = plan_for(source, mtp="prune")
    assert set(plan.layers) & set(source.spec.mtp_layers)
    prune_checkpoint(source, plan, tmp_path / "out")
    wanted = expected(read_all(path), text_of(source.checkpoint.config), plan)
    assert any(is_mtp(name, text_of(source.checkpoint.config)) for name in wanted)
    assert_same_tensors(read_all(tmp_path / "out"), wanted)
    spec = spec_of(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert spec.mtp_layers == source.spec.mtp_layers
    assert spec.num_experts == plan.keep


def test_flattened_groups_change_the_config(tmp_path):
    source = open_source(tiny_model("deepseek_v3", tmp_path / "model"))
    assert source.spec.num_groups > 1
    prune_checkpoint(source, plan_for(source, groups="flatten"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["n_group"], config["topk_group"]) == (1, 1)


def test_what_lies_in_the_output(tmp_path):
    path = tiny_model("qwen3_moe", tmp_path / "model")
    for name in ("tokenizer.json", "chat_template.jinja", "modeling_q.py", "LICENSE"):
        (path / name).write_text(f"this is {name}")
    (path / "README.md").write_text("describes the other model")
    source = open_source(path)
    plan = plan_for(source)
    out = tmp_path / "out"
    inputs = {"saliency_sha256": "abc"}
    manifest = prune_checkpoint(source, plan, out, inputs=inputs, max_shard_bytes=100_000)
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert {"tokenizer.json", "chat_template.jinja", "modeling_q.py", "LICENSE"} < files
    assert {"plan.json", "thresher.json", "config.json", INDEX} < files
    assert "README.md" not in files
    assert not (out / ".thresher").exists()
    assert (out / "tokenizer.json").read_text() == "this is tokenizer.json"
    assert PrunePlan.load(out / "plan.json") == plan
    assert json.loads((out / "thresher.json").read_text()) == manifest
    assert manifest["files"].keys() == files - {"thresher.json"}
    for name, facts in manifest["files"].items():
        content = (out / name).read_bytes()
        assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert manifest["inputs"] == inputs
    assert manifest["source"]["digest"] == source.checkpoint.digest()
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == manifest["total_size"]
    assert set(index["weight_map"]) == set(read_all(out))
    # once more: recognised as finished; another plan: refused, and nothing harmed
    assert prune_checkpoint(source, plan, out, max_shard_bytes=100_000) == manifest
    other = plan_for(source, seed=1)
    with pytest.raises(InputError, match="plan_sha256"):
        prune_checkpoint(source, other, out, max_shard_bytes=100_000)
    assert PrunePlan.load(out / "plan.json") == plan
    prune_checkpoint(source, other, out, force=True)
    assert PrunePlan.load(out / "plan.json") == other
    assert [p.name for p in out.glob("*.safetensors")] == ["model.safetensors"]
    assert not (out / INDEX).exists()


def test_a_plan_made_before_is_carried_out_in_its_folder(tmp_path):
    source = open_source(tiny_model("olmoe", tmp_path / "model"))
    plan, out = plan_for(source), tmp_path / "out"
    out.mkdir()
    plan.save(out / "plan.json")
    with pytest.raises(InputError, match=r"not empty \('plan.json'\)"):
        prune_checkpoint(source, plan_for(source, seed=1), out)
    assert PrunePlan.load(out / "plan.json") == plan
    prune_checkpoint(source, plan, out)
    assert PrunePlan.load(out / "plan.json") == plan
    assert (out / "model.safetensors").is_file()


def test_module_lists_of_quantization_follow_the_experts(tmp_path):
    path = tiny_model("deepseek_v3", tmp_path / "model", fp8=True)
    config = json.loads((path / "config.json").read_text())
    names = [
        "lm_head",
        "re:.*experts.0.*",
        "model.layers.1.mlp.experts.3.down_proj",
        "model.layers.1.mlp.experts.6",
        "model.layers.1.mlp.experts.30",
        "model.layers.0.mlp.experts.3.down_proj",
        "model.layers.1.mlp.gate",
        "model.layers.3.mlp.experts.3.up_proj",
        "model.layers.3.eh_proj",
    ]
    config["quantization_config"]["modules_to_not_convert"] = names
    config["quantization_config"]["config_groups"] = {"g": {"targets": names[2:3], "weights": None}}
    spec = spec_of(config)
    assert spec.mtp_layers == (3,)
    layers = {1: (1, 3, 4, 5, 8, 9, 12, 13), 2: (0, 1, 4, 5, 8, 9, 12, 13)}
    plan = PrunePlan(criterion="reap", num_experts=16, keep=8, layers=layers)
    edited = Cut(spec, plan).config()["quantization_config"]
    assert edited["modules_to_not_convert"] == [
        "lm_head",
        "re:.*experts.0.*",
        "model.layers.1.mlp.experts.1.down_proj",
        "model.layers.0.mlp.experts.3.down_proj",
        "model.layers.1.mlp.gate",
    ]
    assert edited["config_groups"]["g"]["targets"] == ["model.layers.1.mlp.experts.1.down_proj"]
    assert spec.config["quantization_config"]["modules_to_not_convert"] == names


def test_counts_stay_lists_and_all_spellings_are_edited(tmp_path):
    source = open_source(tiny_model("hunyuan_v1_moe", tmp_path / "model"))
    config = copy.deepcopy(dict(source.spec.config))
    config["num_experts"] = [source.spec.num_experts] * 3
    config["num_local_experts"] = source.spec.num_experts
    edited = Cut(spec_of(config), plan_for(source)).config()
    half = source.spec.num_experts // 2
    assert edited["num_experts"] == [half] * 3
    assert edited["num_local_experts"] == half


def refused(source: Source, plan: PrunePlan, out: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        prune_checkpoint(source, plan, out)
    assert "\n" not in str(caught.value)


def rewrite(path: Path, tensors: Tensors) -> Source:
    """The checkpoint with other tensors, in one shard."""
    for file in path.glob("model*"):
        file.unlink()
    save_file(tensors, path / "model.safetensors")
    return open_source(path)


def test_checkpoints_that_cannot_be_cut_are_refused_before_anything_is_written(tmp_path):
    path = tiny_model("qwen3_moe", tmp_path / "model")
    source = open_source(path)
    plan, out = plan_for(source), tmp_path / "out"
    refused(source, plan, path / "inside", "overlaps")
    refused(source, plan, tmp_path, "overlaps")
    wrong = PrunePlan(criterion="reap", num_experts=3, keep=2, layers=plan.layers)
    refused(source, wrong, out, "the plan is for 3 experts")
    layer = source.spec.moe_layers[0]
    block, whole = f"model.layers.{layer}.mlp.", read_all(path)
    gate, up = block + "gate.weight", block + "experts.2.up_proj.weight"
    without_expert = rewrite(path, {k: v for k, v in whole.items() if k != up})
    refused(without_expert, plan, out, f"layer {layer} of .* up weights of .*expert 2")
    short = rewrite(path, whole | {gate: whole[gate][:-1].clone()})
    refused(short, plan, out, "does not have one row")
    without_router = rewrite(path, {k: v for k, v in whole.items() if k != gate})
    refused(without_router, plan, out, f"layer {layer} of .* has no router")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (path / "config.json").write_text(json.dumps(config))
    fp8 = {gate: whole[gate].to(torch.float8_e4m3fn), gate + "_scale_inv": torch.ones(1, 1)}
    refused(rewrite(path, whole | fp8), plan, out, "router .* is quantized")
    assert not out.exists()


def pruning(out: Path, model: str, plan_file: str) -> None:
    source = open_source(Path(model))
    prune_checkpoint(source, PrunePlan.load(plan_file), out, max_shard_bytes=30_000)


def test_killed_ten_times_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    path = tiny_model("deepseek_v3", tmp_path / "model", fp8=True)
    plan_for(open_source(path)).save(tmp_path / "plan.json")
    found = assert_same_after_kills(pruning, tmp_path / "runs", path, tmp_path / "plan.json")
    assert len(found) > 10
