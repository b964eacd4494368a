"""The page "Write an adapter" is done from its first command to its last, as a reader would."""

from __future__ import annotations

from pathlib import Path

import follow
import pytest
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

PAGE = Path(__file__).with_name("write-an-adapter.md").read_text(encoding="utf-8")


def test_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "reader"
    # A model of a real one's number of layers and heads: a folder of its name comes before the hub.
    config = GPTNeoXConfig(
        vocab_size=64,
        hidden_size=96,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=64,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder / "EleutherAI" / "pythia-160m")

    follow.follow(PAGE, folder, follow.environment(tmp_path / "environment"))


def test_the_page_is_read() -> None:
    said = [str(step) for step in follow.steps(PAGE)]
    assert said[:2] == ["look.py", "$ python look.py"]
    assert "$ pip install -e 'nnpatch-gpt-neox[test]'" in said
    assert len(said) == PAGE.count("\n$ ") + 2


# What the page says wrong is found.


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("```console\n$ echo one\ntwo\n```", "prints\none"),
        ("```console\n$ echo one\none\ntwo\n```", "prints\none"),
        ("```console\n$ printf 'one\\ntwo\\n'\none\n```", "prints\none\ntwo"),
        ("```console\n$ exit 3\n```", "fails with 3"),
        ("```console\n$ exit 3\n$ echo no\n```", "fails with 3"),
        ("```console\n$ exit 3\n$ echo $?\n4\n```", "prints\n3"),
        ("```console\n$ no-such-command\n```", "fails with 127"),
        ("```python\n# one/two.py\nprint(5)\n```\n\n```console\n$ python one/two.py\n4\n```", "5"),
    ],
)
def test_what_is_wrong_is_found(page: str, words: str, tmp_path: Path) -> None:
    variables = follow.environment(tmp_path / "environment")
    with pytest.raises(AssertionError, match=words):
        follow.follow(f"{page}\n", tmp_path, variables)


def test_what_is_right_is_not(tmp_path: Path) -> None:
    page = """
```python
# one/two.py
print("three   four")
```

```console
$ python one/two.py
three four
$ printf '1\\n2\\n3 at 5:00\\n'
...
3 at ...
$ exit 3
$ echo $?
3
```
"""
    follow.follow(page, tmp_path, follow.environment(tmp_path / "environment"))


def test_what_is_installed_there_is_not_installed_here(tmp_path: Path) -> None:
    page = """
```python
# src/nnpatch_nothing/__init__.py
VALUE = 5
```

```toml
# pyproject.toml
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "nnpatch-nothing"
version = "0.1.0"
```

```console
$ pip install -e .
$ python -c 'import nnpatch_nothing; print(nnpatch_nothing.VALUE)'
5
```
"""
    follow.follow(page, tmp_path, follow.environment(tmp_path / "environment"))
    with pytest.raises(ImportError):
        __import__("nnpatch_nothing")
