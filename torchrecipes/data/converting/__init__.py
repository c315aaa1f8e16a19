"""From files as they are to documents: Markdown, reStructuredText, HTML, source code.

importing           `import_documents`: sources in, shards of JSON lines and a manifest out
manifest            what the manifest says of a source, and its `summary`
find_inputs         the files of a folder, what each is, and what is skipped by which rule
convert_file        one file into documents
from_markdown       `markdown_to_text`
from_rst            `rst_to_text`, with `docutils`
from_html           `html_to_text`, with `selectolax`
text_blocks         paragraphs, code, lists and tables as plain text
licenses            SPDX identifiers by plain rules
git_origin          where a folder was cloned from
"""

from torchrecipes.data.converting.from_html import html_to_text
from torchrecipes.data.converting.from_markdown import markdown_to_text
from torchrecipes.data.converting.from_rst import rst_to_text
from torchrecipes.data.converting.importing import import_documents
from torchrecipes.data.converting.manifest import summary

__all__ = ["html_to_text", "import_documents", "markdown_to_text", "rst_to_text", "summary"]
