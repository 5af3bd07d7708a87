"""The token-set file, read with safetensors itself, and how sets are built."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from calibration.chat import tokenizer_sha256
from calibration.mixes import parse_mix
from calibration.tokens import Drawing, TokenSet, build_token_set, build_token_sets
from models.errors import InputError
from tests.calibration.conftest import Wrap


def small() -> TokenSet:
    return TokenSet(
        input_ids=torch.tensor([5, 6, 7, 8, 9, 10], dtype=torch.int32),
        offsets=torch.tensor([0, 2, 5, 6]),
        domain=torch.tensor([0, 1, 0], dtype=torch.uint8),
        domains=["code", "täglich"],
        mix="a:1,b:2",
        seed=7,
        tokenizer_sha256="ab" * 32,
        notes={"max_length": "3"},
    )


def test_file_as_the_contract_says(tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    small().save(path)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {
            "domains": '["code", "täglich"]', "mix": "a:1,b:2", "seed": "7",
            "tokenizer_sha256": "ab" * 32, "max_length": "3",
        }  # fmt: skip
        read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - its own API
    assert {name: tensor.dtype for name, tensor in read.items()} == {
        "input_ids": torch.int32, "offsets": torch.int64, "domain": torch.uint8,
    }  # fmt: skip
    assert read["input_ids"].tolist() == [5, 6, 7, 8, 9, 10]
    assert read["offsets"].tolist() == [0, 2, 5, 6]
    assert read["domain"].tolist() == [0, 1, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["set.safetensors"]


@given(
    st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), min_size=1, max_size=6),
    st.text(max_size=9),
)
def test_load_is_the_inverse_of_save(samples: list[list[int]], name: str) -> None:
    lengths = [len(sample) for sample in samples]
    made = TokenSet(
        input_ids=torch.tensor([t for sample in samples for t in sample], dtype=torch.int32),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        domain=torch.zeros(len(samples), dtype=torch.uint8),
        domains=[name],
        mix=name,
        seed=0,
        tokenizer_sha256="",
    )
    with tempfile.TemporaryDirectory() as folder:
        made.save(Path(folder) / "set.safetensors")
        read = TokenSet.load(Path(folder) / "set.safetensors")
    assert [row.tolist() for row in read] == samples
    assert (read.domains, read.mix, read.lengths()) == ([name], name, lengths)
    assert read.digest() == made.digest()
    assert read.to_bytes() == made.to_bytes()


def test_views_and_counts() -> None:
    made = small()
    assert len(made) == 3
    assert made.sample(1).tolist() == [7, 8, 9]
    assert made.counts() == {
        "code": {"samples": 2, "tokens": 3},
        "täglich": {"samples": 1, "tokens": 3},
    }
    made.check_vocabulary(11)
    with pytest.raises(InputError, match="holds id 10 and the model has 10 embeddings"):
        made.check_vocabulary(10)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"offsets": torch.tensor([0, 5, 2, 6])}, "sample 1 is of negative length: offsets must"),
        ({"offsets": torch.tensor([0, 2, 2, 6])}, "sample 1 is empty"),
        ({"offsets": torch.tensor([0, 2, 5, 9])}, "offsets run from 0 to 9 over 6 tokens"),
        ({"offsets": torch.tensor([1, 2, 5, 6])}, "offsets run from 1 to 6"),
        ({"offsets": torch.tensor([0, 6])}, "2 offsets and 3 domains do not describe samples"),
        ({"input_ids": torch.arange(6)}, "input_ids is torch.int64 [6]; it must be torch.int32"),
        ({"input_ids": torch.full((6,), -1, dtype=torch.int32)}, "negative id"),
        ({"domain": torch.tensor([0, 1, 2], dtype=torch.uint8)}, "domain 2 and only 2 are named"),
    ],
)  # fmt: skip
def test_bad_tensors(tmp_path: Path, change: dict[str, torch.Tensor], says: str) -> None:
    good = small()
    tensors = {"input_ids": good.input_ids, "offsets": good.offsets, "domain": good.domain}
    metadata = {"domains": '["a", "b"]', "mix": "m", "seed": "0", "tokenizer_sha256": ""}
    path = tmp_path / "bad.safetensors"
    save_file({**tensors, **change}, path, metadata=metadata)
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        TokenSet.load(path)
    assert str(path) in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    good = small()
    path = tmp_path / "bad.safetensors"
    with pytest.raises(InputError, match="there is no token set"):
        TokenSet.load(path)
    for content in (b"", b"not a safetensors file at all", good.to_bytes()[:-3]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a whole safetensors file"):
            TokenSet.load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(InputError, match=re.escape("it holds ['weight']")):
        TokenSet.load(path)
    tensors = {"input_ids": good.input_ids, "offsets": good.offsets, "domain": good.domain}
    save_file(tensors, path)
    with pytest.raises(InputError, match="metadata lacks or misspells 'domains'"):
        TokenSet.load(path)
    fields = {"mix": "m", "tokenizer_sha256": ""}
    for metadata in ({"domains": "code", "seed": "0"}, {"domains": "[]", "seed": "first"}):
        save_file(tensors, path, metadata={**metadata, **fields})
        with pytest.raises(InputError, match="metadata lacks or misspells"):
            TokenSet.load(path)


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        small().save(tmp_path / "file" / "set.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


Rows = Callable[[str, list[str]], str]


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    def write(name: str, texts: list[str]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(path)

    return write


def test_built_from_files(tokenizer: PreTrainedTokenizerFast, rows: Rows) -> None:
    """Every sample is its own document, BOS first, cut at max_length, and accounted for."""
    words, long = [f"word {n}" for n in range(9)], ["x " * 300, "  ", "another text"]
    spec = f"{rows('words.jsonl', words)}:4,{rows('long.jsonl', long)}"
    made = build_token_set(tokenizer, parse_mix(spec), max_length=20, seed=3)
    assert made.domains == ["words", "long"]
    assert made.domain.tolist() == [0, 0, 0, 0, 1, 1]
    texts = {tokenizer.decode(row[1:]) for row in made if len(row) < 20}
    assert texts < {*words, "another text"}
    assert len(texts) == 5
    assert all(row[0] == tokenizer.bos_token_id for row in made)
    assert max(made.lengths()) == 20
    assert made.tokenizer_sha256 == tokenizer_sha256(tokenizer)
    first, second = made.report()
    assert (first["read"], first["used"], first["truncated"]) == (4, 4, 0)
    assert (second["read"], second["used"], second["truncated"]) == (3, 2, 1)
    assert second["rejected"] == {"empty text": 1}
    assert second["tokens"] == made.counts()["long"]["tokens"]


def test_same_seed_same_bytes(tokenizer: PreTrainedTokenizerFast, rows: Rows) -> None:
    mix = parse_mix(rows("words.jsonl", [f"word {n}" for n in range(40)]) + ":8")
    made = [build_token_set(tokenizer, mix, seed=seed) for seed in (1, 1, 2)]
    assert made[0].to_bytes() == made[1].to_bytes()
    assert made[0].digest() != made[2].digest()


def test_samples_share_a_mix_out(tokenizer: PreTrainedTokenizerFast) -> None:
    counted: list[int] = []
    made = build_token_set(
        tokenizer, parse_mix("offline"), samples=8, max_length=64, progress=counted.append
    )
    assert {name: count["samples"] for name, count in made.counts().items()} == {
        "code": 3, "tools": 3, "swe": 2,
    }  # fmt: skip
    assert counted == list(range(1, 9))
    assert max(made.lengths()) <= 64
    assert made.notes["offline_python"].startswith("CPython 3.")


def test_too_few_rows(tokenizer: PreTrainedTokenizerFast, rows: Rows) -> None:
    spec = rows("few.jsonl", ["one text", " ", "two texts"]) + ":3"
    says = "gave 2 usable rows of 3 read and 3 were asked for (1 rejected: empty text)"
    with pytest.raises(InputError, match=re.escape(says)):
        build_token_set(tokenizer, parse_mix(spec))
    with pytest.raises(InputError, match="gave 0 usable rows of 2 read"):
        build_token_set(tokenizer, parse_mix(rows("none.jsonl", [" ", ""])))


def test_a_sample_needs_two_tokens(wrap: Wrap, rows: Rows) -> None:
    mix = parse_mix(rows("short.jsonl", ["a", "a longer one"]))
    made = build_token_set(wrap(None), mix)
    assert len(made) == 1
    assert made.report()[0]["rejected"] == {"fewer than 2 tokens": 1}


@pytest.mark.parametrize("spec", ["offline[code]", "evol-codealpaca-v1", "owner/name"])
def test_endless_sources_need_a_number(tokenizer: PreTrainedTokenizerFast, spec: str) -> None:
    with pytest.raises(InputError, match="no set number of rows; say how many"):
        build_token_set(tokenizer, parse_mix(spec))


def test_max_length_leaves_something(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="max length 1 leaves nothing to predict"):
        build_token_set(tokenizer, parse_mix("offline"), max_length=1)


# ---- balance and held-out sets -------------------------------------------------------------------


def drawn(tokenizer: PreTrainedTokenizerFast, spec: str, **how: Any) -> tuple[TokenSet, Any]:
    return build_token_sets(tokenizer, parse_mix(spec), Drawing(**how))


def test_balance_of_tokens_and_of_domains(tokenizer: PreTrainedTokenizerFast, rows: Rows) -> None:
    short = rows("short.jsonl", [f"only {n} words" for n in range(400)])
    long = rows("long.jsonl", [f"row {n} " + "many words " * 40 for n in range(400)])
    spec = f"{short}:30,{long}:10"
    shares = {}
    for balance in ("rows", "tokens", "domains"):
        made, _ = drawn(tokenizer, spec, samples=200, balance=balance)
        counts = made.counts()
        assert len(made) == 200
        assert made.notes["balance"] == balance
        shares[balance] = counts["short"]["tokens"] / sum(c["tokens"] for c in counts.values())
    assert made.domain.tolist() == sorted(made.domain.tolist())
    assert shares["rows"] < 0.2
    assert shares["tokens"] == pytest.approx(0.75, abs=0.03)
    assert shares["domains"] == pytest.approx(0.5, abs=0.03)


def test_balanced_files_end_with_the_scarcest(
    tokenizer: PreTrainedTokenizerFast, rows: Rows
) -> None:
    few = rows("few.jsonl", [f"row number {n}" for n in range(10)])
    many = rows("many.jsonl", [f"row number {n}" for n in range(500)])
    made, _ = drawn(tokenizer, f"{few},{many}", balance="tokens")
    counts = made.counts()
    assert counts["few"]["samples"] == 10
    assert counts["many"]["tokens"] == pytest.approx(counts["few"]["tokens"], rel=0.15)
    with pytest.raises(InputError, match=r"few.jsonl gave 10 usable rows of 10 read"):
        drawn(tokenizer, f"{few}:90,{many}:10", balance="tokens")
    with pytest.raises(InputError, match="with balance tokens give all of them one, or none"):
        drawn(tokenizer, f"{few},{many}:10", balance="tokens")


def test_no_row_is_drawn_twice(tokenizer: PreTrainedTokenizerFast, rows: Rows) -> None:
    """Components of one source share its rows, and so does the held-out set."""
    path = rows("every.jsonl", [f"row number {n}" for n in range(30)])
    made, apart = drawn(tokenizer, f"{path}:10,{path}:8", holdout=12)
    texts = [tokenizer.decode(row) for one in (made, apart) for row in one]
    assert len(texts) == len(set(texts)) == 30
    assert apart.notes["held_out_from"] == made.digest()
    with pytest.raises(InputError, match="gave 1 usable rows of 1 read and 7 were asked for"):
        drawn(tokenizer, f"{path}:10,{path}:14", holdout=12)


@pytest.mark.parametrize("balance", ["rows", "tokens"])
def test_runs_of_an_instance_stay_together(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, balance: Any
) -> None:
    path = tmp_path / "runs.jsonl"
    with path.open("w") as file:
        for instance in range(30):
            for run in range(4):
                ask = {"role": "user", "content": "Mend it."}
                say = {"role": "assistant", "content": f"issue {instance} run {run}"}
                row = {"messages": [ask, say], "instance_id": f"repo__{instance}"}
                file.write(json.dumps(row) + "\n")
    spec = f"{path}:40"
    made, apart = drawn(tokenizer, spec, holdout=9, seed=4, balance=balance)
    mine, theirs = (
        {re.search(r"issue (\d+)", tokenizer.decode(row))[1] for row in one}  # type: ignore[index]
        for one in (made, apart)
    )
    assert len(made) == 40
    assert len(apart) == 9
    assert not mine & theirs
    assert sum(apart.report()[0]["rejected"].values()) > 0
    assert apart.report()[0]["rejected"].keys() == {"another run of an instance that calibrates"}
    assert made.to_bytes() == drawn(tokenizer, spec, seed=4, balance=balance)[0].to_bytes()


@pytest.mark.parametrize(
    "shared",
    [{"instance_id": 7}, {"instance_id": 0}, {"messages": [{"role": "user", "content": "Hi."}]}],
)
def test_rows_of_one_instance_cannot_be_held_out(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, shared: dict[str, Any]
) -> None:
    path = tmp_path / "runs.jsonl"
    with path.open("w") as file:
        for run in range(20):
            ask = shared.get("messages", [{"role": "user", "content": f"question {run}"}])
            say = {"role": "assistant", "content": f"answer {run}"}
            file.write(json.dumps({**shared, "messages": [*ask, say]}) + "\n")
    with pytest.raises(InputError, match="15 rejected: another run of an instance"):
        drawn(tokenizer, f"{path}:5", holdout=3)


def test_a_developers_text_is_no_instance(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for n in range(20):
            opening = {"role": "developer", "content": "Be terse."}
            ask = {"role": "user", "content": f"question {n}"}
            file.write(json.dumps({"messages": [opening, ask]}) + "\n")
    _, apart = drawn(tokenizer, f"{path}:12", holdout=8)
    assert apart.report()[0]["rejected"] == {}


def test_offline_holds_out_its_own_part(tokenizer: PreTrainedTokenizerFast) -> None:
    made, apart = drawn(tokenizer, "offline[code]:5", holdout=4, max_length=64)
    assert made.report()[0]["split"] is None
    assert (len(apart), apart.report()[0]["split"]) == (4, "heldout")
    with pytest.raises(InputError, match="is the held-out part itself"):
        drawn(tokenizer, "offline[code](heldout):5", holdout=4)


def test_holding_out_needs_numbers(tokenizer: PreTrainedTokenizerFast, rows: Rows) -> None:
    path = rows("every.jsonl", ["one row", "another row"])
    with pytest.raises(InputError, match="leaves none to hold out; say how many"):
        drawn(tokenizer, path, holdout=1)


def test_half_a_surrogate_is_a_reason(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "half.jsonl"
    path.write_text('{"text": "whole one"}\n{"text": "half \\ud83d one"}\n')
    made, _ = drawn(tokenizer, str(path))
    assert made.report()[0]["rejected"] == {"half of a surrogate pair in its text": 1}
