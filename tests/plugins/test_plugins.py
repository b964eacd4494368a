"""Plugins are found through real entry points, and a broken one harms nobody else."""

from __future__ import annotations

import re
import sys
import textwrap
import warnings
from typing import Any

import pytest
import torch

from nnpatch_core import DecoderAPI, Outcome, Sites, activation_patching, decoder_components
from nnpatch_core.errors import (
    AdapterError,
    AdapterWarning,
    PatchingError,
    PluginWarning,
    UnknownNameError,
)
from nnpatch_core.metrics import logit_difference
from nnpatch_core.plugins import find_adapter, find_metric, find_seq_pos, hookspecs, load_plugins
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.distributions import Install

OWN = {"llama": "nnpatch-llama", "mistral": "nnpatch-mistral", "gemma": "nnpatch-gemma"}
ADAPTER = """
    from nnpatch_core import DecoderAPI, decoder_components, hookimpl

    @hookimpl
    def register_model_apis(register):
        register(DecoderAPI({name!r}, ({model_type!r},), decoder_components()))
"""


def adapter(name: str = "Martian", model_type: str = "martian") -> str:
    return ADAPTER.format(name=name, model_type=model_type)


def names(found: Any) -> list[Any]:
    return sorted(entry.name for entry in found)


def sweep(
    sites: Sites, api: DecoderAPI | str | type[Any] | None = None, model: Any = None, **options: Any
) -> Outcome:
    return activation_patching(
        model or tiny_model(),
        api,
        sites,
        torch.tensor([[5, 6, 7, 8]]),
        torch.tensor([[5, 9, 7, 8]]),
        torch.tensor([1]),
        torch.tensor([2]),
        progress=False,
        **options,
    )


# Discovery --------------------------------------------------------------------------------------


def test_own_plugins_are_discovered() -> None:
    registry = load_plugins()
    assert registry.failures == ()
    found = {plugin.name: plugin.distribution for plugin in registry.plugins}
    assert OWN.items() <= found.items()
    assert {"Gemma", "Gemma2", "Gemma3", "Llama3", "Mistral"} <= set(names(registry.adapters))
    for plugin in registry.plugins:
        assert str(plugin) == f"{plugin.distribution} {plugin.version}"
        assert re.fullmatch(r"\d+\.\d+\.\d+.*", plugin.version)


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("Llama3", "llama"),
        ("Mistral", "mistral"),
        ("Gemma", "gemma"),
        ("Gemma2", "gemma2"),
        ("Gemma3", "gemma3_text"),
        ("Gemma3Vision", "gemma3"),
    ],
)
def test_own_adapters_are_found_by_name_and_by_model(name: str, model_type: str) -> None:
    found = find_adapter(name)
    assert found.name == name
    assert find_adapter(None, tiny_model(model_type)) is found
    assert find_adapter(found) is found


def test_adapter_of_another_distribution_is_found_by_name_and_by_model(
    install: Install,
) -> None:
    install("martian-models", adapter())
    model = tiny_model()
    expected = sweep(Sites("resid"), tiny_api(), model)["resid"]
    model.config.model_type = "martian"
    for api in (None, "Martian"):
        out = sweep(Sites("resid"), api, model)
        assert out.info["adapter"] == "Martian"
        torch.testing.assert_close(out["resid"], expected, rtol=0, atol=0)
    assert (
        OWN.items() <= {entry.name: entry.distribution for entry in load_plugins().plugins}.items()
    )


def test_adapter_as_a_class(install: Install) -> None:
    code = """
        from nnpatch_core import decoder_components, hookimpl

        class Martian:
            name = "Martian"
            model_types = ("martian",)
            layers = "model.layers"
            components = decoder_components()

            def n_heads(self, config, kind, layer):
                return 4 if kind == "query" else 2

        @hookimpl
        def register_model_apis(register):
            register(Martian)
    """
    install("martian-models", code)
    model = tiny_model()
    model.config.model_type = "martian"
    by_model, by_name = sweep(Sites("k"), None, model), sweep(Sites("k"), "Martian", model)
    by_class = sweep(Sites("k"), sys.modules["martian_models"].Martian, model)
    assert by_model["k"].shape == (3, 2)
    for out in (by_name, by_class):
        torch.testing.assert_close(out["k"], by_model["k"], rtol=0, atol=0)


