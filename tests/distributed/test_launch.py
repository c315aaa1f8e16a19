"""`run` with more than one process: refused flags, and how errors and signals end all of them."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ranks
from torchrecipes.cli import main as cli
from torchrecipes.cli.main import main

# Its processes do not import torch, which takes seconds, unless `fails` is `gloo`.
RECIPE = '''
"""A recipe whose ranks end as its config says."""
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
from torchrecipes.errors import UserError


@dataclass
class Config:
    output_dir: str = "out"
    fails: str = ""
    note: str = ""


def main(config: Config) -> None:
    rank, start = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    folder = Path(config.output_dir)
    folder.mkdir(exist_ok=True)
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE OMP_NUM_THREADS".split()
    mine = folder / f"start-{start}-rank-{rank}"
    mine.write_text(" ".join([*(os.environ[name] for name in names), config.note]))
    received = []
    if config.fails != "at startup":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: received.append(number))
    print(f"{os.getpid()} is rank {rank}", flush=True)
    if config.fails == "gloo":
        import torch
        import torch.distributed as dist
        dist.init_process_group("gloo")
        dist.all_reduce(torch.ones(1))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))
    while len(list(folder.glob(f"start-{start}-rank-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
    if rank == 1:
        match config.fails:
            case "mistake":
                raise UserError("x.txt: line 3 is empty. Fill it.")
            case "twice":
                if start == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                1 / 0
            case "exit":
                os._exit(7)
    if config.fails == "finish":
        return
    while not received or (config.fails == "stubborn" and rank == 1):
        time.sleep(0.01)
    time.sleep(0.2)  # as if saving: a second signal would be in the list by now
    (folder / f"saved-{rank}").write_text(" ".join(str(int(number)) for number in received))
    raise SystemExit(128 + received[0])
'''


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "tiny.py").write_text(RECIPE)
    return tmp_path


def command(*words: str) -> subprocess.Popen:
    """`tune-style run tiny.py`, in a process group of its own."""
    full = [sys.executable, "-m", "torchrecipes.cli.main", "run", "tiny.py", *words]
    return subprocess.Popen(full, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0)


def launcher(*words: str) -> ranks.Process:
    """The same, forked from a process that has imported torch, which takes seconds."""
    if not hasattr(os, "pidfd_open"):
        pytest.skip("needs Linux")
    Path("tune_style.py").write_text("import sys\nfrom torchrecipes.cli.main import main\nsys.exit(main())\n")
    return ranks.Process([str(Path("tune_style.py").absolute()), "run", "tiny.py", *words], dict(os.environ))


def wait_for(process: ranks.Process | subprocess.Popen, world_size: int) -> dict[int, int]:
    """The process number of each rank, as soon as they all listen to signals."""
    lines = [process.stdout.readline().split() for _ in range(world_size)]
    return {int(line[-1]): int(line[0]) for line in lines}


def end_of(process: ranks.Process | subprocess.Popen) -> tuple[int, str]:
    """Its exit code and what it said on stderr; what hangs is killed."""
    try:
        err = process.communicate(timeout=60)[1]
        process.wait(60)
    except (TimeoutError, subprocess.TimeoutExpired):
        process.kill()  # its ranks, which hold the pipes, notice
        process.stdout.close()
        process.stderr.close()
        pytest.fail("the launcher did not end")
    return process.returncode, err


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("", 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize(
    ("words", "flag", "hint"),
    [
        ("--nproc-per-node two", "--nproc-per-node", "gpu, cpu or auto"),
        ("--nproc-per-node 0", "--nproc-per-node", "from 1"),
        ("--nnodes 2", "--nnodes", "--rdzv-endpoint"),
        ("--nnodes 1:2", "--nnodes", "--rdzv-endpoint"),
        ("--nnodes 3:2 --rdzv-endpoint a:1", "--nnodes", "MIN:MAX"),
        ("--nnodes x", "--nnodes", "--nnodes 2"),
        ("--nnodes 2 --rdzv-endpoint node0", "--rdzv-endpoint", "65535"),
        ("--nnodes 2 --rdzv-endpoint node0:99999", "--rdzv-endpoint", "node0:29500."),
        ("--nnodes 2 --rdzv-endpoint :29500", "--rdzv-endpoint", "65535"),
        ("--nnodes 2 --master-addr a --master-port 1", "--node-rank", "0 to 1"),
        ("--nnodes 2 --rdzv-backend static --rdzv-endpoint a:1", "--node-rank", "0 to 1"),
        ("--nnodes 2 --node-rank 2 --master-addr a", "--node-rank", "0 to 1."),
        ("--nnodes 2 --node-rank 0", "--master-addr", "all 2 nodes"),
        ("--nnodes 1:2 --node-rank 0 --master-addr a", "--rdzv-backend", "1:2"),
        ("--master-port 70000", "--master-port", "65535"),
        ("--rdzv-endpoint a:1 --master-addr a", "--rdzv-endpoint", "--master-addr"),
        ("--rdzv-backend c10d --rdzv-endpoint a:1 --node-rank 1", "--rdzv-backend", "--node-rank"),
        ("--rdzv-backend c10d --master-addr a", "--rdzv-backend", "--master-addr and --master-port"),
        ("--max-restarts -1", "--max-restarts", "0 or more"),
        ("--grace-period -1", "--grace-period", "0 seconds or more"),
    ],
)
def test_wrong_flags_are_one_message(words, flag, hint, capsys):
    for verb in ("run", "validate"):
        assert main([verb, "tiny.py", *words.split()]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"{flag}: ") and hint in err and err.count("\n") == 1, err


def test_gpus_are_counted_where_the_run_is(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["validate", "tiny.py", "--nproc-per-node", "gpu"]) == 0
    assert main(["run", "tiny.py", "--nproc-per-node", "gpu"]) == 2
    assert capsys.readouterr().err.startswith("--nproc-per-node: ")


def test_a_launch_inside_a_launch_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert main(["run", "tiny.py", "--nproc-per-node", "2"]) == 2
    assert "--nproc-per-node" in capsys.readouterr().err


def test_the_config_is_checked_once_before_any_process_starts(capfd, monkeypatch):
    monkeypatch.setattr("torchrecipes.distributed.launch.launch", lambda *_, **__: pytest.fail("launched"))
    assert main(["run", "tiny.py", "--nproc-per-node", "8", "fials=x"]) == 2
    assert capfd.readouterr().err.count("'fails'") == 1


def test_ranks_threads_and_overrides_reach_the_processes(monkeypatch, capfd):
    monkeypatch.setattr("torchrecipes.cli.launch_flags.cores", lambda: 7)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    note = "two words 'and' $HOME \"quotes\""
    assert main(["run", "--nproc-per-node", "2", "tiny.py", "fails=finish", f"note={note!r}".replace("\\'", "''")]) == 0
    assert Path("out/start-0-rank-0").read_text() == f"0 0 2 2 3 {note}"
    assert Path("out/start-0-rank-1").read_text() == f"1 1 2 2 3 {note}"
    assert capfd.readouterr().err == ""
    assert {number: signal.getsignal(number) for number in before} == before


def test_the_users_thread_count_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert main(["run", "--nproc-per-node", "1", "tiny.py", "fails=finish"]) == 0
    assert Path("out/start-0-rank-0").read_text() == "0 0 1 1 5 "


def run_here(*words: str) -> int:
    """The launch in this process, which has imported torch already."""
    with pytest.raises(SystemExit) as stop:
        main(["run", "tiny.py", *words])
    return stop.value.code


def test_a_users_mistake_on_one_rank_is_reported_once_and_not_restarted(capfd):
    assert run_here("--nproc-per-node", "2", "--max-restarts", "3", "fails=mistake") == 2
    assert capfd.readouterr().err == "rank 1: x.txt: line 3 is empty. Fill it.\n"
    assert not Path("out/start-1-rank-0").exists()


def test_a_killed_rank_is_named_and_all_restart_then_a_bug_is_one_traceback(capfd):
    assert run_here("--nproc-per-node", "2", "--max-restarts", "1", "fails=twice") == 1
    killed, again, *trace = capfd.readouterr().err.splitlines()
    assert killed.startswith("rank 1 was killed (SIGKILL).") and "dmesg" in killed
    assert "(1 of 1)" in again
    assert trace[0] == "[rank 1] Traceback (most recent call last):"
    assert trace[-1] == "ZeroDivisionError: division by zero"
    assert sum("Traceback" in line for line in trace) == 1
    assert Path("out/start-1-rank-0").exists()


def test_a_rank_that_ends_without_a_message_is_named(capfd):
    assert run_here("--nproc-per-node", "2", "fails=exit") == 1
    err = capfd.readouterr().err
    assert err.startswith("rank 1 ") and "exit code 7" in err and err.count("\n") == 1


def test_only_the_cause_is_reported_when_a_rank_dies_in_a_collective(capfd):
    assert run_here("--nproc-per-node", "2", "fails=gloo") == 1
    err = capfd.readouterr().err
    assert err.startswith("rank 1 was killed (SIGKILL)") and "Traceback" not in err and "peer" not in err


def test_sigterm_reaches_every_rank_once_and_they_exit_after_saving():
    process = command("--nproc-per-node", "2", "--max-restarts", "1")
    wait_for(process, 2)
    process.terminate()
    assert end_of(process) == (143, "")
    assert [Path(f"out/saved-{rank}").read_text() for rank in (0, 1)] == ["15", "15"]
    assert not Path("out/start-1-rank-0").exists()


def test_sigterm_to_one_rank_alone_ends_all_after_saving():
    process = launcher("--nproc-per-node", "2", "--max-restarts", "1")
    os.kill(wait_for(process, 2)[1], signal.SIGTERM)
    assert end_of(process) == (143, "")
    assert [Path(f"out/saved-{rank}").read_text() for rank in (0, 1)] == ["15", "15"]
    assert not Path("out/start-1-rank-0").exists()


def test_a_rank_that_does_not_exit_is_killed_after_the_grace_period():
    # Ctrl+C on a terminal goes to the launcher's whole process group.
    process = command("--nproc-per-node", "2", "--grace-period", "3", "fails=stubborn")
    wait_for(process, 2)
    os.killpg(process.pid, signal.SIGINT)
    code, err = end_of(process)
    assert code == 130
    assert err.startswith("rank 1 ") and "--grace-period" in err and err.count("\n") == 1
    assert Path("out/saved-0").read_text() == "2"


def test_ranks_end_when_their_launcher_is_killed():
    process = launcher("--nproc-per-node", "2")
    wait_for(process, 2)
    process.send_signal(signal.SIGKILL)
    end_of(process)  # when the last rank has closed the pipe
    for rank in (0, 1):  # the kernel tells of each thread of the launcher
        assert set(Path(f"out/saved-{rank}").read_text().split()) == {"15"}


def two_nodes(*words: str) -> list[ranks.Process]:
    flags = ["--nnodes", "2", "--rdzv-endpoint", f"localhost:{free_port()}", "--local-addr", "localhost"]
    return [launcher(*flags, *words) for _ in range(2)]


def test_a_mistake_on_one_node_ends_the_other():
    nodes = two_nodes("fails=mistake")
    codes, errs = zip(*[end_of(node) for node in nodes], strict=True)
    assert codes == (2, 2)
    ended, error = sorted(err.splitlines()[-1] for err in errs)
    assert error == "rank 1: x.txt: line 3 is empty. Fill it."
    assert ended == f"ended: {error} (on {socket.gethostname()})"


def test_a_signal_to_one_node_ends_both_after_saving():
    nodes = two_nodes("--max-restarts", "1")
    for node in nodes:
        wait_for(node, 1)
    nodes[0].send_signal(signal.SIGTERM)
    codes, errs = zip(*[end_of(node) for node in nodes], strict=True)
    assert codes == (143, 143)
    assert all(re.fullmatch(r"rendezvous of 2 nodes at \S+ \.\.\.\n", err) for err in errs), errs
    assert [Path(f"out/saved-{rank}").read_text() for rank in (0, 1)] == ["15", "15"]


def test_a_rank_of_another_launcher_prints_its_error_itself(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    Path("out").mkdir()
    Path("out/start-0-rank-0").touch()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert cli.main(["run", "tiny.py", "fails=mistake"]) == 2
    finally:
        for number, handler in before.items():  # the recipe has its own, and here it is this process that it runs in
            signal.signal(number, handler)
    assert capsys.readouterr().err == "[rank 1] x.txt: line 3 is empty. Fill it.\n"
