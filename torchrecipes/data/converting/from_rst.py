"""reStructuredText to text, with `docutils`.

1. Directives and roles that docutils does not know, Sphinx's for the most part, are read by a stated rule instead of
   being dropped as errors: the first argument and the content of a directive are kept, and of a role its text.
2. Files are never read (`include`, `literalinclude`, tables from files), raw HTML is dropped, and messages about
   mistakes in the text do not get into it.
3. Titles become `# `, literal blocks and code are put between fences, lists get `- ` or numbers, quotes `> `; comments,
   targets, substitution definitions, tables of contents and metadata are dropped.
"""

import io
import re
from collections.abc import Callable
from typing import Any

from torchrecipes.data.converting.licenses import license_of_field
from torchrecipes.data.converting.text_blocks import TextBlocks
from torchrecipes.data.sources.line_reader import UnreadableFile
from torchrecipes.errors import UserError

DIRECTIVE = re.compile(r"^[ \t>|+*-]*\.\. +(?:\|[^|\n]+\| +)?([A-Za-z][\w.:+-]*?) ?::(?=\s|$)", re.MULTILINE)
ROLE = re.compile(r":([A-Za-z][\w.+:-]*):(?=`)")
LICENSE_FIELD = re.compile(r":license:[ \t]*(\S.*)")
LONGEST_LINE = 20_000  # characters

# What the directives of Sphinx and others are. All that are not listed keep their first argument and their content.
CODE = "code-block sourcecode code doctest testcode testoutput prompt ipython highlight-block productionlist".split()
DROPPED = (
    "toctree include literalinclude raw index contents highlight module currentmodule py:module py:currentmodule "
    "program sectionauthor moduleauthor codeauthor meta tabularcolumns graphviz digraph graph uml plot mermaid "
    "testsetup testcleanup default-domain autoclass autofunction automodule automethod autodata autosummary "
    "autoexception centered only-if sectnum header footer bibliography cssclass rst-class class-name image-sg"
).split()
VERSIONS = {
    "versionadded": "Added in version",
    "versionchanged": "Changed in version",
    "deprecated": "Deprecated since version",
    "deprecated-removed": "Deprecated since version",
    "versionremoved": "Removed in version",
}
SIGNATURES = (
    "function class method data attribute exception decorator staticmethod classmethod module describe option "
    "cmdoption envvar macro type member var struct enum enumerator opcode property pyfunction coroutinefunction "
    "coroutinemethod abstractmethod awaitablefunction awaitablemethod decoratormethod command variable"
).split()
CODE_ROLES = set(
    "func meth class mod data const exc attr obj any file samp command program option envvar keyword token kbd "
    "macro type member var struct enum enumerator makevar mailheader mimetype newsgroup regexp opcode source "
    "gh path code literal cmd variable prop_tgt prop_sf prop_dir prop_gbl prop_test prop_inst prop_cache "
    "policy generator genex cpack_gen".split()
)


def rst_to_text(text: str) -> tuple[str, str | None]:
    """Converts a reStructuredText file.

    Returns:
        The text, which may be empty, and the SPDX identifier in a `:license:` field at its top, or None.

    Raises:
        UnreadableFile: docutils cannot read it: nested too deeply, a line of more than 20,000 characters.
        UserError: docutils is not installed (code `missing_package`).
    """
    try:
        import docutils.core
        from docutils.parsers.rst import directives, roles
    except ImportError:
        hint = "pip install 'torchrecipes[import]'"
        raise UserError("reStructuredText is read with docutils", hint=hint, code="missing_package") from None
    if max(map(len, text.split("\n"))) > LONGEST_LINE:
        raise UnreadableFile(f"a line of more than {LONGEST_LINE:,} characters", "")
    settings = {
        "file_insertion_enabled": False,
        "raw_enabled": False,
        "_disable_config": True,
        "report_level": 5,
        "halt_level": 5,
        "warning_stream": io.StringIO(),
        "doctitle_xform": False,
        "docinfo_xform": False,
        "syntax_highlight": "none",
        "smart_quotes": False,
        "line_length_limit": LONGEST_LINE,
    }
    # docutils keeps both in tables of its own, for all texts of a process.
    saved = dict(directives._directives), dict(roles._roles)
    try:
        _register(text, directives, roles)
        document = docutils.core.publish_doctree(text, settings_overrides=settings)
        writer = _Writer(TextBlocks())
        writer.write(document)
    except RecursionError:
        raise UnreadableFile("reStructuredText nested too deeply", "") from None
    except TimeoutError:
        raise
    except Exception as error:  # of docutils: whatever it raises is about this text
        raise UnreadableFile("docutils cannot read it", f"{type(error).__name__}: {error}") from None
    finally:
        for table, content in zip((directives._directives, roles._roles), saved, strict=True):
            table.clear()
            table.update(content)
    found = LICENSE_FIELD.search(text, 0, 1_000)
    return writer.blocks.text(), license_of_field(found[1]) if found else None


