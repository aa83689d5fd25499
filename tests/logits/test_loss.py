"""The loss from logits in chunks: the same value, the same gradients, and never more logits than a chunk.

Tolerances, in float32: 1e-6 of the loss, and 1e-5 of the largest gradient of each parameter.
"""

import contextlib

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.trainer_pt_utils import LabelSmoother

from balance_shim.logits import chunks, head
from balance_shim.logits.deferred import DeferredLogits
from balance_shim.training.chunked_loss import deferring_for_a_step
from balance_shim.versions import version_of

VOCABULARY, CHUNK, ROWS, TOKENS = 640, 8, 2, 24
SIZES = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY,
}  # fmt: skip
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Eight rows of logits fit into a chunk, however many there are."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", CHUNK * chunks.BYTES_PER_LOGIT * VOCABULARY)


class MostRows(TorchDispatchMode):
    """Notes the most rows of values over the vocabulary that any operation has returned."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        weight = (SIZES["hidden_size"], VOCABULARY)
        if isinstance(found, torch.Tensor) and found.shape[-1:] == (VOCABULARY,) and found.shape[-2:] != weight:
            self.rows = max(self.rows, found.numel() // VOCABULARY)
        return found


class PackedLinear(nn.Linear):
    """What a quantized linear layer looks like: whole numbers and a scale, made into a matrix on each call."""

    def __init__(self, plain):
        super().__init__(plain.in_features, plain.out_features, bias=False)
        scale = plain.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((plain.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, hidden):
        return nn.functional.linear(hidden, self.weight.to(hidden.dtype) * self.scale)


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **SPECIAL, **changes))


def soft_capped():
    config = transformers.Gemma2Config(**SIZES, **SPECIAL, head_dim=12, final_logit_softcapping=2.0)
    return transformers.Gemma2ForCausalLM(config)


def scaled():
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, **SPECIAL, logits_scaling=3.0))


def multiplied():
    return transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES, **SPECIAL))


def gpt2():
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}
    no_dropout = {"embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **no_dropout, bos_token_id=1, eos_token_id=2))


def t5():
    sizes = {"d_model": 48, "d_ff": 96, "d_kv": 12, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0)
    return transformers.T5ForConditionalGeneration(config)


def bert():
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    no_dropout = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **no_dropout, vocab_size=VOCABULARY))


def quantized():
    model = llama()
    model.lm_head = PackedLinear(model.lm_head)
    return model


def with_lora_head():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave lora_A without gradients
            nn.init.normal_(parameter, std=0.1)
    return wrapped


def with_head_kept_by_peft():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))


MODELS = {
    "plain": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "soft-capped": soft_capped,
    "scaled": scaled,
    "multiplied": multiplied,
    "gpt2": gpt2,
    "t5": t5,
    "bert": bert,
    "quantized": quantized,
    "lora": with_lora_head,
    "modules to save": with_head_kept_by_peft,
}


def made(name="plain"):
    torch.manual_seed(0)
    return MODELS[name]().train()


def batch(ignored=True):
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (ROWS, TOKENS))
    labels = ids.clone()
    if ignored:
        labels[0, :11] = -100
    return {"input_ids": ids, "labels": labels}


def from_outputs(model, inputs, **options):
    return model(**inputs, **options).loss


def smoothed(model, inputs):
    """As `Trainer.compute_loss` does it with `label_smoothing_factor`."""
    labels = inputs.pop("labels")
    return LabelSmoother(epsilon=0.2)(model(**inputs), labels, shift_labels=True)


def own_loss(model, inputs):
    """As trainers do it that know nothing of any library's loss functions."""
    labels = inputs.pop("labels")
    logits = model(**inputs).logits[..., :-1, :].contiguous().view(-1, VOCABULARY)
    return nn.functional.cross_entropy(logits, labels[..., 1:].flatten(), label_smoothing=0.3)


def autocast(model, inputs):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(**inputs).loss


def masked(model, inputs):
    """As older vision-language models do it: rows that count are picked by the attention mask."""
    labels = inputs.pop("labels")
    logits = model(**inputs).logits[..., :-1, :][labels[..., 1:] != -100].contiguous()
    return nn.CrossEntropyLoss(reduction="none")(logits.float(), labels[..., 1:][labels[..., 1:] != -100]).mean()


LOSSES = {
    "from outputs": from_outputs,
    "smoothed": smoothed,
    "own loss": own_loss,
    "masked": masked,
}


