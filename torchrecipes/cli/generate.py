"""`tune-style generate`: how a trained causal model continues a text."""

import argparse
import json
import sys
import time
from pathlib import Path

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
    parser.add_argument("--output", metavar="FILE.jsonl", help="write an object per prompt there, too")


def main(args: argparse.Namespace) -> None:
    """Print every prompt with its continuation: one alone as it grows, several batch after batch."""
    prompts = args.prompt + (_read_prompts(Path(args.prompts_file)) if args.prompts_file else [])
    if not prompts:
        raise UserError('there is no prompt. Give --prompt "TEXT", or --prompts-file FILE.')
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; it is 1 or more.")
    if args.output and not Path(args.output).resolve().parent.is_dir():
        raise UserError(f"--output {args.output}: there is no such folder. Make it first.")
    wait_without_spinning()
    folder, model, tokenizer, autocast = load_causal(args, "generate")

    from torchrecipes.evaluation.generate import generate_text

    device = next(model.parameters()).device
    print(f"{folder}, {device}", file=sys.stderr, flush=True)
    tokens, seconds, lines = 0, 0.0, []
    said = ""  # a prompt that is alone is printed as it grows

    def say(piece: str) -> None:
        nonlocal said
        more = piece if said else prompts[0] + piece
        print(more, end="", flush=True)
        said += more

    for first in range(0, len(prompts), args.batch_size):
        begin = time.perf_counter()
        found = generate_text(
            model,
            tokenizer,
            prompts[first : first + args.batch_size],
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            autocast=autocast,
            tell=say if len(prompts) == 1 else None,
        )
        seconds += time.perf_counter() - begin
        for number, continuation in enumerate(found, start=first):
            if number:
                print(LINE)
            print((continuation.prompt + continuation.text)[len(said) :], flush=True)
            tokens += continuation.num_tokens
            lines.append(
                {
                    "prompt": continuation.prompt,
                    "text": continuation.text,
                    "num_tokens": continuation.num_tokens,
                    "ended": continuation.ended,
                }
            )
    if args.output:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        Path(args.output).write_text(text, encoding="utf-8")
    print(f"{tokens:,} new tokens in {seconds:.1f} s, {tokens / seconds:,.0f} per second", file=sys.stderr)


def _read_prompts(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"--prompts-file {file} cannot be read: {error.strerror}. Give a file of prompts.") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompts-file {file} is not UTF-8. Save it as such.") from None
    if file.suffix not in (".jsonl", ".ndjson", ".json"):
        return [line for line in lines if line.strip()]
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, LookupError, TypeError):
                prompt = None
            if not isinstance(prompt, str):
                raise UserError(f'{file}:{number}: not an object with a text under "prompt". Correct the line.')
            prompts.append(prompt)
    return prompts