def _register(text: str, directives: Any, roles: Any) -> None:
    """Registers the directives and roles that the text uses and docutils does not know, or should not follow."""
    from docutils import nodes
    from docutils.parsers.rst import Directive
    from docutils.parsers.rst.languages import en

    class Sphinx(Directive):
        """Keeps the argument and the content."""

        optional_arguments, final_argument_whitespace, has_content = 1, True, True
        option_spec = AnyOption({"class": str})

        def run(self) -> list:
            name = self.name.lower().rpartition(":")[2]
            if self.name.lower() in DROPPED or name in DROPPED:
                return []
            argument = self.arguments[0] if self.arguments else ""
            if name in CODE:
                block = "\n".join(self.content) or argument
                language = argument.split()[0] if argument and self.content else ""
                return [nodes.literal_block(block, block, language=language)]
            if name in VERSIONS:
                version, *rest = argument.split(maxsplit=1) or [""]
                argument = f"{VERSIONS[name]} {version}" + (f": {rest[0]}" if rest else ".")
            shown = nodes.paragraph()
            if name in SIGNATURES:
                signatures = [line.strip() for line in argument.split("\n") if line.strip()]
                shown = nodes.line_block("", *[nodes.line("", "", nodes.literal(one, one)) for one in signatures])
            elif argument:
                shown += self.state.inline_text(argument, self.lineno)[0]
            content = nodes.Element()
            self.state.nested_parse(self.content, self.content_offset, content)
            if name in SIGNATURES:
                content = [nodes.definition("", *content.children)]
            return [shown, *content]

    def role(name: str, rawtext: str, text: str, *_: Any, **__: Any) -> tuple[list, list]:
        found = re.fullmatch(r"(?s)(.*?)\s*<[^<>]*>", text)
        shown = found[1] if found and found[1] else text
        if shown is text:
            shown = shown.lstrip("!").rpartition(".")[2] if shown.startswith("~") else shown.lstrip("!")
        last = name.lower().rpartition(":")[2]
        if last in ("func", "meth") and not shown.endswith(")"):
            shown += "()"
        shown = shown.replace("\x00", "\\")
        return [nodes.literal(rawtext, shown) if last in CODE_ROLES else nodes.inline(rawtext, shown)], []

    def nothing(*_: Any, **__: Any) -> tuple[list, list]:
        return [], []

    nothing.options = AnyOption({"class": str})

    handled = {name for name in en.directives if name not in (*CODE, *DROPPED, *SIGNATURES)}
    for name in {found.lower() for found in DIRECTIVE.findall(text)} - handled:
        directives.register_directive(name, Sphinx)
    for name in {found.lower() for found in ROLE.findall(text)} - (set(en.roles) - {"index"}):
        roles.register_local_role(name, role)
    roles.register_local_role("raw", nothing)  # and so for the roles that a text derives from it


# Names of docutils' nodes.
IGNORED = set("comment system_message substitution_definition target raw meta pending transition decoration".split())
PREFIXES = {"definition": "    ", "description": "    ", "block_quote": "> "}
BLOCKS = set(
    "document paragraph option_group line_block attribution caption topic sidebar figure legend table "
    "compound container rubric subtitle".split()
)


class AnyOption(dict):
    """The options of a directive: whatever they are, they are accepted and not used."""

    def __missing__(self, key: str) -> Callable:
        return lambda value: value


