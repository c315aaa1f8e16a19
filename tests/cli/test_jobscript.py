"""Job scripts: shell and YAML parse, the command arrives unchanged, and signals do what the script says."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from torchrecipes.cli.main import main

RECIPE = '''
"""A recipe that writes its config to a file."""
import os
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Checkpoint:
    resume: str = "auto"


@dataclass
class Config:
    output_dir: str = "out"
    note: str = ""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)


def main(config: Config) -> None:
    Path(config.output_dir).mkdir(exist_ok=True)
    (Path(config.output_dir) / os.environ["RANK"]).write_text(config.note)
'''
ODD = """it's $HOME `id` "x" \\ ; $(touch pwned) * #"""  # as a person may write it
OVERRIDE = 'note="' + ODD.replace("\\", "\\\\").replace('"', '\\"') + '"'  # as YAML writes it


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(RECIPE)
    # `tune-style` of the scripts is this one.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def script(capsys, *words: str) -> str:
    assert main(["jobscript", *words]) == 0
    out = capsys.readouterr().out
    if words[0] != "kubernetes":
        checked = subprocess.run(["bash", "-n"], input=out, text=True, capture_output=True)
        assert (checked.returncode, checked.stderr) == (0, "")
        assert "\n\n\n" not in out
    return out


def test_options_of_slurm(capsys):
    options = "--nodes 3 --gpus-per-node 4 --time 1-12:00:00 --partition gpu,big --cpus-per-node 32".split()
    text = script(capsys, "slurm", *options, "tiny.py")
    sbatch = dict(line[10:].partition("=")[::2] for line in text.splitlines() if line.startswith("#SBATCH --"))
    assert sbatch == {
        "job-name": "tiny",
        "nodes": "3",
        "ntasks-per-node": "1",
        "gpus-per-node": "4",
        "cpus-per-task": "32",
        "time": "1-12:00:00",
        "partition": "gpu,big",
        "requeue": "",
        "signal": "B:TERM@120",
        "open-mode": "append",
        "output": "%x-%j.log",
    }
    command = text.replace("\\\n", " ")
    assert "tune-style run --nnodes 3 --nproc-per-node 4 --rdzv-endpoint" in command
    assert "--time" not in script(capsys, "slurm", "--nodes", "1", "--gpus-per-node", "1", "tiny.py")


STUBS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@" >> scontrol.log; fi',
    "squeue": "cat state",
    # As srun does: forwards SIGTERM to the command, and exits with its code.
    "srun": 'while [[ "$1" == --* ]]; do shift; done; "$@" & job=$!; trap "kill -TERM $job" TERM; wait $job; wait $job',
    "tune-style": 'exec python tune_style.py "$@"',
}