def test_entry_point_that_names_an_object_of_a_module(install: Install) -> None:
    code = """
        from nnpatch_core import DecoderAPI, decoder_components, hookimpl

        class Hooks:
            @hookimpl
            def register_model_apis(self, register):
                register(DecoderAPI("Martian", ("martian",), decoder_components()))

        hooks = Hooks()
    """
    install("martian-models", code, value="martian_models:hooks")
    assert "Martian" in names(load_plugins().adapters)


# One test a hook --------------------------------------------------------------------------------


def hooks() -> dict[str, Install]:
    return {name: hook for name, hook in vars(hookspecs).items() if hasattr(hook, "nnpatch_spec")}


@pytest.mark.parametrize("hook", hooks())
def test_every_hook_has_a_docstring_and_a_test(hook: str) -> None:
    assert (hooks()[hook].__doc__ or "").strip()
    # A new hook comes with a test of that name.
    assert f"test_{hook}" in globals()


def test_register_model_apis(install: Install) -> None:
    install("martian-models", adapter())
    (found,) = [entry for entry in load_plugins().adapters if entry.name == "Martian"]
    assert isinstance(found.value, DecoderAPI)
    assert str(found.plugin) == "martian-models 1.2.3"


WINDOW = """
    from nnpatch_core import hookimpl

    class Window:
        '''Every run of `size` neighbours, together; it stands at its first position.'''

        one_by_one = True

        def __init__(self, size=1):
            self.size = size

        def expand(self, seq_len):
            return [
                tuple(range(first, first + self.size)) for first in range(seq_len - self.size + 1)
            ]

    @hookimpl
    def register_seq_pos(register):
        register("window", Window)
"""


def test_register_seq_pos(install: Install) -> None:
    install("windows", WINDOW)
    # In the full engine, whose numbers do not depend on what else is swept.
    out = sweep(Sites("resid", seq_pos_type="window", seq_pos=2), engine="full")
    assert out["resid"].shape == (3, 4)
    assert out.swept("resid").all(0).tolist() == [True, True, True, False]
    together = sweep(Sites("resid", seq_pos_type="custom_constant", seq_pos=[1, 2]), engine="full")
    torch.testing.assert_close(out["resid"][:, 1], together["resid"], rtol=0, atol=0)
    # `seq_pos` may be left out, as the strategy has a default for it.
    each = sweep(Sites("resid", seq_pos_type="each"), engine="full")["resid"]
    windows_of_one = sweep(Sites("resid", seq_pos_type="window"), engine="full")["resid"]
    torch.testing.assert_close(windows_of_one, each, rtol=0, atol=0)


def test_seq_pos_of_a_plugin_is_among_the_known_names(install: Install) -> None:
    install("windows", WINDOW)
    with pytest.raises(
        UnknownNameError, match=r"'windows' .*window\?\); there are .*lastk, spans, window"
    ):
        Sites("resid", seq_pos_type="windows")


METRICS = """
    from nnpatch_core import hookimpl

    def largest(logits):
        return logits.max(-1).values

    def above_target(logits, context):
        return logits.max(-1).values - context.target_logits.max(-1).values

    @hookimpl
    def register_metrics(register):
        register("largest", largest)
        register("above_target", above_target)
"""