def step(name, loss_of, in_chunks, **options):
    """Return loss, gradients by name, and the most rows of logits, of one step of a model made anew."""
    model = made(name)
    with MostRows() as most, head.deferring(model) if in_chunks else contextlib.nullcontext():
        loss = loss_of(model, batch(), **options)
        loss.backward()
    return loss.detach(), {key: each.grad for key, each in model.named_parameters() if each.grad is not None}, most.rows


def compare(name, loss_of, tolerance=1e-5, **options):
    loss, gradients, rows = step(name, loss_of, in_chunks=False, **options)
    found, found_gradients, found_rows = step(name, loss_of, in_chunks=True, **options)
    assert rows >= ROWS * (TOKENS - 1) - 11 and found_rows <= CHUNK, (rows, found_rows)
    torch.testing.assert_close(found, loss, rtol=tolerance / 10, atol=0)
    assert found_gradients.keys() == gradients.keys()
    for key, expected in gradients.items():
        worst = (found_gradients[key] - expected).abs().max()
        assert worst <= tolerance * expected.abs().max(), (key, worst, expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_same_loss_and_gradients_as_with_full_logits(name, monkeypatch):
    """Heads of every kind, with labels that do not count; the number of chunks is not bounded here."""
    monkeypatch.setattr(chunks, "MOST_CHUNKS_IN_TRAINING", 1000)
    compare(name, from_outputs)


@pytest.mark.parametrize("name", ["plain", "soft-capped", "lora"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_way_to_a_loss(name, loss, monkeypatch):
    """The model's own, the Trainer's label smoothing, and what other people write."""
    monkeypatch.setattr(chunks, "MOST_CHUNKS_IN_TRAINING", 1000)
    compare(name, LOSSES[loss])


@pytest.mark.skipif(version_of("transformers") < (4, 47), reason="the loss has no such argument there")
@pytest.mark.parametrize("count", [7, torch.tensor(7)])
def test_divided_by_the_number_of_items(count, monkeypatch):
    """With `num_items_in_batch` the loss is a sum divided by what the Trainer has counted."""
    monkeypatch.setattr(chunks, "MOST_CHUNKS_IN_TRAINING", 1000)
    compare("plain", from_outputs, num_items_in_batch=count)


def test_under_autocast(monkeypatch):
    """Autocast at the head's call holds for every chunk, also when it is computed again; bfloat16's tolerance."""
    monkeypatch.setattr(chunks, "MOST_CHUNKS_IN_TRAINING", 1000)
    compare("plain", autocast, tolerance=1e-2)


def test_only_ignored_labels_give_what_they_give_in_full():
    """A mean over nothing is not a number, in chunks too."""
    model = made()
    inputs = batch()
    inputs["labels"][:] = -100
    with head.deferring(model):
        assert model(**inputs).loss.isnan()


def test_a_head_that_trains_gets_few_chunks():
    """Each chunk's gradient of the head is rounded to the weight's precision when it is added."""
    assert chunks.rows_in_chunk(4096, VOCABULARY, head_trains=False) == CHUNK
    assert chunks.rows_in_chunk(4096, VOCABULARY, head_trains=True) == 4096 / chunks.MOST_CHUNKS_IN_TRAINING
    assert chunks.rows_in_chunk(2 * CHUNK - 1, VOCABULARY, head_trains=False) == 2 * CHUNK - 1


def test_half_precision_head_that_trains(monkeypatch):
    """In bfloat16 the gradient of the head, added up from sixteen chunks, is the same to 2 % of its largest value."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2 * chunks.BYTES_PER_LOGIT * VOCABULARY)
    assert ROWS * TOKENS / chunks.rows_in_chunk(ROWS * TOKENS, VOCABULARY, head_trains=True) == 16
    results = []
    for in_chunks in (False, True):
        model = made().to(torch.bfloat16)
        with head.deferring(model) if in_chunks else contextlib.nullcontext():
            loss = model(**batch()).loss
        loss.backward()
        results.append((loss.item(), model.lm_head.weight.grad.float()))
    (loss, gradient), (found, found_gradient) = results
    assert found == pytest.approx(loss, rel=1e-5)
    assert 0 < (found_gradient - gradient).abs().max() < 0.02 * gradient.abs().max()


def deferred_outputs(model, **inputs):
    with head.deferring(model):
        outputs = model(**(inputs or batch()))
    assert type(outputs.logits) is DeferredLogits
    return outputs


def test_logits_work_when_they_are_read(capsys):
    """They have shape and type without being computed, then the very values; that is said, once."""
    model = made()
    expected = model(**batch()).logits
    outputs = deferred_outputs(model)
    with MostRows() as most:
        assert outputs.logits.shape == expected.shape and outputs.logits.dtype == expected.dtype
        assert outputs.logits.device == expected.device and outputs.logits.requires_grad
        assert len(outputs.logits) == ROWS and outputs.logits.size(-1) == VOCABULARY
    assert most.rows == 0
    torch.testing.assert_close(outputs.logits + 0, expected, rtol=0, atol=0)
    assert torch.equal(outputs.to_tuple()[1], expected)
    assert outputs.logits.detach().numpy().shape == expected.shape
    assert capsys.readouterr().err.count("the logits are read in full") <= 1


def test_gradients_flow_through_logits_that_are_read():
    """Whatever somebody computes from them trains the model as it would."""
    gradients = []
    for in_chunks in (False, True):
        model = made()
        outputs = deferred_outputs(model) if in_chunks else model(**batch())
        (outputs.logits.cumsum(-1) ** 2).mean().backward()
        gradients.append({name: each.grad for name, each in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-7, msg=name)


class Fused(torch.autograd.Function):
    """A loss that takes its arguments past the class of the tensor, as kernels written in C++ or Triton do."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return (logits * logits).mean()

    @staticmethod
    def backward(ctx, gradient):
        (logits,) = ctx.saved_tensors
        return gradient * 2 * logits / logits.numel()


@pytest.mark.parametrize("name", ["plain", "lora"])
def test_gradients_come_back_from_functions_that_see_no_class(name):
    """Other people's autograd functions get the values, and their gradients reach the model."""
    gradients = []
    for in_chunks in (False, True):
        model = made(name)
        outputs = deferred_outputs(model) if in_chunks else model(**batch())
        Fused.apply(outputs.logits.float()).backward()
        gradients.append({key: each.grad for key, each in model.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any(each.any() for each in gradients[1].values())
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-5, atol=1e-7, msg=key)


def test_what_libraries_do_to_outputs_does_not_compute_them():
    """accelerate moves all outputs to the first device and makes them float32; neither asks for the values."""
    from accelerate.utils import convert_outputs_to_fp32, send_to_device

    model = made()
    half = model.to(torch.bfloat16)
    with MostRows() as most, head.deferring(half):
        outputs = convert_outputs_to_fp32(half.forward)(**batch())
        outputs = send_to_device(outputs, torch.device("cpu"), non_blocking=True)
    assert type(outputs.logits) is DeferredLogits and outputs.logits.dtype == torch.float32
    assert 0 < most.rows <= CHUNK


def test_metrics_over_the_vocabulary_are_computed_in_chunks():
    """Accuracy as TRL logs it, entropy row by row, and log-probabilities of the labels need no full logits."""
    model = made()
    inputs = batch(ignored=False)
    index = inputs["labels"][:, 1:].unsqueeze(-1)

    def metrics(logits):
        rows = torch.cat([_entropy(part) for part in logits.reshape(-1, VOCABULARY).split(CHUNK)])
        each = [torch.logsumexp(row, dim=-1) for row in logits]
        return logits.argmax(dim=-1), *logits.max(-1), logits.gather(-1, index), *each, rows, logits.mean(dim=-1)

    expected = metrics(model(**inputs).logits[..., :-1, :])
    shifted = deferred_outputs(model, **inputs).logits[..., :-1, :].contiguous()
    with MostRows() as most, torch.no_grad():
        found = metrics(shifted)
    assert 0 < most.rows <= CHUNK
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def _entropy(logits):
    log_probabilities = logits.log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits.transpose(0, 1).sum(),
        lambda logits: logits[..., 5:9].exp().sum(),
        lambda logits: logits[:, None].mean(),
        lambda logits: logits.view(-1).std(),
        lambda logits: logits.sum(0).max(),
        lambda logits: (logits * logits).sum(),
        lambda logits: (logits * torch.arange(VOCABULARY)).sum(),
        lambda logits: logits.clone().div_(3).sum(),
        lambda logits: torch.cat([logits, logits]).norm(),
        lambda logits: nn.functional.cross_entropy(logits.transpose(1, 2), batch()["labels"]),
        lambda logits: nn.functional.cross_entropy(logits[0], torch.full((TOKENS, VOCABULARY), 1 / VOCABULARY)),
        lambda logits: nn.functional.cross_entropy(logits[0], batch()["labels"][1], weight=torch.arange(640.0)),
        lambda logits: nn.functional.cross_entropy(input=logits[1], target=batch()["labels"][1]),
        lambda logits: 2 / (3 + logits.flatten(0, 1)[:5].softmax(dim=1)).sum(),
        lambda logits: logits.unbind()[1].detach().float().mean(),
        lambda logits: torch.stack(list(logits)).sum(),
    ],
)
def test_anything_else_gets_what_full_logits_give(change):
    """Operations that are not known, or known with other arguments, give the values that they would have given."""
    model = made()
    expected, found = change(model(**batch()).logits), change(deferred_outputs(model).logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert found.requires_grad == expected.requires_grad


def test_writing_into_logits():
    """Models that forbid tokens write into the logits before the loss: they are then there in full."""
    model = made()
    labels = batch()["labels"].flatten()
    losses = []
    for logits in (model(**batch()).logits, deferred_outputs(model).logits):
        logits[:, :, 3:30] = -1e4
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), labels))
    torch.testing.assert_close(*losses)


