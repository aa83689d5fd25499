"""Which heads make their logits in chunks, around what they do, and how they are afterwards."""

import contextlib

import pytest
import torch
from torch import nn

from balance_shim.logits import head
from balance_shim.logits.deferred import DeferredLogits
from tests.logits.small_models import (
    CHUNK,
    SEQUENCES,
    SIZES,
    TOKENS,
    VOCABULARY,
    MostRows,
    batch,
    build,
    deferred_outputs,
    llama,
)


@pytest.mark.parametrize("how", ["evaluation", "no gradients", "generation", "short row"])
def test_left_alone(how):
    """Outside of training, and where there is too little to save, the head does what it does."""
    model = build()
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
            short = {name: tensor[:1, : 2 * CHUNK - 1] for name, tensor in batch().items()}
            assert type(model(**short).logits) is torch.Tensor


@pytest.mark.parametrize("unused", [False, True])
def test_same_gradients_under_data_parallelism(unused, tmp_path):
    """DDP takes the outputs apart, and with `find_unused_parameters` copies them; gradients are the same."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        results = []
        for in_chunks in (False, True):
            model = build()
            parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
            with MostRows() as most, head.deferring(parallel) if in_chunks else contextlib.nullcontext():
                loss = parallel(**batch()).loss
                loss.backward()
            results.append(({name: parameter.grad for name, parameter in model.named_parameters()}, most.rows))
        (expected, rows), (actual, actual_rows) = results
        assert rows == SEQUENCES * TOKENS and (actual_rows <= CHUNK or unused)
        for name, gradient in expected.items():
            assert (actual[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
    finally:
        torch.distributed.destroy_process_group()


def test_the_head_is_as_it_was_afterwards():
    """Also behind an error, and with a `forward` that somebody else has put on it."""
    model = build()
    with pytest.raises(RuntimeError, match="stop"), head.deferring(model):
        assert "forward" in vars(model.lm_head)
        raise RuntimeError("stop")
    assert "forward" not in vars(model.lm_head)
    closure = model.lm_head.forward = model.lm_head.forward
    with head.deferring(model):
        assert model.lm_head.forward is not closure
        assert type(model(**batch()).logits) is DeferredLogits
    assert vars(model.lm_head)["forward"] is closure


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
    [(lora_with_dropout, "dropout"), (mixing, "MixingHead may mix tokens"), (partitioned, "sharded over processes"),
     (dropping, "DroppingHead may mix tokens")],
)  # fmt: skip
def test_unknown_heads_stay_in_full_and_that_is_said(make, reason, monkeypatch):
    """One line says why."""
    messages = []
    monkeypatch.setattr("balance_shim.log.once", lambda level, line: messages.append(line))
    model = make().train()
    with head.deferring(model):
        assert type(model(**batch()).logits) is torch.Tensor
    assert (
        len(messages) == 1
        and messages[0].startswith("the loss is computed from full logits: ")
        and reason in messages[0]
    )


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("shape", [lambda logits: logits.view(-1, VOCABULARY), lambda logits: logits + 0])
def test_a_loss_that_the_script_recomputes(reentrant, shape):
    """Activation checkpointing around the loss detaches the logits, and counts what is saved."""
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for in_chunks in (False, True):
        model = build()
        logits = (deferred_outputs(model) if in_chunks else model(**batch())).logits
        checkpoint(lambda values: shape(values).logsumexp(-1).sum(), logits, use_reentrant=reentrant).backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)


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
            assert type(compiled(torch.ones(SEQUENCES, TOKENS, 16))) is torch.Tensor
    assert len(graphs) == 1
