"""Models, the weights that a script looks at, and adapters."""

from .combination import Area, Combination, Outcome

_REFUSED = "zero/test_support.py::test_refused"
_TRAINED = "zero/test_combinations.py::test_trained"
_PARTS = "zero/test_parts.py::test_models_of_all_kinds_and_their_parts"
_MODELS: Area = "Models and weights"


def _row(area: Area, key: str, name: str, outcome: Outcome, proof: str, recognised: str = "", message: str = "",
         reason: str = "") -> Combination:  # fmt: skip
    return Combination(key, area, name, outcome, proof, recognised, message, reason)


ROWS = (
    _row(
        _MODELS, "quantized", "quantized weights (bitsandbytes, torchao, GPTQ, ...)", "refused",
        f"{_REFUSED}[quantized]", "`quantization_config`, `load_in_4bit`, `load_in_8bit`, or the model's own config",
        "ZeRO-3 cannot partition quantized weights ({cls}): transformers loads them whole into every process; use "
        "BALANCE_MODE=balanced, which places them, or load the model unquantized",
    ),
    _row(
        _MODELS, "device_map", "`device_map`", "works with a note", "zero/test_support.py::test_device_map_is_dropped",
        "the argument", "device_map={device_map} is dropped: ZeRO-3 partitions every layer itself",
    ),
    _row(
        _MODELS, "teacher", "models that no Trainer trains (teachers, reference models)", "works",
        "zero/test_training.py::test_a_teacher_offloading_and_what_the_variables_say", "called without an engine",
        reason="they get an engine of their own at the first call",
    ),
    _row(
        _MODELS, "experts", "mixture-of-experts models with experts in a list", "works",
        "zero/test_training.py::test_experts_that_a_rank_does_not_need", "a ModuleList of experts",
        reason="their blocks become DeepSpeed's leaf modules, so that all experts are gathered together",
    ),
    _row(
        _MODELS, "pictures", "vision-language models, pictures on some ranks only", "works",
        "zero/test_training.py::test_pictures_in_some_batches_only", "`get_image_features` and its like",
        reason="ranks without pictures or sound run the tower on dummy inputs and add nothing to the loss",
    ),
    _row(
        _MODELS, "weights_read", "sizes and values of weights that the script reads or writes", "works",
        "zero/test_training.py::test_a_script_that_looks_at_its_weights", "an operation on a partitioned parameter",
        reason="sizes are those of the whole weight; values are gathered, if every rank does the same",
    ),
    _row(
        _MODELS, "state_dict", "`state_dict()` and `load_state_dict()` by the script", "works",
        "zero/test_training.py::test_a_script_that_looks_at_its_weights", "hooks of modules with partitioned weights",
        reason="weights are gathered module by module, if every rank does the same; what is read is in host memory",
    ),
    _row(
        _MODELS, "weights_data", "`weight.data` of a partitioned weight", "refused", f"{_REFUSED}[weights_data]",
        "reading the attribute",
        "the script reads `.data` of a weight of shape {shape} that is partitioned; put `with "
        "deepspeed.zero.GatheredParameters([weight], modifier_rank=0):` around it",
    ),
    _row(
        _MODELS, "weights_in_loss", "gradients of a weight that no engine trains, outside of its module", "refused",
        f"{_REFUSED}[weights_in_loss]", "the backward pass comes to an operation on a partitioned parameter",
        "the backward pass comes to `{operation}` of a partitioned weight of shape {shape} that no Trainer or "
        "`Accelerator().prepare(...)` trains: its gradient would be lost. Train its model with one, or set "
        "BALANCE_MODE=balanced",
    ),
    _row(
        _MODELS, "gradients", "gradients that a callback reads in `on_pre_optimizer_step`", "works",
        "zero/test_training.py::test_a_script_that_copies_and_reads_gradients", "`grad` of a partitioned parameter",
        reason="the callback runs before DeepSpeed's step, and gets the mean over the ranks, clipped",
    ),
    _row(
        _MODELS, "gradient_used_up", "gradients that the script reads after the step", "refused",
        f"{_REFUSED}[gradient_used_up]", "`grad` of a partitioned parameter, between DeepSpeed's step and `zero_grad`",
        "the script reads the gradient of a weight of shape {shape}, which DeepSpeed's step has used up; read it in a "
        "callback's on_pre_optimizer_step",
    ),
    _row(
        _MODELS, "clip_by_torch", "`torch.nn.utils.clip_grad_norm_`", "refused", f"{_REFUSED}[clip_by_torch]",
        "it reads `grad` of a partitioned parameter",
        "the script clips gradients by torch's functions, while DeepSpeed clips in its own step; set max_grad_norm in "
        "the TrainingArguments, or \"gradient_clipping\" in BALANCE_ZERO_CONFIG",
    ),
    _row(
        _MODELS, "deepcopy", "`copy.deepcopy` of a model or a layer", "works",
        "zero/test_training.py::test_a_script_that_copies_and_reads_gradients", "`copy.deepcopy` of a module",
        reason="the copy is whole on every rank, and independent of the engine",
    ),
    _row(
        _MODELS, "parametrize", "`torch.nn.utils.parametrize` of a partitioned weight", "works",
        "zero/test_training.py::test_a_script_that_copies_and_reads_gradients", "register_parametrization",
        reason="the weight is gathered for it",
    ),
    _row(
        _MODELS, "trained_weights_in_loss", "a loss that uses trained weights outside of their module", "works", _PARTS,
        "an operation on a partitioned parameter with gradients switched on",
        reason="the weight stays gathered until the backward pass has ended, and its gradient counts",
    ),
    _row(
        _MODELS, "parts", "parts of models that no Trainer trains (`teacher.model(...)`)", "works", _PARTS,
        "a module that is called without an engine", reason="their model gets an engine at the first such call",
    ),
    _row(
        _MODELS, "loaded_whole", "models that cannot be constructed of empty weights (Whisper, weight norm)",
        "works with a note", _PARTS, "loading them in partitions raises an error",
        "{cls} cannot be loaded in partitions ({reason}): each process loads it whole into host memory, one after "
        "another, and it is partitioned then",
    ),
    _row(
        _MODELS, "skipped_layers", "layers that are skipped without pictures (Mllama), pictures on some ranks only",
        "works", "zero/test_training.py::test_cross_attention_to_pictures_in_some_batches_only",
        "`cross_attention_layers`", reason="ranks without pictures run them on dummy pictures and discard the output",
    ),
    _row("Adapters", "lora", "LoRA", "works", f"{_TRAINED}[lora]"),
    _row("Adapters", "dora", "DoRA", "works", f"{_TRAINED}[dora]"),
    _row("Adapters", "modules_to_save", "`modules_to_save`", "works", f"{_TRAINED}[modules_to_save]"),
    _row("Adapters", "ia3", "IA3", "works", f"{_TRAINED}[ia3]"),
    _row("Adapters", "prompt", "prompt tuning", "works", f"{_TRAINED}[prompt]"),
    _row("Adapters", "p_tuning", "p-tuning", "works", f"{_TRAINED}[p_tuning]"),
    _row("Adapters", "prefix", "prefix tuning", "works", f"{_TRAINED}[prefix]"),
    _row(
        "Adapters", "merged", "merging adapters and saving the result", "works",
        "zero/test_training.py::test_adapters_that_the_script_saves_are_whole", "`merge_and_unload`",
    ),
    _row(
        "Adapters", "trainable_tokens", "`trainable_token_indices`", "works", f"{_TRAINED}[trainable_tokens]",
        reason="PEFT 0.16 on collects their weights on CUDA by name; elsewhere, and before, they are gathered",
    ),
)  # fmt: skip
