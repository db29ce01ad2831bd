"""Parts by name, as "module:attribute", from installed packages, and packages that break when they are imported."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from marks import sampled

from segrl import metrics
from segrl.cli.main import main
from segrl.errors import SegRLError, UnknownNameError
from segrl.metrics import make_metric
from segrl.registry import (
    PluginReport,
    Registry,
    find_plugins,
    inspect_plugins,
    load_plugin,
    path_of,
    resolve_attribute,
    same_definition,
)

GROUP = "segrl.test_things"

PLUGIN = '''
"""A module."""
import sys
print("loud", flush=True)
sys.stdout.write("0")
class Good:
    """A good
    thing.

    More of it.
    """
'''
BROKEN = {  # text of a module: what the report says of it
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "import os; os._exit(7)": "the import ended Python, with exit status 7",
    "import time; time.sleep(1e6)": "the import did not end within 0.5 s",
    "raise RuntimeError('no licence')": "RuntimeError: no licence",
    "import sys; sys.exit('bye')": "SystemExit: bye",
    "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)": "exit status -11",
    "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])": "did not end within 0.5 s",
    "x = 1": "AttributeError: module",
    "def (": "SyntaxError",
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package: a module and an entry point, as pip would lay them."""

    def install(name: str, code: str, attribute: str = "Good", module: str = "", entry: str = "") -> str:
        module = module or f"plugin_{name}"
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[{GROUP}]\n{entry or name} = {module}:{attribute}\n")
        (tmp_path / f"{module}.py").write_text(code)
        monkeypatch.delitem(sys.modules, module, raising=False)
        return module

    monkeypatch.syspath_prepend(str(tmp_path))
    yield install
    for name in [name for name in sys.modules if name.startswith("plugin_")]:
        del sys.modules[name]


class Thing:
    """One thing."""


class TestRegistry:
    def things(self, **settings):
        return Registry("thing", GROUP, **settings)

    def test_a_name_finds_what_was_registered(self):
        things = self.things()
        assert things.register("one")(Thing) is Thing
        assert things.get("one") is Thing
        assert things.get(f"{__name__}:Thing") is Thing
        assert things.names() == ["one"]

    @pytest.mark.parametrize(
        ("act", "error", "text"),
        [
            (lambda t: t.get("onee"), UnknownNameError, "unknown thing 'onee'; did you mean 'one'? Known: one"),
            (lambda t: t.register("one")(dict), SegRLError, f"thing 'one' is registered already, by {__name__}:Thing"),
            (lambda t: t.register("two")(len), SegRLError, "thing 'two' is a builtin_function_or_method; expected a"),
            (lambda t: t.register(Thing), SegRLError, "expected a name without ':', as in @register_thing('mine')"),
            (lambda t: t.register("a:b"), SegRLError, "thing 'a:b': expected a name without ':'"),
            (lambda t: t.get("math:pi"), SegRLError, "thing 'math:pi' is a float; expected a class"),
            (lambda t: t.get("math:"), SegRLError, "thing 'math:': expected 'module:attribute'"),
            (lambda t: t.get("no_such_module:x"), SegRLError, "cannot be imported: ModuleNotFoundError: No module"),
        ],
    )
    def test_errors(self, act, error, text):
        things = self.things(classes=True)
        things.register("one")(Thing)
        with pytest.raises(error) as caught:
            act(things)
        assert text in str(caught.value)
        assert things.names() == ["one"]

    def test_a_cell_run_twice_replaces_the_class(self):
        things = self.things()

        def cell():
            return things.register("cell")(type("Cell", (), {"__module__": "__main__", "__qualname__": "Cell"}))

        first, second = cell(), cell()
        assert first is not second
        assert things.get("cell") is second

    def test_local_definitions_of_one_name_are_two(self):
        def make():
            class Local: ...

            return Local

        things = self.things()
        first = things.register("local")(make())
        things.register("local")(first)
        assert not same_definition(first, make())
        with pytest.raises(SegRLError, match="registered already"):
            things.register("local")(make())

    def test_a_reference_finds_the_item_again(self):
        class Local: ...

        things = self.things()
        assert things.reference(Thing) == f"{__name__}:Thing"
        things.register("mine")(Thing)
        assert things.reference(Thing) == f"{__name__}:Thing"  # a fresh process knows no name "mine"
        with pytest.raises(SegRLError, match=r"thing '.*Local' is defined inside a function .* @register_thing"):
            things.reference(Local)
        things.register("local")(Local)
        assert things.reference(Local) == "local"
        things.register("own")(SegRLError)
        assert things.reference(SegRLError) == "own"
        assert all(things.get(things.reference(item)) is item for item in (Thing, Local, SegRLError))


