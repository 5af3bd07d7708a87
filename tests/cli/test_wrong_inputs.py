"""Every wrong input: exit 2, one `error:` line that names the trouble, nothing harmed.

The program runs in this process (`cli.main.run`), but for the full disks, which need their own.
"""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.main import run
from tests.cli.command import FIXTURE, ROOT, argv, assert_refused, environment, thresher
from tests.cli.models import model, token_file

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`m` (DeepSeek-V3.2, two shards), `t.safetensors` and `scores` of the two."""
    root = tmp_path_factory.mktemp("pristine")
    model(root / "m")
    tokens = token_file(root / "t.safetensors")
    arguments = ["score", root / "m", "--tokens", tokens, "-o", root / "scores", "--quiet"]
    assert run([str(argument) for argument in arguments]) == 0
    return root


@pytest.fixture
def work(pristine: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    shutil.copytree(pristine, tmp_path / "work")
    return tmp_path / "work"


def fingerprint(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Refusal:
    """Runs commands that must be refused, and checks what is left behind."""

    def __init__(self, capsys: pytest.CaptureFixture[str], work: Path) -> None:
        self.capsys, self.work = capsys, work

    def __call__(self, *arguments: object, words: tuple[str, ...]) -> None:
        before = fingerprint(self.work)
        self.capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = self.capsys.readouterr()
        assert code == 2, captured.err
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ")
        for word in words:
            assert word in lines[0], lines[0]
        after = fingerprint(self.work)
        assert {name: after.get(name) for name in before} == before, "an input was harmed"
        written = [name for name in after if name not in before]
        assert all("/.thresher/" in name for name in written), written


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], work: Path) -> Refusal:
    return Refusal(capsys, work)


def score_of(work: Path) -> list[object]:
    return ["score", work / "m", "--tokens", work / "t.safetensors", "-o", work / "o", "--quiet"]


def prune_of(work: Path, keep: int = 8) -> list[object]:
    scores, out = work / "scores", work / "o"
    return ["prune", work / "m", "--scores", scores, "--keep", keep, "-o", out, "--quiet"]


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a shard's JSON header, data bytes kept."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def first_tensor(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(v for k, v in header.items() if k != "__metadata__")
    return entry


def both(work: Path) -> Iterator[list[object]]:
    yield score_of(work)
    yield prune_of(work)


# -- the checkpoint --------------------------------------------------------------------------------


def test_missing_shard(work: Path, refused: Refusal) -> None:
    name = shard_names(work / "m")[0]
    (work / "m" / name).unlink()
    for command in both(work):
        refused(*command, words=(name,))


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_truncated_shard(work: Path, refused: Refusal, left: int) -> None:
    shard = work / "m" / shard_names(work / "m")[1]
    shard.write_bytes(shard.read_bytes()[:left])
    for command in both(work):
        refused(*command, words=(shard.name,))


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.update(shape=[2**62, 2**62]),
        lambda entry: entry.update(shape=[-1, 64]),
        lambda entry: entry.update(shape="big"),
        lambda entry: entry.update(data_offsets=[0, 2**60]),
        lambda entry: entry.update(data_offsets=[-8, 8]),
        lambda entry: entry.update(data_offsets=[64, 0]),
        lambda entry: entry.update(dtype="F128"),
    ],
    ids=["shape", "negative", "text", "beyond", "before", "backwards", "dtype"],
)
def test_absurd_header(
    work: Path, refused: Refusal, change: Callable[[dict[str, Any]], None]
) -> None:
    shard = work / "m" / shard_names(work / "m")[0]
    edit_header(shard, lambda header: change(first_tensor(header)))
    for command in both(work):
        refused(*command, words=(shard.name,))


def test_header_length_beyond_the_file(work: Path, refused: Refusal) -> None:
    shard = work / "m" / shard_names(work / "m")[0]
    content = shard.read_bytes()
    shard.write_bytes(struct.pack("<Q", 2**63) + content[8:])
    for command in both(work):
        refused(*command, words=(shard.name,))


@pytest.mark.parametrize(
    "target", ["../secret.safetensors", "/etc/passwd", "a/../../x.safetensors"]
)
def test_index_points_outside(work: Path, refused: Refusal, target: str) -> None:
    (work / "secret.safetensors").write_bytes(b"secret")

    def change(index: dict[str, Any]) -> None:
        index["weight_map"][next(iter(index["weight_map"]))] = target

    edit_json(work / "m" / INDEX, change)
    for command in both(work):
        refused(*command, words=(INDEX,))


def test_link_out_of_the_folder(work: Path, refused: Refusal) -> None:
    name = shard_names(work / "m")[0]
    (work / "m" / name).rename(work / "elsewhere.safetensors")
    (work / "m" / name).symlink_to(work / "elsewhere.safetensors")
    for command in both(work):
        refused(*command, words=(name,))


def test_index_names_an_unknown_tensor(work: Path, refused: Refusal) -> None:
    shard = shard_names(work / "m")[0]
    edit_json(work / "m" / INDEX, lambda index: index["weight_map"].update(ghost=shard))
    for command in both(work):
        refused(*command, words=("ghost",))


def test_nan_weights(work: Path, refused: Refusal) -> None:
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    for shard in shard_names(work / "m"):
        tensors = load_file(work / "m" / shard)
        if name in tensors:
            tensors[name][0, 0] = torch.nan
            save_file(tensors, work / "m" / shard)
    refused(*score_of(work), words=(name,))


def test_missing_expert(work: Path, refused: Refusal) -> None:
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    for shard in shard_names(work / "m"):
        tensors = load_file(work / "m" / shard)
        if tensors.pop(name, None) is not None:
            save_file(tensors, work / "m" / shard)
    edit_json(work / "m" / INDEX, lambda index: index["weight_map"].pop(name))
    refused(*score_of(work), words=("experts",))


# -- config.json -----------------------------------------------------------------------------------


def test_no_count_key(work: Path, refused: Refusal) -> None:
    edit_json(work / "m" / "config.json", lambda config: config.pop("n_routed_experts"))
    for command in (*both(work), ["inspect", work / "m"]):
        refused(*command, words=("n_routed_experts",))


def test_count_that_is_no_number(work: Path, refused: Refusal) -> None:
    edit_json(work / "m" / "config.json", lambda config: config.update(n_routed_experts="many"))
    for command in (*both(work), ["inspect", work / "m"]):
        refused(*command, words=("n_routed_experts", "many"))


@pytest.mark.parametrize("family", ["llama", "bert", "deepseek_v9", 7, None])
def test_unknown_family(work: Path, refused: Refusal, family: object) -> None:
    edit_json(work / "m" / "config.json", lambda config: config.update(model_type=family))
    for command in (*both(work), ["inspect", work / "m"]):
        refused(*command, words=("model_type",))


def test_unknown_family_lists_what_is_known(work: Path, refused: Refusal) -> None:
    edit_json(work / "m" / "config.json", lambda config: config.update(model_type="llama"))
    refused("inspect", work / "m", words=("llama", "deepseek_v32", "qwen3_moe", "gpt_oss"))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\x01", '{"model_type": "x"' * 2])
def test_damaged_config(work: Path, refused: Refusal, text: str) -> None:
    (work / "m" / "config.json").write_text(text)
    for command in (*both(work), ["inspect", work / "m"]):
        refused(*command, words=("config.json",))


def test_no_model(tmp_path: Path, work: Path, refused: Refusal) -> None:
    refused("inspect", tmp_path / "nowhere", words=("nowhere",))
    refused("inspect", work / "t.safetensors", words=("t.safetensors",))


# -- what to keep ----------------------------------------------------------------------------------


def test_keep_below_top_k(work: Path, refused: Refusal) -> None:
    config = json.loads((work / "m" / "config.json").read_text())
    refused(*prune_of(work, keep=config["num_experts_per_tok"] - 1), words=("keep",))
    refused("inspect", FIXTURE, "--keep", 7, words=("7 of 256",))


def test_keep_not_divisible_by_groups(work: Path, refused: Refusal) -> None:
    config = json.loads((work / "m" / "config.json").read_text())
    keep = config["n_routed_experts"] - 1
    refused(*prune_of(work, keep=keep), words=(f"{config['n_group']} groups",))


def test_keep_more_than_there_are(work: Path, refused: Refusal) -> None:
    refused(*prune_of(work, keep=10**6), words=("1000000",))


def test_keep_and_ratio(work: Path, refused: Refusal) -> None:
    refused(*prune_of(work), "--ratio", 0.5, words=("--keep", "--ratio"))
    command = ["prune", work / "m", "--scores", work / "scores", "-o", work / "o"]
    refused(*command, words=("--keep", "--ratio"))


@pytest.mark.parametrize("ratio", ["1.5", "-0.1", "0.99"])
def test_impossible_ratio(work: Path, refused: Refusal, ratio: str) -> None:
    command = ["prune", work / "m", "--scores", work / "scores", "-o", work / "o"]
    refused(*command, "--ratio", ratio, words=("ratio",))


def test_unknown_criterion(work: Path, refused: Refusal) -> None:
    refused(*prune_of(work), "--criterion", "reapp", words=("reapp", "reap_sum"))


def test_scores_of_another_model(work: Path, refused: Refusal) -> None:
    edit_json(work / "m" / "config.json", lambda config: config.update(rope_theta=77))
    refused(*prune_of(work), words=("another checkpoint",))


def test_scores_that_are_none(work: Path, refused: Refusal) -> None:
    (work / "scores" / "saliency.json").unlink()
    refused(*prune_of(work), words=("saliency.json",))


def test_scores_that_were_changed(work: Path, refused: Refusal) -> None:
    file = work / "scores" / "saliency.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused(*prune_of(work), words=("saliency.safetensors",))


# -- tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mix", "word"),
    [("", "empty"), ("  ", "empty"), ("offlin", "offlin"), ("code-tools-sew:5", "code-tools-sew"),
     ("offline[cod]:5", "cod"), ("offline:0", "offline:0"), ("nothing.jsonl", "nothing.jsonl"),
     ("missing.yaml", "missing.yaml"), ("offline:5,,", "mix")],
)  # fmt: skip
def test_empty_or_misspelt_mix(work: Path, refused: Refusal, mix: str, word: str) -> None:
    for command in (["tokens", work / "m"], ["score", work / "m"]):
        refused(*command, "--mix", mix, "-o", work / "o", words=(word,))


def test_empty_rows(work: Path, refused: Refusal) -> None:
    (work / "none.jsonl").write_text("")
    (work / "odd.jsonl").write_text('{"colour": "blue"}\n')
    for name in ("none.jsonl", "odd.jsonl"):
        mix = ("--mix", work / name)
        refused("tokens", work / "m", *mix, "-o", work / "o.safetensors", words=(name,))
        refused("eval", work / "m", "--text", work / name, words=(name,))


def test_tokens_given_twice_or_never(work: Path, refused: Refusal) -> None:
    refused(*score_of(work), "--mix", "offline", words=("--tokens", "--mix"))
    refused("score", work / "m", "-o", work / "o", words=("--tokens", "--mix"))
    refused("eval", work / "m", words=("--tokens", "--text"))
    refused("tokens", work / "m", "-o", work / "o", words=("--mix",))


def test_tokens_of_another_vocabulary(work: Path, refused: Refusal) -> None:
    token_file(work / "t.safetensors", vocabulary=50_000)
    refused(*score_of(work), words=("embeddings",))


def test_token_file_that_is_none(work: Path, refused: Refusal) -> None:
    for content in (b"", b"text", (work / "t.safetensors").read_bytes()[:-3]):
        (work / "t.safetensors").write_bytes(content)
        refused(*score_of(work), words=("t.safetensors",))


@pytest.mark.parametrize("command", ["quantize", "compress"])
@pytest.mark.parametrize(
    ("targets", "word"), [("re:.*mlp.gate$", "router"), ("re:.*nothing", "matches no matrix")]
)
def test_recipe_that_does_not_fit(
    work: Path, refused: Refusal, command: str, targets: str, word: str
) -> None:
    """Told before the tokens are looked for, which may take long to make."""
    recipe = work / "recipe.yaml"
    recipe.write_text(f"QuantizationModifier: {{scheme: W4A16, targets: ['{targets}']}}")
    refused(
        command, work / "m", "--recipe", recipe, "--tokens", work / "none.safetensors",
        "-o", work / "o", *(["--keep", 8] if command == "compress" else []),
        words=("recipe.yaml", word),
    )  # fmt: skip


def test_no_tokenizer(work: Path, refused: Refusal) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (work / "m" / name).unlink()
    refused("tokens", work / "m", "--mix", "offline", "-o", work / "o", words=("tokenizer",))


# -- devices and places ----------------------------------------------------------------------------


def test_device_that_is_not_there(work: Path, refused: Refusal) -> None:
    refused(*score_of(work), "--device", "cuda:63", words=("cuda:63",))


def test_output_that_is_somebody_elses(work: Path, refused: Refusal) -> None:
    (work / "o").mkdir()
    (work / "o" / "thesis.tex").write_text("\\documentclass")
    for command in both(work):
        refused(*command, words=("thesis.tex",))


def test_output_of_another_command(work: Path, refused: Refusal) -> None:
    assert run([str(argument) for argument in prune_of(work)]) == 0
    config = json.loads((work / "m" / "config.json").read_text())
    refused(*prune_of(work, keep=config["n_routed_experts"]), words=("keep", "--force"))
    refused(*score_of(work), words=("--force",))


def test_output_inside_the_source(work: Path, refused: Refusal) -> None:
    command = prune_of(work)
    refused(*command[:-2], work / "m" / "pruned", "--quiet", words=("pruned",))
    refused(*command[:-2], work / "m", "--quiet", words=(str(work / "m"),))


def test_output_below_a_file(work: Path, refused: Refusal) -> None:
    for command in both(work):
        command[command.index("-o") + 1] = work / "t.safetensors" / "o"
        refused(*command, words=("t.safetensors",))


def test_token_file_is_not_overwritten(work: Path, refused: Refusal) -> None:
    mix = ("--mix", "offline:3")
    refused("tokens", work / "m", *mix, "-o", work / "t.safetensors", words=("--force",))


@pytest.mark.parametrize(("of", "limit"), [(prune_of, 65_536), (score_of, 4_096)])
def test_full_disk(work: Path, of: Callable[[Path], list[object]], limit: int) -> None:
    """Files that may not grow fail as a full disk does (EFBIG for ENOSPC)."""

    def limited() -> None:  # in the child
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    before = fingerprint(work)
    done = thresher(*of(work), preexec_fn=limited)
    assert_refused(done, "free ", str(work / "o"))
    after = fingerprint(work)
    assert {name: after[name] for name in before} == before
    # with room again, the same command ends as if nothing had been
    assert thresher(*of(work)).returncode == 0
    assert not (work / "o" / ".thresher").exists()


@pytest.mark.parametrize(("of", "size"), [(prune_of, "256k"), (score_of, "12k")])
def test_really_full_disk(work: Path, of: Callable[[Path], list[object]], size: str) -> None:
    """A small tmpfs of one's own, where the system lets users have one. A snapshot that does not
    fit is told and left out; files of the job itself are what must fit."""
    out = work / "o"
    out.mkdir()
    mount = f"mount -t tmpfs -o size={size} none {out}"
    alone = ["unshare", "-Urm", "sh", "-c"]
    if subprocess.run([*alone, mount], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces with tmpfs here")
    done = subprocess.run(
        [*alone, f'{mount} && exec "$@"', "sh", *argv(*of(work))],
        cwd=ROOT,
        env=environment(),
        text=True,
        capture_output=True,
        check=False,
    )
    lines = done.stderr.splitlines(keepends=True)
    told = [line for line in lines if "no room to save" in line]
    assert len(told) == (of is score_of)
    done.stderr = "".join(line for line in lines if line not in told)
    assert_refused(done, "free ", str(out))
