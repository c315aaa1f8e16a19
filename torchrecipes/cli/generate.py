"""`tune-style generate`: continues prompts with a trained causal model."""

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from torchrecipes.cli.openmp import wait_without_spinning
from torchrecipes.cli.trained_model import add_model_arguments, load_causal
from torchrecipes.errors import UserError

LINE = "-" * 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `generate`."""
    parser.epilog = (
        'example: tune-style generate runs/gpt2 --prompt "The sea was" --max-new-tokens 50\n'
        "         tune-style generate runs/gpt2 --prompts-file prompts.txt --temperature 0 --output texts.jsonl"
    )
    add_model_arguments(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help='may be repeated; "" is allowed')
    parser.add_argument(
        "--prompts-file", metavar="FILE", help='a prompt per line, or .jsonl: an object with "prompt" per line'
    )
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="per prompt (default 100)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens (default: all)")
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the most likely tokens with total probability P (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts per batch (default 16)")
    parser.add_argument("--output", metavar="FILE.jsonl", help="a new file with one object per prompt")


class Prompt(NamedTuple):
    """A text to continue, and its place: `file:line`, or the option."""

    text: str
    place: str


def main(args: argparse.Namespace) -> None:
    """Print every prompt with its continuation: a single one token by token, several batch by batch."""
    _check_options(args)
    prompts = [Prompt(text, _option(text)) for text in args.prompt]
    if args.prompts_file:
        prompts += _read_prompts(Path(args.prompts_file))
    if not prompts:
        hint = 'Give --prompt "TEXT", or --prompts-file FILE.'
        raise UserError("there is no prompt", hint=hint, code="no_prompt")
    with _new_file(args.output) if args.output else nullcontext() as output:
        _continue(args, prompts, output)


def _continue(args: argparse.Namespace, prompts: list[Prompt], output: TextIO | None) -> None:
    wait_without_spinning()
    folder, model, tokenizer, autocast = load_causal(args, "generate")

    from torchrecipes.evaluation.generation import check_prompts, generate_text

    prompt_ids = [tokenizer.encode_prompt(prompt.text) for prompt in prompts]
    check_prompts(model, prompt_ids, [prompt.place for prompt in prompts])
    _report_unknown(tokenizer, prompts, prompt_ids)
    device = next(model.parameters()).device
    print(f"{folder}, {device}", file=sys.stderr, flush=True)
    tokens, seconds = 0, 0.0
    prompt_counts = Counter()  # over all batches: a prompt that is given twice is continued in two ways
    printed = ""  # of a single prompt, which is printed token by token

    def print_token(piece: str) -> None:
        nonlocal printed
        more = piece if printed else prompts[0].text + piece
        print(more, end="", flush=True)
        printed += more

    for first in range(0, len(prompts), args.batch_size):
        begin = time.perf_counter()
        completions = generate_text(
            model,
            tokenizer,
            [prompt.text for prompt in prompts[first : first + args.batch_size]],
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            prompt_counts=prompt_counts,
            autocast=autocast,
            on_token=print_token if len(prompts) == 1 else None,
        )
        seconds += time.perf_counter() - begin
        tokens += sum(completion.num_tokens for completion in completions)
        if output:  # now, so that a later failure cannot lose it
            output.writelines(json.dumps(asdict(completion), ensure_ascii=False) + "\n" for completion in completions)
            output.flush()
        for number, completion in enumerate(completions, start=first):
            if number:
                print(LINE)
            print((completion.prompt + completion.text)[len(printed) :], flush=True)
    print(f"{tokens:,} new tokens in {seconds:.1f} s, {tokens / seconds:,.0f} per second", file=sys.stderr)


def _check_options(args: argparse.Namespace) -> None:
    for option in ("--max-new-tokens", "--batch-size", "--top-k"):
        value = getattr(args, option[2:].replace("-", "_"))
        if value is not None and value < 1:
            raise UserError(f"{value} is out of range", key=option, hint="Give 1 or more.", code="out_of_range")
    if not 0 <= args.temperature < math.inf:
        hint = "Give 0 (greedy) or more."
        raise UserError(f"{args.temperature} is out of range", key="--temperature", hint=hint, code="out_of_range")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        hint = "Give a number above 0 and at most 1, as in --top-p 0.9."
        raise UserError(f"{args.top_p} is out of range", key="--top-p", hint=hint, code="out_of_range")


def _option(text: str) -> str:
    shown = text if len(text) <= 30 else text[:30] + "..."
    return f"--prompt {json.dumps(shown, ensure_ascii=False)}"


@contextmanager
def _new_file(name: str) -> Iterator[TextIO]:
    """Create a file, and delete it if nothing was written: the next attempt would refuse to overwrite it."""
    path = Path(name)
    if path.is_dir():
        hint = f"Name a file in it: --output {path / 'texts.jsonl'}"
        raise UserError(f"{name} is a folder", key="--output", hint=hint, code="is_a_folder")
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        or_delete = ", or delete it first" if path.suffix == ".jsonl" else ""  # else it may be something precious
        hint = f"It is not overwritten: give another name{or_delete}."
        raise UserError(f"{name} exists", key="--output", hint=hint, code="file_exists") from None
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} does not exist", key="--output", hint="Create the folder.", code="not_found"
        ) from None
    except OSError as error:
        problem = f"cannot write {name}: {error.strerror}"
        raise UserError(problem, key="--output", hint="Give another name.", code="not_writable") from None
    try:
        with file:
            yield file
    finally:
        if path.exists() and not path.stat().st_size:
            path.unlink()


def _report_unknown(tokenizer: Any, prompts: list[Prompt], prompt_ids: list[list[int]]) -> None:
    counts = [ids.count(tokenizer.unknown_id) for ids in prompt_ids]
    places = [prompt.place for prompt, count in zip(prompts, counts, strict=True) if count]
    if places:
        unknown = tokenizer.decode_token(tokenizer.unknown_id)
        print(
            f"{sum(counts):,} {unknown} in {len(places):,} of {len(prompts):,} prompts, for text that the tokenizer "
            f"cannot encode; the first is {places[0]}",
            file=sys.stderr,
        )


def _read_prompts(file: Path) -> list[Prompt]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise _bad_prompts(f"cannot read {file}: {error.strerror}", "Give a file of prompts.") from None
    except UnicodeDecodeError:
        raise _bad_prompts(f"{file} is not UTF-8", "Save it as UTF-8.") from None
    as_json = file.suffix in (".jsonl", ".ndjson", ".json")
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{file}:{number}"
            prompts.append(Prompt(_prompt_of_json(line, place) if as_json else line, place))
    if not prompts:
        raise _bad_prompts(f"{file} has no prompt", "Write one per line.")
    return prompts


def _prompt_of_json(line: str, place: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, LookupError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise _bad_prompts(f'{place} is not an object with a text under "prompt"', "Correct the line.")
    return prompt


def _bad_prompts(problem: str, hint: str) -> UserError:
    return UserError(problem, key="--prompts-file", hint=hint, code="bad_prompts")
