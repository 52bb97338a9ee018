"""exp, tanh, erf and the activation functions, over vectors of float32 lanes.

Polynomials only: no library call, and the same bits in every lane, for every vector length and on every machine that
has a fused multiply-add; but for exp2_rough and exp2_rougher, which take what AVX-512 has. Within 2 units in the last
place (exp: 1; silu: 3; gelu and gelu_erf: 3, of the result and 1 together). The coefficients are minimax fits by
Remez's exchange algorithm, computed with 40 digits and rounded to float32; ranges are reduced as in Cody & Waite,
"Software Manual for the Elementary Functions" (1980). NaN gives NaN.

Each function exists twice: `emit_x(context, b, x)` for code generators, over an IR builder and a float32 vector of any
length, and the intrinsic `x_f32` for Numba code, over f32x16.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from edgelm.kernels.emit import I16, I32, call, emit_fma, target
from edgelm.kernels.simd import f32x16

# exp(r) = 1 + r + r² q(r) for |r| <= ln 2 / 2, relative error 3e-9
EXP = (0.4999999403953552, 0.1666652113199234, 0.04166838899254799, 0.008368710055947304, 0.0013814613921567798)
# 2**r = 1 + r q(r) for |r| <= 1/2, relative error 2e-9
EXP2 = (0.6931471824645996, 0.24022647738456726, 0.055503323674201965, 0.00961843691766262, 0.0013398873852565885,
        0.00015353361959569156)
# 2**r for 0 <= r <= 1, relative error 2.9e-6: for what is then rounded to bfloat16, an error of 2e-3
EXP2_OF_FRACTION = (1.0, 0.6930448448617509, 0.2412802050785793, 0.05224247352365966, 0.013426684707629784)
EXP2_OF_FRACTION_ROUGHLY = (0.9999251961708069, 0.6958335638046265, 0.22606715559959412, 0.07802452147006989)  # 7.5e-5
# tanh(x) = x + x³ p(x²) for x² <= 0.39, relative error 4e-9
TANH = (-0.3333328366279602, 0.13331501185894012, -0.05374443531036377, 0.02065381221473217, -0.005720825865864754)
TANH_SMALL = 0.62
# erf(x) = x + x p(x²) for x² <= 1, relative error 4e-8
ERF = (0.12837912142276764, -0.37612324953079224, 0.11280179768800735, -0.02671131119132042, 0.004917551297694445,
       -0.0005631422391161323)
# erfc(x) = exp(-(x + x p(x))) for 0.98 <= x <= 4, error of erf 4e-10
ERFC = (0.12868593633174896, 0.6350017786026001, 0.10648027062416077, -0.023968642577528954, 0.0037388051860034466,
        -0.0003462016466073692, 1.354183132207254e-05)

LOG2_E = math.log2(math.e)
LN2_HIGH, LN2_LOW = 0.693145751953125, 1.428606765330187e-06  # the first has 15 bits: its multiples are exact
EXP_LARGEST, EXP_SMALLEST = 88.8, -104.0  # beyond these exp is infinite, or rounds to zero
EXP_SMALLEST_NORMAL = -87.33654


def _k(like: ir.Value, value: float) -> ir.Constant:
    return ir.Constant(like.type, [value] * like.type.count)


def _ki(like: ir.Value, value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(I32, like.type.count), [value] * like.type.count)


def _fn(b: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    return call(b, f"llvm.{name}.v{args[0].type.count}f32", args[0].type, *args)


def _horner(context: Any, b: ir.IRBuilder, x: ir.Value, coefficients: tuple[float, ...]) -> ir.Value:
    result = _k(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        result = emit_fma(context, b, result, x, _k(x, c))
    return result


def _reduced_exp(context: Any, b: ir.IRBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(exp(x - n ln 2), n as int32 lanes), n = x / ln 2 rounded."""
    ints = ir.VectorType(I32, x.type.count)
    magic = _k(x, 1.5 * 2.0**23)  # adding it rounds to an integer, to nearest, in the low bits
    shifted = emit_fma(context, b, x, _k(x, LOG2_E), magic)
    whole = b.fsub(shifted, magic)
    n = b.sub(b.bitcast(shifted, ints), b.bitcast(magic, ints))
    r = emit_fma(context, b, whole, _k(x, -LN2_HIGH), x)
    r = emit_fma(context, b, whole, _k(x, -LN2_LOW), r)
    q = _horner(context, b, r, EXP)
    return b.fadd(emit_fma(context, b, b.fmul(r, r), q, r), _k(x, 1.0)), n


