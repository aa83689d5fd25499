"""axolotl's save: by all ranks where the mode has chosen DeepSpeed, as if axolotl's own config had."""

from types import ModuleType, SimpleNamespace

import pytest

from balance_shim import modes
from balance_shim.modes.base import Mode
from balance_shim.modes.zero3 import Zero3
from balance_shim.patching import registry
from balance_shim.patching.guard import SeamMoved
from balance_shim.seams import axolotl_saving


@pytest.mark.parametrize(
    ("mode", "own", "expected"),
    [(Zero3(), None, {"ours": 3}), (Zero3(), "ds.json", "ds.json"), (Mode(), None, None)],
    ids=["ours", "the user's", "off"],
)
def test_the_config_has_deepspeed_while_it_saves(mode, own, expected, monkeypatch):
    """The user's own config stands, and afterwards the config is as before."""
    module = ModuleType("axolotl.train")
    module.save_trained_model = lambda cfg, trainer, model: cfg.deepspeed
    monkeypatch.setattr(modes, "current", lambda: mode)
    axolotl_saving.apply(module)
    try:
        cfg = SimpleNamespace(deepspeed=own)
        trainer = SimpleNamespace(args=SimpleNamespace(deepspeed={"ours": 3}))
        assert module.save_trained_model(cfg, trainer, "model") == expected
        assert cfg.deepspeed == own
    finally:
        registry.restore(tuple(patch for patch in registry.patches() if patch.module == "axolotl.train"))


def test_another_version_is_told():
    """A version without that function is left alone, with a line that names it."""
    with pytest.raises(SeamMoved):
        axolotl_saving.apply(ModuleType("axolotl.train"))
