"""Markdown, reStructuredText and HTML become text: what is kept, what is dropped, and what hostile pages cannot do."""

import re

import pytest

from torchrecipes.data.converting import html_to_text, markdown_to_text, rst_to_text
from torchrecipes.data.sources.line_reader import UnreadableFile


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("see [the docs](http://a.b/c_(d) 'title') now", "see the docs now\n"),
        ("[a][1], [B][], [c][no], [d]\n\n[1]: http://x\n[b]: <http://y> 'z'", "a, B, [c][no], [d]\n"),
        ("![logo](a.png) [![badge](b.svg)](c) <https://x.y/z>", "logo badge https://x.y/z\n"),
        ("[two\nlines](x) and [`f[0](1)`](y)", "two\nlines and `f[0](1)`\n"),
        (r"\[not a\](link) `[code](x)` ``a ` [b](c)``", "\\[not a\\](link) `[code](x)` ``a ` [b](c)``\n"),
        ("a <!-- hidden --> b\n<!-- two\n\n```\nlines -->\nc", "a  b\nc\n"),
        ("`<!--` is text\n\n<script>\nalert(1)\n</script>\n<b>bold</b> Vec<T> &lt;i&gt; &copy; ?a=1&copy=2",
         "`<!--` is text\n\nbold Vec<T> <i> © ?a=1&copy=2\n"),
        ("one\n\n<p align='center'>\n<img src='x'>\n</p>\n\ntwo", "one\n\ntwo\n"),
        ("~~~md\n[a](b) <!-- c -->\n```\n~~~\n[a](b)", "~~~md\n[a](b) <!-- c -->\n```\n~~~\na\n"),
        ("- item\n\n    [in](list)\n\ntext\n\n\t[code](x)\n\n    more <b>\n",
         "- item\n\n    in\n\ntext\n\n\t[code](x)\n\n    more <b>\n"),
        ("<pre>\n[a](b)  c\n</pre>\n[d](e)", "[a](b)  c\nd\n"),
        ("1. a\n   ```py\n   [x](y)\n   ```\n", "1. a\n   ```py\n   [x](y)\n   ```\n"),
        ("```\nnever closed [a](b)", "```\nnever closed [a](b)\n"),
        ("<!-- never closed\n[a](b)", ""),
        ("| a | b |\n|---|---|\n| [x](y) | *z* |", "| a | b |\n|---|---|\n| x | *z* |\n"),
    ],
)  # fmt: skip
def test_markdown(source, expected):
    assert markdown_to_text(source)[0] == expected


def test_front_matter_is_read_for_its_license_and_removed():
    assert markdown_to_text("---\ntitle: x\nlicense: 'mit'\n---\n# A") == ("# A\n", "MIT")
    address = "+++\nlicense = https://creativecommons.org/licenses/by-sa/4.0/\n+++\nA"
    assert markdown_to_text(address) == ("A\n", "CC-BY-SA-4.0")
    assert markdown_to_text("---\n\nno end") == ("---\n\nno end\n", None)
    assert markdown_to_text("---\nlicense: see the file\n---\nA") == ("A\n", None)


PAGE = """<!DOCTYPE html><html><head><title>T</title><style>p {}</style>
<link rel="license" href="https://creativecommons.org/licenses/by/4.0/"></head><body>
<header>site</header><nav>menu</nav><main>
<h1>Title <a class="headerlink" href="#t">¶</a></h1>
<p>Some <b>bold</b> text &amp; a <a href="x">link</a>,
with <code>a b</code>.<br>New line. <img alt="picture" src="x"></p>
<div class="highlight-python"><pre><span class="linenos">1</span>def f(x):
    if x &lt; 1:

        return   "a  b"
</pre></div>
<ul><li>one</li><li>two <ol start="3"><li>three</li><li><p>four</p><p>more</p></li></ol></li></ul>
<blockquote><p>said</p><pre>x
 y</pre></blockquote>
<dl><dt>term</dt><dd><p>meaning</p></dd></dl>
<table><caption>cap</caption><tr><th>a</th><th>b</th></tr><tr><td>1<p>2</p></td><td><ul><li>x</li></ul></td></tr></table>
<script>alert(1)</script><p hidden>secret</p><textarea>typed</textarea><svg><text>drawn</text></svg>
</main><footer>end</footer></body></html>"""
TEXT = """# Title

Some bold text & a link, with `a b`.
New line. picture

```python
def f(x):
    if x < 1:

        return   "a  b"
```

- one
- two
  3. three
  4. four

     more

> said
>
> ```
> x
>  y
> ```

term

    meaning

cap

a | b
1 2 | x
"""


def test_html():
    pytest.importorskip("selectolax")
    assert html_to_text(PAGE) == (TEXT, "CC-BY-4.0")


def test_html_content_is_the_whole_page_where_no_part_of_it_stands_out():
    pytest.importorskip("selectolax")
    text = "<body><div>" + "<p>long enough text</p>" * 50 + "</div><article>short</article></body>"
    assert html_to_text(text)[0].endswith("short\n")
    assert html_to_text("<article>" + "a b " * 99 + "</article><div>shop</div>")[0] == "a b " * 98 + "a b\n"


@pytest.mark.parametrize(
    "page",
    [
        "<script>BAD()</script><p>ok",
        "<SCRIPT >BAD()</SCRIPT ><p>ok",
        "<p>ok<style>BAD</style><noscript>BAD</noscript><template>BAD</template>",
        "<iframe srcdoc='BAD'>BAD</iframe><object>BAD</object><p onclick='BAD()'>ok",
        "<svg><script>BAD</script></svg><p>ok",
        "<p>ok<!-- BAD --><!-->",
        "<p>ok<img src='file:///etc/passwd' onerror='BAD'>",
        "<p>ok<script>BAD",
    ],
)
def test_html_scripts_and_what_is_hidden_give_no_text(page):
    pytest.importorskip("selectolax")
    assert html_to_text(page)[0] == "ok\n"