def test_register_metrics(install: Install) -> None:
    install("more-metrics", METRICS)
    out = sweep(Sites("resid"), metric=["largest", "above_target", "logit_difference"])
    assert out.metrics == ("largest", "above_target", "logit_difference")
    assert out.metric == "largest"
    above = out.for_metric("above_target")
    torch.testing.assert_close(above.patched("resid"), out.patched("resid") - out.baseline.target)
    torch.testing.assert_close(above["resid"], out["resid"], rtol=1e-4, atol=1e-5)


def test_metric_of_a_plugin_is_among_the_known_names(install: Install) -> None:
    install("more-metrics", METRICS)
    with pytest.raises(UnknownNameError, match=r"'small'; there are above_target,.* largest,"):
        find_metric("small")


INFERRING = """
    from nnpatch_core import DecoderAPI, decoder_components, hookimpl

    @hookimpl
    def infer_model_api(model, lacks):
        if model.config.model_type != "martian":
            return None
        lacks("q", "Martians ask nothing")
        components = decoder_components()
        del components["q"]
        return DecoderAPI("Martian", ("martian",), components)
"""


def test_infer_model_api(install: Install) -> None:
    install("martian-models", INFERRING)
    model = tiny_model()
    model.config.model_type = "martian"
    with pytest.warns(AdapterWarning) as caught:
        out = sweep(Sites("k"), None, model)
    (warning,) = caught
    assert warning.filename == __file__
    for part in ("'martian'", "adapter 'Martian'", "k (2 heads)", "q: Martians ask nothing"):
        assert part in str(warning.message)
    torch.testing.assert_close(out["k"], sweep(Sites("k"), tiny_api())["k"], rtol=0, atol=0)
    # What it passes on is inferred by ours.
    with pytest.warns(AdapterWarning, match="adapter 'Gpt2'"):
        assert find_adapter(None, tiny_model("gpt2")).layers == "transformer.h"


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("'Martian'", "TypeError: an adapter must be a ModelAPI, got 'Martian'"),
    ],
)
def test_inferring_that_fails_harms_nobody(install: Install, value: str, part: str) -> None:
    code = f"""
        from nnpatch_core import hookimpl

        @hookimpl
        def infer_model_api(model):
            return {value}
    """
    install("martian-models", code)
    with (
        pytest.warns(AdapterWarning, match="adapter 'Gpt2'"),
        pytest.warns(PluginWarning, match=rf"martian-models 1.2.3: hook infer_model_api .*{part}"),
    ):
        assert find_adapter(None, tiny_model("gpt2")).name == "Gpt2"
    # It is not asked about a model that has an adapter.
    assert find_adapter(None, tiny_model("llama")).name == "Llama3"


def test_inferring_that_refuses(install: Install) -> None:
    code = """
        from nnpatch_core import hookimpl
        from nnpatch_core.errors import AdapterError

        @hookimpl
        def infer_model_api(model):
            raise AdapterError("Martians are secret")
    """
    install("martian-models", code)
    with pytest.raises(AdapterError, match=r"'gpt2'.*Martians are secret; pass an adapter as api="):
        find_adapter(None, tiny_model("gpt2"))


# Broken plugins ---------------------------------------------------------------------------------

HALFWAY = """
    from nnpatch_core import DecoderAPI, decoder_components, hookimpl

    def martian():
        return DecoderAPI("Martian", ("martian",), decoder_components())

    @hookimpl
    def register_seq_pos(register):
        register("halfway", lambda: None)

    @hookimpl
    def register_metrics(register):
        register("halfway", len)
"""

