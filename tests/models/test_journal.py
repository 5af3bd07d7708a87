"""The journal: resuming, refusing, locking, and surviving torn lines."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from models.errors import InputError
from models.journal import Journal, json_bytes, write_atomically

JOB = {"command": "prune", "keep": 32, "source": {"digest": "abc"}}
ROOT = Path(__file__).parents[2]


def refused(out: Path, job: dict, *fragments: str, force: bool = False) -> None:
    with pytest.raises(InputError) as caught:
        Journal.open(out, job, force)
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_the_same_job_resumes_and_knows_what_is_done(tmp_path):
    out = tmp_path / "deep" / "out"
    with Journal.open(out, JOB) as journal:
        assert not journal.done("layer:0")
        journal.record("layer:0", sha256="x", layer=0)
        journal.record("layer:1", note="ümlaut\nnewline")
    with Journal.open(out, JOB) as journal:
        assert journal.units() == ("layer:0", "layer:1")
        assert journal.facts("layer:0") == {"sha256": "x", "layer": 0}
        assert journal.facts("layer:1")["note"] == "ümlaut\nnewline"
        journal.close(complete=True)
    assert not (out / ".thresher").exists()


def test_another_job_is_refused_and_the_setting_named(tmp_path):
    with Journal.open(tmp_path / "o", JOB) as journal:
        journal.record("a")
    refused(tmp_path / "o", JOB | {"keep": 16}, "keep (32, now 16)", "--force")
    refused(tmp_path / "o", JOB | {"source": {"digest": "d"}}, 'source.digest ("abc", now "d")')
    refused(tmp_path / "o", {"command": "prune"}, "keep (32, now null)")


def test_a_job_stopped_before_its_first_unit_gives_way(tmp_path):
    with Journal.open(tmp_path, JOB) as journal:
        (journal.folder / "scratch").write_text("x")
    with Journal.open(tmp_path, JOB | {"keep": 16}) as journal:
        assert not (journal.folder / "scratch").exists()
        journal.record("a")
    with Journal.open(tmp_path, JOB | {"keep": 16}) as journal:
        assert journal.units() == ("a",)
    refused(tmp_path, JOB, "keep (16, now 32)")


def test_force_removes_only_what_is_ours(tmp_path):
    with Journal.open(tmp_path, JOB) as journal:
        (tmp_path / "ours.bin").write_text("x")
        journal.record("file:ours.bin", file="ours.bin")
        journal.record("file:evil", file="../evil")
        (journal.folder / "scratch").mkdir()
        (journal.folder / "scratch" / "s").write_text("x")
    (tmp_path / "theirs.txt").write_text("x")
    (tmp_path.parent / "evil").write_text("x")
    with Journal.open(tmp_path, JOB | {"keep": 16}, force=True) as journal:
        assert journal.units() == ()
        assert not (journal.folder / "scratch").exists()
        journal.record("a")
    assert not (tmp_path / "ours.bin").exists()
    assert (tmp_path / "theirs.txt").exists()
    assert (tmp_path.parent / "evil").exists()
    # the same forced command goes on instead of starting over once more
    with Journal.open(tmp_path, JOB | {"keep": 16}, force=True) as journal:
        assert journal.done("a")


def test_foreign_folders_are_refused_unless_forced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    refused(tmp_path, JOB, "not empty", "thesis.txt", "--force")
    assert not (tmp_path / ".thresher").exists()
    Journal.open(tmp_path, JOB, force=True).close()
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    file = tmp_path / "file"
    file.write_text("")
    refused(file, JOB, "cannot be written")
    refused(file / "below", JOB, "cannot be written")


def test_a_finished_output_is_recognised_and_protected(tmp_path):
    manifest = {"job": JOB, "files": {"weights.bin": {}, "/etc/hostname": {}, "../x": {}}}
    write_atomically(tmp_path / "thresher.json", json_bytes(manifest))
    (tmp_path / "weights.bin").write_text("x")
    assert Journal.open(tmp_path, JOB).complete
    refused(tmp_path, JOB | {"keep": 16}, "keep (32, now 16)")
    with Journal.open(tmp_path, JOB | {"keep": 16}, force=True) as journal:
        assert not journal.complete
    assert not (tmp_path / "weights.bin").exists()
    assert not (tmp_path / "thresher.json").exists()
    assert Path("/etc/hostname").exists()


def test_a_kill_between_manifest_and_clean_up(tmp_path):
    Journal.open(tmp_path, JOB).close()
    write_atomically(tmp_path / "thresher.json", json_bytes({"job": JOB, "files": {}}))
    assert Journal.open(tmp_path, JOB).complete
    assert not (tmp_path / ".thresher").exists()


def test_a_kill_before_the_job_was_written(tmp_path):
    (tmp_path / ".thresher").mkdir()
    with Journal.open(tmp_path, JOB) as journal:
        assert journal.units() == ()


@pytest.mark.parametrize(
    "torn", [b'{"unit": "b", "x', b'{"unit": "b"}', b"\xff\n", b"[]\n", b"{}\n"]
)
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    with Journal.open(tmp_path, JOB) as journal:
        journal.record("a")
    log = tmp_path / ".thresher" / "journal.jsonl"
    log.write_bytes(log.read_bytes() + torn)
    with Journal.open(tmp_path, JOB) as journal:
        assert journal.units() == ("a",)
        journal.record("c")
    with Journal.open(tmp_path, JOB) as journal:
        assert journal.units() == ("a", "c")


def test_two_processes_do_not_share_a_job(tmp_path):
    script = (
        "import sys\n"
        "from models.journal import Journal\n"
        "j = Journal.open(__import__('pathlib').Path(sys.argv[1]), {'command': 'x'})\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "o")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        refused(tmp_path / "o", {"command": "x"}, "another process")
        refused(tmp_path / "o", {"command": "x"}, "another process", force=True)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    Journal.open(tmp_path / "o", {"command": "x"}).close()  # the lock died with its holder


def test_a_linked_job_folder_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".thresher").symlink_to(tmp_path / "elsewhere")
    refused(tmp_path / "out", JOB, "is a link")


def test_write_atomically_replaces_whole(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, b"1")
    write_atomically(path, json_bytes({"ü": 1}))
    assert json.loads(path.read_bytes()) == {"ü": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(InputError, match="cannot be written"):
        write_atomically(path / "below", b"")


@pytest.mark.parametrize("complete", [False, True])
def test_what_is_discarded_is_gone_when_the_job_is_let_go(tmp_path, complete):
    journal = Journal.open(tmp_path, {"command": "a"})
    for name in ("old", "older"):
        (journal.folder / name).mkdir()
        for number in range(50):
            (journal.folder / name / str(number)).write_bytes(b"x" * 1000)
        journal.discard(journal.folder / name)
    journal.discard(journal.folder / "old")  # twice, or what was never there
    journal.close(complete)
    assert not (tmp_path / ".thresher" / "old").exists()
    assert not (tmp_path / ".thresher" / "older").exists()
    assert (tmp_path / ".thresher").exists() == (not complete)
