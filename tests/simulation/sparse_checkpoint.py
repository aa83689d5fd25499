"""Checkpoints of big models that take no disk: real headers, and holes where the weights would be.

A file system stores nothing for the parts of a file that nobody wrote, and reads zeros there. So a 7 B model is a few
kilobytes, and still loads with `from_pretrained`. Meant for simulation with shapes only, where nobody reads weights.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

LARGEST_SHARD = 4 * 2**30  # a shard is mapped into memory as a whole, which a small machine refuses for big ones

_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_sparse_checkpoint(
    config: transformers.PretrainedConfig, folder: "str | Path", dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write a checkpoint of the model that `config` describes, with a tokenizer of bytes, and return the folder.

    Arguments:
        config: its `architectures`, where given, name the class of the model; otherwise it is a causal one.
        dtype: of all floating-point weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = _on_meta(config)
    config.architectures = [type(model).__name__]
    setattr(config, "dtype" if hasattr(type(config), "dtype") else "torch_dtype", dtype)
    config.save_pretrained(folder)
    weights = dict(_weights(model, dtype))
    shards = list(_shards(weights))
    where = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_holes(folder / file, {name: weights[name] for name in names})
        where.update(dict.fromkeys(names, file))
    total = sum(map(_size, weights.values()))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    _tokenizer().save_pretrained(folder)
    return folder


def _on_meta(config) -> torch.nn.Module:
    name = (config.architectures or [None])[0]
    with torch.device("meta"):
        if name is None:
            return transformers.AutoModelForCausalLM.from_config(config)
        return getattr(transformers, name)(config)


def _weights(model, dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a checkpoint of `model` holds, leaving out what is tied to something before it."""
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, torch.empty_like(tensor, dtype=dtype) if tensor.is_floating_point() else tensor


def _shards(weights) -> Iterator[list[str]]:
    shard, size = [], 0
    for name, tensor in weights.items():
        if shard and size + _size(tensor) > LARGEST_SHARD:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += _size(tensor)
    yield shard


def _size(tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _write_holes(path: Path, weights) -> None:
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in weights.items():
        end = start + _size(tensor)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + start)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that makes one token of each byte, so that any text does for any vocabulary above 260."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", bos_token="<|im_start|>"
    )
