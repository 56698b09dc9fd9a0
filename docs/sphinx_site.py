"""What Sphinx does not do by itself: pages made of the code, drawings as parts of the page.

A page names what is made of the code in a comment of its own, such as
``<!-- generated: commands -->``; it is put there before the page is parsed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

import proxytune_kernels
from proxytune_kernels.cli.app import app as command_line

HERE = Path(__file__).parent


def python_api() -> Iterator[str]:
    """Every public name, by autodoc."""
    kinds = {"sharded": "module"}
    for name in proxytune_kernels.__all__:
        found = getattr(proxytune_kernels, name)
        kind = kinds.get(name, "class" if isinstance(found, type) else "function")
        options = "" if kind == "function" else "   :members:\n"
        yield f"## `{name}`\n\n```{{eval-rst}}\n"
        yield f".. auto{kind}:: proxytune_kernels.{name}\n{options}```\n\n"


def commands() -> Iterator[str]:
    """Every command, with the words of its help."""
    import click
    from typer.main import get_command

    group: Any = get_command(command_line)
    for name, command in group.commands.items():
        context = click.Context(command, info_name=f"proxytune {name}")
        usage = " ".join(command.collect_usage_pieces(context))
        yield f"## `{name}`\n\n{command.help}\n\n    proxytune {name} {usage}\n\n"
        for parameter in command.get_params(context):
            names, text = parameter.get_help_record(context)
            yield f"- `{names}`{': ' if text else ''}{text or ''}\n"
        yield "\n"


def http_api() -> Iterator[str]:
    """Every endpoint of the server, of its OpenAPI schema."""
    from transformers.utils.logging import disable_progress_bar

    from proxytune_kernels.server.app import create_app
    from proxytune_kernels.server.settings import Settings

    disable_progress_bar()
    trio = proxytune_kernels.load_trio("shipped")
    decoder = proxytune_kernels.Decoder(trio, max_batch_size=1, max_seq_len=64)
    schema = create_app(decoder, Settings(model="shipped")).openapi()
    models = schema["components"]["schemas"]

    def said(value: dict[str, Any]) -> str:
        if "$ref" in value:
            return (
                f"[{value['$ref'].rpartition('/')[2]}](#{value['$ref'].rpartition('/')[2].lower()})"
            )
        if "anyOf" in value:
            return " or ".join(dict.fromkeys(said(each) for each in value["anyOf"]))
        if "enum" in value or "const" in value:
            return " or ".join(f"`{each!r}`" for each in value.get("enum", [value.get("const")]))
        if value.get("type") == "array":
            return f"list of {said(value.get('items', {}))}"
        return str(value.get("type", "anything"))

    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            text = operation.get("description", operation.get("summary", ""))
            yield f"## `{method.upper()} {path}`\n\n{text}\n\n"
            for parameter in operation.get("parameters", ()):
                yield f"- `{parameter['name']}` in the {parameter['in']}\n"
            body = operation.get("requestBody", {}).get("content", {})
            for kind, content in body.items():
                yield f"- takes {said(content['schema'])} ({kind})\n"
            for status, response in operation["responses"].items():
                yield f"- {status}: {response.get('description', '')}\n"
            yield "\n"
    yield "## Bodies\n\n"
    for name, model in models.items():
        yield f"### {name}\n\n{model.get('description', '')}\n\n"
        for field, value in model.get("properties", {}).items():
            default = f", `{value['default']!r}` unless given" if "default" in value else ""
            needed = ", required" if field in model.get("required", ()) else ""
            text = f": {value['description']}" if "description" in value else ""
            yield f"- `{field}` ({said(value)}{needed}{default}){text}\n"
        yield "\n"


def pages(pattern: str) -> Iterator[str]:
    """The pages of a pattern, which may be none, in the order of their names."""
    found = sorted(str(path.relative_to(HERE).with_suffix("")) for path in HERE.glob(pattern))
    if found:
        yield "\n".join(["```{toctree}", *found, "```"])


GENERATED: dict[str, Callable[..., Iterator[str]]] = {
    "Python": python_api, "commands": commands, "HTTP": http_api, "pages": pages,
}  # fmt: skip


def fill(_: Sphinx, __: str, source: list[str]) -> None:
    """Put what is generated in place of the comments that name it."""

    def generated(comment: re.Match[str]) -> str:
        name, *arguments = comment[1].split()
        return "".join(GENERATED[name](*arguments))

    text = re.sub(r"<!-- generated: (.+?) -->", generated, source[0])
    # Markdown outside of docs/ is no page here, but a file.
    source[0] = re.sub(r"\]\((\.\./[^)#]+\.md)\)", r"](path:\1)", text)


def outdated(_: Sphinx, env: Any, *__: set[str]) -> list[str]:
    """What is made of the code is made anew in each build."""
    return [name for name in env.found_docs if "<!-- generated: " in read(env.doc2path(name))]


def read(path: str | Path) -> str:
    """A text file."""
    return Path(path).read_text("utf-8")


class Inline(SphinxPostTransform):
    """The drawings become parts of the page, where they have its colours, light and dark."""

    default_priority = 5
    formats = ("html",)

    def run(self, **_: Any) -> None:
        """Called by Sphinx for each page."""
        for image in list(self.document.findall(nodes.image)):
            if image["uri"].endswith(".svg"):
                text = read(HERE / image["uri"])
                image.replace_self(
                    nodes.raw("", f'<div class="drawing">{text}</div>', format="html")
                )


READABLE = (
    # What scrolls can be scrolled by keyboard.
    ("<pre>", '<pre tabindex="0">'),
    ('<div class="table-wrapper', '<div tabindex="0" class="table-wrapper'),
    # A heading has a level, and a landmark a name of its own.
    ('class="caption" role="heading">', 'class="caption" role="heading" aria-level="2">'),
    ('<aside class="sidebar', '<aside aria-label="Contents" class="sidebar'),
    ('\n<div id="search-results">', '\n<h1>Search</h1><div id="search-results">'),
    ('<aside class="toc', '<aside aria-label="On this page" class="toc'),
)
EMPTY_HEADING = re.compile(r"<th( [^>]*)?>\s*(<p>\s*</p>)?\s*</th>")


def readable(app: Sphinx, error: Exception | None) -> None:
    """What axe found in the pages that Sphinx and the theme write."""
    if error or app.builder.format != "html":
        return
    for path in Path(app.outdir).rglob("*.html"):
        text = EMPTY_HEADING.sub("<td></td>", read(path))
        for found, wanted in READABLE:
            text = text.replace(found, wanted)
        path.write_text(text, "utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("env-get-outdated", outdated)
    app.connect("source-read", fill)
    app.connect("build-finished", readable)
    app.add_post_transform(Inline)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
