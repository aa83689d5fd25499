"""One step of LSTM and GRU, which torch computes with kernels of their own on accelerators, but not on its CPU.

From torch's `RNN.cu` (2.5 to 2.13): the order of the gates and the contents of the workspace.
"""

from typing import Any

import torch

aten = torch.ops.aten


def _lstm(
    input_gates: torch.Tensor,
    hidden_gates: torch.Tensor,
    cell: torch.Tensor,
    input_bias: torch.Tensor | None = None,
    hidden_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    gates = _biased(input_gates, input_bias) + _biased(hidden_gates, hidden_bias)
    opened, kept, fresh, shown = gates.chunk(4, 1)
    opened, kept, shown = opened.sigmoid(), kept.sigmoid(), shown.sigmoid()
    fresh = fresh.tanh()
    next_cell = kept * cell + opened * fresh
    return shown * next_cell.tanh(), next_cell, torch.cat([opened, kept, fresh, shown], 1)


def _lstm_backward(
    grad_hidden: torch.Tensor | None,
    grad_cell: torch.Tensor | None,
    cell: torch.Tensor,
    next_cell: torch.Tensor,
    workspace: torch.Tensor,
    has_bias: bool,
) -> tuple[torch.Tensor, ...]:
    opened, kept, fresh, shown = workspace.chunk(4, 1)
    seen = next_cell.tanh()
    by_cell = torch.zeros_like(cell) if grad_cell is None else grad_cell
    by_shown = torch.zeros_like(cell)
    if grad_hidden is not None:
        by_cell = by_cell + grad_hidden * shown * (1 - seen * seen)
        by_shown = grad_hidden * seen
    grad_gates = torch.cat(
        [
            by_cell * fresh * opened * (1 - opened),
            by_cell * cell * kept * (1 - kept),
            by_cell * opened * (1 - fresh * fresh),
            by_shown * shown * (1 - shown),
        ],
        1,
    )
    return grad_gates, by_cell * kept, grad_gates.sum(0)


def _gru(
    input_gates: torch.Tensor,
    hidden_gates: torch.Tensor,
    hidden: torch.Tensor,
    input_bias: torch.Tensor | None = None,
    hidden_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    reset, update, fresh = _biased(input_gates, input_bias).chunk(3, 1)
    reset_too, update_too, fresh_too = _biased(hidden_gates, hidden_bias).chunk(3, 1)
    reset, update = (reset + reset_too).sigmoid(), (update + update_too).sigmoid()
    fresh = (fresh + reset * fresh_too).tanh()
    return fresh + update * (hidden - fresh), torch.cat([reset, update, fresh, hidden, fresh_too], 1)


def _gru_backward(grad: torch.Tensor, workspace: torch.Tensor, has_bias: bool) -> tuple[torch.Tensor, ...]:
    reset, update, fresh, hidden, fresh_too = workspace.chunk(5, 1)
    by_update = grad * (hidden - fresh) * (1 - update) * update
    by_fresh = grad * (1 - update) * (1 - fresh * fresh)
    by_reset = by_fresh * fresh_too * (1 - reset) * reset
    of_input = torch.cat([by_reset, by_update, by_fresh], 1)
    of_hidden = torch.cat([by_reset, by_update, by_fresh * reset], 1)
    return of_input, of_hidden, grad * update, of_input.sum(0), of_hidden.sum(0)


def _biased(gates: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return gates if bias is None else gates + bias


STEPS: dict[Any, Any] = {
    aten._thnn_fused_lstm_cell.default: _lstm,
    aten._thnn_fused_lstm_cell_backward_impl.default: _lstm_backward,
    aten._thnn_fused_gru_cell.default: _gru,
    aten._thnn_fused_gru_cell_backward.default: _gru_backward,
}
