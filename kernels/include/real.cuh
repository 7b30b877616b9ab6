// Exponential and logarithm as a fixed sequence of double operations, each rounded once: the bits of
// the CPU's, which decides what is sampled.
//
// Twin: `ops::sample::real`, operation by operation. Not here: functions of the model (f32).
#pragma once

#include "device.cuh"

// Weights are multiples of its inverse: sums of integers have no order.
constexpr double WEIGHT_ONE = 0x1p46;

// e^x times WEIGHT_ONE, to the nearest integer, for x <= 0.
INLINE u64 weight(double x) {
    constexpr double ROUNDER = 0x1.8p52, LN2_HIGH = 0x1.62e42feep-1, LN2_LOW = 0x1.a39ef35793c76p-33;
    const double terms[14] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0,
                              1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0,
                              1.0 / 24.0, 1.0 / 6.0, 1.0 / 2.0, 1.0, 1.0};
    // Here the weight is zero already.
    x = x > -40.0 ? x : -40.0;
    const double rounded = add_rn64(mul_rn64(x, 0x1.71547652b82fep+0), ROUNDER);
    const double n = add_rn64(rounded, -ROUNDER);
    const double rest = add_rn64(add_rn64(x, -mul_rn64(n, LN2_HIGH)), -mul_rn64(n, LN2_LOW));
    double power = terms[0];
    UNROLL
    for (u32 i = 1; i < 14; ++i) power = add_rn64(mul_rn64(power, rest), terms[i]);
    const u64 exponent = double_bits(rounded) - double_bits(ROUNDER);
    const double scaled = mul_rn64(power, bits_double((1023u + 46u + exponent) << 52));
    // Below 2^52, units of the last place of 2^52 + x are integers.
    return double_bits(add_rn64(scaled, 0x1p52)) - double_bits(0x1p52);
}

// The natural logarithm of a positive normal number.
INLINE double ln(double x) {
    constexpr double LN2_HIGH = 0x1.62e42feep-1, LN2_LOW = 0x1.a39ef35793c76p-33, ROOT = 0x1.6a09e667f3bcdp-1;
    const double terms[11] = {2.0 / 23.0, 2.0 / 21.0, 2.0 / 19.0, 2.0 / 17.0, 2.0 / 15.0, 2.0 / 13.0,
                              2.0 / 11.0, 2.0 / 9.0, 2.0 / 7.0, 2.0 / 5.0, 2.0 / 3.0};
    // x = 2^n m with m between the root of a half and that of two.
    const long long above = static_cast<long long>(double_bits(x) - double_bits(ROOT));
    const long long exponent = above >> 52;
    const double m = bits_double(double_bits(x) - (static_cast<u64>(exponent) << 52));
    const double n = static_cast<double>(exponent);
    const double f = add_rn64(m, -1.0);
    const double s = div_rn64(f, add_rn64(f, 2.0));
    const double square = mul_rn64(s, s);
    double series = terms[0];
    UNROLL
    for (u32 i = 1; i < 11; ++i) series = add_rn64(mul_rn64(series, square), terms[i]);
    const double small = add_rn64(mul_rn64(s, mul_rn64(square, series)), mul_rn64(n, LN2_LOW));
    return add_rn64(mul_rn64(n, LN2_HIGH), add_rn64(mul_rn64(2.0, s), small));
}
