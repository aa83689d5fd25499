"""`import balance_shim`, `install`, `uninstall` and `status`."""

import configparser

import pytest

from tests.processes import REPOSITORY, SHIM, code, output_of, python


def test_importing_loads_next_to_nothing():
    """No torch, no transformers, and none of the costly parts of the standard library."""
    loaded = output_of("import sys; a = set(sys.modules); import balance_shim; print(*sorted(set(sys.modules) - a))")
    assert {name.partition(".")[0] for name in loaded.split()} == {"__future__", "balance_shim"}
    assert "balance_shim.settings" not in loaded and "balance_shim.language" not in loaded


def test_importing_with_many_variables_loads_no_library():
    """Reading every variable still needs nothing but the standard library."""
    loaded = output_of(
        "import sys; import balance_shim; print(*sys.modules)",
        BALANCE_MODE="auto",
        BALANCE_MAX_MEMORY='{"0": "20GiB"}',
        BALANCE_RESERVE="5%",
    )
    assert not {"torch", "transformers", "accelerate", "wrapt", "numpy", "balance_shim.language"} & set(loaded.split())


def test_public_names():
    """The package exports what it means to, and its version is the one it is installed under."""
    names = output_of("import balance_shim; print(*balance_shim.__all__, balance_shim.__version__)").split()
    metadata = configparser.ConfigParser()
    metadata.read(REPOSITORY / "setup.cfg")
    assert names == [
        "BalanceError",
        "DeviceMapError",
        "LostModelError",
        "ModelError",
        "MoveError",
        "ReplicaError",
        "SettingError",
        "SimulationError",
        "UsageError",
        "ZeroError",
        "__version__",
        "install",
        "plan",
        "status",
        "uninstall",
        metadata["metadata"]["version"],
    ]


@pytest.mark.parametrize(
    ("mode", "expected"), [(None, "True balanced"), ("", "True balanced"), ("auto", "True auto"), ("OFF", "False off")]
)
def test_importing_arms(mode, expected):
    """Mode balanced unless BALANCE_MODE says otherwise; off arms nothing."""
    variables = {} if mode is None else {"BALANCE_MODE": mode}
    text = """
        import sys
        before = list(sys.meta_path)
        import balance_shim
        status = balance_shim.status()
        print(status.armed, status.mode)
        assert (sys.meta_path == before) is not status.armed and status.seams == ()
        """
    assert output_of(text, **variables) == expected


def test_a_map_alone_implies_its_mode():
    """BALANCE_DEVICE_MAP without BALANCE_MODE means mode map."""
    assert output_of("import balance_shim; print(balance_shim.status().mode)", BALANCE_DEVICE_MAP='{"": 0}') == "map"


def test_install_takes_settings():
    """Arguments of install override the environment and are read by the same rules."""
    text = """
        import balance_shim
        from balance_shim import state
        balance_shim.install(mode="map", device_map={"model": 0}, intercept=["auto", "none"], strict=True, seq_len=None)
        settings = state.settings()
        print(settings.mode, settings.device_map.entries, sorted(settings.intercept), settings.strict, settings.seq_len)
        balance_shim.install(mode="off")
        assert not balance_shim.status().armed
        balance_shim.install()
        assert balance_shim.status().mode == "auto"
        """
    expected = "map {'model': 0} ['auto', 'none'] True None"
    assert output_of(text, BALANCE_MODE="auto", BALANCE_SEQ_LEN="8") == expected


@pytest.mark.parametrize(
    ("arguments", "error"),
    [("nothing=1", "TypeError"), ("mode='map'", "SettingError"), ("mode='x', strict=True", "SettingError")],
)
def test_install_refuses(arguments, error):
    """An unknown setting and an explicit request that cannot be met raise, and leave what was armed as it was."""
    text = f"""
        import balance_shim
        try:
            balance_shim.install({arguments})
        except Exception as failure:
            print(type(failure).__name__, balance_shim.status().mode)
            raise
        """
    done = code(text)
    assert done.returncode == 1 and done.stdout == f"{error} balanced\n"


def test_a_refusal_that_nobody_catches_is_one_line():
    """No traceback through the shim; what the script raises itself, and hooks of its own, are as they were."""
    refused = "import balance_shim; balance_shim.install(mode='map')"
    done = code(refused)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("balance_shim: error: BALANCE_MODE=map needs BALANCE_DEVICE_MAP")
    done = code(f"try:\n    {refused}\nexcept RuntimeError:\n    1 / 0")
    assert done.stderr.startswith("Traceback") and done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"
    done = code(f"import sys; sys.excepthook = lambda kind, *_: print(kind.__name__)\ntry:\n    {refused}\n"
                "except RuntimeError:\n    1 / 0")  # fmt: skip
    assert done.stdout == "ZeroDivisionError\n"


