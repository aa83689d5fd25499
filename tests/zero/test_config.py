"""The DeepSpeed config: complete for any model, under what the user says himself."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

import balance_shim
from balance_shim.errors import SettingError
from balance_shim.upstream import loading_dtype
from balance_shim.zero import config, mean_loss, moe
from balance_shim.zero.weights import loading
from tests import models


@pytest.fixture
def zero3():
    """Settings of mode zero3, without arming anything in this process but the settings."""

    def settings(**more):
        balance_shim.install(mode="zero3", **more)

    yield settings
    balance_shim.uninstall()


def test_alone_it_is_stage_3_with_the_trainers_optimizer(zero3):
    """Nothing of the user's: all there is comes from us or, as "auto", from the TrainingArguments."""
    zero3()
    own_config, added = config.for_training(None)
    assert own_config["zero_optimization"]["stage"] == 3 and added == []
    assert "optimizer" not in own_config and "scheduler" not in own_config and "train_batch_size" not in own_config
    assert "offload_optimizer" not in own_config["zero_optimization"]


@pytest.mark.parametrize(("value", "parts"), [("optimizer", 1), ("all", 2)])
def test_offload(zero3, value, parts):
    """The optimizer's state, and the weights too, go to host memory."""
    zero3(offload=value)
    zero = config.for_training(None)[0]["zero_optimization"]
    assert [zero[name]["device"] for name in ("offload_optimizer", "offload_param") if name in zero] == ["cpu"] * parts


def test_the_users_config_wins_key_by_key(zero3, tmp_path):
    """The variable over the script's, the script's over ours, down into the objects; what we add is named."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"sub_group_size": 5, "overlap_comm": True}}))
    zero3(zero_config=str(file))
    script = {
        "train_batch_size": "auto",
        "zero_optimization": {"stage": 3, "sub_group_size": 7, "round_robin_gradients": 1},
    }
    before = json.dumps(script)
    merged, added = config.for_training(script)
    zero = merged["zero_optimization"]
    assert (zero["sub_group_size"], zero["overlap_comm"], zero["round_robin_gradients"]) == (5, True, 1)
    assert zero["contiguous_gradients"] is True and "train_batch_size" not in merged
    assert "zero_optimization.contiguous_gradients" in added and "zero_optimization.stage" not in added
    assert "zero_optimization.overlap_comm" not in added and "bf16" in added
    assert json.dumps(script) == before


def test_the_config_of_accelerate_launch(zero3, monkeypatch, tmp_path):
    """Its file counts where the script passes none; another stage, in the file or as an option, is refused."""
    zero3()
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"sub_group_size": 5}}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    assert config.for_training(None)[0]["zero_optimization"]["sub_group_size"] == 5
    assert config.for_training({"bf16": {"enabled": True}})[0]["zero_optimization"]["sub_group_size"] != 5
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    with pytest.raises(SettingError, match=r"accelerate launch.* asks for ZeRO stage 2"):
        config.for_training(None)


@pytest.mark.parametrize(
    ("script", "message"),
    [({"zero_optimization": {"stage": 2}}, "stage 2"), ('{"zero_optimization": 3}', "not an object"), ("[]", "object"),
     ({"bf16": True}, "bf16 is True, not an object"), ('{"optimizer": null}', "optimizer is None, not an object"),
     ("/no/such.json", "cannot be read")],
)  # fmt: skip
def test_a_script_config_that_is_not_zero3(zero3, script, message):
    """What cannot be ZeRO-3 is refused, and the line says whose config it is."""
    zero3()
    with pytest.raises(SettingError, match=message) as caught:
        config.for_training(script)
    assert str(caught.value).startswith("the DeepSpeed config of the script")


def internvl_like():
    """A config such as remote InternVL's, whose width stands in `llm_config` only."""
    return SimpleNamespace(llm_config=SimpleNamespace(hidden_size=80), vision_config=SimpleNamespace(hidden_size=640))


def llava():
    return transformers.LlavaConfig(text_config=transformers.LlamaConfig(hidden_size=96))


WIDTHS = {
    "text": (lambda: transformers.LlamaConfig(hidden_size=64), 64),
    "GPT-2": (lambda: transformers.GPT2Config(n_embd=40), 40),
    "T5": (lambda: transformers.T5Config(d_model=72), 72),
    "text in vision-language": (llava, 96),
    "remote InternVL": (internvl_like, 80),
    "none at all": (lambda: None, 24),
}  # fmt: skip


@pytest.mark.parametrize("name", WIDTHS)
def test_bucket_sizes_are_numbers_for_every_model(name):
    """transformers refuses to fill them in for configs without hidden_size; ours are whole numbers for all."""
    make, width = WIDTHS[name]
    model = torch.nn.Linear(24, 99)
    model.config = make()
    own_config = config.own()
    own_config["zero_optimization"]["stage3_prefetch_bucket_size"] = 17  # the user's own
    config.fill_hidden_size(own_config, model)
    zero = own_config["zero_optimization"]
    assert [zero[key] for key in config.HIDDEN_SIZE_KEYS] == [width * width, 17, 10 * width]