#: What is wrong: the plugin's code, and what the report of it says.
BROKEN = {
    "import error": ("import no_such_module_at_all", ["import", "no_such_module_at_all"]),
    "syntax error": ("def oops(:\n    pass", ["import", "SyntaxError"]),
    "exits": ("import sys\nsys.exit('bye')", ["import", "SystemExit", "bye"]),
    "raises": ("raise RuntimeError('on import')", ["import", "RuntimeError", "on import"]),
    "hook raises": (
        """
        @hookimpl
        def register_model_apis(register):
            register(martian())
            raise RuntimeError("in the hook")
        """,
        ["register_model_apis", "RuntimeError", "in the hook"],
    ),
    "hook exits": (
        """
        @hookimpl
        def register_model_apis(register):
            register(martian())
            raise SystemExit(3)
        """,
        ["register_model_apis", "SystemExit", "3"],
    ),
    "unknown hook": (
        """
        @hookimpl
        def register_model_api(register):
            register(martian())
        """,
        ["registration", "PluginValidationError", "register_model_api"],
    ),
    "unknown argument": (
        """
        @hookimpl
        def register_model_apis(register, model):
            register(martian())
        """,
        ["registration", "PluginValidationError", "register_model_apis", "model"],
    ),
    "no adapter": (
        """
        @hookimpl
        def register_model_apis(register):
            register(martian())
            register("Martian")
        """,
        ["register_model_apis", "TypeError", "'Martian'", "ModelAPI"],
    ),
    "class that is no adapter": (
        """
        @hookimpl
        def register_model_apis(register):
            register(martian())
            register(dict)
        """,
        ["register_model_apis", "TypeError", "dict", "ModelAPI"],
    ),
    "class that takes arguments": (
        """
        @hookimpl
        def register_model_apis(register):
            register(martian())
            register(DecoderAPI)
        """,
        ["register_model_apis", "TypeError", "name"],
    ),
    "metric that cannot be called": (
        """
        @hookimpl(specname="register_metrics")
        def more(register):
            register("constant", 5)
        """,
        ["register_metrics", "TypeError", "'constant'", "5"],
    ),
    "strategy without a name": (
        """
        @hookimpl(specname="register_seq_pos")
        def more(register):
            register("", len)
        """,
        ["register_seq_pos", "TypeError", "''"],
    ),
}


@pytest.mark.parametrize(("code", "parts"), BROKEN.values(), ids=BROKEN)
def test_broken_plugin_harms_nobody_else(install: Install, code: str, parts: list[str]) -> None:
    # A good one is loaded before it and another one after it.
    install("venusian-models", adapter("Venusian", "venusian"))
    install("broken-models", textwrap.dedent(HALFWAY) + textwrap.dedent(code), version="0.9")
    install("jovian-models", adapter("Jovian", "jovian"))
    with pytest.warns(PluginWarning) as caught:
        registry = load_plugins()
    (warning,) = caught
    for part in ["broken-models 0.9", *parts]:
        assert part in str(warning.message)
    (failure,) = registry.failures
    assert failure.plugin.distribution == "broken-models"
    assert str(failure) == str(warning.message)
    # Nothing that it registered before it failed is kept.
    loaded = {plugin.distribution for plugin in registry.plugins}
    assert loaded >= {*OWN.values(), "venusian-models", "jovian-models"}
    assert "broken-models" not in loaded
    assert {"Venusian", "Jovian", "Llama3"} <= set(names(registry.adapters))
    assert "Martian" not in names(registry.adapters)
    assert "halfway" not in names(registry.seq_pos) + names(registry.metrics)


def test_sweep_beside_a_broken_plugin(install: Install) -> None:
    install("broken-models", "raise RuntimeError('on import')")
    with pytest.warns(PluginWarning, match="broken-models 1.2.3.*on import"):
        out = sweep(Sites("resid"))
    assert out.info["adapter"] == "Llama3"


def test_broken_plugins_all_at_once(install: Install) -> None:
    for number, (code, _) in enumerate(BROKEN.values()):
        install(f"broken-{number}", textwrap.dedent(HALFWAY) + textwrap.dedent(code))
    with pytest.warns(PluginWarning) as caught:
        registry = load_plugins()
    assert len(caught) == len(registry.failures) == len(BROKEN)
    assert {plugin.distribution for plugin in registry.plugins} >= set(OWN.values())


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("no_such_module_at_all", "ModuleNotFoundError"),
        ("broken_models:nothing", "AttributeError"),
        ("not a module", "Error"),
    ],
)
def test_entry_point_that_leads_nowhere(install: Install, value: str, error: str) -> None:
    install("broken-models", "", value=value)
    with pytest.warns(PluginWarning, match=f"broken-models 1.2.3.*{error}"):
        registry = load_plugins()
    assert {plugin.distribution for plugin in registry.plugins} >= set(OWN.values())


