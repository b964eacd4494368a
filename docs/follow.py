"""Does what a page says, step by step, in an empty folder, as a reader would.

A block whose first line is a comment with a path, such as `# sweep.py`, is the file of that path; a
`csv` block is the file that the text before it names last.
In a `console` block a line that begins with `$ ` is a command, and what follows it is what it
prints, if the page shows any of it; `...` stands for anything, alone on a line for any lines. A
command that fails is an error unless `echo $?` comes next.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs

#: The pages whose files are written, and whose commands are run.
PAGES = (
    "command-line.md",
    "plugins.md",
    "start.md",
    "write-a-metric.md",
    "write-a-position-strategy.md",
    "write-an-adapter.md",
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"`([\w./-]+\.csv)`")
FILE = re.compile(r"# ([\w./-]+\.(?:py|toml))\n")
#: The model of the pages, by its name on the model hub.
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
#: What another environment, or the test that runs this, would have a command do differently.
FOREIGN = ("COV_", "NNPATCH_", "PIP_", "PYTEST_", "PYTHON")
#: What the distribution's own script of that name does, in another environment.
SCRIPT = """#!{python}
import sys
from importlib.metadata import entry_points

if {name!r} == "pip" and sys.argv[1:2] == ["install"]:
    # Without an index: what the page needs is there.
    sys.argv[2:2] = ["--quiet", "--no-index", "--no-build-isolation"]
script = next(iter(entry_points(group="console_scripts", name={name!r})))
sys.exit(script.load()())
"""


@attrs.frozen
class File:
    """A file that the page has the reader write."""

    path: str
    text: str

    def __str__(self) -> str:
        return self.path


@attrs.frozen
class Command:
    """A command, and what the page shows of its output, if anything."""

    text: str
    shown: str

    def __str__(self) -> str:
        return f"$ {self.text}"


def is_file(block: str) -> bool:
    """Whether a block is a file that the reader writes."""
    return FILE.match(block) is not None


def steps(page: str) -> Iterator[File | Command]:
    """The files and commands of a page, in its order."""
    for found in BLOCK.finditer(page):
        language, block = found.groups()
        if language == "console":
            yield from _commands(block)
        elif language == "csv":
            yield File(TABLE.findall(page[: found.start()])[-1], block)
        elif is_file(block):
            path, text = FILE.match(block)[1], block.partition("\n")[2]  # type: ignore[index]
            yield File(path, text)


def _commands(block: str) -> Iterator[Command]:
    before, *commands = re.split(r"^\$ ", block, flags=re.MULTILINE)
    assert not before, f"a console block begins with a command, not with {before!r}"
    for command in commands:
        text, _, shown = command.partition("\n")
        yield Command(text, shown)


def matches(shown: str, printed: str) -> bool:
    """Whether a command printed what the page shows; blank lines and widths do not count."""
    pattern = ""
    for line in _lines(shown):
        if line.strip() == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += r".*?".join(map(re.escape, line.split("..."))) + r"\n"
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in _lines(printed))) is not None


def _lines(text: str) -> list[str]:
    """The lines that are not blank, with one space between words, behind their margin."""
    lines = [line.expandtabs() for line in text.splitlines() if line.strip()]
    margins = [line[: len(line) - len(line.lstrip())] for line in lines]
    return [margin + " ".join(line.split()) for margin, line in zip(margins, lines, strict=True)]


def place(model: Path, folder: Path) -> None:
    """Put a model into a reader's folder, under the name that the model hub has for SmolLM2.

    A folder of that name comes before the hub, so that commands run as they are printed.
    """
    there = folder / SMOLLM2
    there.parent.mkdir(parents=True, exist_ok=True)
    there.symlink_to(model, target_is_directory=True)


def environment(folder: Path) -> dict[str, str]:
    """Make an environment on top of the present one, and give what runs commands in it.

    It sees what is installed here; what is installed there is gone with the folder.
    """
    venv.create(folder, symlinks=True)
    places = {name: str(folder) for name in ("base", "platbase", "installed_base")}
    own = Path(sysconfig.get_path("purelib", "venv", vars=places))
    here = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    lines = (f"import site; site.addsitedir({path!r})\n" for path in here)
    (own / "here.pth").write_text("".join(lines), encoding="utf-8")
    python = folder / "bin" / "python"
    for name in ("nnpatch", "pip", "pytest"):
        script = python.with_name(name)
        script.write_text(SCRIPT.format(python=python, name=name), encoding="utf-8")
        script.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return {
        **kept,
        "PATH": os.pathsep.join((str(python.parent), os.environ["PATH"])),
        "VIRTUAL_ENV": str(folder),
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "TQDM_DISABLE": "1",
    }


def follow(page: str, folder: Path, variables: Mapping[str, str]) -> None:
    """Do what a page says in a folder, and raise `AssertionError` where it does not come out."""
    code = 0
    said = list(steps(page))
    for step, following in zip(said, [*said[1:], None], strict=True):
        sys.stdout.write(f"{step}\n")
        if isinstance(step, File):
            path = folder / step.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(step.text, encoding="utf-8")
            continue
        done = subprocess.run(
            ["bash", "-c", f"(exit {code})\n{step.text}"],
            cwd=folder,
            env=dict(variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        sys.stdout.write(done.stdout)
        code = done.returncode
        told = following is not None and str(following) == "$ echo $?"
        assert code == 0 or told, f"{step} fails with {code}:\n{done.stdout}"
        if step.shown.strip():
            right = matches(step.shown, done.stdout)
            assert right, f"{step} prints\n{done.stdout}\nand by the page\n{step.shown}"