def test_hostile_html_neither_crashes_nor_explodes():
    pytest.importorskip("selectolax")
    entities = "<!DOCTYPE x [<!ENTITY a 'lol'><!ENTITY b '&a;&a;&a;&a;'>]>" + "<p>&b;&b;</p>"
    assert len(html_to_text(entities)[0]) < 200
    text = html_to_text("<ul><li>" * 2000 + "deep")[0]
    assert text.endswith("deep\n") and max(map(len, text.split("\n"))) < 200
    rows = "".join(f"<tr><td>{n}<td><table><tr><td>in<td>ner</table>" for n in range(5000))
    assert html_to_text(f"<table>{rows}</table>")[0].count("\n") == 5000
    for bomb in ("<div>" * 100_000, "<a " + " ".join(f"a{n}" for n in range(100_000)) + ">"):
        with pytest.raises(UnreadableFile):
            html_to_text(bomb)
    for odd in (
        "",
        "<",
        "<p",
        "</p>",
        "<html><body></body>",
        "\ufffe",
        "<frameset>",
        "<body hidden>x",
        "plain & simple",
    ):
        html_to_text(odd)


SPHINX = """\
:orphan:

.. _target:

Title
=====

A :class:`~a.b.C`, a :func:`f`, :py:meth:`x <y>`, ``a  b``, *it*, `link <http://x>`_ and |sub| [1]_.

.. |sub| replace:: text
.. comment

.. function:: f(x, *, y=1)
              g()
   :module: m

   Does it.

   .. versionadded:: 3.2
      With more.

.. code-block:: python
   :linenos:

   def f(x):
       if x:

           return "a  b"

Literal::

    {  }

.. note:: Mind *this*.

   And that.

Sub
---

- one
- two

  more

3. three
4. four

term : kind
    meaning

======  ===
a       b
======  ===
1       2 3
``x``   y
======  ===

.. image:: /etc/passwd
   :alt: picture

.. toctree::

   other

.. deprecated:: 3.4

.. [1] A note.
"""
SPHINX_TEXT = """# Title

A `C`, a `f()`, `x()`, `a b`, it, link and text [1].

`f(x, *, y=1)`
`g()`

    Does it.

    Added in version 3.2: With more.

```python
def f(x):
    if x:

        return "a  b"
```

Literal:

```
{  }
```

Note: Mind this.

And that.

## Sub

- one
- two

  more

3. three
4. four

term : kind

    meaning

a | b
1 | 2 3
`x` | y

picture

Deprecated since version 3.4.

[1] A note.
"""


def test_rst():
    pytest.importorskip("docutils")
    assert rst_to_text(SPHINX)[0] == SPHINX_TEXT
    assert rst_to_text(":license: MIT\n\ntext") == ("text\n", "MIT")


@pytest.mark.parametrize(
    "source",
    [
        ".. include:: {}",
        ".. literalinclude:: {}",
        ".. raw:: html\n   :file: {}",
        ".. csv-table::\n   :file: {}",
        ".. csv-table::\n   :url: file://{}",
        ".. code:: text\n   :include: {}",
        ".. raw:: html\n\n   <script>SECRET</script>",
        ".. role:: h(raw)\n   :format: html\n\n:h:`SECRET`",
        ".. |x| raw:: html\n   :file: {}\n\n|x|",
        ".. meta::\n   :description: SECRET",
        ".. comment\n   SECRET",
    ],
)
def test_rst_reads_no_files_and_drops_raw_text(source, tmp_path):
    pytest.importorskip("docutils")
    (tmp_path / "secret.txt").write_text("SECRET")
    text = rst_to_text("before\n\n" + source.replace("{}", str(tmp_path / "secret.txt")) + "\n\nafter\n")[0]
    assert "SECRET" not in text and text.startswith("before\n") and text.endswith("after\n")


def test_messages_about_mistakes_do_not_get_into_the_text():
    pytest.importorskip("docutils")
    mistakes = "Title\n==\n\n*open, `x`_ and |y| and :no-role:`z`\n\n- a\nb\n\n.. no-directive:: arg\n\n   body\n"
    text = rst_to_text(mistakes)[0]
    assert not re.search(r"(?i)warning|error|unknown|<stdin>|system", text)
    assert "body" in text and "arg" in text and "z" in text


def test_hostile_rst_neither_crashes_nor_explodes():
    pytest.importorskip("docutils")
    bomb = "".join(f".. |a{n}| replace:: {f'|a{n + 1}|' * 9}\n" for n in range(9)) + ".. |a9| replace:: lol\n\n|a0|\n"
    assert len(rst_to_text(bomb)[0]) < 100_000
    deep = "\n\n".join("  " * n + "* x" for n in range(400))
    table = "+" + "-" * 900 + "+\n|" + " " * 900 + "|"
    for source in (deep, table, "x" * 30_000, "|" * 900, "`" * 900, ".. |u| unicode:: 0xD800\n\n|u|"):
        try:
            rst_to_text(source)
        except UnreadableFile as error:
            assert error.reason


def test_what_one_text_defines_is_unknown_to_the_next():
    pytest.importorskip("docutils")
    rst_to_text(".. role:: mine(math)\n\n:mine:`x`")
    assert rst_to_text(":mine:`x`")[0] == "x\n"
