"""HTML to text: the main content of a page, with code verbatim.

1. Elements that are no text (scripts, styles, forms' controls, drawings) and navigation are removed.
2. The content is the first of `CONTENT` that holds a quarter of what is left, or else all of it.
3. Headings become `# `, `pre` a block between fences, `code` is put between backquotes, lists get `- ` or numbers,
   quotes `> `, and the cells of a table's row are joined by ` | `. Links and emphasis leave their text, images their
   `alt`.

`selectolax` parses as browsers do, so that broken pages are read as they look. Nothing is loaded and nothing is run.
"""

import re
from typing import Any

from torchrecipes.data.converting.licenses import license_of_address
from torchrecipes.data.converting.text_blocks import TextBlocks
from torchrecipes.data.sources.line_reader import UnreadableFile
from torchrecipes.errors import UserError

REMOVED = (
    "script style noscript template svg canvas iframe object embed audio video dialog button input select textarea nav "
    "footer aside [hidden] [aria-hidden=true] [role=navigation] [role=banner] [role=contentinfo] [role=search] "
    ".headerlink .sphinxsidebar .related .breadcrumb .breadcrumbs .linenos .lineno .gutter .line-numbers-rows"
).split()
REMOVED.append("body > header")
CONTENT = "main", "[role=main]", "div.body", "#content", "#main", ".markdown-body", "article"
BLOCKS = set(
    "address article blockquote body center dd details dialog div dl dt fieldset figcaption figure footer form "
    "h1 h2 h3 h4 h5 h6 header hgroup hr li main menu ol p pre section summary table tbody tfoot thead tr ul "
    "caption".split()
)
LISTS = "ul", "ol", "menu"
PREFIXES = {"li": ("- ", "  "), "blockquote": ("> ", "> "), "dd": ("    ", "    ")}
HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
PERMALINKS = {"¶", "§", "#", "🔗"}  # the whole text of a link beside a heading
LANGUAGE = re.compile(r"(?:^|\s)(?:language|lang|highlight|highlight-source|sourceCode|brush:)[- ]?([\w+#]+)")
NO_LANGUAGE = {"default", "none", "text", "plaintext", "notranslate"}

# Elements whose end tag may be left out do not nest in themselves, so that counting them says nothing.
UNCOUNTED = (
    "p|li|dt|dd|tr|td|th|thead|tbody|tfoot|option|optgroup|colgroup|area|base|br|col|embed|hr|img|input|link|meta|wbr"
)
TAG = re.compile(rf"<(/?)(?!(?:{UNCOUNTED})\b)[a-zA-Z][^\s/>]*", re.IGNORECASE)
DEEPEST = 5_000  # open elements: the time of the parser grows with the square of their number
LONG_TAG = re.compile(r"<[a-zA-Z][^>]{20000,}")
QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")
MOST_ATTRIBUTES = 1_000  # of an element: as above


def html_to_text(html: str) -> tuple[str, str | None]:
    """Converts a page.

    Returns:
        The text of its main content, which may be empty, and the SPDX identifier of the licence that a link with
        `rel=license` names, or None.

    Raises:
        UnreadableFile: elements nested, or attributes repeated, in numbers that no page has.
        UserError: `selectolax` is not installed (code `missing_package`).
    """
    try:
        from selectolax.lexbor import LexborHTMLParser
    except ImportError:
        hint = "pip install 'torchrecipes[import]'"
        raise UserError("HTML is read with selectolax", hint=hint, code="missing_package") from None
    _refuse_bombs(html)
    tree = LexborHTMLParser(html)
    found = tree.css_first("[rel=license]")
    license = license_of_address(found.attributes.get("href") or "") if found is not None else None
    for selector in REMOVED:
        for node in tree.css(selector):
            if node.tag not in ("html", "body"):
                node.decompose()
    body = tree.body
    if body is None:
        return "", license
    size = len(body.text())
    blocks = TextBlocks()
    for selector in CONTENT:
        content = tree.css_first(selector)
        if content is not None and 4 * len(content.text()) >= size:
            break
    else:
        content = body
    _write(content, blocks)
    return blocks.text(), license