def test_experts_in_a_list_are_gathered_together():
    """Blocks with a list of experts become leaf modules; experts in one tensor need nothing."""
    block = torch.nn.Module()
    block.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    model = torch.nn.Sequential(block, torch.nn.Linear(2, 2))
    assert moe.leaf_classes(model) == [torch.nn.Module]
    assert moe.leaf_classes(models.llama()) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": torch.float16}, "float16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "auto"}, "bfloat16"),
        ({"torch_dtype": None}, "float32"),
    ],
)
def test_the_precision_of_a_load(options, expected):
    """As this version of transformers reads it, by either name of the argument."""
    config_ = transformers.LlamaConfig(**models.SIZES)
    config_.torch_dtype = torch.bfloat16
    assert str(loading_dtype.dtype_of(config_, options)) == f"torch.{expected}"


class TrainersConfig:
    """Stands for the config object of `TrainingArguments` that ask for no mixed precision."""

    def __init__(self, **precisions):
        self.config = {kind: {"enabled": precisions.get(kind, False)} for kind in ("bf16", "fp16")}

    def trainer_config_process(self):
        raise NotImplementedError

    def enabled(self):
        return [kind for kind, part in self.config.items() if part["enabled"]]


def test_precision_is_that_of_the_model_that_trains(monkeypatch):
    """Not of another one, loaded before or after it; and what the arguments ask for stays."""
    requested = TrainersConfig(bf16=True)
    loading.adopt_precision(requested, torch.float32)
    assert requested.enabled() == ["bf16"]
    adopted = TrainersConfig()
    monkeypatch.setattr(loading, "_latest", torch.bfloat16)  # a reference model
    loading.adopt_precision(adopted)
    assert adopted.enabled() == ["bf16"]
    loading.adopt_precision(adopted, torch.float32)
    assert adopted.enabled() == []
    adapted = torch.nn.ModuleList([torch.nn.Linear(9, 9).to(torch.bfloat16), torch.nn.Linear(2, 2)])
    loading.adopt_precision(adopted, loading.main_dtype(adapted))
    assert adopted.enabled() == ["bf16"]


@pytest.mark.parametrize(("takes", "divides", "expected"), [(True, True, 2.0), (True, False, 0.5), (False, False, 1.0)])
def test_a_loss_that_counts_no_tokens_has_the_weight_of_its_tokens(takes, divides, expected, monkeypatch):
    """The Trainer multiplies by the number of processes where the model takes the number of all tokens; a model that
    does not divide by it has its loss weighed by the part of the tokens that are its own, here 1 of 4."""
    trainer = SimpleNamespace(
        args=SimpleNamespace(average_tokens_across_devices=True, world_size=2),
        model_accepts_loss_kwargs=takes,
        compute_loss_func=None,
        accelerator=SimpleNamespace(num_processes=2),
    )
    assert mean_loss.is_averaged(trainer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.copy_(torch.tensor([4, 2])))
    count = mean_loss.noted(trainer, torch.tensor(4)) if takes else None
    with mean_loss.counting_targets() as numbers:
        torch.nn.CrossEntropyLoss()(torch.zeros(3, 5), torch.tensor([1, -100, -100]))
    loss = torch.tensor(2.0)
    if takes:
        moved = count.to("meta") if divides else count.to(count.device)
        assert moved.device.type == ("meta" if divides else "cpu")
        if divides:
            _ = loss.to("meta") / moved
    assert mean_loss.corrected(trainer, (loss, "outputs"), count, numbers) == (torch.tensor(expected), "outputs")


def test_a_loss_whose_tokens_are_unknown_has_an_equal_weight():
    """Not the mean of cross_entropy, or means of different numbers of targets: the mean of the ranks' losses."""
    trainer = SimpleNamespace(
        args=SimpleNamespace(), model_accepts_loss_kwargs=False, accelerator=SimpleNamespace(num_processes=2)
    )
    with mean_loss.counting_targets() as numbers:
        assert mean_loss.corrected(trainer, torch.tensor(2.0), None, numbers) == 2.0
        torch.nn.functional.cross_entropy(torch.zeros(3, 5), torch.arange(3))
        torch.nn.functional.cross_entropy(torch.zeros(2, 5), torch.arange(2))
    assert [int(number) for number in numbers] == [3, 2]
    assert mean_loss.corrected(trainer, torch.tensor(2.0), None, numbers) == 2.0


@pytest.mark.parametrize(("bytes_", "expected"), [(None, 1e9), (80 << 30, 1e9), (8 << 30, 214748364)])
def test_small_devices_keep_fewer_parameters_whole(zero3, monkeypatch, bytes_, expected):
    """A twentieth of the smallest device, which the launcher tells all ranks; the usual number where nobody tells."""
    zero3()
    monkeypatch.delenv("BALANCE_SHIM_SMALLEST_DEVICE", raising=False)
    if bytes_ is not None:
        monkeypatch.setenv("BALANCE_SHIM_SMALLEST_DEVICE", str(bytes_))
    zero = config.for_training(None)[0]["zero_optimization"]
    assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == expected
    assert zero["sub_group_size"] == 1e8
