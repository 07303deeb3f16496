"""`masked_lm_loss` for GPUs: Triton kernels between library matrix products.

With `h` the hidden states, `p` the masked positions, `y` the labels, `W` and `b` the decoder:

    u = h[p] A^T + c      x = norm(gelu(u))      z = x W^T + b        the head on masked rows only
    m = max z      s = sum exp(z - m)      loss = log s - (z_y - m)
    dz = exp(z - m) / s - onehot(y)                                   written over z
    dx = dz W      dW = dz^T x      db = sum of the rows of dz
    du = gelu'(u) norm'(dx)      dA = du^T h[p]      dh[p] = du A

Matrix products are the library's, with one kernel between two of them. The first product is a
kernel that gathers its rows, unless the caller has gathered them already. The logits are written by
one product, read twice and overwritten once by the kernel of the loss, and read by two products.

- The library's fast products need rows that begin at a multiple of 16 bytes. So where V is not a
  multiple of 8, all three products with the logits work on `W` with rows of zeros appended up to
  V_PAD; `W` is copied in each call, because a cache would not notice a change through `.data`. The
  extra columns of the logits have no weight in the loss, and 0 in `dz`.
- `x` lies in a buffer with one more column, of ones: `db` is that column of `dz^T x`.
- All gradients are those of the plain sum, computed in the forward pass; the backward pass
  multiplies them by the incoming scalar, which may be a loss scale or 1 / count, and rounds them
  once. That scalar never meets a 16-bit `dz`: a probability near 1 / V divided by the number of
  positions is 0 in fp16. Until then they are fp32: `dW` is a sum over all M rows, larger than fp16
  holds where many labels are equal.
- Shapes depend on the number of labels alone, and nothing is read back: the host never waits for
  the device.
- Rows of padding may hold any finite numbers in the hidden states, and so large ones in `u` that
  they are inf. They are finite in `x` and 0 in `dz` and `du`, and so add 0 to every sum. The three
  kernels between the products read nothing of them.
- Rows of the hidden gradient are stored, not added (each position occurs once), and sums over rows
  go through partial sums in a fixed order: no atomics, so results repeat bit for bit.

Letters: `T` rows of the hidden states, `M` labels including padding, `D` hidden size, `V`
vocabulary, `V_PAD` columns of the logits. The loss and the gradients of padding (-1) are zero. With
`TRITON_INTERPRET=1` the kernels run on CPU tensors: slow, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from csrc.head import ONE_CHUNK_BYTES, MaskedLMHead, take_gradients

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 4096  # a row of the layer norm lies in the registers of one program
ALIGNED = 8  # numbers of 16 bit in the 16 bytes that the library's fast products load at once
PAD_COLUMNS = 128
# Logits are made and turned into their gradients so many rows at a time, all if 0. Few rows might
# stay in the cache between the two; `csrc/benchmark.py --chunk_rows` measures it.
CHUNK_ROWS = 0

NORM_TILE = 4096  # numbers per program that works on complete rows
NORM_WARPS = 8

# Tiles of the gathering product by bytes per number: BLOCK_M x BLOCK_N, in steps of BLOCK_K. fp32
# has no exact matrix unit, so its tile is what registers can hold.
DENSE_TILES = {
    2: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    4: {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
}
# Columns of logits that a program of one row takes at once.
LOSS_TILE = {"BLOCK_V": 2048, "num_warps": 4}


@triton.jit
def _gelu(u, TANH: tl.constexpr):
    """GELU of fp32 `u`, and its derivative."""
    if TANH:
        # u/2 (1 + tanh t) = u sigmoid(2t) with 2t = 2 sqrt(2/pi) (u + 0.044715 u^3)
        share = tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * u * u)
        slope = share + u * share * (1.0 - share) * inner
    else:
        # u Phi(u), of the normal distribution: Phi(u) = (1 + erf(u / sqrt 2)) / 2
        share = 0.5 * (1.0 + tl.erf(0.7071067811865476 * u))
        slope = share + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
    return u * share, slope


@triton.jit(do_not_specialize=["M"])
def _gather_dense_kernel(
    hidden_ptr,  # (T, D)
    positions_ptr,  # (M,)
    weight_ptr,  # (D, D), output by input
    bias_ptr,  # (D,), unused without HAS_BIAS
    u_ptr,  # (M, D), written
    M,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """u = hidden[positions] weight^T + bias, one tile."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    positions = tl.load(positions_ptr + rows, mask=rows < M, other=-1).to(tl.int64)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        left = tl.load(
            hidden_ptr + positions[:, None] * D + inner[None, :],
            mask=(positions >= 0)[:, None] & (inner < D)[None, :], other=0.0,
        )
        right = tl.load(
            weight_ptr + columns[None, :] * D + inner[:, None],
            mask=(columns < D)[None, :] & (inner < D)[:, None], other=0.0,
        )
        # "ieee": fp32 inputs are not cut to tf32.
        sums = tl.dot(left, right, sums, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    tl.store(
        u_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :], sums,
        mask=(rows < M)[:, None] & (columns < D)[None, :],
    )


