"""Attention within each example of a packed sequence, with PyTorch's own flash attention.

transformers separates packed examples with a mask. Its cost grows with the square of the sequence length, masked
entries included. The package flash-attn needs no mask, but must be compiled. This implementation needs only PyTorch
2.11 or later and a GPU with bf16; without these, it computes the attention of one example at a time.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from corpusprep.errors import RunError

_OTHER = re.compile(
    r"sliding_window$|attention_chunk|softcap|alibi|(attn|attention)\w*drop|attn_pdrop|v_head_dim|sinks?$"
)
_TERMS = ("sliding_window", "softcap", "s_aux", "position_bias")
VARLEN = "varlen"
"""Name of this implementation in transformers."""


def register() -> None:
    """Registers this implementation with transformers."""
    AttentionInterface.register(VARLEN, attend)
    AttentionMaskInterface.register(VARLEN, _mask)


def unsuited(config: Any) -> str | None:
    """Name of a setting in the model's config that this implementation does not support; None if it supports all."""
    config = config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"layer_types with {min(kinds - {'full_attention'})}"
    for name, value in vars(config).items():
        if value and _OTHER.search(name):
            return str(name)
    return None


def at_hand(config: Any, precision: str) -> bool:
    """Whether PyTorch's flash attention supports the GPU, the precision and the model's head size."""
    config = config.get_text_config(decoder=True)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        precision == "bf16"
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (8, 0)
        and flash() is not None
        and _takes(size)
    )


def _takes(size: int) -> bool:
    return size % 8 == 0 and size <= 256


@functools.cache
def flash() -> Callable[..., Tensor] | None:
    """PyTorch's causal flash attention for concatenated sequences; None if this version of PyTorch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known or "scale" not in known:
        return None
    grouped = "enable_gqa" in known

    def call(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None) -> Tensor:
        more: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
        times = query.shape[1] // key.shape[1]
        if grouped:
            more["enable_gqa"] = times > 1
        elif times > 1:
            key, value = (side.repeat_interleave(times, 1) for side in (key, value))
        found: Tensor = varlen_attn(query, key, value, bounds, bounds, longest, longest, **more)
        return found

    return call


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers calls it: query (1, heads, t, size); key and value may have fewer heads.

    Examples begin where `cu_seq_lens_q` says, or else where `position_ids` restart. Without either, or with a mask,
    this is scaled dot product attention.

    Raises:
        RunError: the model needs more than plain causal attention.
    """
    asked = next((name for name in _TERMS if more.get(name) is not None), None)
    if asked is not None or dropout or more.get("is_causal") is False:
        raise RunError(
            f'train.attention = "{VARLEN}" does not support {asked or "dropout"}, which the model uses. Set it to sdpa.'
        )
    bounds, longest = more.get("cu_seq_lens_q"), more.get("max_length_q")
    plain = attention_mask is None and query.shape[0] == 1 and query.shape[2] == key.shape[2]
    if bounds is None and plain and more.get("position_ids") is not None:
        bounds = _bounds(more["position_ids"], query.shape[2])
    if not plain or bounds is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
        return out, None
    if torch.is_autocast_enabled(query.device.type):
        computed = torch.get_autocast_dtype(query.device.type)
        query, key, value = (side.to(computed) for side in (query, key, value))
    quick = flash() if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) else None
    size = query.shape[3]
    if quick is not None and value.shape[3] == size and _takes(size):
        if longest is None:
            longest = int(bounds.diff().max())
        sides = (side[0].transpose(0, 1) for side in (query, key, value))
        return quick(*sides, bounds.to(torch.int32), int(longest), scaling)[None], None
    apart = (
        [side[:, :, start:end] for side in (query, key, value)] for start, end in itertools.pairwise(bounds.tolist())
    )
    attended = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True) for q, k, v in apart
    ]
    return torch.cat(attended, 2).transpose(1, 2), None


def _bounds(position_ids: Tensor, tokens: int) -> Tensor | None:
    """Offsets at which examples begin, and the end of the last one; None if the positions belong to another batch."""
    if position_ids.shape != (1, tokens):
        return None
    begins = F.pad(position_ids[0].diff() != 1, (1, 0), value=True).nonzero().view(-1)
    return F.pad(begins, (0, 1), value=tokens).to(torch.int32)


def _mask(
    batch_size: int, *args: Any, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **more: Any
) -> Any:
    """Makes no mask for a packed batch: one row without padding, for which transformers forbids skipping the mask."""
    if batch_size == 1 and attention_mask is None and not allow_is_causal_skip:
        return None
    return sdpa_mask(
        batch_size, *args, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **more
    )
