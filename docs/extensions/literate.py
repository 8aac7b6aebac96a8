"""Turn the scripts of the site into pages with their outputs.

A script has cells: ``# %% [markdown]`` begins a cell of text in comments, ``# %%`` begins a cell of code. A page shows
text, code, and what the code prints and draws. Outputs are stored in ``docs/stored`` with the digest of the script, and
a script whose digest is there is not executed again:

    python docs/extensions/literate.py [--all] [NAME ...]    # execute the scripts that changed, or all of them

Every open figure of matplotlib is stored after its cell.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import tempfile
import time
from pathlib import Path

DOCS = Path(__file__).parents[1]
SETTINGS = {  # of matplotlib, for every picture
    "figure.dpi": 110, "savefig.bbox": "tight", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "figure.facecolor": "white",
}  # fmt: skip
STORED = DOCS / "stored"


def setup(app):
    """Execute the scripts that changed and write the pages before Sphinx reads the sources."""
    app.connect("builder-inited", lambda app: main([]))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def main(arguments: list[str]) -> None:
    """Bring the stored outputs and the pages of the examples up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="scripts, without .py; by default all that changed")
    parser.add_argument("--all", action="store_true", help="execute all scripts")
    options = parser.parse_args(arguments)
    for script in scripts():
        if options.all or script.stem in options.names or not is_fresh(script):
            store(script, *execute(script))
        page, text = script.with_suffix(".md"), render(script)
        if not page.exists() or page.read_text() != text:
            page.write_text(text)


def scripts() -> list[Path]:
    """Return the scripts of the site: ``docs/FOLDER/NAME.py``."""
    return sorted(path for path in DOCS.glob("*/*.py") if path.parent.name != "extensions")


def cells(script: Path) -> list[tuple[str, str]]:
    """Return the cells of a script: ``("markdown" or "code", text)``."""
    parts = re.split(r"^# %%(.*)\n", script.read_text(), flags=re.MULTILINE)[1:]
    result = []
    for kind, text in zip(parts[::2], parts[1::2], strict=True):
        if "[markdown]" in kind:
            result.append(("markdown", re.sub(r"^# ?", "", text, flags=re.MULTILINE).strip()))
        else:
            result.append(("code", text.strip()))
    return result


def digest(script: Path) -> str:
    """Return the digest of the code of a script; text and the layout of the code may change."""
    code = "".join(text for kind, text in cells(script) if kind == "code")
    return hashlib.sha256(re.sub(r"[\s(),]+|#.*", "", code).encode()).hexdigest()


def read(script: Path) -> dict:
    """Return the stored outputs of a script, or an empty record."""
    path = STORED / f"{script.stem}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def is_fresh(script: Path) -> bool:
    """Return whether the outputs of the code of a script are stored."""
    return read(script).get("digest") == digest(script)


def execute(script: Path) -> tuple[list[str], list[list[bytes]], float, float]:
    """Run a script; return the text and the pictures of every cell, and the seconds of wall and processor time."""
    os.environ.setdefault("MPLBACKEND", "agg")
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("agg")
    names, texts, pictures = {"__name__": "__main__", "__file__": str(script)}, [], []
    wall, processor = time.monotonic(), time.process_time()
    for kind, text in cells(script):
        if kind == "markdown":
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out), plt.rc_context(SETTINGS):
            exec(compile(text, str(script), "exec"), names)
        texts.append(re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+", "TMP", out.getvalue().rstrip()))
        with plt.rc_context(SETTINGS):
            pictures.append([_png(plt.figure(number)) for number in plt.get_fignums()])
        plt.close("all")
    return texts, pictures, time.monotonic() - wall, time.process_time() - processor


def store(script: Path, texts: list[str], pictures: list[list[bytes]], wall: float, processor: float) -> None:
    """Write the outputs of a script to ``docs/stored``."""
    import jax

    STORED.mkdir(exist_ok=True)
    for old in STORED.glob(f"{script.stem}-*.png"):
        old.unlink()
    names = [[f"{script.stem}-{i}-{j}.png" for j in range(len(p))] for i, p in enumerate(pictures)]
    for name, picture in zip(sum(names, []), sum(pictures, []), strict=True):
        (STORED / name).write_bytes(picture)
    record = {"digest": digest(script), "seconds": round(wall), "processor_seconds": round(processor)}
    record |= {
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "device": jax.default_backend(),
        "text": texts,
        "pictures": names,
    }
    (STORED / f"{script.stem}.json").write_text(json.dumps(record, indent=1) + "\n")


def render(script: Path) -> str:
    """Return the page of a script with its stored outputs."""
    record, i, lines = read(script), 0, []
    for kind, text in cells(script):
        if kind == "markdown":
            lines += [text, ""]
            continue
        lines += ["```python", text, "```", ""]
        if record["text"][i]:
            lines += ["```{code-block} text", ":class: output", "", record["text"][i], "```", ""]
        for name in record["pictures"][i]:
            lines += [f"```{{image}} ../stored/{name}", f":alt: Output of the code above ({script.stem})", "```", ""]
        i += 1
    place, command = f"docs/{script.parent.name}/{script.name}", f"python docs/extensions/literate.py {script.stem}"
    seconds, machine = record["processor_seconds"] + 1, f"{record['cores']} cores ({record['device']})"
    lines += ["---", f"*Script: `{place}`. Outputs: `{command}`, at most {seconds} s of processor time on {machine},"]
    lines += [f"jax {record['jax']}, {record['date']}.*", ""]
    return "\n".join(lines)


def _png(figure) -> bytes:
    """Return a figure as PNG with few colours, which makes small files."""
    from PIL import Image

    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png")
    Image.open(buffer).convert("RGB").quantize(128, dither=0).save(small, format="PNG", optimize=True)
    return small.getvalue()


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
