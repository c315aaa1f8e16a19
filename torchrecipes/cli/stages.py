"""The stages of a config: `run` trains them in order, each from another's result, and compares them at the end.

A stage that has finished is skipped, one that was interrupted resumes. One that ended with exit code 4, by its own
decision, is run again only to see whether new settings let it continue; stages that start from it take what it left.
"""

import argparse
import contextlib
import copy
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from torchrecipes.cli import run
from torchrecipes.config.catalog import find_config, find_recipe
from torchrecipes.config.stages import Stage, read_stages
from torchrecipes.config.suggest import did_you_mean
from torchrecipes.errors import UserError

STATUS = "stage.json"  # in a stage's folder: how it ended
ENDED_BY_ITSELF = 4  # exit code of a run that its recipe has ended early, as in torchrecipes.distributed.launch


def run_stages(args: argparse.Namespace) -> None:
    """Run every stage that is not done, here or in as many processes as the flags say, and print their comparison.

    With `args.stage` run that one alone.

    Raises:
        UserError: of a stage; all of them are checked before the first one runs.
        SystemExit: with the exit code of a stage that was interrupted, or 4 if one has ended itself.
    """
    stages = _read(args)
    if args.stage is not None:
        if run_stage(args, stages[args.stage]) == "ended":
            raise SystemExit(ENDED_BY_ITSELF)
        return
    load_stages(args)
    # Before any of them runs: other ranks and nodes may be a moment ahead.
    statuses = {name: read_status(stage) for name, stage in stages.items()}
    for number, (name, stage) in enumerate(stages.items(), 1):
        title = f"stage {name} ({number} of {len(stages)})"
        try:
            if stage.start:
                result_of(stages[stage.start], stage.start_checkpoint)
        except UserError as error:
            _print(f"{title}: skipped: {error}")
            continue
        if statuses[name] == "finished" and _is_unchanged(args, stage):
            _print(f"{title}: finished before, in {stage.output_dir}")
            continue
        _print(f"{title}: {stage.output_dir}")
        one = copy.copy(args)
        one.stage = name
        statuses[name] = run_stage(one, stage)
    _compare(stages)
    if "ended" in statuses.values():
        raise SystemExit(ENDED_BY_ITSELF)


