"""Mixed precision: which operations `torch.autocast` runs in which type on CUDA.

After the lists of aten/src/ATen/autocast_mode.h of torch 2.13 and of torch's documentation of automatic mixed
precision, limited to operations that a training may meet. Names are those of ATen, overloads behind a dot. The list of
CPUs is another one: there normalization and softmax stay in the lower type.
"""

LOWER = (
    "linear", "matmul", "mm", "bmm", "mv", "addmm", "addbmm", "baddbmm", "addmv", "addr", "chain_matmul",
    "linalg_multi_dot", "linalg_vecdot", "einsum", "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d",
    "conv_transpose2d.input", "conv_transpose3d.input", "prelu", "scaled_dot_product_attention", "lstm_cell",
    "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
)  # fmt: skip

SINGLE = (
    "acos", "asin", "cosh", "tan", "sinh", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2", "reciprocal",
    "rsqrt", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "group_norm",
    "native_layer_norm", "rms_norm", "norm.Scalar", "norm.ScalarOpt_dim", "cosine_similarity", "cosine_embedding_loss",
    "nll_loss", "nll_loss_nd", "cross_entropy_loss", "kl_div", "l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss",
    "hinge_embedding_loss", "margin_ranking_loss", "poisson_nll_loss", "triplet_margin_loss",
    "binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm", "logsumexp",
)  # fmt: skip

# These take the type they should compute in as an argument, which is set unless the caller has.
SINGLE_BY_ARGUMENT = ("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "prod", "prod.dim_int", "cumsum",
                      "cumprod", "linalg_vector_norm")  # fmt: skip

# In the widest type among their arguments.
WIDEST = ("addcdiv", "addcmul", "atan2", "bilinear", "cat", "cross", "dot", "vdot", "grid_sampler", "index_put",
          "scatter_add", "stack", "tensordot")  # fmt: skip

# Names in `torch`, `torch.nn.functional` and of tensors' methods that differ from ATen's.
PYTHON_NAMES = {
    "__pow__": "pow", "__rpow__": "pow", "__rtruediv__": "reciprocal", "__rdiv__": "reciprocal",
    "cross_entropy": "cross_entropy_loss", "grid_sample": "grid_sampler", "vector_norm": "linalg_vector_norm",
    "concat": "cat", "concatenate": "cat",
}  # fmt: skip
