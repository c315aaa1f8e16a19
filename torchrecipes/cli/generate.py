"""`tune-style generate`: how a trained causal model continues a text."""

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

from torchrecipes.cli.trained_model import add_model_arguments, load_causal, wait_without_spinning
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
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest token always (default 0.8)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="choose from the K likeliest tokens (default: all)")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="choose from the likeliest tokens that come to P (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (default 0)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts at a time (default 16)")
    parser.add_argument("--output", metavar="FILE.jsonl", help="a new file: an object per prompt")


class Prompt(NamedTuple):
    """A text to continue, and where it stands: `file:line`, or the option."""

    text: str
    place: str


def main(args: argparse.Namespace) -> None:
    """Print every prompt with its continuation: one alone as it grows, several batch after batch."""
    _check_options(args)
    prompts = [Prompt(text, _option(text)) for text in args.prompt]
    if args.prompts_file:
        prompts += _read_prompts(Path(args.prompts_file))
    if not prompts:
        raise UserError('there is no prompt. Give --prompt "TEXT", or --prompts-file FILE.')
    with _new_file(args.output) if args.output else nullcontext() as output:
        _continue(args, prompts, output)


def _continue(args: argparse.Namespace, prompts: list[Prompt], output: TextIO | None) -> None:
    wait_without_spinning()
    folder, model, tokenizer, autocast = load_causal(args, "generate")

    from torchrecipes.evaluation.generation import check_prompts, generate_text

    prompt_ids = [tokenizer.encode_prompt(prompt.text) for prompt in prompts]
    check_prompts(model, prompt_ids, [prompt.place for prompt in prompts])
    _tell_unknown(tokenizer, prompts, prompt_ids)
    device = next(model.parameters()).device
    print(f"{folder}, {device}", file=sys.stderr, flush=True)
    tokens, seconds = 0, 0.0
    seen = Counter()  # of all batches: a prompt that is given again goes on in another way
    said = ""  # a prompt that is alone is printed as it grows

    def say(piece: str) -> None:
        nonlocal said
        more = piece if said else prompts[0].text + piece
        print(more, end="", flush=True)
        said += more

    for first in range(0, len(prompts), args.batch_size):
        begin = time.perf_counter()
        found = generate_text(
            model,
            tokenizer,
            [prompt.text for prompt in prompts[first : first + args.batch_size]],
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            prompt_counts=seen,
            autocast=autocast,
            on_token=say if len(prompts) == 1 else None,
        )
        seconds += time.perf_counter() - begin
        tokens += sum(continuation.num_tokens for continuation in found)
        if output:  # at once, so that what comes later cannot undo it
            output.writelines(json.dumps(asdict(continuation), ensure_ascii=False) + "\n" for continuation in found)
            output.flush()
        for number, continuation in enumerate(found, start=first):
            if number:
                print(LINE)
            print((continuation.prompt + continuation.text)[len(said) :], flush=True)
    print(f"{tokens:,} new tokens in {seconds:.1f} s, {tokens / seconds:,.0f} per second", file=sys.stderr)


def _check_options(args: argparse.Namespace) -> None:
    for option in ("--max-new-tokens", "--batch-size", "--top-k"):
        value = getattr(args, option[2:].replace("-", "_"))
        if value is not None and value < 1:
            raise UserError(f"{option} is {value}; it is 1 or more. Without it the default holds.")
    if not 0 <= args.temperature < math.inf:
        raise UserError(f"--temperature is {args.temperature}; it is 0 (the likeliest token always) or more.")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top-p is {args.top_p}; it is more than 0 and at most 1, as in --top-p 0.9.")


def _option(text: str) -> str:
    shown = text if len(text) <= 30 else text[:30] + "..."
    return f"--prompt {json.dumps(shown, ensure_ascii=False)}"


@contextmanager
def _new_file(name: str) -> Iterator[TextIO]:
    """Makes a file, and removes it if nothing was written: it would be in the way of the next attempt."""
    path = Path(name)
    if path.is_dir():
        raise UserError(f"--output {name} is a folder. Name a file in it: --output {path / 'texts.jsonl'}")
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        or_delete = ", or delete it first" if path.suffix == ".jsonl" else ""  # else it may be anything, and dear
        raise UserError(
            f"--output {name} is there already, and is not written over. Give another name{or_delete}."
        ) from None
    except FileNotFoundError:
        raise UserError(f"--output {name}: there is no such folder. Make it first.") from None
    except OSError as error:
        raise UserError(f"--output {name} cannot be written: {error.strerror}. Give another name.") from None
    try:
        with file:
            yield file
    finally:
        if path.exists() and not path.stat().st_size:
            path.unlink()


def _tell_unknown(tokenizer: Any, prompts: list[Prompt], prompt_ids: list[list[int]]) -> None:
    counts = [ids.count(tokenizer.unknown_id) for ids in prompt_ids]
    places = [prompt.place for prompt, count in zip(prompts, counts, strict=True) if count]
    if places:
        unknown = tokenizer.decode_token(tokenizer.unknown_id)
        print(
            f"{unknown} stands for text that the tokenizer does not have: {sum(counts):,} of them in "
            f"{len(places):,} of {len(prompts):,} prompts, the first of which is {places[0]}",
            file=sys.stderr,
        )


def _read_prompts(file: Path) -> list[Prompt]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"--prompts-file {file} cannot be read: {error.strerror}. Give a file of prompts.") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompts-file {file} is not UTF-8. Save it as such.") from None
    as_json = file.suffix in (".jsonl", ".ndjson", ".json")
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{file}:{number}"
            prompts.append(Prompt(_prompt_of_json(line, place) if as_json else line, place))
    if not prompts:
        raise UserError(f"--prompts-file {file} is empty: it has no prompt. Write one per line.")
    return prompts


def _prompt_of_json(line: str, place: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, LookupError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise UserError(f'{place}: not an object with a text under "prompt". Correct the line.')
    return prompt
