"""Finds the files to import in a folder: what each is by its name, what is skipped, and by which rule."""

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

from torchrecipes.data.converting.licenses import FolderLicenses
from torchrecipes.data.sources.records import BadRecord
from torchrecipes.errors import UserError

FORMATS = {
    **dict.fromkeys(".md .markdown .mdown .mkd .mdx .qmd".split(), "markdown"),
    **dict.fromkeys(".rst .rest".split(), "rst"),
    **dict.fromkeys(".html .htm .xhtml".split(), "html"),
    **dict.fromkeys(".txt .text .adoc .org .tex".split(), "text"),
    **dict.fromkeys(".jsonl .ndjson .parquet .json .csv .tsv".split(), "records"),
}
ONLY_IF_NAMED = {".json", ".csv", ".tsv"}  # in a folder they are settings and tables far more often than texts
COMPRESSED = {".gz", ".zst", ".xz"}  # of records
LANGUAGES = """
    ada: .adb .ads; assembly: .asm .s; awk: .awk; batch: .bat .cmd; c: .c .h; c++: .cc .cpp .cxx .hh .hpp .hxx .inl
    .ipp; c#: .cs; clojure: .clj .cljs .cljc; cmake: .cmake; cobol: .cob .cbl; css: .css; cuda: .cu .cuh; cython: .pyx
    .pxd .pxi; d: .d; dart: .dart; elixir: .ex .exs; elm: .elm; erlang: .erl .hrl; f#: .fs .fsx .fsi; fortran: .f .f90
    .f95 .f03 .for; glsl: .glsl; go: .go; graphql: .graphql; groovy: .groovy .gradle; haskell: .hs .lhs; hcl: .tf .hcl;
    idris: .idr; java: .java; javascript: .js .mjs .cjs .jsx; julia: .jl; kotlin: .kt .kts; lean: .lean; less: .less;
    lisp: .lisp .lsp .el; lua: .lua; matlab: .m; nim: .nim; nix: .nix; objective-c: .mm; ocaml: .ml .mli; pascal: .pas;
    perl: .pl .pm; php: .php; powershell: .ps1 .psm1; prolog: .pro; protobuf: .proto; python: .py .pyi; r: .r; racket:
    .rkt; ruby: .rb; rust: .rs; sass: .scss .sass; scala: .scala .sc; scheme: .scm .ss; shell: .sh .bash .zsh .fish;
    solidity: .sol; sql: .sql; svelte: .svelte; swift: .swift; systemverilog: .sv .svh; tcl: .tcl; toml: .toml;
    typescript: .ts .tsx .mts .cts; verilog: .v .vh; vhdl: .vhd .vhdl; vimscript: .vim; visual basic: .vb .bas; vue:
    .vue; yaml: .yaml .yml; zig: .zig
"""  # a language and the ends of its files
LANGUAGE_OF = {
    suffix: language.strip()
    for language, suffixes in (item.split(": ") for item in " ".join(LANGUAGES.split()).split("; "))
    for suffix in suffixes.split()
}
LANGUAGE_OF_NAME = {
    "Makefile": "makefile", "GNUmakefile": "makefile", "Dockerfile": "dockerfile", "CMakeLists.txt": "cmake",
    "Rakefile": "ruby", "Gemfile": "ruby", "Jenkinsfile": "groovy", "BUILD": "starlark", "BUILD.bazel": "starlark",
}  # fmt: skip
VENDORED_FOLDERS = set(
    "node_modules bower_components jspm_packages vendor vendored _vendor third_party third-party thirdparty 3rdparty "
    "site-packages dist-packages venv virtualenv __pycache__ Pods Carthage Godeps".split()
)
GENERATED_NAMES = re.compile(
    r".*(_pb2(_grpc)?\.pyi?|\.pb\.(go|cc|h)|\.g\.(dart|cs)|\.designer\.(cs|vb)|\.generated\.\w+|_generated\.(go|rs|h))"
    r"|zz_generated\..*|moc_.*\.cpp|parsetab\.py|lextab\.py|(pnpm-lock|package-lock)\.\w+"
)
MINIFIED_NAMES = re.compile(r".*[.-]min\.(js|mjs|css)|.*\.bundle\.js")

