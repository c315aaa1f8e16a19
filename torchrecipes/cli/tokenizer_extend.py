"""`tune-style tokenizer extend`: adds tokens to a model's tokenizer, and rows to its embedding and head."""

import argparse
from pathlib import Path

from torchrecipes.cli.data_source import add_source_arguments, source_from
from torchrecipes.cli.tokenizer_inspect import open_tokenizer
from torchrecipes.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tokenizer extend`."""
    parser.epilog = (
        "example: tune-style tokenizer extend runs/base --from-data 500 --data texts -o extended\n"
        "         tune-style tokenizer extend gpt2 --tokens '<|user|>' '<|assistant|>' --special -o extended"
    )
    parser.add_argument("checkpoint", help="a Hugging Face folder, a checkpoint, or a run's folder")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the new folder")
    tokens = parser.add_mutually_exclusive_group(required=True)
    tokens.add_argument("--tokens", nargs="+", metavar="TOKEN", help="the tokens to add")
    tokens.add_argument("--tokens-file", metavar="FILE", help="a text file with a token per line")
    tokens.add_argument(
        "--from-data", type=int, metavar="N", help="N tokens for what is frequent in --data and is split too finely"
    )
    parser.add_argument("--special", action="store_true", help="special tokens: documents never contain them")
    parser.add_argument(
        "--init",
        choices=("pieces", "mean"),
        default="pieces",
        help="new rows: the mean of the rows of a token's pieces until now, or of all rows (default pieces)",
    )
    add_source_arguments(parser, required=False)


def main(args: argparse.Namespace) -> None:
    """Write the folder and print what is in it."""
    source = source_from(args)
    if (source is None) != (args.from_data is None):
        key = "--data" if source is None else "--from-data"
        raise UserError("--from-data N and --data PATH... go together", key=key, code="missing_option")
    if args.from_data is not None and args.from_data < 1:
        problem = f"{args.from_data} is out of range"
        raise UserError(problem, key="--from-data", hint="Give 1 or more.", code="out_of_range")
    if args.from_data is not None and args.special:
        raise UserError("tokens from text are not special", key="--special", hint="Leave it out.", code="unused_option")
    output = Path(args.output)
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise UserError(f"{output} is not empty", key="--output", hint="Give another folder.", code="not_empty")

    from torchrecipes.data.tokenizers import extend_tokenizer, learn_tokens
    from torchrecipes.model_folder import resolve_model_folder
    from torchrecipes.models import extend_vocabulary
    from torchrecipes.models.config_json import read_json

    folder = resolve_model_folder(args.checkpoint, warn=True)
    tokenizer = open_tokenizer(str(folder))
    if source is not None:
        extension = learn_tokens(tokenizer, source, args.from_data)
    else:
        extension = extend_tokenizer(tokenizer, args.tokens or _read_tokens(Path(args.tokens_file)), args.special)
    size = read_json(folder / "config.json").get("vocab_size", 0) if (folder / "config.json").is_file() else 0
    needed = extension.first_id + len(extension.names)
    multiple = 64 if size % 64 == 0 else 1
    rows = max(size, -(-needed // multiple) * multiple)
    found = extend_vocabulary(folder, output, extension.first_id, extension.pieces, rows, args.init)
    extension.tokenizer.save(output)
    print(f"{output}: {len(extension.names):,} tokens added, ids {extension.first_id:,} to {needed - 1:,}")
    print(f"embedding: {size:,} rows before, {rows:,} now, {rows - needed:,} of them unused ({', '.join(found)})")
    for name, ids in list(zip(extension.names, extension.pieces, strict=True))[:20]:
        print(f"  {name}: was {' '.join(tokenizer.backend.id_to_token(i) for i in ids) or 'unknown'}")
    print(f"Train it on: init_from={output}")


def _read_tokens(file: Path) -> list[str]:
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        problem = f"{file} cannot be read: {reason}"
        raise UserError(problem, key="--tokens-file", hint="Give a text file with a token per line.") from None
    if not (tokens := [line for line in lines if line.strip()]):
        raise UserError(f"{file} holds no tokens", key="--tokens-file", code="nothing_to_add")
    return tokens
