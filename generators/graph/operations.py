"""Which torch operation means what to the graph, by its name without underscores.

Names serve both levels at which the tracer looks: Python functions (`conv2d`) and ATen operators (`convolution`).
An operation that is in no table has no parameters of its own: it is contracted away if it has one stream, and a node
of kind "merge" if it joins several.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LAYERS = {
    "convolution": """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution conv_tbc
        deform_conv2d thnn_conv2d conv_depthwise3d slow_conv3d""",
    "linear": "linear bilinear",
    "embedding": "embedding embedding_bag",
    "normalisation": """batch_norm instance_norm layer_norm group_norm rms_norm native_batch_norm native_layer_norm
        native_group_norm native_batch_norm_legit native_batch_norm_legit_no_training cudnn_batch_norm
        fused_rms_norm""",
    "recurrent": "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
    "activation": "prelu",
}
LAYERS = {name: kind for kind, names in _LAYERS.items() for name in names.split()}
"""Operations whose first operand is data and whose further ones are parameters -> kind of the node."""

STACKED_RECURRENT = _names("lstm gru rnn_tanh rnn_relu")
STANDARDISATION = _names("batch_norm native_batch_norm instance_norm")
"""Normalisations that, applied to a parameter, are part of how a weight is made (weight standardisation)."""

PRODUCTS = _names(
    """matmul rmatmul mm bmm mv dot addmm addmv addbmm baddbmm einsum tensordot inner outer linear chain_matmul
    multi_dot grouped_mm scaled_grouped_mm"""
)
"""Sums of products over an axis: a linear layer with one parameter operand, attention between two streams."""

ATTENTION = _names(
    """scaled_dot_product_attention scaled_dot_product_flash_attention scaled_dot_product_efficient_attention
    scaled_dot_product_flash_attention_for_cpu scaled_dot_product_fused_attention_overrideable flex_attention"""
)

LOOKUPS = _names("getitem index index_select gather take take_along_dim")
"""Reading a parameter at positions that come from data makes it an embedding."""

FUSED_PRODUCTS = _names("addcmul addcdiv")
"""`a + b * c` in one: a multiply and an add."""

ADDS = _names("add iadd radd sub isub rsub subtract sum")
MULTIPLIES = _names("mul imul rmul multiply div idiv rdiv truediv itruediv rtruediv divide true_divide lerp")
CONCATENATES = _names(
    """cat concat concatenate stack hstack vstack dstack column_stack setitem index_put copy scatter index_copy
    slice_scatter select_scatter block_diag cartesian_prod"""
)

ACTIVATIONS = _names(
    """relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid logsigmoid hardsigmoid hardswish hardtanh tanh
    softplus softsign softshrink hardshrink tanhshrink threshold rrelu glu log_softmax softmax"""
)
ELEMENTWISE = _names(
    """relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid logsigmoid hardsigmoid hardswish hardtanh tanh
    softplus softsign dropout alpha_dropout feature_dropout"""
)
"""Operations of one tensor that keep its shape and type."""

POOLS = _names(
    """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d
    fractional_max_pool2d mean amax max amin sum max_pool2d_with_indices"""
)
STATISTICS = _names(
    "rsqrt var std var_mean std_mean norm vector_norm normalize linalg_vector_norm layer_norm rms_norm group_norm"
)
"""Operations that show that a stream is divided by its own spread: a following scale is that of a normalisation."""

MIXED_DEVICES = _names("pack_padded_sequence pad_packed_sequence")
"""Operations that take some operands on the CPU whatever the device of the others."""

FIRST_ONLY = _names("expand_as view_as reshape_as type_as to")
"""Operations that read only the shape, type or device of their second operand."""

SOURCE_FREE = _names(
    """zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty new_full
    new_tensor size dim numel element_size stride is_floating_point shape"""
)
"""Operations that take nothing from their operands but shape and type."""


_IN_PLACE = _names("iadd isub imul idiv itruediv ifloordiv imod ipow iand ior ixor ilshift irshift imatmul")


def base_name(name: str) -> str:
    """`__iadd__` -> `iadd`, `relu_` -> `relu`, `_native_batch_norm_legit` -> `native_batch_norm_legit`."""
    return name.strip("_")


def is_in_place(name: str) -> bool:
    """Whether the operation writes into its first operand."""
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or (name.startswith("__i") and base_name(name) in _IN_PLACE)
    return name.endswith("_")