HIDDEN = "hidden (its name starts with a dot)"
LINK = "a symbolic link"
EXCLUDED = "matches --exclude"
NOT_INCLUDED = "matches no --include"
VENDORED = "vendored or built: in a folder such as node_modules or __pycache__"
GENERATED = "generated (its name or its first lines say so)"
MINIFIED = "minified"
RECORDS = "a table or JSON; name the file to read its texts"
UNKNOWN = "unknown format; name the file to read it as plain text"
TOO_LARGE = "larger than --max-file-mb"
NO_FILE = "not a file that can be read"


class InputFile(NamedTuple):
    """A file to import."""

    path: str
    name: str  # in the output: the path below the folder that was given
    format: str  # markdown, rst, html, text, records or code
    language: str | None  # of code
    size: int  # bytes
    modified_ns: int
    license: str | None  # of its folder


def find_inputs(
    paths: Sequence[str], exclude: Sequence[str], include: Sequence[str], max_bytes: int, shuffle: bool
) -> tuple[list[InputFile], list[BadRecord], dict[str, str | None]]:
    """Finds the files of one source.

    Args:
        paths: files and folders.
        exclude: patterns as in a .gitignore file; the last that matches decides, `!` takes a file back.
        include: if any, only files that match one of these are taken.
        max_bytes: of a file; those of records (JSON lines, tables) may be larger.
        shuffle: order the files by a hash of their names, not by the names.

    Returns:
        The files in order; what is skipped and by which rule; and the LICENSE files that were read, with what they say.

    Raises:
        UserError: there is no such file or folder (code `no_such_file`).
    """
    excluded, included = Patterns(exclude), Patterns(include)
    files: list[InputFile] = []
    skipped: list[BadRecord] = []
    licenses: dict[str, str | None] = {}
    for path in paths:
        path = os.path.abspath(os.path.expanduser(path))
        if not os.path.exists(path):
            raise UserError(f"there is no file or folder {path}", key="--source", code="no_such_file")
        named = not os.path.isdir(path)
        root = os.path.dirname(path) if named else path
        prefix = "" if named or len(paths) == 1 else os.path.basename(path) + "/"
        of_folder = FolderLicenses(Path(root))
        for relative in [os.path.basename(path)] if named else _walk(root, excluded, skipped):
            found = _file(root, relative, named, excluded, included, max_bytes)
            if isinstance(found, BadRecord):
                skipped.append(found)
                continue
            license, file = of_folder.of(Path(found.path).parent)
            files.append(found._replace(name=prefix + found.name, license=license))
            if file:
                licenses[prefix + file] = license
    if shuffle:
        files.sort(key=lambda file: (xxhash.xxh3_64_intdigest(os.fsencode(file.name)), file.name))
    return files, skipped, licenses


def _walk(root: str, excluded: "Patterns", skipped: list[BadRecord]) -> list[str]:
    """Returns the paths of files below `root`, ordered by the parts of their names."""
    found = []
    unreadable: list[OSError] = []
    for parent, folders, names in os.walk(root, onerror=unreadable.append):
        relative = os.path.relpath(parent, root)
        below = "" if relative == "." else relative + os.sep
        kept = []
        for name in folders:
            if name.startswith("."):
                reason = HIDDEN
            elif os.path.islink(os.path.join(parent, name)):
                reason = LINK
            elif name in VENDORED_FOLDERS:
                reason = VENDORED
            elif excluded.match(_posix(below + name), is_folder=True) and not excluded.negated:
                reason = EXCLUDED
            else:
                kept.append(name)
                continue
            skipped.append(BadRecord(_posix(below + name) + "/", reason))
        folders[:] = kept
        found += [below + name for name in names]
    skipped += [BadRecord(str(error.filename), NO_FILE, error.strerror or "") for error in unreadable]
    skipped.sort(key=lambda record: record.source)
    return sorted(found, key=lambda name: name.split(os.sep))