@pytest.mark.parametrize(
    ("state", "code", "log"), [("RUNNING", 143, "requeue 4321\n"), ("COMPLETING", 143, ""), ("RUNNING", 0, "")]
)
def test_a_slurm_job_forwards_the_signal_waits_for_the_save_and_is_requeued(
    state, code, log, capsys, folder, monkeypatch
):
    text = script(capsys, "slurm", "--nodes", "2", "--gpus-per-node", "1", "tiny.py", OVERRIDE)
    for name, body in STUBS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "tune_style.py").write_text(
        "import json, signal, sys, time\n"
        "from pathlib import Path\n"
        "Path('words.json').write_text(json.dumps(sys.argv[1:]))\n"
        "signal.signal(signal.SIGTERM, lambda *_: stop.append(1))\n"
        "stop = []\n"
        "print('there', flush=True)\n"
        f"while not stop and {code}: time.sleep(0.01)\n"
        "time.sleep(0.2)\n"  # as if saving
        "Path('saved').touch()\n"
        f"sys.exit({code})\n"
    )
    (folder / "state").write_text(state)
    (folder / "job.sh").write_text(text)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[7-8]")
    monkeypatch.setenv("SLURM_JOB_ID", "4321")
    job = subprocess.Popen(["bash", "job.sh"], stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "there\n"
    if code:
        job.terminate()
    assert job.wait() == code
    job.stdout.close()
    assert (folder / "saved").exists()
    assert ((folder / "scontrol.log").read_text() if (folder / "scontrol.log").exists() else "") == log
    words = yaml.safe_load((folder / "words.json").read_text())
    assert words[words.index("--rdzv-endpoint") + 1] == "node7:24321"
    assert words[words.index("--rdzv-id") + 1] == "4321"
    assert words[-2:] == ["tiny.py", OVERRIDE]


def test_the_script_for_one_machine_runs(capsys, folder):
    text = script(capsys, "torchrun", "--nodes", "1", "--gpus-per-node", "2", "tiny.py", OVERRIDE)
    (folder / "job.sh").write_text(text)
    done = subprocess.run(["bash", "job.sh"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name: path.read_text() for path in Path("out").iterdir()} == {"0": ODD, "1": ODD}
    assert not Path("pwned").exists()


def test_the_script_for_several_machines_asks_for_the_rendezvous_node(capsys, folder):
    (folder / "my own.yaml").write_text("note: x\n")
    text = script(capsys, "torchrun", "--nodes", "2", "--gpus-per-node", "8", "tiny.py", "--config", "my own.yaml")
    assert '--rdzv-endpoint "${1:?the name of the rendezvous node}:29500"' in text
    assert shlex.split(text.replace("\\\n", " ").splitlines()[-1])[-3:] == ["tiny.py", "--config", "my own.yaml"]
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True)
    assert done.returncode and "the name of the rendezvous node" in done.stderr


def test_kubernetes_is_a_service_and_an_indexed_job(capsys):
    words = "kubernetes --nodes 2 --gpus-per-node 8 --image me/recipes:1 --claim disk --name bert tiny.py".split()
    text = script(capsys, *words, "output_dir=runs/first", OVERRIDE)
    service, job = yaml.safe_load_all(text)
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    actions = {
        str(rule.get("onExitCodes", {}).get("values") or rule["onPodConditions"][0]["type"]): rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
    }
    assert actions == {"[2]": "FailJob", "[143]": "Ignore", "DisruptionTarget": "Ignore"}
    pod = spec["template"]["spec"]
    assert (pod["restartPolicy"], pod["subdomain"]) == ("Never", service["metadata"]["name"])  # as the policy asks
    assert (pod["terminationGracePeriodSeconds"], pod["shareProcessNamespace"]) == (120, True)
    container = pod["containers"][0]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}} and container["image"] == "me/recipes:1"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    assert mounts == {"runs": "/runs", "shm": "/dev/shm"}
    assert volumes["runs"] == {"persistentVolumeClaim": {"claimName": "disk"}}
    assert volumes["shm"] == {"emptyDir": {"medium": "Memory"}}
    command = container["command"]
    assert command[command.index("--master-addr") + 1] == "bert-0.bert"
    assert command[command.index("--node-rank") + 1] == "$(JOB_COMPLETION_INDEX)"
    assert command[-1] == "output_dir=/runs/first"
    assert command[-2].replace("$$", "$") == OVERRIDE and "$(touch" not in command[-2].replace("$$", "")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("slurm --nodes 0 --gpus-per-node 1 tiny.py", "--nodes"),
        ("slurm --nodes 1 --gpus-per-node 1 --image x tiny.py", "--image"),
        ("torchrun --nodes 1 --gpus-per-node 1 --time 1:00 tiny.py", "--time"),
        ("slurm --nodes 1 --gpus-per-node 1 --time tomorrow tiny.py", "--time"),
        ("slurm --nodes 1 --gpus-per-node 1 --grace-period 20 tiny.py", "--grace-period"),
        ("kubernetes --nodes 1 --gpus-per-node 1 tiny.py", "--image"),
        ("kubernetes --nodes 1 --gpus-per-node 1 --image x --name My_Job tiny.py", "--name"),
        ("slurm --nodes 1 --gpus-per-node 1 tiny.py checkpoint.resume=never", "checkpoint.resume"),
    ],
)
def test_mistakes_name_the_option_and_print_no_script(words, key, capsys):
    assert main(["jobscript", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"{key}: ") and out == ""


def test_the_config_is_checked_before_a_script_is_printed(capsys):
    assert main("jobscript slurm --nodes 1 --gpus-per-node 1 tiny.py nte=x".split()) == 2
    out, err = capsys.readouterr()
    assert "'note'" in err and out == ""
