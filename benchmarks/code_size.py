"""Count lines of code per subpackage, without blank lines, comments and docstrings.

    python benchmarks/code_size.py
    python benchmarks/code_size.py --files

The total is that of the library and its recipes; tests, benchmarks and documentation are listed below it.
"""

import argparse
import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """Count the lines that hold code: a line with a token that is no comment and not part of a docstring."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            text = first.value if isinstance(first, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                docstrings |= set(range(first.lineno, first.end_lineno + 1))
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def room(path: Path) -> str:
    """Name the subpackage of a file: `data/corpus`, `models`, `recipes`."""
    folder = path.relative_to(ROOT).parent
    return folder.as_posix() if folder.parts else path.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", action="store_true", help="also list the largest files")
    args = parser.parse_args()
    per_file = {
        path: code_lines(path.read_text(encoding="utf-8"))
        for top in ("torchrecipes", "recipes", "tests", "benchmarks", "docs")
        for path in sorted((ROOT / top).rglob("*.py"))
    }
    per_room, files = Counter(), Counter()
    for path, lines in per_file.items():
        per_room[room(path)] += lines
        files[room(path)] += 1
    library = sorted(name for name in per_room if name.startswith(("torchrecipes", "recipes")))
    for name in library:
        print(f"{per_room[name]:7,}  {files[name]:3} files  {name}")
    print(f"{sum(per_room[name] for name in library):7,}  {sum(files[name] for name in library):3} files  total")
    for top in ("tests", "benchmarks"):
        print(f"{sum(n for name, n in per_room.items() if name.startswith(top)):7,}  {'':9}  {top}")
    if args.files:
        print()
        for path, lines in sorted(per_file.items(), key=lambda item: -item[1])[:30]:
            print(f"{lines:7,}  {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
