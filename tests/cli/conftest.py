"""Small models in folders, the plans that the command makes for them, and what real loads make of those."""

import json

import pytest

from tests import models
from tests.cli.running import (
    MACHINE,
    SAVED,
    SHORT,
    dtype_argument,
    simulated,
    together,
)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with a folder for each small model, weights included, which only the real loads need."""
    folder = tmp_path_factory.mktemp("models")
    for name in SAVED:
        on_meta = models.ALL[name]()
        # Real checkpoints say these.
        on_meta.config.decoder_start_token_id = 0
        for number, part in enumerate(("image_token_id", "video_token_id", "vision_start_token_id"), start=500):
            setattr(on_meta.config, part, number)
        type(on_meta)(on_meta.config).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def plans(saved, tmp_path_factory):
    """The plan of each small model, and a folder with the map that was written for each."""
    maps = tmp_path_factory.mktemp("maps")
    commands = {name: (saved / name, "--gpus", MACHINE, *SHORT, "--output", maps / f"{name}.json") for name in SAVED}
    done = together(*((*command, "--json") for command in commands.values()))
    return {name: json.loads(output) for name, (_, output, _) in zip(commands, done, strict=True)}, maps


@pytest.fixture(scope="session")
def loaded(saved, plans):
    """What real loads on simulated devices make of "auto" and of the written maps: name -> "auto"/"map" -> map."""
    return simulated(
        f"""
        import json, sys, transformers
        found = {{}}
        for name in {list(SAVED)!r}:
            folder = {str(saved)!r} + "/" + name
            config = transformers.AutoConfig.from_pretrained(folder)
            load = getattr(transformers, config.architectures[0]).from_pretrained
            with open({str(plans[1])!r} + f"/{{name}}.json") as file:
                written = json.load(file)
            dtype = {{{dtype_argument()!r}: "float32"}}
            auto = load(folder, device_map="auto", **dtype)
            model = load(folder, device_map=written, **dtype)
            homes = {{key: str(tensor.device) for key, tensor in model.state_dict().items()}}
            found[name] = {{"auto": auto.hf_device_map, "written": written, "homes": homes}}
        print(json.dumps(found))
        """
    )