class TestPlugins:
    def test_only_what_is_named_is_imported(self, install):
        good, other = install("good", PLUGIN), install("other", PLUGIN)
        things = Registry("thing", GROUP)
        assert things.names() == ["good", "other"]
        assert things.get("good").__name__ == "Good"
        assert good in sys.modules
        assert other not in sys.modules
        assert things.reference(things.get("good")) == "good"
        with pytest.raises(UnknownNameError, match=r"did you mean 'other'\? Known: good, other"):
            things.get("othr")

    def test_a_plugin_that_registers_itself(self, install):
        things = Registry("thing", GROUP)
        module = install("self", "import builtins\nGood = builtins.test_things.register('self')(type('Good', (), {}))")
        import builtins

        builtins.test_things = things  # type: ignore[attr-defined]
        try:
            assert things.get("self") is sys.modules[module].Good
        finally:
            del builtins.test_things  # type: ignore[attr-defined]

    def test_one_that_cannot_be_imported_is_an_error_with_package_and_reason(self, install):
        install("bad", "raise RuntimeError('no')")
        with pytest.raises(SegRLError) as caught:
            Registry("thing", GROUP).get("bad")
        expected = "thing 'bad' of bad 1.0 cannot be imported from 'plugin_bad:Good': RuntimeError: no"
        assert str(caught.value) == expected

    def test_two_packages_with_one_name(self, install):
        install("a", PLUGIN, entry="same")
        install("b", PLUGIN, entry="same")
        assert len(find_plugins(GROUP)["same"]) == 2
        with pytest.raises(SegRLError, match=r"thing 'same': . 1\.0 and . 1\.0 both bring it; uninstall one, or name"):
            load_plugin(GROUP, "same", "thing")
        assert "both bring it" in str(inspect_plugins(GROUP)["same"].broken)

    @pytest.mark.slow
    def test_listed_without_being_imported(self, install):
        module = install("good", PLUGIN)
        assert inspect_plugins(GROUP) == {"good": PluginReport("good", "good 1.0", "A good thing.", None)}
        assert module not in sys.modules

    @pytest.mark.parametrize("code", sampled(BROKEN, keep=3))
    def test_broken_ones_are_listed_with_the_reason(self, install, code):
        install("bad", code)
        install("good", PLUGIN)
        hangs = "0.5 s" in BROKEN[code]
        reports = inspect_plugins(GROUP, 0.5 if hangs else 60.0)
        assert reports["bad"].origin == "bad 1.0"
        assert str(reports["bad"].broken).startswith("cannot be imported from 'plugin_bad:Good': ")
        assert BROKEN[code] in str(reports["bad"].broken)
        assert hangs or reports["good"].broken is None

    @pytest.mark.slow
    def test_preloaded_modules_take_none_of_the_time(self, install, tmp_path):
        (tmp_path / "plugin_slow.py").write_text("import time\ntime.sleep(2)\nvalue = 1\n")
        install("good", "import plugin_slow\n" + PLUGIN)
        assert inspect_plugins(GROUP, 1.5, preload=["plugin_slow"])["good"].broken is None

    @pytest.mark.slow
    def test_reports_of_a_registry(self, install):
        install("good", PLUGIN)
        install("taken", PLUGIN, entry="mine")
        install("bad", "raise KeyboardInterrupt")
        things = Registry("thing", GROUP)
        things.register("mine")(Thing)
        reports = [(report.name, report.origin, report.summary, report.broken) for report in things.reports(60.0)]
        assert reports == [
            ("bad", "bad 1.0", "", "cannot be imported from 'plugin_bad:Good': KeyboardInterrupt"),
            ("good", "good 1.0", "A good thing.", None),
            ("mine", f"module {__name__}", "One thing.", None),
            ("mine", "taken 1.0", "", f"the name is taken by module {__name__}; use 'plugin_taken:Good'"),
        ]