def _print(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def run_stage(args: argparse.Namespace, stage: Stage) -> str:
    """Run the stage that `args.stage` names, and note how it ended: `finished`, or `ended` by itself."""
    try:
        run.run_once(args)
        status = "finished"
    except SystemExit as end:
        if end.code != ENDED_BY_ITSELF:
            raise
        status = "ended"
    from torchrecipes.atomic_write import write_atomically
    from torchrecipes.distributed.collectives import run_on_rank0_and_broadcast

    content = json.dumps({"status": status}).encode() + b"\n"
    # No rank looks for it before it is there.
    run_on_rank0_and_broadcast(lambda: write_atomically(Path(stage.output_dir) / STATUS, [content]))
    return status


def read_status(stage: Stage) -> str | None:
    """Return how a stage ended: `finished`, `ended` by itself, or None: it has not run to its end."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((Path(stage.output_dir) / STATUS).read_bytes())["status"]
    return None


def load_stages(args: argparse.Namespace) -> dict[str, tuple[Stage, ModuleType, Any]]:
    """Check all stages, and return each with its recipe and its config.

    A stage whose start is not there yet is checked with the model that the start itself begins with; one whose start
    has problems, for problems of its own.

    Raises:
        UserError: lists the problems of every stage, each once; or `args.stage` names none (code `unknown_stage`).
    """
    stages, loaded, problems, broken, reported = _read(args), {}, [], set(), set()
    for name, stage in stages.items():
        before = loaded.get(stage.start)
        try:
            loaded[name] = (stage, *_load(args, stage, stages, before[2] if before else None, stage.start in broken))
        except UserError as error:
            broken.add(name)
            of_stage = {str(problem) for problem in error.problems or (error,)}
            if not of_stage <= reported:
                problems.append(UserError(f"stage {name}: {error}", code=error.code, problems=error.problems))
            reported |= of_stage
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise UserError("\n".join(map(str, problems)), code="invalid_config", problems=problems)
    return loaded


def load_stage(args: argparse.Namespace) -> tuple[ModuleType, Any]:
    """Return the recipe and the checked config of the stage that `args.stage` names.

    Raises:
        UserError: there is no such stage (code `unknown_stage`), the one that it starts from has left nothing
            (`result_of`), or the config is invalid.
    """
    stages = _read(args)
    return _load(args, stages[args.stage], stages, None)


def _read(args: argparse.Namespace) -> dict[str, Stage]:
    stages = read_stages(args.config, args.overrides)
    if args.stage is not None and args.stage not in stages:
        hint = did_you_mean(args.stage, stages, "The stages are") if stages else "Leave --stage out"
        raise UserError(f"the config has no stage '{args.stage}'", key="--stage", hint=hint, code="unknown_stage")
    return stages


def _load(
    args: argparse.Namespace, stage: Stage, stages: dict[str, Stage], stand_in: Any, start_is_broken: bool = False
) -> tuple[ModuleType, Any]:
    # `stand_in` is the config of the start, where that has not run; one that is broken has no model to check against.
    from torchrecipes.config.loading import load, report_once
    from torchrecipes.error_file import has_error_file

    with contextlib.nullcontext() if has_error_file() else report_once():
        path = find_recipe(stage.recipe or args.recipe)
        find_config(stage.config or args.config)
        recipe = run.load_recipe(path)
        options = {"recipe": path, "stage": stage, "check": lambda config: run.check(recipe, config)}
        if stage.start:
            try:
                options["init_from"] = str(result_of(stages[stage.start], stage.start_checkpoint))
            except UserError:
                if stand_in is None and not start_is_broken:
                    raise
                # The network is that of its ancestors, whose own start may be there.
                options["init_from"] = (stand_in and stand_in.init_from) or stages[stage.start].output_dir
                if start_is_broken or not Path(options["init_from"]).exists():
                    del options["check"]
        config = stage.config or args.config
        return recipe, load(recipe.Config, config, [] if stage.config else args.overrides, **options)


def result_of(stage: Stage, which: str | None) -> Path:
    """Return the checkpoint of a stage that another one starts from.

    Args:
        stage: it has ended.
        which: `best`, `last`, or None: the best one where the stage keeps one, else the last.

    Raises:
        UserError: it has not ended (code `stage_not_done`), or has none (`no_best_checkpoint`, or as
            `resolve_model_folder`).
    """
    from torchrecipes.checkpoint.best import best_checkpoint
    from torchrecipes.model_folder import resolve_model_folder

    folder = Path(stage.output_dir)
    if read_status(stage) is None:
        hint = f"Run that one first: --stage {stage.name}"
        raise UserError(
            f"the stage {stage.name} has not ended, in {folder}", key="from", hint=hint, code="stage_not_done"
        )
    best = best_checkpoint(folder / "checkpoints")
    if best and which != "last":
        return folder / "checkpoints" / best["checkpoint"]
    if which == "best" or (which is None and _keeps_best(folder)):
        raise UserError(
            f"the stage {stage.name} has no best checkpoint: none was within the limits of checkpoint.keep_best",
            hint="Take its last one with from_checkpoint: last, or raise the limits",
            code="no_best_checkpoint",
        )
    return resolve_model_folder(folder)


def _keeps_best(folder: Path) -> bool:
    import yaml

    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return bool((config.get("checkpoint") or {}).get("keep_best"))


def _is_unchanged(args: argparse.Namespace, stage: Stage) -> bool:
    """Whether a finished stage has the settings of now; with others, the run itself says which they are."""
    import yaml

    from torchrecipes.config import changed_keys, to_yaml

    one = copy.copy(args)
    one.stage = stage.name
    recipe, config = load_stage(one)
    saved = (Path(stage.output_dir) / "config.yaml").read_text(encoding="utf-8")
    return not changed_keys(yaml.safe_load(saved), yaml.safe_load(to_yaml(config)), recipe.Config)


def _compare(stages: dict[str, Stage]) -> None:
    """Print the comparison of runs on a domain, or, of other recipes, the best value of every stage that keeps one."""
    from torchrecipes.checkpoint.best import best_checkpoint
    from torchrecipes.cli.compare import compare_runs

    if os.environ.get("RANK", "0") == "0":
        folder = Path(next(iter(stages.values())).output_dir).parent
        try:
            compare_runs([folder], folder)
        except UserError as error:  # stages of another kind
            found = {name: best_checkpoint(Path(stage.output_dir) / "checkpoints") for name, stage in stages.items()}
            lines = [f"{name}: {x['metric']} {x['value']:.4g} ({x['checkpoint']})" for name, x in found.items() if x]
            print("\n".join(lines) or f"no comparison: {error.problem}", flush=True)
