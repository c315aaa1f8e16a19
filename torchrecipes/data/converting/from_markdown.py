"""Markdown to text: what a reader of the rendered page does not see is removed, all else stays as it is.

Code (between fences, indented after a blank line outside a list, in `<pre>`, or between backquotes) is kept verbatim.
Outside:

1. Front matter (`---` on the first line, up to `---` or `...`; `+++` likewise) is removed; its `license` is read.
2. Comments `<!-- -->` are removed, over any number of lines; so are `<script>` and `<style>` with their content, and
   the tags, but not the content, of other elements of HTML.
3. `[text](address)`, `[text][id]` and `[text][]` leave their text, images their alternative text, and addresses between
   angle brackets the address. Definitions `[id]: address` are removed; brackets whose id is not defined are text.
4. Character references such as `&lt;` become the character.

Headings, lists, emphasis and tables are kept: a model should learn to read and write them.
"""

import html
import re
from collections.abc import Iterator

from torchrecipes.data.converting.licenses import license_of_field

FRONT_MATTER = {"---": ("---", "..."), "+++": ("+++",)}
FRONT_LICENSE = re.compile(r"license[ \t]*[:=][ \t]*(\S.*)")
FENCE = re.compile(r"[ \t]*(?:>[ \t]?)*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?(`{3,}(?=[^`]*$)|~{3,})")
ITEM = re.compile(r" {0,3}(?:[-*+]|\d{1,9}[.)])(?:[ \t]|$)")
INDENTED = re.compile(r"(?: {4}| {0,3}\t)")
DEFINITION = re.compile(
    r""" {0,3}\[(?!\^)([^\[\]]{1,999})\]:[ \t]*\S+(?:[ \t]+(?:"[^"]*"|'[^']*'|\([^()]*\)))?[ \t]*$"""
)
PRE = re.compile(r"<pre\b[^<>]*>", re.IGNORECASE)
END_OF_PRE = re.compile(r"</pre\s*>", re.IGNORECASE)
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(?s:.+?)(?<!`)\1(?!`)")
SPAN_OR_HIDDEN = re.compile(
    r"(?P<span>(?<!`)(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))|<!--|<(?P<element>script|style)\b", re.IGNORECASE
)
ESCAPED = re.compile(r"\\[!-/:-@\[-`{-~]")
KEPT = re.compile(r"\x00(\d+)\x00")
# A link's text may hold one level of brackets, those of an image; its address one level of parentheses.
LINK = re.compile(
    r"""!?\[((?:[^\[\]]|\[[^\[\]]*\])*+)\]"""
    r"""\([ \t]*(?:<[^<>\n]*>|[^\s()<>]*(?:\([^\s()]*\)[^\s()]*)*)(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)"""
)
REFERENCE = re.compile(r"!?\[([^\[\]]+)\]\[([^\[\]]*)\]")
ADDRESS = re.compile(r"<((?:https?|ftp|mailto):[^\s<>]*)>")
ELEMENTS = (
    "a abbr address article aside b big blockquote br caption center cite code col colgroup dd del details dfn div dl "
    "dt em figcaption figure font footer h1 h2 h3 h4 h5 h6 header hr i iframe img ins kbd li main mark nav noscript ol "
    "p picture pre q s samp section small source span strike strong sub summary sup svg table tbody td tfoot th thead "
    "tr tt u ul var video wbr"
).split()
TAG = re.compile(rf"</?(?:{'|'.join(ELEMENTS)})(?:\s[^<>]*)?/?>", re.IGNORECASE)
REFERENCED_CHARACTER = re.compile(r"&(?:[a-zA-Z][a-zA-Z0-9]{1,31}|#\d{1,7}|#[xX][0-9a-fA-F]{1,6});")


def markdown_to_text(text: str) -> tuple[str, str | None]:
    """Converts a Markdown file with `\\n` as line end and without NUL.

    Returns:
        The text, which may be empty, and the SPDX identifier of the licence in its front matter, or None.
    """
    lines, license = _front_matter(text.split("\n"))
    blocks = list(_blocks(lines))
    defined = {_identifier(match[1]) for code, block in blocks if not code and (match := DEFINITION.match(block))}
    written: list[str] = []
    removed = False  # where something was removed, the blank lines around it would add up
    for code, block in blocks:
        shown = block if code else _inline(block, defined)
        if shown is None:
            removed = True
        elif shown or not (removed and written and not written[-1]):
            written.append(shown)
            removed = removed and not shown
    result = "\n".join(written).strip("\n")
    return (result + "\n" if result.strip() else ""), license


