"""`tune-style jobscript`: prints a job script for Slurm or Kubernetes, or the command for plain machines."""

import argparse
import re
import shlex
from pathlib import Path

from torchrecipes.cli import run
from torchrecipes.config.stages import read_stages
from torchrecipes.errors import UserError

KINDS = ("slurm", "torchrun", "kubernetes")
_ONLY = {"time": "slurm", "partition": "slurm", "cpus_per_node": "slurm", "image": "kubernetes", "claim": "kubernetes"}
_GRACE_PERIOD = 120  # seconds
_RESERVE = 20  # seconds of the grace period reserved for requeueing the job
_PORT = 29500
_MOUNT = "/runs"  # where a pod sees the volume


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `jobscript`."""
    parser.epilog = (
        "example: tune-style jobscript slurm --nodes 2 --gpus-per-node 8 --time 24:00:00 "
        "mlm_pretrain --config neobert/small > job.sh\n         sbatch job.sh"
    )
    parser.add_argument("kind", choices=KINDS, metavar="|".join(KINDS), help="the scheduler")
    run.add_config_arguments(parser)
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="machines")
    parser.add_argument("--gpus-per-node", type=int, required=True, metavar="N", help="GPUs, and processes, of each")
    help_grace = f"from SIGTERM to SIGKILL, for a checkpoint ({_GRACE_PERIOD})"
    parser.add_argument("--grace-period", type=int, default=_GRACE_PERIOD, metavar="SECONDS", help=help_grace)
    parser.add_argument("--name", help="the job's name (the recipe's)")
    parser.add_argument("--time", help="slurm: time limit, as in 24:00:00; the job requeues itself")
    parser.add_argument("--partition", help="slurm: the partition")
    parser.add_argument("--cpus-per-node", type=int, metavar="N", help="slurm: cores of each machine")
    parser.add_argument("--image", help="kubernetes: the container's image, with torchrecipes in it (required)")
    parser.add_argument(
        "--claim", help=f"kubernetes: the PersistentVolumeClaim for the run's folder, seen as {_MOUNT} (runs)"
    )


def main(args: argparse.Namespace) -> None:
    """Print the script, or raise a UserError about the config or the options."""
    _check(args)
    if stages := read_stages(args.config, args.overrides):
        from torchrecipes.cli.stages import load_stages

        _, _, config = load_stages(args)[args.stage or next(iter(stages))]
        output_dir = str(Path(config.output_dir).parent)
    else:
        _, config = run.load_recipe_and_config(args)
        output_dir = getattr(config, "output_dir", None)
    if args.kind != "torchrun" and getattr(getattr(config, "checkpoint", None), "resume", "auto") == "never":
        raise UserError(
            "with never, a job that returns from the queue could not resume",
            key="checkpoint.resume",
            hint="Leave it at checkpoint.resume=auto.",
            code="would_not_resume",
        )
    if args.kind == "slurm":
        print(_slurm(args))
    elif args.kind == "torchrun":
        print(_plain(args))
    else:
        print(_kubernetes(args, output_dir))


def _check(args: argparse.Namespace) -> None:
    for option in ("nodes", "gpus_per_node", "cpus_per_node"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise _wrong(option, getattr(args, option), "Give 1 or more.")
    if args.grace_period <= _RESERVE:
        raise _wrong("grace_period", args.grace_period, f"Give more than {_RESERVE} seconds.")
    for option, kind in _ONLY.items():
        if getattr(args, option) is not None and args.kind != kind:
            raise UserError(f"it is for {kind}, not for {args.kind}", key=_flag(option), hint="Leave it out.")
    if args.kind == "kubernetes" and not args.image:
        hint = "Give a container image with Python, torch and torchrecipes in it."
        raise UserError("it is missing", key="--image", hint=hint)
    stem = Path(args.recipe).stem
    args.name = args.name or re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:50].strip("-") or "run"
    # A valid pod name, which is safe everywhere else. The limit is 63 characters with the pod's number.
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,55}[a-z0-9])?", args.name):
        raise _wrong("name", args.name, "Use small letters, digits and dashes, a letter first, at most 57.")
    forms = {"time": r"[0-9]+([:-][0-9]+)*", "partition": r"[\w.,-]+", "image": r"[\w./:@-]+", "claim": r"[a-z0-9.-]+"}
    examples = {
        "time": "24:00:00 or 2-12:00:00",
        "partition": "gpu or gpu,gpu2",
        "image": "registry.example/me/torchrecipes:1",
        "claim": "runs",
    }
    for option, form in forms.items():
        if getattr(args, option) is not None and not re.fullmatch(form, getattr(args, option)):
            raise _wrong(option, getattr(args, option), f"Write it as in {examples[option]}.")


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _wrong(option: str, value: object, hint: str) -> UserError:
    return UserError(f"{value} is not valid", key=_flag(option), hint=hint, code="wrong_value")


def _recipe_words(args: argparse.Namespace) -> list[str]:
    config = [] if args.config is None else ["--config", args.config]
    stage = [] if args.stage is None else ["--stage", args.stage]
    return [args.recipe, *config, *stage, *args.overrides]


def _slurm(args: argparse.Namespace) -> str:
    options = {
        "job-name": args.name,
        "nodes": args.nodes,
        "ntasks-per-node": "1",
        "gpus-per-node": args.gpus_per_node,
        "cpus-per-task": args.cpus_per_node,
        "time": args.time,
        "partition": args.partition,
        "requeue": "",
        "signal": f"B:TERM@{args.grace_period}",
        "open-mode": "append",
        "output": "%x-%j.log",
    }
    lines = [f"#SBATCH --{key}{f'={value}' if value else ''}" for key, value in options.items() if value is not None]
    cpus = f"--cpus-per-task={args.cpus_per_node} " if args.cpus_per_node else ""
    return f"""#!/bin/bash