@pytest.fixture
def segrl(capsys):
    """`main`: exit status, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = main(list(arguments))
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return run


class TestCommands:
    def test_list_names_every_kind(self, segrl):
        status, out, _ = segrl("parts", "list", "--json")
        assert status == 0
        parts = [(part["kind"], part["name"]) for part in json.loads(out)]
        for part in (
            ("adapter", "semantic_guided"),
            ("probe", "answer"),
            ("segmenter", "sam2"),
            ("dense_loss", "dice_ce"),
            ("metric", "hd95"),
        ):
            assert parts.count(part) == 1
        assert all(part["summary"] and part["broken"] is None for part in json.loads(out) if "test" not in part["name"])
        assert "adapter" in segrl("parts", "list")[1]

    def test_describe_shows_settings_shapes_and_path(self, segrl):
        status, out, _ = segrl("parts", "describe", "semantic_guided", "--json")
        assert status == 0
        part = json.loads(out)
        assert (part["kind"], part["path"]) == ("adapter", "segrl.heads.adapters:SemanticGuidedAdapter")
        assert "prompts (N, P, C)" in part["shapes"]
        settings = {setting["name"]: setting for setting in part["settings"]}
        assert (settings["num_heads"]["default"], settings["input_dim"]["required"]) == ("8", True)
        assert "must divide" in settings["num_heads"]["doc"]
        assert segrl("parts", "describe", "semantic_guided")[1].count("num_heads") >= 1

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (("dice",), "'dice' is a dense_loss and a metric; write segrl parts describe dense_loss dice"),
            (("semantic_guide",), "unknown part 'semantic_guide'; did you mean 'semantic_guided'?"),
            (("adaptor", "mlp"), "unknown kind of part 'adaptor'; did you mean 'adapter'?"),
            (("adapter", "dice"), "unknown adapter 'dice'; Known: linear"),
            (("math:hypot",), "'math:hypot': expected a kind before module:attribute, one of adapter"),
        ],
    )
    def test_describe_says_what_is_wrong(self, segrl, arguments, text):
        status, _, err = segrl("parts", "describe", *arguments)
        assert status == 2
        assert text in " ".join(err.split())

    def test_describe_of_a_path(self, segrl):
        _, out, _ = segrl("parts", "describe", "dense_loss", "segrl.losses:focal", "--json")
        assert [setting["name"] for setting in json.loads(out)["settings"]] == ["alpha", "gamma"]


class TestMetrics:
    TRUE = np.array([[1, 1, 0, 0]], dtype=bool)

    def scores(self, mask, true=TRUE, **target):
        prediction = SimpleNamespace(mask=mask)
        names = ("dice", "iou", "boundary_iou", "s_measure", "hd95")
        return {name: make_metric(name)(prediction, SimpleNamespace(mask=true, **target)) for name in names}

    def test_values(self):
        scores = self.scores(np.roll(self.TRUE, 1))
        assert scores["dice"] == 0.5
        assert scores["iou"] == pytest.approx(1 / 3)
        assert scores["s_measure"] == metrics.s_measure(np.roll(self.TRUE, 1), self.TRUE)
        assert scores["hd95"] == 0.95  # of the distances 0 and 1, interpolated
        assert self.scores(self.TRUE) == {"dice": 1.0, "iou": 1.0, "boundary_iou": 1.0, "s_measure": 1.0, "hd95": 0.0}

    def test_no_mask_is_an_empty_one(self):
        assert self.scores(None) == self.scores(np.zeros_like(self.TRUE))
        assert (self.scores(None)["dice"], self.scores(None)["hd95"]) == (0.0, None)
        assert self.scores(None, np.zeros_like(self.TRUE))["dice"] == 1.0

    def test_volumes_have_millimetres(self):
        scores = self.scores(np.roll(self.TRUE, 1)[None], self.TRUE[None], spacing_mm=(1.0, 1.0, 2.5))
        assert (scores["hd95"], scores["s_measure"], scores["dice"]) == (0.95 * 2.5, None, 0.5)

    def test_own_ones(self):
        assert make_metric(max) is max
        assert make_metric("math:hypot")(3, 4) == 5.0
        with pytest.raises(UnknownNameError, match=r"unknown metric 'dic'; did you mean 'dice'\?"):
            make_metric("dic")


def test_attributes_may_have_dots():
    assert resolve_attribute("os:path.join")("a", "b") == "a/b"
    assert path_of(3) is None
