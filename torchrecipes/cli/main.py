"""`tune-style`: imports the module of one verb, runs it, and prints a user's mistake as one message.

A verb is a module with two functions, and a row in `VERBS`, or in `GROUPS` (`tune-style data stats`):

    add_arguments(parser)   declares its arguments; `parser.epilog` holds an example
    main(args)              does the work; imports torch inside, if it needs it

Every verb gets `--debug`. Exit codes: 0 done, 1 a bug (with its traceback), 2 a user's mistake, 130 interrupted.
"""

import argparse
import importlib
import os
import select
import sys
import traceback
from collections.abc import Iterable, Sequence

from torchrecipes import __version__
from torchrecipes.errors import UserError, format_user_error

VERBS = {
    "ls": ("torchrecipes.cli.ls", "list the recipes and their configs"),
    "cat": ("torchrecipes.cli.cat", "print a recipe or a config"),
    "cp": ("torchrecipes.cli.cp", "copy a recipe or a config, to change it"),
    "validate": ("torchrecipes.cli.validate", "check a config against a recipe without running it"),
    "estimate": ("torchrecipes.cli.estimate", "estimate the memory, time and disk of a run"),
    "preflight": ("torchrecipes.cli.preflight", "run pre-launch checks, in minutes"),
    "run": ("torchrecipes.cli.run", "run a recipe, a shipped one or your own"),
    "jobscript": ("torchrecipes.cli.jobscript", "print a job script for Slurm, Kubernetes or plain machines"),
    "generate": ("torchrecipes.cli.generate", "generate text with a trained causal model"),
    "perplexity": ("torchrecipes.cli.perplexity", "measure a trained causal model's perplexity on text"),
    "embed": ("torchrecipes.cli.embed", "turn texts into embeddings with a trained encoder"),
    "predict": ("torchrecipes.cli.predict", "classify texts with a trained classifier"),
    "fill-mask": ("torchrecipes.cli.fill_mask", "predict masked tokens with a trained encoder"),
    "plot": ("torchrecipes.cli.plot", "plot the loss of one or more runs"),
    "compare": ("torchrecipes.cli.compare", "compare adapted models: what each gained and forgot"),
}

# A group's summary, and its verbs.
GROUPS = {
    "data": (
        "prepare, check and measure text",
        {
            "import": ("torchrecipes.cli.data_import", "turn Markdown, RST, HTML and source code into documents"),
            "clean": ("torchrecipes.cli.data_clean", "normalize, filter and remove duplicates of text"),
            "decontaminate": ("torchrecipes.cli.data_decontaminate", "remove from text what occurs in evaluation sets"),
            "tokenize": ("torchrecipes.cli.data_tokenize", "turn text into a corpus, ahead of a run"),
            "pairs": ("torchrecipes.cli.data_pairs", "turn pairs and labeled texts into a corpus, ahead of a run"),
            "mine-negatives": (
                "torchrecipes.cli.data_mine_negatives",
                "add hard negatives to pairs, found by an encoder",
            ),
            "append": ("torchrecipes.cli.data_append", "add text to a corpus"),
            "cache": ("torchrecipes.cli.data_cache", "list or remove what streams have tokenized"),
            "score": ("torchrecipes.cli.data_score", "find bad data: the loss of every document under a model"),
            "stats": ("torchrecipes.cli.data_stats", "describe a corpus: lengths of documents, fill of rows"),
            "split-report": (
                "torchrecipes.cli.data_split_report",
                "show how domain names are divided into training and validation",
            ),
            "verify": ("torchrecipes.cli.data_verify", "check every byte of a corpus against its checksums"),
        },
    ),
    "tokenizer": (
        "train, inspect and extend tokenizers",
        {
            "train": ("torchrecipes.cli.tokenizer_train", "train a tokenizer on text"),
            "inspect": ("torchrecipes.cli.tokenizer_inspect", "describe a tokenizer, and measure it on text"),
            "extend": ("torchrecipes.cli.tokenizer_extend", "add tokens to a model's tokenizer and to the model"),
        },
    ),
}


