"""Arms balance_shim when an interpreter starts; nothing in the user's script changes.

Put this folder and `shim/` on `PYTHONPATH` and set `BALANCE_MODE`. `balance-shim run` does it for you, with a copy of
this file that comes with the package.

Every Python that inherits `PYTHONPATH` runs this file, of any version and whatever it is for. So it keeps to syntax
that old ones read, does nothing unless asked, runs the `sitecustomize` it hides, and never stops the interpreter.
"""

import os
import sys

# `python -m` of these does not train. The package's own command only prints, or starts programs that may train.
_NOT_TRAINING = (
    "pip", "ensurepip", "venv", "virtualenv", "py_compile", "compileall", "build", "setuptools", "wheel", "site",
    "sysconfig", "pyproject_hooks", "balance_shim", "torch._inductor",
)  # fmt: skip
_NOT_TRAINING_PROGRAMS = ("pip", "balance-shim", "virtualenv", "setup.py", "_in_process.py", "__pip-runner__.py")
# Helpers of `multiprocessing` and of `multiprocess`, its fork that `datasets` uses: data workers, resource trackers.
_WORKERS = ("from multiprocessing.", "from multiprocess.")


def _is_asked_for():
    """Whether the environment wants anything of us. `off` is a master switch, except that simulating is no mode."""
    mode = os.environ.get("BALANCE_MODE", "").strip().lower()
    has_mode = mode != "off" and (mode or os.environ.get("BALANCE_DEVICE_MAP", "").strip())
    return bool(has_mode or os.environ.get("BALANCE_SIMULATE", "").strip())


def _may_train():
    """Whether this interpreter may come to train a model."""
    if sys.version_info < (3, 10):
        return False
    arguments = getattr(sys, "argv", None) or [""]
    program = arguments[0]
    if program in ("-m", "-c"):
        # Here sys.argv lacks the module's name or the code. sys.orig_argv has it, in front of the arguments that both
        # share: as a word of its own, or run together as in "-mpip".
        command = sys.orig_argv[: len(sys.orig_argv) - len(arguments) + 1]
        target = command[-1] if command else ""
        if target.startswith("-"):
            target = target.partition(program[1])[2]
        if program == "-m":
            return not any(target == name or target.startswith(name + ".") for name in _NOT_TRAINING)
        # pip runs a setup.py through `-c`, too.
        return not (target.lstrip().startswith(_WORKERS) or ("setuptools" in target and "setup.py" in target))
    name = os.path.basename(program)
    return not (name in _NOT_TRAINING_PROGRAMS or (name.startswith("pip") and name[3:].replace(".", "").isdigit()))


def _arm():
    """Import the package, which arms. A failure of ours costs one line; the program runs on."""
    try:
        try:
            import balance_shim  # noqa: F401
        except ImportError as error:
            # Not installed for this interpreter. Where this file is the package's own copy, the package is around it;
            # its parent folder must not go on sys.path, for that may be the site-packages of another interpreter.
            package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
            if error.name != "balance_shim" or os.path.basename(package) != "balance_shim":
                raise
            _import_from(package)
    except Exception as error:
        reason = "%s: %s" % (type(error).__name__, error)
        sys.stderr.write("balance_shim: warning: not armed (%s); running without it\n" % reason)


def _import_from(package):
    from importlib.util import module_from_spec, spec_from_file_location

    init = os.path.join(package, "__init__.py")
    spec = spec_from_file_location("balance_shim", init, submodule_search_locations=[package])
    sys.modules["balance_shim"] = module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["balance_shim"]
        raise


def _run_hidden_sitecustomize():
    """Run the `sitecustomize` that this one hides, as if this folder were not on the path; let its errors through."""
    folder = os.path.realpath(os.path.dirname(os.path.abspath(__file__)))
    paths = list(sys.path)
    positions = [place for place, entry in enumerate(paths) if entry and os.path.realpath(entry) == folder]
    for place in positions:
        sys.path.remove(paths[place])
    # The import system gives out what stands here in the end: the hidden module if there is one, as without us.
    this = sys.modules.pop(__name__)
    try:
        import sitecustomize  # noqa: F401
    except ImportError as error:
        # Only this name missing means that there is none. A file that fails to import something else is broken, and
        # that is for its owner to see: site.py makes the same distinction.
        if getattr(error, "name", __name__) != __name__:
            raise
        sys.modules[__name__] = this
    finally:
        for place in positions:
            sys.path.insert(_place_in_changed_path(paths, place), paths[place])


def _place_in_changed_path(paths, place):
    """Return where `paths[place]` belongs in sys.path, which the hidden file may have changed: by its neighbour."""
    if place > 0 and paths[place - 1] in sys.path:
        return sys.path.index(paths[place - 1]) + 1
    if place + 1 < len(paths) and paths[place + 1] in sys.path:
        return sys.path.index(paths[place + 1])
    return 0


if __name__ == "sitecustomize":  # not when somebody only reads this file
    try:
        _run_hidden_sitecustomize()
    finally:
        # After the user's file, which may set paths and variables for us; and even if it failed.
        if _is_asked_for() and _may_train():
            _arm()
