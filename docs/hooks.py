"""Pages of the documentation site that are generated while it is built, so that nothing is written down twice.

MkDocs calls the functions that begin with ``on_``; :func:`generated` needs no MkDocs. Written pages are read in the
repository as well. So tables that are generated stand in them, and links to generated pages are added for the site
only. ``python docs/hooks.py`` writes those tables again; a test compares them.
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
# Files of the repository that are pages as well, and those that they link to.
PAGES = {
    "PAPERS.md": "papers.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
TABLE = re.compile(r"(<!-- generated: (\w+), by python docs/hooks.py -->\n).*?(\n<!-- end -->)", re.DOTALL)
NAMED = re.compile(r"(?<!\[)`(?:moa )?(\w+)`(?!\])")


def generated() -> dict[str, Callable[[], str]]:
    """What writes the Markdown of each generated page, by its path in the site."""
    from moa_lightning.cli import COMMANDS
    from moa_lightning.commands.combiners.facts import every_combiner
    from moa_lightning.commands.combiners.pages import index, page

    known = every_combiner()
    pages: dict[str, Callable[[], str]] = {"combiners/index.md": partial(index, known)}
    pages |= {f"combiners/{one.name}.md": partial(page, one) for one in known}
    pages |= {f"reference/{command}.md": partial(help_page, command) for command in COMMANDS}
    return pages | {page: partial(file_page, file) for file, page in PAGES.items()}


def help_page(command: str) -> str:
    """What ``moa COMMAND --help`` prints."""
    from moa_lightning.cli import main

    printed = io.StringIO()
    terminal = (patch.dict(os.environ, COLUMNS="84"), patch.object(sys, "argv", ["moa"]))  # as wide as a page
    with terminal[0], terminal[1], contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([command, "--help"])
    return f"# moa {command}\n\n```text\n{printed.getvalue().strip()}\n```\n"


def file_page(file: str) -> str:
    """A file of the repository's top folder, with its links as the site has them."""
    text = (ROOT / file).read_text(encoding="utf-8")
    for file, page in PAGES.items():
        text = text.replace(f"]({file})", f"]({page})")
    return text.replace("](README.md)", "](index.md)").replace("](docs/", "](")


def tables() -> dict[str, str]:
    """Tables inside written pages, by name."""
    from moa_lightning.commands.combiners.facts import every_combiner

    known = sorted(every_combiner(), key=lambda one: one.name.lower())
    kl = {one.name: one.kl_penalty for one in known}
    missing = {one.name: one.sections["Missing score"] for one in known}
    return {
        "kl": _by_combiner("the penalty of `RewardKL`", kl),
        "missing": _by_combiner("an objective without a score for a response", missing),
    }


def _by_combiner(title: str, texts: dict[str, str]) -> str:
    rows = [f"| `{name}` | {text} |" for name, text in texts.items()]
    return "\n".join([f"| combiner | {title} |", "| --- | --- |", *rows])


def with_tables(markdown: str) -> str:
    """The page with its generated tables as they should be."""
    return TABLE.sub(lambda found: f"{found[1]}\n{tables()[found[2]]}\n{found[3]}", markdown)


def write_tables() -> None:
    """Write the generated tables into the written pages again."""
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if TABLE.search(text):
            path.write_text(with_tables(text), encoding="utf-8")


def linked(markdown: str) -> str:
    """A written page for the site: in tables combiners and commands link to their pages, files to theirs."""
    from moa_lightning.cli import COMMANDS
    from moa_lightning.commands.combiners.facts import every_combiner

    pages = {f"`{one.name}`": f"combiners/{one.name}.md" for one in every_combiner()}
    pages |= {f"`moa {command}`": f"reference/{command}.md" for command in COMMANDS}

    def link(found: re.Match[str]) -> str:
        return f"[{found[0]}]({pages[found[0]]})" if found[0] in pages else found[0]

    lines = markdown.split("\n")
    text = "\n".join(NAMED.sub(link, line) if line.startswith("|") else line for line in lines)
    for file, page in PAGES.items():
        text = text.replace(f"](../{file})", f"]({page})")
    return text


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Add the links of the site to the written pages."""
    return markdown if page.file.src_uri in generated() else linked(markdown)


def on_config(config: Any) -> Any:
    """Add the generated pages to the navigation."""
    sections = {title: pages for section in config.nav for title, pages in section.items()}
    names = list(generated())
    sections["Combiners"] += [name for name in names if re.fullmatch(r"combiners/[A-Z]\w*\.md", name)]
    commands = [name for name in names if name.startswith("reference/")]
    sections["Reference"].insert(1, {"Options of each command": commands})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site."""
    from mkdocs.structure.files import File

    for name, write in generated().items():
        files.append(File.generated(config, name, content=write()))
    return files


if __name__ == "__main__":
    write_tables()