def test_a_problem_is_one_line():
    """A value that cannot be used is said once, however often the shim is armed."""
    text = """
        import balance_shim
        balance_shim.install()
        balance_shim.uninstall()
        balance_shim.install()
        print(balance_shim.status().armed, *balance_shim.status().problems)
        """
    done = code(text, BALANCE_SEQ_LEN="many")
    assert done.stdout.startswith("True BALANCE_SEQ_LEN='many' is not")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("balance_shim: warning: BALANCE_SEQ_LEN='many'")


def test_a_fatal_problem_is_raised_by_the_import():
    """An explicit request that cannot be met stops the script where it imports us; nothing is armed."""
    text = """
        import sys
        before = list(sys.meta_path)
        try:
            import balance_shim
        except RuntimeError as error:
            print(type(error).__name__, error)
        assert sys.meta_path == before and "balance_shim" not in sys.modules
        """
    done = code(text, BALANCE_MODE="map")
    assert done.stdout.startswith("SettingError BALANCE_MODE=map") and done.stderr == ""


def test_a_spawned_worker_repeats_nothing(tmp_path):
    """A worker that imports the script again is armed like it, and says nothing a second time."""
    script = tmp_path / "train.py"
    script.write_text(
        "import multiprocessing, balance_shim\n"
        "def work():\n    print(balance_shim.status().armed)\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=work)\n"
        "    process.start()\n    process.join()\n    print(process.exitcode)\n"
    )
    done = python(str(script), BALANCE_SEQ_LEN="many")
    assert done.stdout == "True\n0\n" and done.stderr.count("\n") == 1


def test_threads_that_arm_and_import_at_once(tmp_path):
    """Arming and disarming in some threads while others import the libraries neither blocks nor fails."""
    from tests.patching import stand_in_library

    text = """
        from prelude import *
        import threading
        gate = threading.Barrier(12)
        failures = []
        def work(number):
            gate.wait()
            try:
                for _ in range(20):
                    if number % 3 == 0: balance_shim.install()
                    elif number % 3 == 1: balance_shim.uninstall()
                    else:
                        import library.leaf
                        assert library.leaf.Model.twice(2) == 4
            except BaseException as failure:
                failures.append(failure)
        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(12)]
        for thread in threads: thread.start()
        for thread in threads: thread.join(30)
        assert not failures and not any(thread.is_alive() for thread in threads), failures
        armed = balance_shim.status().armed
        leaf = sys.modules["library.leaf"]
        from balance_shim.patching import registry
        assert registry.is_ours(leaf.get_device_map) is armed
        assert any(type(finder).__module__ == "balance_shim.patching.import_hooks" for finder in sys.meta_path) is armed
        """
    output_of(text, paths=(SHIM, stand_in_library.write(tmp_path)))


@pytest.mark.parametrize("first", ["torch", "balance_shim"])
def test_simulated_devices(first, tmp_path):
    """BALANCE_SIMULATE makes devices as soon as torch is there, and leaves their peaks in the report's folder."""
    pytest.importorskip("torch")
    text = f"""
        import {first}
        import balance_shim, torch
        x = torch.zeros(256, device="npu:1")
        """
    done = code(text, BALANCE_SIMULATE="2x1GiB", BALANCE_REPORT=str(tmp_path / "new"), BALANCE_MODE="off")
    assert done.returncode == 0, done.stderr
    import json

    record = json.loads((tmp_path / "new" / "simulation.json").read_text())
    assert [device["name"] for device in record] == ["npu:0", "npu:1"]
    assert record[0]["capacity"] == 2**30 and record[1]["peak"] >= 1024


def test_uninstalling_puts_the_excepthook_back():
    """A refusal that was raised and caught leaves nothing behind; a hook of the program's own stays."""
    text = """
        import sys
        before = sys.excepthook
        import balance_shim
        try:
            balance_shim.install(mode="map")
        except RuntimeError:
            pass
        assert sys.excepthook is not before
        balance_shim.uninstall()
        assert sys.excepthook is before
        balance_shim.install()
        sys.excepthook = own = lambda *error: None
        balance_shim.uninstall()
        assert sys.excepthook is own
        """
    assert code(text).returncode == 0
    assert code("import sys; before = sys.excepthook\nimport balance_shim; assert sys.excepthook is before",
                BALANCE_MODE="off").returncode == 0  # fmt: skip
