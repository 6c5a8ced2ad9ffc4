"""One run at a time in an output folder."""

import contextlib
import contextvars
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastzs import locks, ranks
from fastzs.files import remove_leftovers, temporary_beside
from fastzs.locks import hold
from fastzs.runs import OutputError


def entries(folder):
    return sorted(path.name for path in Path(folder).glob(".*"))


def other(folder, *, host="elsewhere", age=0.0, **more):
    """The file of a run on another machine, or with ``more`` of this one."""
    path = folder / ".running-00ff.json"
    entry = {"place": host, "host": host, "pid": 4, "born": "5", "run": "x", "user": "u", "command": "train"}
    path.write_text(json.dumps(entry | {"since": time.time() - age} | more))
    os.utime(path, (time.time() - age,) * 2)
    return path


@contextlib.contextmanager
def in_new_context(manager):
    """As another thread or process enters it."""
    context = contextvars.Context()
    yield context.run(manager.__enter__)
    context.run(manager.__exit__, None, None, None)


def test_the_folder_is_made_and_left_clean(tmp_path):
    with hold(tmp_path / "new" / "deep", "segment") as held:
        held.check()
        assert len(entries(tmp_path / "new" / "deep")) == 1
    assert entries(tmp_path / "new" / "deep") == []


def test_a_folder_in_which_nothing_was_written_goes_again(tmp_path):
    (tmp_path / "old").mkdir()
    with contextlib.suppress(RuntimeError), hold(tmp_path / "old", "segment"), hold(tmp_path / "new" / "deep", "train"):
        raise RuntimeError
    with hold(tmp_path / "other" / "deep", "segment"):
        (tmp_path / "other" / "x").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old", "other", "x"]


def test_the_same_thread_may_come_in_again(tmp_path):
    with hold(tmp_path / "a", "train") as held:
        with hold(tmp_path / "b" / ".." / "a", "train") as again, hold(tmp_path / "b", "train"):
            assert again is held
        held.check()
        assert len(entries(tmp_path / "a")) == 1
    assert entries(tmp_path / "a") == []


def test_a_second_run_is_refused_and_told_by_whom(tmp_path):
    with hold(tmp_path, "train"):
        code = "import sys\nfrom pathlib import Path\nfrom fastzs.locks import hold\n"
        code += "hold(Path(sys.argv[1]), 'x').__enter__()\n"
        said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert said.returncode == 1
    for part in (str(tmp_path), "fastzs train", f"process {os.getpid()}", "0 min", "name another folder"):
        assert part in said.stderr
    with hold(tmp_path, "segment"):
        pass


def test_of_many_that_begin_together_one_goes_on(tmp_path):
    ready, inside, won, refused = threading.Barrier(6), [], [], []

    def run():
        ready.wait()
        try:
            with hold(tmp_path, "segment"):
                inside.append(1)
                assert len(inside) == 1
                time.sleep(3)
                won.append(1)
                inside.pop()
        except OutputError:
            refused.append(1)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 5)
    assert entries(tmp_path) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_a_killed_run_is_taken_over_at_once(tmp_path):
    code = "import sys, time\nfrom pathlib import Path\nfrom fastzs.locks import hold\n"
    code += "with hold(Path(sys.argv[1]), 'segment'):\n print('in', flush=True)\n time.sleep(60)\n"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(OutputError, match=f"process {process.pid}"), hold(tmp_path, "segment"):
        pass
    process.kill()
    while len(entries(tmp_path)) == 1:  # not waited for: a zombie does not count as alive
        with hold(tmp_path, "segment"):
            assert len(entries(tmp_path)) == 1
    process.communicate()
    assert entries(tmp_path) == []


def test_a_number_that_another_process_has_now(tmp_path):
    other(tmp_path, place=locks._place(), pid=os.getpid(), born="1")
    with hold(tmp_path, "segment"):
        assert not (tmp_path / ".running-00ff.json").exists()


def test_another_machine_counts_as_alive_for_a_minute(tmp_path):
    other(tmp_path, host="node7", age=50)
    with pytest.raises(OutputError, match=r"node7.*if it is dead, the folder is free 60 s"), hold(tmp_path, "segment"):
        pass
    other(tmp_path, host="node7", age=70)
    with hold(tmp_path, "segment"):
        pass


def test_a_file_that_is_no_json(tmp_path):
    path = tmp_path / ".running-aa.json"
    path.write_bytes(b"\xff{")
    with pytest.raises(OutputError, match="in use by another run"), hold(tmp_path, "segment"):
        pass
    assert path.exists()


def test_a_run_that_was_taken_for_dead_hears_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.01)
    with hold(tmp_path, "segment") as held:
        before = held.path.stat().st_mtime_ns
        while held.path.stat().st_mtime_ns == before:
            time.sleep(0.01)
        held.path.unlink()
        held._thread.join(10)
        with pytest.raises(OutputError, match="another run took it over"):
            held.check()


def test_processes_of_one_torchrun_share_the_folder(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with hold(tmp_path, "train"):
        left = temporary_beside(tmp_path / "x")
        left.touch()
        os.utime(left, (1, 1))
        monkeypatch.setenv("RANK", "1")
        with in_new_context(hold(tmp_path, "train")):
            assert len(entries(tmp_path)) == 3  # and the other one's temporary file stays
        monkeypatch.setenv("MASTER_PORT", "2")
        with pytest.raises(OutputError), in_new_context(hold(tmp_path, "train")):
            pass


def test_leftovers_of_killed_runs_go(tmp_path):
    inside = tmp_path / "checkpoints" / "sub"
    inside.mkdir(parents=True)
    old = [temporary_beside(tmp_path / "a.png"), temporary_beside(inside / "b")]
    old[0].write_bytes(b"half")
    old[1].mkdir()
    (old[1] / "model").touch()
    link = temporary_beside(tmp_path / "last")
    link.symlink_to(inside)
    for path in (*old, link):
        os.utime(path, (1000, 1000), follow_symlinks=False)
    foreign = tmp_path / ".mine.tmp"
    foreign.touch()
    os.utime(foreign, (1000, 1000))
    young = temporary_beside(tmp_path / "y")
    young.touch()
    os.utime(young, (2**31, 2**31))
    with hold(tmp_path, "segment"):
        pass
    assert entries(tmp_path) == sorted([".mine.tmp", young.name])
    assert entries(inside) == []
    remove_leftovers(tmp_path / "gone", 1e12)


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write to the output folder .*file"), hold(tmp_path / "file", "x"):
        pass
    below = tmp_path / "file" / "below"
    with pytest.raises(OutputError, match=r"cannot write to the output folder .*Not a directory"), hold(below, "x"):
        pass
    if os.path.isdir("/proc/self"):
        with pytest.raises(OutputError, match="cannot write to the output folder /proc"), hold(Path("/proc/zs"), "x"):
            pass


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1)),
        ({}, (0, 1)),
        ({"WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "h", "MASTER_PORT": "9"}, (2, 3)),
        ({"RANK": "2", "WORLD_SIZE": "3"}, "would also have set MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "2"}, "do not go together"),
        ({"WORLD_SIZE": "3"}, "do not go together"),
        ({"RANK": "3", "WORLD_SIZE": "3"}, "do not go together"),
        ({"RANK": "-1", "WORLD_SIZE": "3"}, "RANK is '-1'; expected a number"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; expected a number"),
    ],
)
def test_variables_of_torchrun(monkeypatch, variables, said):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(said, tuple):
        assert ranks.started() == said
    else:
        with pytest.raises(ValueError, match=said):
            ranks.started()