def all_verbs() -> dict[str, tuple[str, str]]:
    """Return every verb, those of groups as `data stats`, with its module and its summary."""
    grouped = {f"{group} {verb}": row for group, (_, verbs) in GROUPS.items() for verb, row in verbs.items()}
    return VERBS | grouped


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return its exit code; a bug raises its exception."""
    try:
        return _main(argv)
    except KeyboardInterrupt:
        return 130


def _main(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(f"torchrecipes {__version__}")
        return 0
    verb, *rest = words
    if verb in GROUPS:
        _, verbs = GROUPS[verb]
        if not rest or rest[0] in ("-h", "--help", "help"):
            print(_group_overview(verb))
            return 0
        group, (name, *rest) = verb, rest
        if name not in verbs:
            return _no_command(f"tune-style {group}", name, verbs)
        verb, (module_name, summary) = f"{group} {name}", verbs[name]
    elif verb in VERBS:
        module_name, summary = VERBS[verb]
    else:
        return _no_command("tune-style", verb, [*all_verbs(), *GROUPS])
    module = importlib.import_module(module_name)
    parser = argparse.ArgumentParser(
        prog=f"tune-style {verb}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    # Intermixed: `--config` may stand before, between or after the overrides.
    args, unknown = parser.parse_known_intermixed_args(rest)
    if unknown:
        setting = unknown[0].lstrip("-")
        hint = f"; a recipe's settings have no dashes: {setting}" if "=" in setting else ""
        parser.error(f"unknown option {unknown[0]}{hint}")
    try:
        module.main(args)
        sys.stdout.flush()
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            return 1
        message = format_user_error(_in_options(error, args))
        if _is_one_of_many():
            from torchrecipes.error_file import report_error

            return report_error(error, message, debug=args.debug)
        if message is None:
            raise
        if args.debug:
            traceback.print_exc()
        else:
            print(message, file=sys.stderr)
        return 2
    return 0


def _no_command(command: str, verb: str, verbs: Iterable[str]) -> int:
    from torchrecipes.config.suggest import did_you_mean

    print(f"{command} has no command '{verb}'. {did_you_mean(verb, verbs, 'The commands are')}", file=sys.stderr)
    return 2


def _in_options(error: Exception, args: argparse.Namespace) -> Exception:
    # A source names its arguments, which a config sets with `=` and some verbs with options.
    if not isinstance(error, UserError) or not error.hint:
        return error
    hint = error.hint
    if hasattr(args, "on_bad_record") and getattr(args, "config", None):  # whose source takes no options
        hint = hint.replace("on_bad_record=skip", "data.source.on_bad_record=skip")
        return UserError(error.problem, key=error.key, hint=hint, code=error.code, problems=error.problems)
    if hasattr(args, "on_bad_record"):
        hint = hint.replace("on_bad_record=skip", "--on-bad-record skip")
    elif hasattr(args, "set"):
        hint = hint.replace("on_bad_record=skip", "--set on_bad_record=skip").replace(
            " with query", " with --set query"
        )
    elif hasattr(args, "text_column"):  # a verb with a row in the output for each in the input
        hint = hint.replace(", or count and skip such records with on_bad_record=skip", "")
        hint = hint.replace("data, name", "data, or name").replace("the columns of the data", "the column of the text")
    if hasattr(args, "text_column"):
        hint = hint.replace("text_column", "--text-column")
    return UserError(error.problem, key=error.key, hint=hint, code=error.code, problems=error.problems)


def _is_one_of_many() -> bool:
    # A rank of our own launcher or torchrun, which read its error from a file, or of srun and the like.
    ranked = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    return ranked or bool(os.environ.get("TORCHELASTIC_ERROR_FILE"))


def _stdout_is_closed() -> bool:
    # The reader of our output (`| head`) has gone. The broken pipe of a worker, in contrast, is a bug to be shown.
    stdout = 1
    poll = select.poll()
    poll.register(stdout, select.POLLOUT)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:  # so that the interpreter does not complain when it flushes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return closed


def _overview() -> str:
    groups = {f"{group} VERB": ("", f"{summary}: {', '.join(verbs)}") for group, (summary, verbs) in GROUPS.items()}
    return f"""usage: tune-style COMMAND ...

{_table(VERBS | groups)}

For the options of a command: tune-style COMMAND --help. To begin:

  tune-style ls
  tune-style run mlm_pretrain --config neobert/quickstart output_dir=runs/first"""


def _group_overview(group: str) -> str:
    summary, verbs = GROUPS[group]
    return f"""usage: tune-style {group} VERB ...

{summary[0].upper()}{summary[1:]}.

{_table(verbs)}

For the options of a verb: tune-style {group} VERB --help."""


def _table(verbs: dict[str, tuple[str, str]]) -> str:
    width = max(map(len, verbs), default=0)
    return "\n".join(f"  {verb:<{width}}  {summary}" for verb, (_, summary) in verbs.items())


def _as_process() -> None:
    try:
        code = main()
    except SystemExit as end:
        if not _is_one_of_many():
            raise
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    if _is_one_of_many():
        from torchrecipes.error_file import hard_exit

        hard_exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _as_process()