@triton.jit(do_not_specialize=["M"])
def _activate_normalise_kernel(
    u_ptr,  # (M, D)
    labels_ptr,  # (M,), -1 at padding
    norm_weight_ptr,  # (D,)
    norm_bias_ptr,  # (D,), unused without HAS_BIAS
    x_ptr,  # (M, X_PITCH), written: D columns, one of ones, zeros
    mean_ptr,  # (M,) fp32, written
    rstd_ptr,  # (M,) fp32, written
    M,
    eps,
    D: tl.constexpr,
    X_PITCH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXTRA: tl.constexpr,  # X_PITCH - D at most
):
    """x = norm(gelu(u)), ROWS rows. All in fp32: u and x alone are rounded to their dtype."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = tl.load(labels_ptr + rows, mask=rows < M, other=-1) >= 0
    columns = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (columns < D)[None, :]
    offsets = rows.to(tl.int64)[:, None] * D + columns[None, :]
    # Padding may be inf here; as 0 it gives a finite x.
    u = tl.load(u_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    active, _ = _gelu(u, TANH)  # 0 outside, as gelu(0) is
    mean = tl.sum(active, axis=1) / D
    centred = tl.where(inside, active - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
    weight = tl.load(norm_weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    x = centred * rstd[:, None] * weight[None, :]
    if HAS_BIAS:
        x += tl.load(norm_bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * X_PITCH
    tl.store(x_rows + columns[None, :], x, mask=(rows < M)[:, None] & (columns < D)[None, :])
    extra = D + tl.arange(0, EXTRA)
    ones = (valid[:, None] & (extra == D)[None, :]).to(tl.float32)
    tl.store(x_rows + extra[None, :], ones, mask=(rows < M)[:, None] & (extra < X_PITCH)[None, :])
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@triton.jit
def _logits(
    z_row,  # pointer to a row of the buffer
    bias_ptr,  # (V,), unused without HAS_BIAS
    valid,
    columns,  # (BLOCK_V,)
    V: tl.constexpr,
    V_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Load logits with their bias, fp32: -inf from column V on, finite in padding."""
    # The mask ends at V_PAD, a multiple of what one load takes; the pad columns are discarded.
    z = tl.load(z_row + columns, mask=valid & (columns < V_PAD), other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
    return tl.where(columns < V, z, float("-inf"))


# Labels, losses and hits are single numbers, and those of a chunk begin anywhere.
@triton.jit(do_not_specialize_on_alignment=["labels_ptr", "loss_ptr", "hit_ptr"])
def _cross_entropy_kernel(
    z_ptr,  # (m, V_PAD), logits without bias in the first V columns; overwritten with dz
    bias_ptr,  # (V,), unused without HAS_BIAS
    labels_ptr,  # (m,), -1 at padding
    loss_ptr,  # (m,) fp32, written
    hit_ptr,  # (m,) int32, written
    V: tl.constexpr,
    V_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Loss, hit and gradient of one row of logits; m programs."""
    row = tl.program_id(0).to(tl.int64)  # m x V_PAD may exceed 2^31
    label = tl.load(labels_ptr + row).to(tl.int32)
    valid = label >= 0
    z_row = z_ptr + row * V_PAD
    target = tl.load(z_row + label, mask=valid, other=0.0).to(tl.float32)
    if HAS_BIAS:
        target += tl.load(bias_ptr + label, mask=valid, other=0.0).to(tl.float32)

    # A finite start: a block with only -inf then adds exp(-inf) = 0, not exp(nan).
    top = -3.4028234e38
    total = 0.0
    top_before = top  # of the columns before the label
    for start in tl.range(0, V, BLOCK_V, num_stages=1):
        columns = start + tl.arange(0, BLOCK_V)
        z = _logits(z_row, bias_ptr, valid, columns, V, V_PAD, HAS_BIAS)
        new_top = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), axis=0)
        top = new_top
        before = tl.where(columns < label, z, float("-inf"))
        top_before = tl.maximum(top_before, tl.max(before, axis=0))
    loss = tl.log(total) - (target - top)  # shifted: log(total) + top would lose digits
    tl.store(loss_ptr + row, tl.where(valid, loss, 0.0))
    hit = valid & (target == top) & (target > top_before)  # as in argmax, the first top wins
    tl.store(hit_ptr + row, hit.to(tl.int32))

    if WITH_GRADIENT:
        tl.debug_barrier()  # every warp has read its target before any logit is overwritten
        inverse = 1.0 / total
        for start in tl.range(0, V_PAD, BLOCK_V, num_stages=1):
            columns = start + tl.arange(0, BLOCK_V)
            z = _logits(z_row, bias_ptr, valid, columns, V, V_PAD, HAS_BIAS)
            dz = tl.exp(z - top) * inverse  # 0 from column V on
            dz -= (columns == label).to(tl.float32)
            tl.store(z_row + columns, tl.where(valid, dz, 0.0), mask=columns < V_PAD)


@triton.jit(do_not_specialize=["M"])
def _activate_normalise_backward_kernel(
    dx_ptr,  # (M, D) fp32
    u_ptr,  # (M, D)
    labels_ptr,  # (M,), -1 at padding
    mean_ptr,  # (M,) fp32
    rstd_ptr,  # (M,) fp32
    norm_weight_ptr,  # (D,)
    du_ptr,  # (M, D), written
    partial_ptr,  # (3, programs, D) fp32, written: of norm_weight, norm_bias, dense_bias
    M,
    D: tl.constexpr,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write du of ROWS rows, and their share of the sums over rows.

    With n = (gelu(u) - mean) rstd and g = dx norm_weight:
    du = gelu'(u) rstd (g - mean(g) - n mean(g n)), d norm_weight = sum dx n.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = tl.load(labels_ptr + rows, mask=rows < M, other=-1) >= 0
    columns = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (columns < D)[None, :]
    offsets = rows.to(tl.int64)[:, None] * D + columns[None, :]
    u = tl.load(u_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    dx = tl.load(dx_ptr + offsets, mask=inside, other=0.0)  # 0 at padding, and so is du
    mean = tl.load(mean_ptr + rows, mask=valid, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=valid, other=0.0)
    weight = tl.load(norm_weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    active, slope = _gelu(u, TANH)
    normal = (active - mean[:, None]) * rstd[:, None]
    weighted = dx * weight[None, :]
    along = tl.sum(weighted * normal, axis=1) / D
    middle = tl.sum(weighted, axis=1) / D
    da = (weighted - normal * along[:, None] - middle[:, None]) * rstd[:, None]
    du = da * slope
    tl.store(du_ptr + offsets, du, mask=(rows < M)[:, None] & (columns < D)[None, :])
    partial = partial_ptr + tl.program_id(0) * D + columns
    stride = tl.num_programs(0) * D
    tl.store(partial, tl.sum(dx * normal, axis=0), mask=columns < D)
    tl.store(partial + stride, tl.sum(dx, axis=0), mask=columns < D)
    tl.store(partial + 2 * stride, tl.sum(du, axis=0), mask=columns < D)


@triton.jit(do_not_specialize=["M"])
def _gather_kernel(
    hidden_ptr,  # (T, D)
    positions_ptr,  # (M,)
    rows_ptr,  # (M, D), written
    M,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """rows = hidden[positions], zeros for padding."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    positions = tl.load(positions_ptr + rows, mask=rows < M, other=-1).to(tl.int64)
    values = tl.load(
        hidden_ptr + positions[:, None] * D + columns[None, :],
        mask=(positions >= 0)[:, None] & (columns < D)[None, :], other=0.0,
    )
    tl.store(
        rows_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :], values,
        mask=(rows < M)[:, None] & (columns < D)[None, :],
    )


@triton.jit(do_not_specialize=["M"])
def _scatter_kernel(
    rows_ptr,  # (M, D) fp32
    positions_ptr,  # (M,)
    scale_ptr,  # scalar fp32
    hidden_ptr,  # (T, D), written at the positions
    M,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hidden[positions] = scale rows; positions are unique, so plain stores do."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    positions = tl.load(positions_ptr + rows, mask=rows < M, other=-1).to(tl.int64)
    inside = (positions >= 0)[:, None] & (columns < D)[None, :]
    offsets = rows.to(tl.int64)[:, None] * D + columns[None, :]
    values = tl.load(rows_ptr + offsets, mask=inside, other=0.0) * tl.load(scale_ptr)
    tl.store(hidden_ptr + positions[:, None] * D + columns[None, :], values, mask=inside)


INTERPRETED = not isinstance(_gather_kernel, triton.JITFunction)


def _row_tile(width: int) -> dict[str, int]:
    """Return ROWS and BLOCK_D of a tile of complete rows, and its warps."""
    block = triton.next_power_of_2(width)
    return {"ROWS": max(1, NORM_TILE // block), "BLOCK_D": block, "num_warps": NORM_WARPS}


def _gather(hidden: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Return the rows of `hidden`, `(T, D)`, at `positions`, `(M,)`, zeros at -1; or all rows."""
    if positions is None:
        return hidden
    rows = hidden.new_empty(len(positions), hidden.shape[1])
    tile = _row_tile(hidden.shape[1])
    grid = (triton.cdiv(len(positions), tile["ROWS"]),)
    _gather_kernel[grid](hidden, positions, rows, len(rows), D=hidden.shape[1], **tile)
    return rows


def _scatter(
    rows: torch.Tensor, positions: torch.Tensor, scale: torch.Tensor, hidden: torch.Tensor
) -> None:
    """Write `scale * rows`, `(M, D)` fp32, over the rows of `hidden`, `(T, D)`, at `positions`."""
    tile = _row_tile(rows.shape[1])
    grid = (triton.cdiv(len(rows), tile["ROWS"]),)
    _scatter_kernel[grid](rows, positions, scale, hidden, len(rows), D=rows.shape[1], **tile)


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None
             ) -> torch.Tensor:
    """Multiply matrices with fp32 sums and an fp32 result; 16 bit would keep 8 or 11 bits of it."""
    if out is None:
        out = left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)
    if left.dtype == torch.float32:
        return torch.mm(left, right, out=out)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left.float(), right.float(), out=out)


# What the transform's backward pass reads: u `(M, D)`, mean and rstd `(M,)` fp32.
_Transformed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _up_to(multiple: int, size: int) -> int:
    return triton.cdiv(size, multiple) * multiple


def _transform(
    hidden: torch.Tensor, positions: torch.Tensor | None, labels: torch.Tensor, head: MaskedLMHead
) -> tuple[torch.Tensor, _Transformed | None]:
    """Gather, dense layer, GELU and layer norm.

    Returns:
        x, `(M, D + 1)` or a little wider: D columns, one of ones, zeros; finite at padding. And
        what the backward pass needs, None without a transform.
    """
    num_rows, width = len(labels), hidden.shape[1]
    pitch = _up_to(ALIGNED, width + 1)
    if head.dense_weight is None:
        x = hidden.new_zeros(num_rows, pitch)
        x[:, :width] = _gather(hidden, positions)
        x[:, width] = labels >= 0
        return x, None
    u = hidden.new_empty(num_rows, width)
    if positions is None and head.dense_bias is not None:
        torch.addmm(head.dense_bias, hidden, head.dense_weight.t(), out=u)
    elif positions is None:
        torch.mm(hidden, head.dense_weight.t(), out=u)  # with `out`, autocast changes nothing
    else:
        tile = DENSE_TILES[hidden.element_size()]
        grid = (triton.cdiv(width, tile["BLOCK_N"]), triton.cdiv(num_rows, tile["BLOCK_M"]))
        _gather_dense_kernel[grid](
            hidden, positions, head.dense_weight, head.dense_bias, u, num_rows, D=width,
            HAS_BIAS=head.dense_bias is not None, **tile,
        )
    x = u.new_empty(num_rows, pitch)
    mean, rstd = (u.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    row_tile = _row_tile(width)
    _activate_normalise_kernel[(triton.cdiv(num_rows, row_tile["ROWS"]),)](
        u, labels, head.norm_weight, head.norm_bias, x, mean, rstd, num_rows, head.norm_eps,
        D=width, X_PITCH=pitch, HAS_BIAS=head.norm_bias is not None,
        TANH=head.activation == "gelu_tanh", EXTRA=ALIGNED, **row_tile,
    )
    return x, (u, mean, rstd)


def _transform_backward(
    grad_x: torch.Tensor, saved: _Transformed, hidden: torch.Tensor,
    positions: torch.Tensor | None, labels: torch.Tensor, head: MaskedLMHead, wanted: set[str],
) -> dict[str, torch.Tensor]:
    """Return the gradients of the transform's tensors, fp32, from `grad_x`, `(M, D)` fp32."""
    assert head.dense_weight is not None
    u, mean, rstd = saved
    num_rows, width = grad_x.shape
    tile = _row_tile(width)
    num_programs = triton.cdiv(num_rows, tile["ROWS"])
    grad_u = torch.empty_like(u)
    partial = grad_x.new_empty(3, num_programs, width)
    _activate_normalise_backward_kernel[(num_programs,)](
        grad_x, u, labels, mean, rstd, head.norm_weight, grad_u, partial, num_rows, D=width,
        TANH=head.activation == "gelu_tanh", **tile,
    )
    names = ("norm_weight", "norm_bias", "dense_bias")
    gradients = dict(zip(names, partial.sum(1), strict=True))
    if "hidden" in wanted:
        gradients["hidden"] = _product(grad_u, head.dense_weight)
    if "dense_weight" in wanted:
        gradients["dense_weight"] = _product(grad_u.t(), _gather(hidden, positions))
    return gradients


def _aligned(weight: torch.Tensor) -> torch.Tensor:
    """Return the decoder's weight, `(V, D)`, or a copy with rows of zeros, `(V_PAD, D)`."""
    vocab, width = weight.shape
    if vocab % ALIGNED == 0:
        return weight
    padded = weight.new_empty(_up_to(PAD_COLUMNS, vocab), width)
    padded[:vocab] = weight
    padded[vocab:] = 0
    return padded


def _decode(
    x: torch.Tensor, labels: torch.Tensor, head: MaskedLMHead, wanted: set[str]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Apply decoder and cross entropy to `x` of `_transform`.

    Returns:
        The losses, `(M,)` fp32; the hits, `(M,)` int32; and the gradients in `wanted`, fp32, of
        "x", "decoder_weight" and "decoder_bias".
    """
    bias, weight = head.decoder_bias, _aligned(head.decoder_weight)
    num_rows, (vocab, width), columns = len(x), head.decoder_weight.shape, len(weight)
    fitting = max(1, ONE_CHUNK_BYTES // (columns * x.element_size()))
    part_rows = triton.cdiv(num_rows, triton.cdiv(num_rows, fitting))  # parts of equal size

    buffer = x.new_empty(part_rows, columns)
    losses = x.new_empty(num_rows, dtype=torch.float32)
    hits = x.new_empty(num_rows, dtype=torch.int32)
    gradients = {}
    if "x" in wanted:
        gradients["x"] = x.new_empty(num_rows, width, dtype=torch.float32)
    # Columns of x: all of them give dW and db.
    first = 0 if "decoder_weight" in wanted else width
    last = x.shape[1] if "decoder_bias" in wanted else width
    sums: Any = None

    for part in range(0, num_rows, part_rows):
        end = min(part + part_rows, num_rows)
        for start in range(part, end, CHUNK_ROWS or part_rows):
            chunk = slice(start, min(start + (CHUNK_ROWS or part_rows), end))
            logits = buffer[chunk.start - part:chunk.stop - part]
            torch.mm(x[chunk, :width], weight.t(), out=logits)
            _cross_entropy_kernel[(len(logits),)](
                logits, bias, labels[chunk], losses[chunk], hits[chunk], V=vocab, V_PAD=columns,
                HAS_BIAS=bias is not None, WITH_GRADIENT=bool(wanted), **LOSS_TILE,
            )
        grad_logits = buffer[:end - part]
        if "x" in wanted:
            _product(grad_logits, weight, out=gradients["x"][part:end])
        if first < last:
            more = _product(grad_logits.t(), x[part:end, first:last])
            sums = more if sums is None else sums.add_(more)
    if "decoder_weight" in wanted:
        gradients["decoder_weight"] = sums[:vocab, :width]
    if "decoder_bias" in wanted:
        gradients["decoder_bias"] = sums[:vocab, width - first]
    return losses, hits, gradients


def _loss_and_gradients(
    hidden: torch.Tensor, positions: torch.Tensor | None, labels: torch.Tensor,
    head: MaskedLMHead, wanted: set[str],
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return losses `(M,)` fp32, hits `(M,)` int32, and the gradients in `wanted`, fp32.

    The gradients are those of the sum; "hidden" has the masked rows only, `(M, D)`.
    """
    if len(labels) == 0:  # an empty grid cannot be launched
        shapes = {name: tensor.shape for name, tensor in head.tensors().items()}
        shapes["hidden"] = torch.Size((0, hidden.shape[1]))
        zeros = {name: hidden.new_zeros(shapes[name], dtype=torch.float32) for name in wanted}
        losses = hidden.new_empty(0, dtype=torch.float32)
        return losses, losses.to(torch.int32), zeros
    x, saved = _transform(hidden, positions, labels, head)
    of_decoder = wanted & {"decoder_weight", "decoder_bias"}
    below = {"x"} if wanted > of_decoder else set()
    losses, hits, gradients = _decode(x, labels, head, of_decoder | below)
    if below:
        grad_x = gradients.pop("x")
        if saved is None:
            gradients["hidden"] = grad_x
        else:
            gradients |= _transform_backward(
                grad_x, saved, hidden, positions, labels, head, wanted
            )
    return losses, hits, {name: gradients[name] for name in wanted}


# In the order of the arguments of `_MaskedLMLoss.forward`.
TENSORS = ("hidden", "dense_weight", "dense_bias", "norm_weight", "norm_bias", "decoder_weight",
           "decoder_bias")


class _MaskedLMLoss(torch.autograd.Function):
    """The complete operation; the backward pass only scales, casts and scatters."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, dense_weight: torch.Tensor | None,
        dense_bias: torch.Tensor | None, norm_weight: torch.Tensor | None,
        norm_bias: torch.Tensor | None, decoder_weight: torch.Tensor,
        decoder_bias: torch.Tensor | None, positions: torch.Tensor | None, labels: torch.Tensor,
        norm_eps: float, activation: Any, with_gradients: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        head = MaskedLMHead(decoder_weight, decoder_bias, dense_weight, dense_bias, norm_weight,
                            norm_bias, norm_eps, activation)
        needed = zip(TENSORS, ctx.needs_input_grad[:len(TENSORS)], strict=True)
        wanted = {name for name, need in needed if need and with_gradients}
        ctx.positions, ctx.hidden_shape, ctx.dtype = positions, hidden.shape, hidden.dtype
        with torch.cuda.device_of(hidden):  # where Triton launches
            losses, hits, ctx.gradients = _loss_and_gradients(
                hidden, positions, labels, head, wanted
            )
        hits = hits.sum()
        ctx.mark_non_differentiable(hits)
        return losses.sum(), hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        gradients = take_gradients(ctx)
        scaled = {}
        if "hidden" in gradients and ctx.positions is not None:
            rows = gradients.pop("hidden")
            scaled["hidden"] = rows.new_zeros(ctx.hidden_shape, dtype=ctx.dtype)
            if len(rows):
                with torch.cuda.device_of(rows):
                    _scatter(rows, ctx.positions, grad_loss, scaled["hidden"])
        for name, gradient in gradients.items():
            # One pass from fp32 to the dtype of the tensor; in place where that is fp32, but not in
            # a view, which would keep its larger buffer.
            same = gradient.dtype == ctx.dtype and gradient.is_contiguous()
            out = gradient if same else gradient.new_empty(gradient.shape, dtype=ctx.dtype)
            scaled[name] = torch.mul(gradient, grad_loss, out=out)
        return *(scaled.get(name) for name in TENSORS), *(None,) * 5


def masked_lm_loss(
    hidden: torch.Tensor,
    masked_positions: torch.Tensor | None,
    masked_labels: torch.Tensor,
    head: MaskedLMHead,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `csrc.masked_lm_loss` in float32, float16 or bfloat16; one backward pass per call.

    Raises:
        ValueError: another dtype, a CPU tensor without the interpreter, or rows that are too wide.
    """
    if hidden.dtype not in DTYPES:
        raise ValueError(f"implementation 'triton': hidden is {hidden.dtype}, must be float32, "
                         "float16 or bfloat16; take 'chunked' or 'reference'")
    if not hidden.is_cuda and not INTERPRETED:
        raise ValueError(f"implementation 'triton': hidden is on {hidden.device}, must be on a "
                         "GPU; take 'chunked' or 'reference'")
    if hidden.shape[-1] > MAX_WIDTH:
        raise ValueError(f"implementation 'triton': hidden has {hidden.shape[-1]} columns, must "
                         f"have at most {MAX_WIDTH}; take 'reference'")

    def packed(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.contiguous()  # kernels assume it

    transform = (head.dense_weight, head.dense_bias, head.norm_weight, head.norm_bias)
    loss_sum, hits = _MaskedLMLoss.apply(
        packed(hidden.flatten(0, -2)), *map(packed, transform), head.decoder_weight,
        packed(head.decoder_bias), packed(masked_positions), packed(masked_labels), head.norm_eps,
        head.activation, torch.is_grad_enabled(),
    )
    return loss_sum, hits
