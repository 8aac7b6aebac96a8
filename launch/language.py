"""Check the language rules: ``python -m launch.language [FOLDER ...]`` prints one line per breach.

The rules: names are nouns of content; prose uses the words of the field; the docstring of every public function begins
with one sentence on one line and has sections for arguments and result; functions that a package exports have an
example that runs; files have at most 400 lines.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINES = 400
NAMES = {"told", "found", "given", "how", "made", "wanted", "here", "one", "asked", "want", "got"}
# words, as regular expressions, and what to write instead
WORDS = {
    r"\btold\b": "takes, is given, is conditioned on",
    r"\basked\b": "evaluated, requested",
    r"\blaws?\b": "distribution",
    r"\bshares?\b": "fraction",
    r"\broads?\b": "pipeline",
    r"\brooms?\b": "package, module",
    r"\bof its own\b": "say which",
    r"\bof one's\b": "say whose",
    r"\bthose of\b": "repeat the noun",
    r"\bthat of\b": "repeat the noun",
    r"\bsuch as are\b": "say which",
    r"\bis none\b": "does not exist",
    r"\bhas not\b": "does not have",
    r"\bmade anew\b": "recomputed",
    r"\bat first\b": "initially",
    r"\bwhat is there\b": "say what",
    r"\bshall\b": "must",
}


def main(folders: list[str]) -> int:
    """Print the breaches of the rules in the files of some folders; return 1 where there are any."""
    files = sorted(f for folder in folders for f in _python_files(Path(folder)))
    breaches = [line for file in files for line in check(file)]
    print("\n".join(breaches) or f"{len(files)} files: no breach of the language rules")
    return bool(breaches)


def check(file: Path) -> Iterator[str]:
    """Yield ``file:line: what is wrong`` for one Python file."""
    text = file.read_text()
    tree, library = ast.parse(text), "fmjax" in file.resolve().relative_to(ROOT).parts[:1]
    if text.count("\n") > LINES:
        yield f"{file}:1: {text.count(chr(10))} lines; split it ({LINES} at most)"
    for line, name in _names(tree):
        if name in NAMES:
            yield f"{file}:{line}: the name {name!r} says nothing of the content"
    for line, prose in _prose(text):
        for word, instead in WORDS.items():
            for match in re.finditer(word, prose):
                yield f"{file}:{line}: {match[0]!r} in prose; write: {instead}"
    if library:
        yield from _docstrings(file, tree)


def _python_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else list(path.rglob("*.py"))


def _names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of every function, class, argument and variable of a file."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


def _prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of comments and of strings with more than one word."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "COMMENT" or (kind in ("STRING", "FSTRING_MIDDLE") and " " in token.string):
            for i, line in enumerate(token.string.split("\n")):
                yield token.start[0] + i, re.sub(r"``.*?``|\{.*?\}|`.*?`", "", line)


def _docstrings(file: Path, tree: ast.Module) -> Iterator[str]:
    """Yield breaches in docstrings of public functions and classes: first line, arguments, result, example."""
    exported = _exported(file)
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if "overload" in [getattr(d, "id", "") for d in node.decorator_list]:
            continue
        where, doc = f"{file}:{node.lineno}: {node.name}", ast.get_docstring(node) or ""
        first = doc.split("\n", 1)[0]
        if not re.match(r"[A-Z`].*[.:]$", first):
            yield f"{where}: the first line of the docstring is a sentence on one line, got {first!r}"
        if isinstance(node, ast.FunctionDef):
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            section = _section(doc, "Args")
            if arguments and not section:
                yield f"{where}: no 'Args:' section"
            for name in arguments if section else ():
                if not re.search(rf"^\s+(\w+, )*{name}(, \w+)*:", section, re.MULTILINE):
                    yield f"{where}: the argument {name!r} is not in 'Args:'"
            returns = node.returns is not None and ast.unparse(node.returns) != "None"
            if returns and not (_section(doc, "Returns") or _section(doc, "Yields")):
                yield f"{where}: no 'Returns:' section"
            if node.name in exported and ">>>" not in doc:
                yield f"{where}: no example (>>>), and fmjax.{file.parent.name} exports it"


def _section(doc: str, name: str) -> str:
    """Return the lines of a Google-style section, or an empty string."""
    match = re.search(rf"^{name}:\n((?:[ \t]+.*\n?|\n)+)", doc, re.MULTILINE)
    return match[1] if match else ""


def _exported(file: Path) -> set[str]:
    """Return the names that the ``__init__.py`` beside a file exports; of a top-level module, all functions."""
    face = file.parent / "__init__.py"
    if file.resolve().parent == ROOT / "fmjax":
        return {n.name for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef)}
    for node in ast.parse(face.read_text()).body if face.exists() else ():
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or [str(ROOT / name) for name in ("fmjax", "launch", "configs")]))
