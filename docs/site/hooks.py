"""MkDocs hooks: files of the repository that pages link to, such as `../examples/linen.py`, become pages of the site.

So a link works on the site as it does where the repository is read.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

# Markdown links to files above docs/, with an anchor or without: [text](../README.md#limits).
LINK = re.compile(r"\]\((?P<target>(?:\.\./)+[^)#\s]+)(?P<anchor>#[^)]*)?\)")
FOLDER = "repository"  # the folder of such pages
LANGUAGES = {".py": "python", ".toml": "toml", ".txt": "text", ".jsonl": "json", ".yml": "yaml"}


def on_files(files, config):
    """Add a page for every file above docs/ that a page links to, and for those that these pages link to."""
    docs, root = Path(config.docs_dir), Path(config.docs_dir).parent
    todo = [(file.src_uri, (docs / file.src_uri).read_text()) for file in files.documentation_pages()]
    while todo:
        source, text = todo.pop()
        for link in LINK.finditer(text):
            where = _in_repository(source, link["target"])
            if where is None or files.get_file_from_path(_page(where)) is not None:
                continue
            if not (root / where).is_file():
                continue  # MkDocs reports the link
            page = _content(root / where, where)
            files.append(File.generated(config, _page(where), content=page))
            todo.append((_page(where), page))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links to files above docs/ at their pages."""
    source = page.file.src_uri

    def pointed(link):
        where = _in_repository(source, link["target"])
        if where is None or files.get_file_from_path(_page(where)) is None:
            return link[0]
        target = posixpath.relpath(_page(where), posixpath.dirname(source))
        return f"]({target}{link['anchor'] or ''})"

    return LINK.sub(pointed, markdown)


def _in_repository(source: str, target: str) -> str | None:
    """The file that a link leads to, from the repository's root; None for one within docs/.

    >>> _in_repository("tutorials/linen.md", "../../examples/linen.py"), _in_repository("a/b.md", "../peft.md")
    ('examples/linen.py', None)
    """
    where = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), target))
    return None if where.startswith(("docs/", "..")) else where


def _page(where: str) -> str:
    return f"{FOLDER}/{where.removesuffix('.md')}.md"


def _content(path: Path, where: str) -> str:
    """A Markdown file with its links as seen from docs/repository/, or a program as a block of code under its name."""
    text = path.read_text()
    if path.suffix != ".md":
        fence = "`" * 4
        return f"# {where}\n\n{fence}{LANGUAGES.get(path.suffix, 'text')}\n{text}{fence}\n"
    up = "../" * (posixpath.dirname(_page(where)).count("/") + 1)

    def moved(link):
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(where), link[1]))
        return f"]({up}{inside[5:]}" if inside.startswith("docs/") else f"]({up}../{inside}"

    return re.sub(r"\]\((?![a-z]+:|#)([^)#\s]+)", moved, text)