# One tune-style per node, which starts a process per GPU. {args.grace_period} s before the time limit, and when Slurm
# preempts the job, all processes finish their step and save a checkpoint; the job is requeued and resumes from it.
{chr(10).join(lines)}

endpoint="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 10000))"

# The other nodes need time to save after the first one has exited: no --kill-on-bad-exit, no --wait.
srun --kill-on-bad-exit=0 --wait=0 --cpu-bind=none {cpus}\\
    tune-style run --nnodes {args.nodes} --nproc-per-node {args.gpus_per_node} --rdzv-endpoint "$endpoint" \\
    --rdzv-id "$SLURM_JOB_ID" --grace-period {args.grace_period - _RESERVE} \\
    {shlex.join(_recipe_words(args))} &
step=$!

# Slurm signals this script alone (B:); srun forwards the signal to every node.
signalled=
trap 'signalled=yes; kill -TERM "$step" 2>/dev/null' TERM
wait "$step"
code=$?
if [ -n "$signalled" ]; then  # the signal ended the wait, not the step
    trap '' TERM
    wait "$step"
    code=$?
fi

# 143: saved after SIGTERM. A job that scancel ends is no longer RUNNING and is not requeued.
if [ "$code" -eq 143 ] && [ "$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID")" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code\""""


def _plain(args: argparse.Namespace) -> str:
    words = shlex.join(_recipe_words(args))
    flags = f"--nnodes {args.nodes} --nproc-per-node {args.gpus_per_node}"
    head = f"# Starts {args.gpus_per_node} processes on this machine."
    torchrun = ours = flags
    if args.nodes > 1:
        head = f"""# Starts {args.gpus_per_node} processes on each of {args.nodes} nodes. Run it on every one of them:
#
#     bash THIS_FILE NODE
#
# NODE is the name of one of them, the same on all. Its port {_PORT} must be free, and open to the others."""
        rendezvous = f'--rdzv-endpoint "${{1:?the name of the rendezvous node}}:{_PORT}" --rdzv-id {args.name}'
        ours = f"{flags} \\\n    {rendezvous}"
        torchrun = f"{flags} --rdzv-backend c10d --rdzv-endpoint NODE:{_PORT}"
    return f"""#!/bin/bash
{head}
#
# PyTorch's torchrun starts the same processes. It prints errors in its own way, and kills them 30 s after SIGTERM:
#     torchrun {torchrun} -m torchrecipes.cli.main run ...

exec tune-style run {ours} \\
    --grace-period {args.grace_period - _RESERVE} \\
    {words}"""


def _kubernetes(args: argparse.Namespace, output_dir: str | None) -> str:
    import yaml

    claim = args.claim or "runs"
    words = _recipe_words(args)
    if output_dir is not None and not Path(output_dir).is_relative_to(_MOUNT):
        words.append(f"output_dir={_MOUNT}/{Path(output_dir).name}")
    flags = ["--nnodes", str(args.nodes), "--nproc-per-node", str(args.gpus_per_node)]
    if args.nodes > 1:
        # Kubernetes numbers the pods; a pod does not always know the name by which the others reach it.
        flags += ["--node-rank", "$(JOB_COMPLETION_INDEX)"]
        flags += ["--master-addr", f"{args.name}-0.{args.name}", "--master-port", str(_PORT)]
    flags += ["--grace-period", str(args.grace_period - _RESERVE)]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": args.name},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"job-name": args.name},
            "ports": [{"name": "rendezvous", "port": _PORT}],
        },
    }
    container = {
        "name": "tune-style",
        "image": args.image,
        # $$ is a $ to Kubernetes, which would replace $(NAME).
        "command": ["tune-style", "run", *flags, *(word.replace("$", "$$") for word in words)],
        "resources": {"limits": {"nvidia.com/gpu": args.gpus_per_node}},
        "volumeMounts": [{"name": "runs", "mountPath": _MOUNT}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    rules = [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [143]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
    ]
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": args.name},
        "spec": {
            "completionMode": "Indexed",
            "completions": args.nodes,
            "parallelism": args.nodes,
            "backoffLimit": 3 * args.nodes,
            "podFailurePolicy": {"rules": rules},
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "subdomain": args.name,
                    "terminationGracePeriodSeconds": args.grace_period,
                    "shareProcessNamespace": True,
                    "containers": [container],
                    "volumes": [
                        {"name": "runs", "persistentVolumeClaim": {"claimName": claim}},
                        {"name": "shm", "emptyDir": {"medium": "Memory"}},
                    ],
                }
            },
        },
    }
    manifest = yaml.safe_dump_all([service, job], sort_keys=False, width=120, default_flow_style=False)
    return f"""# kubectl apply -f THIS_FILE
#
# The image {args.image}
# holds torchrecipes and the files that the command names. All {args.nodes} pods can write to the PersistentVolumeClaim
# '{claim}' (ReadWriteMany), where the run's folder is.
#
# Evicted pods save a checkpoint within {args.grace_period} s and are restarted, which does not count as a failure (exit
# code 143, DisruptionTarget); a user's mistake (2) ends the job; other failures are retried up to backoffLimit.
# /dev/shm is for NCCL and for data.num_workers. Without shareProcessNamespace the program would be process 1, which
# SIGTERM does not end while the pods wait for each other.
{manifest.rstrip()}"""