def test_distribution_without_metadata_is_passed_over(install: Install) -> None:
    """What an interrupted uninstall leaves behind."""
    info = install("broken-models", adapter())
    (info / "METADATA").unlink()
    registry = load_plugins()
    assert {plugin.distribution for plugin in registry.plugins} >= set(OWN.values())


def test_distribution_whose_entry_points_cannot_be_read(install: Install) -> None:
    info = install("broken-models", adapter())
    (info / "entry_points.txt").write_text("[nnpatch]\nno equals sign\n", encoding="utf-8")
    with pytest.warns(PluginWarning, match="broken-models"):
        registry = load_plugins()
    assert {plugin.distribution for plugin in registry.plugins} >= set(OWN.values())


def test_ctrl_c_is_not_a_broken_plugin(install: Install) -> None:
    install("slow-models", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_plugins()


def test_failures_can_be_had_without_warnings(install: Install) -> None:
    install("broken-models", "raise RuntimeError('on import')")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (failure,) = load_plugins(report=False).failures
    assert failure.stage == "import"
    assert isinstance(failure.error, RuntimeError)


def test_broken_plugin_is_named_where_an_adapter_is_inferred(install: Install) -> None:
    install("martian-models", "raise RuntimeError('on import')")
    model = tiny_model()
    model.config.model_type = "martian"
    with (
        pytest.warns(PluginWarning),
        pytest.warns(AdapterWarning, match=r"'martian'.*martian-models.*on import"),
    ):
        assert find_adapter(None, model).name == "Martian"


# Conflicts --------------------------------------------------------------------------------------


@pytest.fixture
def rivals(install: Install) -> None:
    """A second adapter for `model_type` llama."""
    install("other-llamas", adapter("Alpaca", "llama"), version="7.0")


@pytest.mark.usefixtures("rivals")
def test_two_adapters_for_one_model_are_an_error_that_names_both() -> None:
    with pytest.raises(AdapterError) as caught:
        sweep(Sites("resid"))
    for part in ("'llama'", "'Alpaca' of other-llamas 7.0", "'Llama3' of nnpatch-llama", "api="):
        assert part in str(caught.value)


@pytest.mark.usefixtures("rivals")
def test_an_explicit_choice_wins_between_two_adapters() -> None:
    expected = sweep(Sites("resid"), tiny_api())["resid"]
    chosen = {"Alpaca": "Alpaca", "Llama3": "Llama3", "TinyLlama": tiny_api()}
    for name, api in chosen.items():
        out = sweep(Sites("resid"), api)
        assert out.info["adapter"] == name
        torch.testing.assert_close(out["resid"], expected, rtol=0, atol=0)


@pytest.mark.usefixtures("rivals")
def test_another_model_is_not_in_conflict() -> None:
    assert find_adapter(None, tiny_model("mistral")).name == "Mistral"


def test_two_adapters_of_one_name(install: Install) -> None:
    install("other-llamas", adapter("Llama3", "alpaca"), version="7.0")
    with pytest.raises(UnknownNameError) as caught:
        find_adapter("Llama3")
    for part in ("'Llama3'", "other-llamas 7.0", "nnpatch-llama", "object"):
        assert part in str(caught.value)
    # By the model there is no doubt, and an object is what it is.
    assert find_adapter(None, tiny_model()).model_types == ("llama",)
    mine = DecoderAPI("Llama3", ("llama",), decoder_components())
    assert find_adapter(mine) is mine


@pytest.mark.parametrize(
    ("code", "find", "name"), [(WINDOW, find_seq_pos, "window"), (METRICS, find_metric, "largest")]
)
def test_one_name_registered_by_two_plugins(
    install: Install, code: str, find: Install, name: str
) -> None:
    install("one", code)
    install("two", code, version="2.0")
    with pytest.raises(UnknownNameError) as caught:
        find(name)
    for part in (f"'{name}'", "one 1.2.3", "two 2.0"):
        assert part in str(caught.value)


def test_a_plugin_does_not_replace_what_is_built_in(install: Install) -> None:
    install("one", METRICS.replace('"largest"', '"logit_difference"'))
    assert find_metric("logit_difference") is logit_difference


def test_distribution_found_twice_is_loaded_once(install: Install) -> None:
    """A path that names a folder twice, or an older copy that is shadowed, is no conflict."""
    install("martian-models", adapter(), version="1.0")
    install("Martian_Models", adapter(), version="2.0")
    registry = load_plugins()
    found = [plugin for plugin in registry.plugins if "artian" in plugin.distribution]
    assert [plugin.version for plugin in found] == ["2.0"]
    assert names(registry.adapters).count("Martian") == 1


def test_path_named_twice(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    info = install("martian-models", adapter())
    monkeypatch.syspath_prepend(str(info.parent))
    assert names(load_plugins().adapters).count("Martian") == 1


# The environment variable -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("llama", ["Llama3"]),
        ("nnpatch-llama", ["Llama3"]),
        ("nnpatch_llama", ["Llama3"]),
        ("LLAMA", ["Llama3"]),
        (" mistral , nnpatch-llama,", ["Llama3", "Mistral"]),
        ("martian", ["Martian"]),
        ("martian-models,llama", ["Llama3", "Martian"]),
        ("", []),
        (",", []),
    ],
)
def test_environment_variable_limits_what_is_loaded(
    install: Install, monkeypatch: pytest.MonkeyPatch, variable: str, expected: list[str]
) -> None:
    install("martian-models", adapter(), name="martian")
    monkeypatch.setenv("NNPATCH_PLUGINS", variable)
    registry = load_plugins()
    assert names(registry.adapters) == expected
    assert len(registry.plugins) == len(expected)


