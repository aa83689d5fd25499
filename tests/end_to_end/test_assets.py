"""The inputs themselves: a model that was converted wrongly would make every other test here say nothing."""

import multiprocessing
import time

import pytest

from tests.end_to_end import assets


def test_smollm2_knows_the_capital_of_france(smollm2):
    """The weights and the tokenizer that came out of the GGUF file belong together."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    question = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**question, max_new_tokens=1, do_sample=False)[0, -1]
    assert tokenizer.decode(answer) == " Paris"


def test_smollm2_is_an_ordinary_checkpoint(smollm2):
    """Nothing in the folder says that its weights were quantized once, and the head is tied."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert getattr(model, "hf_quantizer", None) is None
    assert "quantization_config" not in model.config.to_dict()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_text_is_english_and_long_enough(text):
    """The text is prose, and each row fills a sequence of 128 tokens."""
    lines = text.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 256
    assert all(len(line) >= assets.TEXT_CHARACTERS for line in lines)
    assert sum(" the " in line for line in lines) > 200


def test_made_once_leaves_nothing_when_making_fails(tmp_path):
    """A failure while making an asset leaves no asset, and the next attempt starts afresh."""

    def fail(path):
        path.mkdir()
        (path / "half").write_text("")
        raise KeyboardInterrupt

    def make(path):
        path.mkdir()
        (path / "whole").write_text("")

    with pytest.raises(KeyboardInterrupt):
        assets._made_once(tmp_path / "asset", fail)
    assert not (tmp_path / "asset").exists()
    assets._made_once(tmp_path / "asset", make)
    assert [file.name for file in (tmp_path / "asset").iterdir()] == ["whole"]


def _count_makers(folder):
    def make(path):
        time.sleep(0.2)
        with (folder / "makers").open("a") as file:
            file.write("x")
        path.write_text("made")

    assert assets._made_once(folder / "asset", make).read_text() == "made"


def test_made_once_is_made_by_one_of_many_processes(tmp_path):
    """Processes that want the same asset at the same time make it once."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_count_makers, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "makers").read_text() == "x"
