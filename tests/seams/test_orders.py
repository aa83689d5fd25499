"""Import, arm, disarm and reload in every order, each in a process of its own."""

import itertools

import pytest

from tests.patching import stand_in_library
from tests.processes import SHIM, output_of

STEPS = {
    "import": "import library.leaf",
    "arm": "balance_shim.install()",
    "disarm": "balance_shim.uninstall()",
    "reload": "if 'library.leaf' in sys.modules: importlib.reload(sys.modules['library.leaf'])",
}

# After each step: patched exactly if armed and imported, acting once a call; otherwise nothing of ours anywhere.
CHECK = """
def check(armed):
    leaf = sys.modules.get("library.leaf")
    assert balance_shim.status().armed is armed
    if leaf is None:
        return
    seam = sys.modules.get("stand_in_seam")
    before = len(seam.acted) if seam else 0
    assert leaf.Special.from_pretrained("m", device_map="auto") == ["Special", "m", "auto"]
    assert leaf.get_device_map("m") == ["m", None] and leaf.Model.twice(2) == 4 and leaf.Model().forward(1) == 2
    acted = len(seam.acted) - before if seam else 0
    assert acted == (4 if armed else 0), acted
    if not armed:
        assert "__wrapped__" not in vars(leaf.get_device_map) and "forward" not in vars(leaf.Special)
        assert sys.meta_path == meta_path
"""

ORDERS = [
    *(order for order in itertools.product(STEPS, repeat=3) if "import" in order and "arm" in order),
    *itertools.permutations(STEPS),
    ("arm", "import", "disarm", "arm"),
    ("arm", "disarm", "import", "arm", "disarm", "arm", "disarm"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return stand_in_library.write(tmp_path_factory.mktemp("stand_in"))


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_every_order(library, order):
    """Whatever came before, arming patches what is imported once, and disarming leaves it as it was."""
    lines = ["from prelude import *", "import importlib", "meta_path = list(sys.meta_path)", CHECK]
    armed = False
    for step in order:
        armed = {"arm": True, "disarm": False}.get(step, armed)
        lines += [STEPS[step], f"check({armed})"]
    output_of("\n".join(lines), paths=(SHIM, library))


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("first", ["import", "arm"])
def test_disarming_restores_the_very_objects(library, first, times):
    """After uninstalling, `vars()` of class and module hold the objects of before, in their order."""
    text = f"""
        from prelude import *
        import library.leaf as leaf
        owners = (leaf.Model, leaf.Special, leaf)
        if {first == "arm"}:
            # What the class body left can only be had before the hook fires: run the body once more by hand.
            del sys.modules["library.leaf"]
            balance_shim.install()
            import library.leaf as leaf
            owners = (leaf.Model, leaf.Special, leaf)
            balance_shim.uninstall()
        before = [list(vars(owner).items()) for owner in owners]
        for _ in range({times}):
            balance_shim.install()
            balance_shim.install()
            assert [list(vars(owner).items()) for owner in owners] != before
            balance_shim.uninstall()
            balance_shim.uninstall()
        after = [list(vars(owner).items()) for owner in owners]
        for old, new in zip(before, after):
            assert [name for name, _ in old] == [name for name, _ in new]
            assert all(a is b for (_, a), (_, b) in zip(old, new))
        """
    output_of(text, paths=(SHIM, library))


REAL_ORDERS = {
    "import-arm-disarm": ("take(); arm(); check(True); disarm(); check(False)", "import"),
    "arm-import-disarm-arm": ("arm(); take(); check(True); disarm(); check(False); arm(); check(True)", "arm"),
}


@pytest.mark.parametrize("name", REAL_ORDERS)
def test_real_transformers(name):
    """With transformers itself: arming before or after its import patches it, and disarming restores it."""
    pytest.importorskip("transformers")
    steps, _ = REAL_ORDERS[name]
    text = f"""
        import os, sys
        os.environ["BALANCE_MODE"] = "off"
        import balance_shim
        assert "torch" not in sys.modules and "transformers" not in sys.modules
        first = {{}}

        def owners():
            modeling, arguments, trainer = (sys.modules["transformers." + leaf] for leaf in LEAVES)
            return modeling.PreTrainedModel, modeling, arguments.TrainingArguments, trainer.Trainer

        LEAVES = ("modeling_utils", "training_args", "trainer")

        def take():
            import transformers.trainer, transformers.modeling_utils
            if not balance_shim.status().armed:
                first.update(enumerate(dict(vars(owner)) for owner in owners()))

        def arm():
            balance_shim.install(mode="balanced")

        def disarm():
            balance_shim.uninstall()

        def check(armed):
            targets = [seam.target for seam in balance_shim.status().seams]
            assert ("transformers.modeling_utils.PreTrainedModel.from_pretrained" in targets) is armed, targets
            assert ("transformers.training_args.TrainingArguments.__post_init__" in targets) is armed, targets
            assert ("transformers.trainer.Trainer.train" in targets) is armed, targets
            from balance_shim.patching import registry
            modeling, arguments, trainer = (sys.modules["transformers." + leaf] for leaf in LEAVES)
            found = (
                vars(modeling.PreTrainedModel)["from_pretrained"].__func__,
                vars(arguments.TrainingArguments)["__post_init__"],
                vars(trainer.Trainer)["train"],
            )
            assert all(registry.is_ours(function) is armed for function in found)
            if not armed:
                for place, before in first.items():
                    after = dict(vars(owners()[place]))
                    assert before.keys() == after.keys() and all(before[key] is after[key] for key in before)

        {steps}
        """
    output_of(text)