def _refuse_bombs(html: str) -> None:
    depth = deepest = 0
    for end in TAG.findall(html):
        depth = max(depth - 1, 0) if end else depth + 1
        deepest = max(deepest, depth)
    if deepest > DEEPEST:
        raise UnreadableFile("HTML nested too deeply", f"{deepest:,} elements are open at once")
    for tag in LONG_TAG.findall(html):
        if len(QUOTED.sub("", tag).split()) > MOST_ATTRIBUTES:
            raise UnreadableFile("HTML with too many attributes in one tag", f"more than {MOST_ATTRIBUTES:,}")


def _write(root: Any, blocks: TextBlocks) -> None:
    writer = _Writer(blocks)
    todo = [(root, False)]  # a stack, not recursion: pages may nest as deeply as they like
    while todo:
        node, leaving = todo.pop()
        tag = node.tag
        if tag == "-text":
            blocks.add(node.text_content)
        elif leaving:
            writer.leave(tag)
        elif tag == "pre":
            _write_code(node, blocks)
        elif not tag.startswith(("-", "!")) and not (tag == "a" and node.text(strip=True) in PERMALINKS):
            writer.enter(tag, node.attributes)
            todo.append((node, True))
            children, child = [], node.child
            while child is not None:
                children.append((child, False))
                child = child.next
            todo.extend(reversed(children))


class _Writer:
    """Turns the beginnings and ends of elements into calls of `TextBlocks`."""

    def __init__(self, blocks: TextBlocks):
        self.blocks = blocks
        self.lists: list[int | None] = []  # number of the next item of every open list; None: without numbers
        self.rows: list[int] = []  # cells so far of every open row: a row is a line, whatever is in its cells
        self.after_row = False

    def enter(self, tag: str, attributes: dict[str, str | None]) -> None:
        """Begins an element."""
        blocks = self.blocks
        if tag in BLOCKS or tag == "br":
            if self.rows:
                blocks.add(" ")
            elif tag == "br":
                blocks.end_line()
            else:
                blocks.end_paragraph()
        if tag == "img":
            blocks.add(attributes.get("alt") or "")
        elif tag == "code":
            blocks.add("`")
        elif tag in LISTS:
            start = attributes.get("start") or "1"
            first = int(start) if start.isascii() and start.isdigit() and len(start) < 10 else 1
            self.lists.append(first if tag == "ol" else None)
        elif tag == "tr":
            self.rows.append(0)
        elif tag in ("td", "th") and self.rows:
            if self.rows[-1]:
                blocks.add(" | ")
            self.rows[-1] += 1
        elif tag in PREFIXES and not self.rows:
            if tag == "li" and self.lists and self.lists[-1] is not None:
                mark = f"{self.lists[-1]}. "
                self.lists[-1] += 1
                blocks.open(mark, " " * len(mark))
            else:
                blocks.open(*PREFIXES[tag])

    def leave(self, tag: str) -> None:
        """Ends an element."""
        blocks = self.blocks
        if tag == "code":
            blocks.add("`")
        elif tag in LISTS:
            self.lists.pop()
        elif tag == "tr":
            self.rows.pop()
            if not self.rows:
                self.after_row = blocks.end_paragraph(joined=self.after_row) or self.after_row
        elif tag == "table" and not self.rows:
            self.after_row = False
        elif tag in PREFIXES and not self.rows:
            blocks.close()
        elif tag in HEADINGS and not self.rows:
            blocks.end_paragraph(HEADINGS[tag])
        if tag in BLOCKS:
            if self.rows:
                blocks.add(" ")
            else:
                blocks.end_paragraph()


def _write_code(node: Any, blocks: TextBlocks) -> None:
    inner = node.css_first("code")
    around = [inner, node, node.parent, node.parent.parent if node.parent is not None else None]
    names = [element.attributes.get("class") or "" for element in around if element is not None]
    found = next((match[1] for name in names if (match := LANGUAGE.search(name))), "")
    for line_break in node.css("br"):
        line_break.replace_with("\n")
    parts = node.css("pre > code")  # several: one after the other, as pages do that show a choice of languages
    text = "\n".join(part.text().strip("\n") for part in parts) if len(parts) > 1 else node.text()
    blocks.code(text, "" if found in NO_LANGUAGE else found)