def test_no_gradients_where_there_would_be_none():
    """What is done to logits without gradients has none later, either."""
    logits = deferred_outputs(made()).logits
    with torch.no_grad():
        converted = logits.float()[:, 1:]
    assert not converted.requires_grad and not converted.logsumexp(-1).requires_grad
    assert not logits.detach().requires_grad and logits.float().requires_grad


@pytest.mark.parametrize("how", ["evaluation", "no gradients", "generation", "short row"])
def test_left_alone(how):
    """Outside of training, and where there is too little to save, the head does what it does."""
    model = made()
    with head.deferring(model):
        if how == "evaluation":
            assert type(model.eval()(**batch()).logits) is torch.Tensor
        elif how == "no gradients":
            with torch.no_grad():
                assert type(model(**batch()).logits) is torch.Tensor
        elif how == "generation":
            ids = batch()["input_ids"][:, :4]
            assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] >= 5
        else:
            short = {name: each[:1, : 2 * CHUNK - 1] for name, each in batch().items()}
            assert type(model(**short).logits) is torch.Tensor


@pytest.mark.parametrize("unused", [False, True])
def test_same_gradients_under_data_parallelism(unused, tmp_path):
    """DDP takes the outputs apart, and with `find_unused_parameters` copies them; gradients are the same."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        results = []
        for in_chunks in (False, True):
            model = made()
            parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
            with MostRows() as most, head.deferring(parallel) if in_chunks else contextlib.nullcontext():
                loss = parallel(**batch()).loss
                loss.backward()
            results.append(({name: each.grad for name, each in model.named_parameters()}, most.rows))
        (expected, rows), (found, found_rows) = results
        assert rows == ROWS * TOKENS and (found_rows <= CHUNK or unused)
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
    finally:
        torch.distributed.destroy_process_group()


def test_the_head_is_as_it_was_afterwards():
    """Also behind an error, and with a `forward` that somebody else has put on it."""
    model = made()
    with pytest.raises(RuntimeError, match="stop"), head.deferring(model):
        assert "forward" in vars(model.lm_head)
        raise RuntimeError("stop")
    assert "forward" not in vars(model.lm_head)
    others = model.lm_head.forward = model.lm_head.forward
    with head.deferring(model):
        assert model.lm_head.forward is not others
        assert type(model(**batch()).logits) is DeferredLogits
    assert vars(model.lm_head)["forward"] is others


class MixingHead(nn.Module):
    """A head that is not known to take each token by itself."""

    def __init__(self, plain):
        super().__init__()
        self.plain = plain

    def forward(self, hidden):
        return self.plain(hidden - hidden.mean(1, keepdim=True))


def lora_with_dropout():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.1)
    return peft.get_peft_model(llama(), config)


def mixing():
    model = llama()
    model.lm_head = MixingHead(model.lm_head)
    return model


class DroppingHead(nn.Linear):
    """A linear layer that draws anew on each call, which no module inside of it shows."""

    def forward(self, hidden):
        return super().forward(nn.functional.dropout(hidden, 0.5, self.training))


def dropping():
    model = llama()
    model.lm_head = DroppingHead(SIZES["hidden_size"], VOCABULARY, bias=False)
    return model


def partitioned():
    model = llama()
    model.lm_head.weight.ds_id = 1
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [(lora_with_dropout, "dropout"), (mixing, "MixingHead may mix tokens"), (partitioned, "several processes"),
     (dropping, "DroppingHead may mix tokens")],
)  # fmt: skip
def test_unknown_heads_stay_in_full_and_that_is_said(make, reason, monkeypatch):
    """One line says why."""
    said = []
    monkeypatch.setattr("balance_shim.log.once", lambda level, line: said.append(line))
    model = make().train()
    with head.deferring(model):
        assert type(model(**batch()).logits) is torch.Tensor
    assert len(said) == 1 and said[0].startswith("the loss is computed from full logits: ") and reason in said[0]


@pytest.mark.parametrize(
    "read",
    [
        lambda outputs: outputs.logits.detach(),
        lambda outputs: outputs.logits[:, -3:].detach(),
        lambda outputs: outputs.logits.float().log_softmax(-1).detach(),
        lambda outputs: outputs,
    ],
)
def test_logits_that_outlive_their_step_are_those_of_the_step(read):
    """A script that keeps logits to look at them later finds what they were before the optimizer changed the head."""
    kept = []
    for in_chunks in (False, True):
        model = made()
        with deferring_for_a_step(model) if in_chunks else contextlib.nullcontext():
            outputs = model(**batch())
            kept.append(read(outputs))
            outputs.loss.backward()
            del outputs
        with torch.no_grad():
            model.lm_head.weight.zero_()
    expected, found = ((each.logits if hasattr(each, "logits") else each).detach() for each in kept)
    torch.testing.assert_close(found + 0, expected, rtol=1e-5, atol=1e-6)


def _halve_rows(logits):
    logits[:, :-1].mul_(0.5)
    return logits


def _shifted(logits):
    shifted = logits[..., :-1, :].view(ROWS, TOKENS - 1, VOCABULARY)
    logits /= 2
    return shifted


def _copied(logits):
    logits[..., :-1, :].contiguous().zero_()
    logits.reshape(-1, VOCABULARY)[torch.arange(5)].zero_()
    return logits


def _by_rows(logits):
    logits.unbind()[1].detach().zero_()
    logits[0].float()[3] = 1
    return logits


@pytest.mark.parametrize("write", [_halve_rows, _shifted, _copied, _by_rows])
def test_writing_into_a_part_of_logits(write):
    """Slices and other views share their memory with the logits, copies do not; whichever is written into."""
    model = made()
    results = []
    for logits in (model(**batch()).logits, deferred_outputs(model).logits):
        model.zero_grad()
        loss = write(logits).logsumexp(-1).sum()
        loss.backward()
        results.append((loss.detach(), model.lm_head.weight.grad.clone()))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("shape", [lambda logits: logits.view(-1, VOCABULARY), lambda logits: logits + 0])
def test_a_loss_that_the_script_recomputes(reentrant, shape):
    """Activation checkpointing around the loss detaches the logits, and counts what is saved."""
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for in_chunks in (False, True):
        model = made()
        logits = (deferred_outputs(model) if in_chunks else model(**batch())).logits
        checkpoint(lambda each: shape(each).logsumexp(-1).sum(), logits, use_reentrant=reentrant).backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)


def test_read_in_inference_mode_and_trained_with_afterwards():
    """A metric without gradients does not take them from the loss."""
    outputs = deferred_outputs(made())
    with torch.inference_mode():
        outputs.logits.topk(3)
    assert (outputs.logits * outputs.logits).mean().requires_grad


def test_a_model_copied_during_a_step_is_on_its_own():
    """A teacher that is copied, or saved, inside of `compute_loss` keeps its own head, and plain logits."""
    import copy
    import pickle

    model = made()
    expected = model(**batch()).logits
    with head.deferring(model):
        copied, saved = copy.deepcopy(model), pickle.dumps(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for other in (copied, pickle.loads(saved)):
        logits = other(**batch()).logits
        assert type(logits) is torch.Tensor
        torch.testing.assert_close(logits, expected)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, VOCABULARY)

    def get_output_embeddings(self):
        return self.head

    def forward(self, hidden):
        return self.head(hidden)


@pytest.mark.parametrize("how", ["torch.compile", "compile()"])
def test_a_compiled_model_is_compiled_once(how):
    """A head that changes with each step would be traced anew each time."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    model = Small()
    compiled = torch.compile(model, backend=backend) if how == "torch.compile" else model
    if compiled is model:
        model.compile(backend=backend)
    for _ in range(3):
        with head.deferring(compiled):
            assert type(compiled(torch.ones(ROWS, TOKENS, 16))) is torch.Tensor
    assert len(graphs) == 1


def test_asking_where_tensors_are_made_does_not_compute_logits():
    """The monitor notes the module that makes each tensor for a step, which may be the one that has no room."""
    from balance_shim.monitoring.makers import Makers

    model = made()
    makers = Makers(model)
    makers.start()
    try:
        outputs = deferred_outputs(model)
    finally:
        makers.stop()
    assert outputs.logits.full is None and "by lm_head" in makers.of([outputs.logits])