def test_plugin_that_is_left_out_is_not_imported(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("broken-models", "raise RuntimeError('imported')")
    monkeypatch.setenv("NNPATCH_PLUGINS", "llama")
    assert load_plugins().failures == ()
    assert "broken_models" not in sys.modules


def test_environment_variable_that_names_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNPATCH_PLUGINS", "llama,pluto,neptune")
    with pytest.warns(PluginWarning) as caught:
        registry = load_plugins()
    (warning,) = caught
    for part in ("NNPATCH_PLUGINS", "neptune, pluto", *OWN):
        assert part in str(warning.message)
    assert names(registry.adapters) == ["Llama3"]


def test_model_whose_plugin_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNPATCH_PLUGINS", "gemma")
    with pytest.warns(
        AdapterWarning, match=r"nnpatch-llama has one, which NNPATCH_PLUGINS='gemma'"
    ):
        assert find_adapter(None, tiny_model()).name == "Llama"
    with pytest.raises(UnknownNameError, match=r"'Llama3'; there are .*Gemma2"):
        find_adapter("Llama3")


# What a plugin registers is checked where it is used ---------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "part"),
    [
        ("lambda seq_pos: None", "None"),
        ("lambda seq_pos: 5", "5"),
        ("lambda seq_pos: seq_pos", "[2]"),
    ],
)
def test_strategy_factory_that_gives_no_strategy(
    install: Install, strategy: str, part: str
) -> None:
    install("windows", WINDOW.replace('"window", Window', f'"window", {strategy}'))
    with pytest.raises(PatchingError, match=re.escape(part)):
        sweep(Sites("resid", seq_pos_type="window", seq_pos=[2]))
