"""The models that the benchmarks train: their published sizes, written out, and checkpoints of them without weights.

    python benchmarks/models.py FOLDER [NAME ...]     write the checkpoints to FOLDER/NAME, those there already left out

A checkpoint has real headers and holes where the numbers would be (see tests/simulation/sparse_checkpoint.py), so all
of them together take a few megabytes of disk. Names and chains below need no library; writing imports transformers.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
REMOTE_CODE = Path(__file__).with_name("internvl_chat.py")

Unit = tuple[str, ...]  # modules that belong together on one device, named as in a device map


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        name: as in tables and folders.
        is_vision: whether pictures go in as well.
        chain: its modules in the order of the forward pass, which cover it; what a contiguous map is cut from.
        layers: the decoder layers among them.
        machine_scale: a machine of 24+24+48+48 GiB times this is one that people would train it on.
        make_config: returns its configuration; imports transformers.
        remote_code: the class comes with the checkpoint.
    """

    name: str
    is_vision: bool
    chain: tuple[Unit, ...]
    layers: tuple[str, ...]
    machine_scale: int
    make_config: Callable[[], Any] = field(compare=False)
    remote_code: bool = False


def _text_chain(layers: int, stem: str = "model", head: str = "lm_head") -> tuple[Unit, ...]:
    decoder = [(name,) for name in _numbered(f"{stem}.layers", layers)]
    return ((f"{stem}.embed_tokens", f"{stem}.rotary_emb"), *decoder, (f"{stem}.norm",), (head,))


def _numbered(stem: str, count: int) -> tuple[str, ...]:
    return tuple(f"{stem}.{number}" for number in range(count))


def _text(name: str, layers: int, machine_scale: int, make_config: Callable[[], Any]) -> Model:
    return Model(name, False, _text_chain(layers), _numbered("model.layers", layers), machine_scale, make_config)


def _qwen2(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> Any:
    import transformers

    return transformers.Qwen2Config(
        vocab_size=152064, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=32768, rms_norm_eps=1e-6,
        rope_theta=1e6, tie_word_embeddings=False,
    )  # fmt: skip


def _llama_3_8b() -> Any:
    import transformers

    return transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=5e5,
        tie_word_embeddings=False, bos_token_id=128000, eos_token_id=128001,
    )  # fmt: skip


def _mixtral_8x7b() -> Any:
    import transformers

    return transformers.MixtralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=32768,
        rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None, tie_word_embeddings=False,
    )  # fmt: skip


def _qwen2_5_vl_7b() -> Any:
    import transformers

    text = {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
    }  # fmt: skip
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=151655, video_token_id=151656,
        vision_start_token_id=151652, vision_end_token_id=151653, tie_word_embeddings=False,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )  # fmt: skip


def _intern_parts() -> tuple[Any, Any]:
    """Return the configurations of InternViT-6B (the 45 layers that are used) and InternLM2-20B.

    The latter as a Llama, which it is but for the order in which it stores queries, keys and values.
    """
    import transformers

    vision = transformers.InternVLVisionConfig(
        hidden_size=3200, num_hidden_layers=45, num_attention_heads=25, intermediate_size=12800, image_size=[448, 448],
        patch_size=[14, 14], use_qk_norm=True, norm_type="rms_norm", attention_bias=False, use_mean_pooling=True,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        vocab_size=92553, hidden_size=6144, intermediate_size=16384, num_hidden_layers=48, num_attention_heads=48,
        num_key_value_heads=8, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=1e6,
        tie_word_embeddings=False,
    )  # fmt: skip
    return vision, text


def _internvl_26b() -> Any:
    import transformers

    vision, text = _intern_parts()
    return transformers.InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=92546, tie_word_embeddings=False,
        architectures=["InternVLForConditionalGeneration"],
    )  # fmt: skip


def _internvl_26b_remote() -> Any:
    import transformers
    from internvl_chat import InternVLChatConfig, InternVLChatModel

    transformers.AutoConfig.register("internvl_chat", InternVLChatConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(InternVLChatConfig, InternVLChatModel, exist_ok=True)
    vision, text = _intern_parts()
    return InternVLChatConfig(vision, text, tie_word_embeddings=False)


_QWEN_VISION: tuple[Unit, ...] = (
    ("model.visual.patch_embed", "model.visual.rotary_pos_emb"),
    *((name,) for name in _numbered("model.visual.blocks", 32)),
    ("model.visual.merger",),
)
_INTERN_VISION: tuple[Unit, ...] = (
    ("model.vision_tower.embeddings",),
    *((name,) for name in _numbered("model.vision_tower.encoder.layer", 45)),
    ("model.vision_tower.layernorm", "model.multi_modal_projector"),
)

MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        _text("Qwen2.5-7B", 28, 1, lambda: _qwen2(3584, 18944, 28, 28, 4)),
        _text("Llama-3-8B", 32, 1, _llama_3_8b),
        Model(
            "Qwen2.5-VL-7B", True, (*_QWEN_VISION, *_text_chain(28, "model.language_model")),
            _numbered("model.language_model.layers", 28), 1, _qwen2_5_vl_7b,
        ),
        Model(
            "InternVL2.5-26B", True, (*_INTERN_VISION, *_text_chain(48, "model.language_model")),
            _numbered("model.language_model.layers", 48), 4, _internvl_26b,
        ),
        Model(
            "InternVL2.5-26B-remote", True,
            (("vision_model",), ("mlp1",), *_text_chain(48, "language_model.model", "language_model.lm_head")),
            _numbered("language_model.model.layers", 48), 4, _internvl_26b_remote, remote_code=True,
        ),
        _text("Qwen2.5-72B", 80, 8, lambda: _qwen2(8192, 29568, 80, 64, 8)),
        _text("Mixtral-8x7B", 32, 6, _mixtral_8x7b),
    )
}  # fmt: skip


def write_checkpoint(model: Model, folder: Path) -> Path:
    """Write a checkpoint of `model` without weights to `folder`, unless it is there, and return the folder."""
    done = folder / "written"
    if done.exists():
        return folder
    from tests.simulation.sparse_checkpoint import write_sparse_checkpoint

    write_sparse_checkpoint(model.make_config(), folder)
    if model.remote_code:
        shutil.copy(REMOTE_CODE, folder)
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["auto_map"] = {
            "AutoConfig": f"{REMOTE_CODE.stem}.InternVLChatConfig",
            "AutoModelForCausalLM": f"{REMOTE_CODE.stem}.InternVLChatModel",
        }
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    done.touch()
    return folder


def main() -> None:
    folder, *names = sys.argv[1:]
    sys.path.insert(0, str(REPOSITORY))
    for name in names or MODELS:
        print(write_checkpoint(MODELS[name], Path(folder, name)))


if __name__ == "__main__":
    main()
