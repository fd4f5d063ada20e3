"""Griffe extension: what the API pages show of each module, and doctests as blocks of code, wherever they are."""

import ast
import textwrap

import griffe

FENCE = "```"


class Doctests(griffe.Extension):
    """Put every doctest into a block, and count what a package imports as itself as its public names."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)

    def on_module_members(self, *, node, mod, **kwargs):
        if mod.exports is None and isinstance(node, ast.Module):
            imports = [alias for stmt in node.body if isinstance(stmt, ast.ImportFrom) for alias in stmt.names]
            mod.exports = [alias.name for alias in imports if alias.name == alias.asname] or None


def fenced(text: str) -> str:
    """The docstring with a fence around each doctest, from its first `>>>` to the blank line behind its output.

    >>> fenced("Add.\\n\\n>>> 1 + 1\\n2\\n\\nMore.").splitlines()
    ['Add.', '', '```pycon', '>>> 1 + 1', '2', '```', '', 'More.']
    """
    out: list[str] = []
    block: list[str] | None = None
    for line in [*text.splitlines(), ""]:
        if block is None and line.lstrip().startswith(">>>"):
            block = []
        if block is None:
            out.append(line)
        elif line.strip():
            block.append(line)
        else:
            indent = block[0][: len(block[0]) - len(block[0].lstrip())]
            code = [f"{FENCE}pycon", *textwrap.dedent("\n".join(block)).splitlines(), FENCE, ""]
            out += [indent + code_line if code_line else "" for code_line in code]
            block = None
    return "\n".join(out).rstrip()