def _file(
    root: str, relative: str, named: bool, excluded: "Patterns", included: "Patterns", max_bytes: int
) -> InputFile | BadRecord:
    path, name = os.path.join(root, relative), _posix(relative)
    base = os.path.basename(name)
    try:
        name.encode()
        status = os.lstat(path) if not named else os.stat(path)
    except OSError as error:
        return BadRecord(name, NO_FILE, error.strerror or "")
    except UnicodeEncodeError:
        return BadRecord(ascii(name), NO_FILE, "its name is not UTF-8")
    stem, suffix = os.path.splitext(base.lower())
    if suffix in COMPRESSED:
        suffix = os.path.splitext(stem)[1] if os.path.splitext(stem)[1] in FORMATS else suffix
        suffix = suffix if FORMATS.get(suffix) == "records" else ".compressed"
    language = LANGUAGE_OF_NAME.get(base) or LANGUAGE_OF.get(suffix)
    form = "code" if language else FORMATS.get(suffix, "text" if named else "")
    reason = ""
    if not named and base.startswith("."):
        reason = HIDDEN
    elif stat.S_ISLNK(status.st_mode):
        reason = LINK
    elif not stat.S_ISREG(status.st_mode):
        reason = NO_FILE
    elif excluded.match(name):
        reason = EXCLUDED
    elif included and not included.match(name):
        reason = NOT_INCLUDED
    elif not form:
        reason = UNKNOWN
    elif not named and suffix in ONLY_IF_NAMED:
        reason = RECORDS
    elif MINIFIED_NAMES.fullmatch(base):
        reason = MINIFIED
    elif form == "code" and GENERATED_NAMES.fullmatch(base):
        reason = GENERATED
    elif form != "records" and status.st_size > max_bytes:
        return BadRecord(name, TOO_LARGE, f"{status.st_size / 1e6:,.1f} MB")
    if reason:
        return BadRecord(name, reason)
    return InputFile(path, name, form, language, status.st_size, status.st_mtime_ns, None)


def _posix(path: str) -> str:
    return path.replace(os.sep, "/")


class Patterns:
    """Patterns of a .gitignore file.

    A pattern with a slash at its beginning or inside is matched from the top, any other against every name; a slash at
    its end matches folders only, and what is in them; `*` and `?` stand for no slash, `**` for any folders; `!` takes
    a file back.
    """

    def __init__(self, patterns: Sequence[str]):
        self.rules: list[tuple[bool, bool, re.Pattern]] = []
        for line in patterns:
            pattern = line.strip()
            if not pattern or pattern.startswith("#"):
                continue
            takes_back = pattern.startswith("!")
            pattern = pattern.removeprefix("!").removeprefix("\\")
            only_folders = pattern.endswith("/")
            pattern = pattern.rstrip("/")
            anywhere = "/" not in pattern
            body = _translate(pattern.lstrip("/"))
            rule = re.compile(("(?:.*/)?" if anywhere else "") + body + r"(?P<below>/.*)?", re.DOTALL)
            self.rules.append((takes_back, only_folders, rule))
        self.negated = any(takes_back for takes_back, _, _ in self.rules)

    def __bool__(self) -> bool:
        return bool(self.rules)

    def match(self, name: str, is_folder: bool = False) -> bool:
        """Returns whether the last pattern that matches a path (with `/`) or a folder above it is not taken back."""
        matched = False
        for takes_back, only_folders, rule in self.rules:
            found = rule.fullmatch(name)
            if found and (not only_folders or is_folder or found["below"]):
                matched = not takes_back
        return matched


def _translate(pattern: str) -> str:
    body, position = "", 0
    while position < len(pattern):
        rest = pattern[position:]
        if rest.startswith("**/"):
            body, position = body + "(?:.*/)?", position + 3
        elif rest == "**":
            body, position = body + ".*", position + 2
        elif rest[0] == "*":
            body, position = body + "[^/]*", position + 1
        elif rest[0] == "?":
            body, position = body + "[^/]", position + 1
        elif found := re.match(r"\[([!^]?)([^\]/]+)\]", rest):
            inside = found[2].replace("\\", "\\\\").replace("[", "\\[")
            body, position = body + f"[{'^' if found[1] else ''}{inside}]", position + found.end()
        else:
            escaped = rest[0] == "\\" and len(rest) > 1
            body, position = body + re.escape(rest[1] if escaped else rest[0]), position + 1 + escaped
    return body