class _Writer:
    """Writes the tree of a document as blocks."""

    def __init__(self, blocks: TextBlocks):
        self.blocks, self.level = blocks, 0  # level: of sections

    def write(self, node: Any) -> None:
        """Writes a node with all that is in it."""
        kind = node.tagname
        if kind == "#text":
            self.blocks.add(node.astext())
        elif kind in IGNORED or "contents" in node.get("classes", ()):
            return
        elif kind in PREFIXES:
            self._inside(PREFIXES[kind], PREFIXES[kind], node.children)
        elif kind in BLOCKS:
            self.blocks.end_paragraph()
            self._write_all(node.children)
            self.blocks.end_paragraph()
        elif handler := getattr(self, f"_{kind}", None):
            handler(node)
        else:  # references, emphasis and whatever else leaves its text
            self._write_all(node.children)

    def _write_all(self, children: list) -> None:
        for child in children:
            self.write(child)

    def _inside(self, first: str, rest: str, children: list) -> None:
        self.blocks.open(first, rest)
        self._write_all(children)
        self.blocks.close()

    def _section(self, node: Any) -> None:
        self.level += 1
        self._write_all(node.children)
        self.level -= 1

    def _title(self, node: Any) -> None:
        self.blocks.end_paragraph()
        self._write_all(node.children)
        in_section = node.parent.tagname == "section"
        self.blocks.end_paragraph("#" * min(self.level, 6) + " " if in_section else "")

    def _literal_block(self, node: Any) -> None:
        classes = node.get("classes", [])
        language = node.get("language") or next((name for name in classes if "code" in classes and name != "code"), "")
        self.blocks.code(node.astext(), language)

    _doctest_block = _math_block = _literal_block

    def _bullet_list(self, node: Any) -> None:
        for child in node.children:
            self._inside("- ", "  ", child.children)

    def _enumerated_list(self, node: Any) -> None:
        for number, child in enumerate(node.children, node.get("start", 1)):
            self._inside(f"{number}. ", " " * len(f"{number}. "), child.children)

    def _footnote(self, node: Any) -> None:
        label, *rest = node.children
        mark = f"[{label.astext()}] "
        self._inside(mark, " " * len(mark), rest)

    _citation = _footnote

    def _footnote_reference(self, node: Any) -> None:
        self.blocks.add(f"[{node.astext()}]")

    _citation_reference = _footnote_reference

    def _definition_list_item(self, node: Any) -> None:
        self.blocks.end_paragraph()
        for child in node.children:
            if child.tagname == "classifier":
                self.blocks.add(" : ")
            self.write(child)

    def _option(self, node: Any) -> None:
        self.blocks.add(f"{', ' if node.parent.index(node) else ''}{node.astext()}")

    def _field_list(self, node: Any) -> None:
        # Sphinx reads the field list with which a file begins: `:orphan:`, `:tocdepth:`.
        if node.parent.tagname != "document" or node.parent.index(node):
            self._write_all(node.children)

    def _field_name(self, node: Any) -> None:
        self.blocks.end_paragraph()
        self.blocks.add(f"{node.astext()}: ")

    def _field_body(self, node: Any) -> None:
        first = node.children[:1]
        if first and first[0].tagname == "paragraph":
            self._write_all(first[0].children)
            self.blocks.end_paragraph()
            first = node.children[1:]
        self._inside("    ", "    ", first)

    def _literal(self, node: Any) -> None:
        self.blocks.add(f"`{node.astext()}`")

    def _math(self, node: Any) -> None:
        self.blocks.add(f"${node.astext()}$")

    def _image(self, node: Any) -> None:
        self.blocks.add(node.get("alt", ""))

    def _note(self, node: Any) -> None:
        self.blocks.end_paragraph()
        self.blocks.add(f"{node.tagname.capitalize()}: ")
        first = node.children[:1]
        if first and first[0].tagname == "paragraph":
            self._write_all(first[0].children)
            self.blocks.end_paragraph()
            first = node.children[1:]
        self._write_all(first)
        self.blocks.end_paragraph()

    def _admonition(self, node: Any) -> None:
        self._write_all(node.children)  # with a title of its own

    _attention = _caution = _danger = _error = _hint = _important = _tip = _warning = _note

    def _line(self, node: Any) -> None:
        self._write_all(node.children)
        self.blocks.end_line()

    def _tgroup(self, node: Any) -> None:
        joined = False
        for row in (row for group in node.children if group.tagname in ("thead", "tbody") for row in group.children):
            cells = []
            for cell in row.children:
                inside = _Writer(TextBlocks())
                inside._write_all(cell.children)
                cells.append(" ".join(inside.blocks.text().split()))
            self.blocks.add(" | ".join(cells))
            joined = self.blocks.end_paragraph(joined=joined) or joined