def _power_of_2(b: ir.IRBuilder, n: ir.Value, like: ir.Value) -> ir.Value:
    return b.bitcast(b.shl(b.add(n, _ki(like, 127)), _ki(like, 23)), like.type)


def _clamped(b: ir.IRBuilder, x: ir.Value, low: float, high: float) -> ir.Value:
    x = b.select(b.fcmp_ordered(">", x, _k(x, high)), _k(x, high), x)
    return b.select(b.fcmp_ordered("<", x, _k(x, low)), _k(x, low), x)


def emit_exp(context: Any, b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp(x), subnormal results included."""
    y, n = _reduced_exp(context, b, _clamped(b, x, EXP_SMALLEST, EXP_LARGEST))
    half = b.ashr(n, _ki(x, 1))  # 2**n in two factors: n may lie beyond what one exponent holds
    return b.fmul(b.fmul(y, _power_of_2(b, half, x)), _power_of_2(b, b.sub(n, half), x))


def emit_exp_negative(context: Any, b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp(x) of x <= 0 for softmax: what would be subnormal is 0, so exp(-inf) is."""
    y, n = _reduced_exp(context, b, x)
    zero = b.fcmp_ordered("<", x, _k(x, EXP_SMALLEST_NORMAL))
    return b.select(zero, _k(x, 0.0), b.fmul(y, _power_of_2(b, n, x)))


def _one_plus_exp(context: Any, b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """1 + exp(x), infinite from x = 88.4 on: there, and where exp(x) is not seen, 2**n is infinity or 0."""
    y, n = _reduced_exp(context, b, _clamped(b, x, -88.0, 89.0))
    return emit_fma(context, b, y, _power_of_2(b, n, x), _k(x, 1.0))


def emit_exp2_negative(context: Any, b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """2**x of x <= 0, for softmax: what would be subnormal is 0, so 2**-inf is."""
    ints, magic = ir.VectorType(I32, x.type.count), _k(x, 1.5 * 2.0**23 + 127)  # whole numbers have 2**n's exponent
    shifted = b.fadd(x, magic)
    r = b.fsub(x, b.fsub(shifted, magic))
    y = emit_fma(context, b, r, _horner(context, b, r, EXP2), _k(x, 1.0))
    power = b.bitcast(b.shl(b.bitcast(shifted, ints), _ki(x, 23)), x.type)
    return b.select(b.fcmp_ordered("<", x, _k(x, -126.0)), _k(x, 0.0), b.fmul(y, power))


def emit_exp2_rough(
    context: Any, b: ir.IRBuilder, x: ir.Value, coefficients: tuple[float, ...] = EXP2_OF_FRACTION
) -> ir.Value:
    """The same, for weights that become bfloat16, which has no subnormal numbers there: it may return some.

    With the two instructions that AVX-512 has for it, which leave more accuracy than is needed, else just the same.
    """
    if x.type.count != 16 or not target(context)[1] >= {"avx512f", "avx512dq"}:
        return emit_exp2_negative(context, b, x)
    zeros, all_lanes, as_set = ir.Constant(x.type, None), ir.Constant(I16, -1), I32(4)

    def avx512(name: str, *args: ir.Value) -> ir.Value:
        return call(b, f"llvm.x86.avx512.mask.{name}.ps.512", x.type, *args, zeros, all_lanes, as_set)

    fraction = avx512("reduce", x, I32(9))  # x - floor(x)
    return avx512("scalef", _horner(context, b, fraction, coefficients), x)  # times 2 ** floor(x)


def emit_exp2_rougher(context: Any, b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The same with an error that is still a 26th of that of bfloat16."""
    return emit_exp2_rough(context, b, x, EXP2_OF_FRACTION_ROUGHLY)


def emit_tanh(context: Any, b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    size = _fn(b, "fabs", x)
    square = b.fmul(x, x)
    small = emit_fma(context, b, b.fmul(square, x), _horner(context, b, square, TANH), x)
    # 1 - 2 / (exp(2|x|) + 1); exp overflows to infinity and gives 1
    large = b.fsub(_k(x, 1.0), b.fdiv(_k(x, 2.0), b.fadd(emit_exp(context, b, b.fadd(size, size)), _k(x, 1.0))))
    return _fn(b, "copysign", b.select(b.fcmp_unordered("<=", size, _k(x, TANH_SMALL)), small, large), x)


def emit_erf(context: Any, b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    size = _fn(b, "fabs", x)
    square = b.fmul(x, x)
    small = emit_fma(context, b, x, _horner(context, b, square, ERF), x)
    t = b.select(b.fcmp_ordered(">", size, _k(x, 4.0)), _k(x, 4.0), size)
    exponent = b.fneg(emit_fma(context, b, t, _horner(context, b, t, ERFC), t))
    large = b.fsub(_k(x, 1.0), emit_exp_negative(context, b, exponent))
    return b.select(b.fcmp_unordered("<=", size, _k(x, 1.0)), small, _fn(b, "copysign", large, x))


def emit_silu(context: Any, b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x * sigmoid(x)"""
    return b.fdiv(x, _one_plus_exp(context, b, b.fneg(x)))


def emit_gelu(context: Any, b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x³); as x sigmoid(2u), which cancels nothing."""
    linear = -2 * 0.7978845608028654
    cubic = emit_fma(context, b, b.fmul(x, x), _k(x, 0.044715 * linear), _k(x, linear))
    return b.fdiv(x, _one_plus_exp(context, b, b.fmul(cubic, x)))


def emit_gelu_erf(context: Any, b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x/2 (1 + erf(x / sqrt 2))"""
    half = b.fmul(x, _k(x, 0.5))
    return emit_fma(context, b, half, emit_erf(context, b, b.fmul(x, _k(x, 0.7071067811865476))), half)


def emit_relu(context: Any, b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return b.select(b.fcmp_unordered(">", x, _k(x, 0.0)), x, _k(x, 0.0))


def _intrinsic(emit: Any) -> Any:
    @intrinsic
    def function(typingctx, x):
        def codegen(context, b, sig, args):
            return emit(context, b, args[0])
        return f32x16(f32x16), codegen
    return function


exp_f32 = _intrinsic(emit_exp)
exp_negative_f32 = _intrinsic(emit_exp_negative)
exp2_negative_f32 = _intrinsic(emit_exp2_negative)
exp2_rough_f32 = _intrinsic(emit_exp2_rough)
exp2_rougher_f32 = _intrinsic(emit_exp2_rougher)
tanh_f32 = _intrinsic(emit_tanh)
erf_f32 = _intrinsic(emit_erf)
silu_f32 = _intrinsic(emit_silu)
gelu_f32 = _intrinsic(emit_gelu)
gelu_erf_f32 = _intrinsic(emit_gelu_erf)
relu_f32 = _intrinsic(emit_relu)

ACTIVATIONS = {
    "identity": lambda context, b, x: x, "silu": emit_silu, "gelu": emit_gelu, "gelu_erf": emit_gelu_erf,
    "relu": emit_relu, "tanh": emit_tanh,
}
