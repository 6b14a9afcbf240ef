"""The epilogues of mlp_in's two products for quack-kernels (CuTe DSL), in bf16: for benchmarks/aot_cutlass.py.

They compute what kernels/mlp_in_product.py does: the same GELU as Triton's, and means and squared deviations of rows as
they are stored. Nothing here has run on a GPU.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op
from quack import layout_utils
from quack.epilogue import gemm_epilogue
from quack.epilogue.ops import ColVecLoad, ColVecReduce, RowVecLoad, RowVecReduce

# Φ(-a) = 2 to the power of this polynomial in a, from the highest power on, for 0 <= a <= 16.
TAIL = (-2.562677082096343e-06, 3.660072252387181e-05, -1.750942610669881e-04, -1.5904517204035074e-04)
TAIL += (7.086713332682848e-03, -5.250875651836395e-02, -4.5920512080192566e-01, -1.1511054039001465, -1.0)


def _ptx(text, values, loc, ip):
    """The value of PTX instructions: $0 is the result, $1 … are the values, all in fp32."""
    operands = [Float32(value).ir_value(loc=loc, ip=ip) for value in values]
    constraints = ",".join(["=f"] + ["f"] * len(operands))
    return Float32(llvm.inline_asm(T.f32(), operands, text, constraints, asm_dialect=llvm.AsmDialect.AD_ATT))


@dsl_user_op
def stored(x, *, loc=None, ip=None):
    """x rounded to bf16, in one instruction: bf16 is the upper half of fp32."""
    text = "{.reg .b32 t; .reg .f32 z; mov.f32 z, 0f00000000; cvt.rn.bf16x2.f32 t, $1, z; mov.b32 $0, t;}"
    return _ptx(text, [x], loc, ip)


@dsl_user_op
def bounded(x, *, loc=None, ip=None):
    """min(|x|, 16), NaN where x is."""
    return _ptx("{.reg .f32 t; abs.f32 t, $1; min.NaN.f32 $0, t, 0f41800000;}", [x], loc, ip)


@dsl_user_op
def positive(x, *, loc=None, ip=None):
    """max(x, 0)."""
    return _ptx("max.f32 $0, $1, 0f00000000;", [x], loc, ip)


@dsl_user_op
def power(x, *, loc=None, ip=None):
    """2 to the power of x."""
    return _ptx("ex2.approx.ftz.f32 $0, $1;", [x], loc, ip)


@dsl_user_op
def where_positive(x, one, other, *, loc=None, ip=None):
    """`one` where x > 0, else `other`."""
    text = "{.reg .pred p; setp.gt.f32 p, $1, 0f00000000; selp.f32 $0, $2, $3, p;}"
    return _ptx(text, [x, one, other], loc, ip)


def lower_tail(a):
    """Φ(-a)."""
    p = Float32(TAIL[0])
    for c in TAIL[1:]:
        p = p * a + c
    return power(p)


def gelu(x):
    """x Φ(x)."""
    a = bounded(x)
    return positive(x) - a * lower_tail(a)


def gelu_and_slope(x):
    """gelu(x) and its derivative."""
    a = bounded(x)
    tail = lower_tail(a)
    below = tail - a * power(a * (a * -0.7213475204444817) - 1.3257480647361595)
    return positive(x) - a * tail, where_positive(x, 1.0 - below, below)


class Deviations(ColVecReduce):
    """The sum of squared deviations of each row's values from their mean, by Chan's formula.

    Its state are mean, sum and count of what was seen.
    """

    reduce_planes = 3

    @cute.jit
    def begin(self, gemm, param, smem_tensor, ctx):
        places = cute.make_layout((ctx.tile_M, ctx.tile_N), stride=(1, 0))
        layout = ctx.partition_for_epilogue_fn(cute.make_rmem_tensor(places, Float32)).layout
        mean, square, count = (cute.make_rmem_tensor(layout, Float32) for _ in range(3))
        return (mean, square, count, smem_tensor)

    @cute.jit
    def begin_loop(self, gemm, state, epi_coord):
        return (*self._end_loop_values(state, epi_coord), epi_coord[1])

    @cute.jit
    def _end_loop_values(self, state, epi_coord):
        return tuple(part[None, None, None, epi_coord[0], epi_coord[1]] for part in state[:3])

    @cute.jit
    def _end_loop_smem(self, state):
        return state[3]

    @cute.jit
    def _merge(self, vals, others):  # of equal counts
        delta = others[0] - vals[0]
        square = vals[1] + others[1] + delta * delta * (vals[2] * 0.5)
        return (vals[0] + delta * 0.5, square, vals[2] * 2.0)

    @cute.jit
    def _finalize(self, vals):
        return vals[1]

    @cute.jit
    def fn_sink_flush(self, gemm, state, frag):
        ref = state[0].layout
        values = layout_utils.convert_layout_zero_stride(frag, ref)
        mean, square, count = (layout_utils.convert_layout_zero_stride(part, ref)[None, 0] for part in state[:3])
        n, before = const_expr(cute.size(values, mode=[1])), const_expr(state[3])
        for i in cutlass.range(cute.size(mean), unroll_full=True):
            total = values[i, 0]
            for j in cutlass.range_constexpr(1, n):
                total = total + values[i, j]
            part_mean = total * (1.0 / n)
            delta = values[i, 0] - part_mean
            part_square = delta * delta
            for j in cutlass.range_constexpr(1, n):
                delta = values[i, j] - part_mean
                part_square = delta * delta + part_square
            if const_expr(before == 0):
                mean[i] = part_mean
                square[i] = part_square
            else:
                delta = part_mean - mean[i]
                mean[i] = mean[i] + delta * (1.0 / (before + 1))
                square[i] = square[i] + (delta * delta * (n * before / (before + 1)) + part_square)
            count[i] = Float32(n * (before + 1.0))


MOMENTS = {"sums": ColVecReduce("sums"), "squares": Deviations("squares")}
ROWS = ("mean", "rstd", "mean_dn", "mean_n_dn")


@gemm_epilogue(outputs=("g",), ops={"bias": RowVecLoad("bias")}, reduces=MOMENTS)
def forward_with_h(acc, bias):
    """D is h (T, W); g (T, W); sums and squares of its rows' parts."""
    g = stored(gelu(stored(acc) + bias))
    return {"D": acc, "g": g, "sums": g, "squares": g}


@gemm_epilogue(ops={"bias": RowVecLoad("bias")}, reduces=MOMENTS)
def forward(acc, bias):
    """D is g (T, W)."""
    g = stored(gelu(stored(acc) + bias))
    return {"D": g, "sums": g, "squares": g}


@gemm_epilogue(
    outputs=("g",),
    ops={"bias": RowVecLoad("bias"), **{name: ColVecLoad(name) for name in ROWS}},
    reduces={"db": RowVecReduce("db")},
)
def backward(acc, c, bias, mean, rstd, mean_dn, mean_n_dn):
    """acc is dn, c is h; D is dh (T, W), db its sums over the rows of a block."""
    g, slope = gelu_and_slope(c + bias)
    g = stored(g)
    along = mean_n_dn * rstd * rstd
    rest = mean * along - mean_dn * rstd
    dh = (acc * rstd + (rest - g * along)) * slope
    return {"D": dh, "g": g, "db": dh}