def _front_matter(lines: list[str]) -> tuple[list[str], str | None]:
    ends = FRONT_MATTER.get(lines[0].rstrip())
    end = next((number for number, line in enumerate(lines[1:], 1) if line.rstrip() in ends), None) if ends else None
    if end is None:
        return lines, None
    fields = [match[1] for line in lines[1:end] if (match := FRONT_LICENSE.match(line))]
    return lines[end + 1 :], license_of_field(fields[0]) if fields else None


def _blocks(lines: list[str]) -> Iterator[tuple[bool, str]]:
    """Yields (is code, text): a line of code, a blank line, or the lines of a paragraph, joined by `\\n`."""
    paragraph: list[str] = []
    fence = hidden = ""  # what ends the code between fences, or the comment, script or style, that is open
    in_pre = in_list = False
    before_is_blank, before_is_indented = True, False
    for line in lines:
        is_blank = not line.strip()
        if fence:
            yield True, line
            stripped = line.strip().lstrip("> ")
            if len(stripped) >= len(fence) and not stripped.strip(fence[0]):
                fence = ""
            continue
        if in_pre or (not hidden and PRE.match(line.lstrip())):
            yield from _paragraph(paragraph)
            in_pre = not END_OF_PRE.search(line)
            if shown := END_OF_PRE.sub("", PRE.sub("", line)):
                yield True, shown
            continue
        if not hidden and (match := FENCE.match(line)):
            yield from _paragraph(paragraph)
            fence = match[1]
            yield True, line
            before_is_blank = False
            continue
        is_item = bool(ITEM.match(line))
        if is_item or (not is_blank and before_is_blank and line[0] not in " \t"):
            in_list = is_item
        is_indented = bool(INDENTED.match(line)) and not in_list and (before_is_blank or before_is_indented)
        if is_indented and not is_blank and not hidden:
            yield from _paragraph(paragraph)
            yield True, line
            before_is_blank, before_is_indented = False, True
            continue
        before_is_indented = before_is_indented and is_blank
        before_is_blank = is_blank
        visible, hidden = _visible(line, hidden)
        if is_blank and not hidden:
            yield from _paragraph(paragraph)
            yield False, ""
        elif visible.strip():
            if DEFINITION.match(visible):
                yield from _paragraph(paragraph)
            paragraph.append(visible)
            if DEFINITION.match(visible):
                yield from _paragraph(paragraph)
    yield from _paragraph(paragraph)


def _paragraph(lines: list[str]) -> Iterator[tuple[bool, str]]:
    if lines:
        yield False, "\n".join(lines)
        lines.clear()


def _visible(line: str, hidden: str) -> tuple[str, str]:
    """Returns a line without comments, scripts and styles, and what ends the one that is open after it."""
    shown, place = [], 0
    while place < len(line) or not shown:
        if hidden:
            end = re.compile(re.escape(hidden), re.IGNORECASE).search(line, place)
            if not end:
                return "".join(shown).rstrip(), hidden
            place = end.end() if hidden == "-->" else line.find(">", end.end()) + 1 or len(line)
            hidden = ""
        starts = (match for match in SPAN_OR_HIDDEN.finditer(line, place) if not match["span"])
        start = next(starts, None)
        if start is None:
            rest = line[place:]
            return ("".join([*shown, rest]).rstrip() if shown else rest), ""
        shown.append(line[place : start.start()])
        hidden = f"</{start['element']}" if start["element"] else "-->"
        place = start.end()
    return "".join(shown).rstrip(), hidden


def _inline(text: str, defined: set[str]) -> str | None:
    """Returns a paragraph without links and tags; None for the definition of a link."""
    if DEFINITION.match(text):
        return None
    kept: list[str] = []

    def keep(match: re.Match) -> str:
        kept.append(match[0])
        return f"\x00{len(kept) - 1}\x00"

    def refer(match: re.Match) -> str:
        return match[1] if _identifier(match[2] or match[1]) in defined else match[0]

    before = text
    text = ESCAPED.sub(keep, CODE_SPAN.sub(keep, text))
    text = ADDRESS.sub(r"\1", text)
    for _ in range(2):  # an image inside a link
        text = REFERENCE.sub(refer, LINK.sub(r"\1", text))
    text = TAG.sub("", text)
    text = REFERENCED_CHARACTER.sub(lambda match: html.unescape(match[0]), text)
    for _ in range(2):  # a code span may hold an escape that was kept before it
        text = KEPT.sub(lambda match: kept[int(match[1])], text)
    if text != before and not text.strip():
        return None
    return text


def _identifier(name: str) -> str:
    return " ".join(name.lower().split())
