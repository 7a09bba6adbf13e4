/* Functions of vectors of floats, in the operations of vectors.h. Of NaN they are NaN. */

#ifndef LLMKIT_VECTOR_MATH_H
#define LLMKIT_VECTOR_MATH_H

#include "vectors.h"

/* e^x for x <= 0, to 2 units in the last place; 0 below -87.
 * The range is reduced by multiples of ln 2 after Cody and Waite; the polynomial has degree 7. */
INLINE vfloat exp_nonpositive(vfloat x) {
    const vfloat smallest = v_set(-87.0f);
    const vfloat log2_e = v_set(1.44269504088896341f);
    vmask underflows = v_less(x, smallest);
    x = v_max(smallest, x); /* in this order, NaN stays NaN */
    vfloat n = v_round(v_mul(x, log2_e));
    /* r = x - n ln 2, with ln 2 in two parts. The first part has few bits, so that n times it is
     * exact. */
    vfloat r = v_fnma(n, v_set(0.693359375f), x);
    r = v_fnma(n, v_set(-2.12194440e-4f), r);
    vfloat y = v_set(1.0f / 5040);
    y = v_fma(y, r, v_set(1.0f / 720));
    y = v_fma(y, r, v_set(1.0f / 120));
    y = v_fma(y, r, v_set(1.0f / 24));
    y = v_fma(y, r, v_set(1.0f / 6));
    y = v_fma(y, r, v_set(0.5f));
    y = v_fma(y, r, v_set(1.0f));
    y = v_fma(y, r, v_set(1.0f));
    return v_select(underflows, v_zero(), v_mul(y, v_exp2_whole(n)));
}

/* e^x - 1 - x for x <= 0. Near 0, where that would cancel, the first terms of its series. */
INLINE vfloat exp_minus_one_minus(vfloat x) {
    vfloat far = v_sub(v_sub(exp_nonpositive(x), v_set(1.0f)), x);
    vfloat near = v_set(1.0f / 362880);
    near = v_fma(near, x, v_set(1.0f / 40320));
    near = v_fma(near, x, v_set(1.0f / 5040));
    near = v_fma(near, x, v_set(1.0f / 720));
    near = v_fma(near, x, v_set(1.0f / 120));
    near = v_fma(near, x, v_set(1.0f / 24));
    near = v_fma(near, x, v_set(1.0f / 6));
    near = v_fma(near, x, v_set(0.5f));
    near = v_mul(near, v_mul(x, x));
    return v_select(v_less(v_set(-0.7f), x), near, far);
}

/* erfc(|x| / sqrt(2)) / 2, to 2e-7; relative to the value, to 2e-6 for |x| < 6.
 * erfc(z) = t e^(P(1 - t) - z^2) with t = 1 / (1 + z / 2). P is a Chebyshev fit of
 * log(erfc(z) e^(z^2) / t) for z < 10, of degree 9 and without a constant term. */
INLINE vfloat half_erfc(vfloat x) {
    const vfloat one = v_set(1.0f);
    vfloat magnitude = v_abs(x);
    vfloat half_z = v_mul(magnitude, v_set(0.35355339f));
    vfloat t = v_div(one, v_add(one, half_z));
    vfloat u = v_mul(half_z, t); /* 1 - t, without its rounding error */
    vfloat p = v_set(-0.13956807f);
    p = v_fma(p, u, v_set(0.60322278f));
    p = v_fma(p, u, v_set(-0.89523341f));
    p = v_fma(p, u, v_set(0.48371802f));
    p = v_fma(p, u, v_set(-0.15399206f));
    p = v_fma(p, u, v_set(0.24056208f));
    p = v_fma(p, u, v_set(0.15549326f));
    p = v_fma(p, u, v_set(-0.30287368f));
    p = v_fma(p, u, v_set(-1.256766f));
    vfloat z_squared = v_mul(v_mul(magnitude, magnitude), v_set(0.5f));
    vfloat e = exp_nonpositive(v_fms(p, u, z_squared));
    return v_mul(v_mul(t, e), v_set(0.5f));
}

/* tanh(x) = (1 - e) / (1 + e) with e = e^(-2 |x|), and the sign of x. */
INLINE vfloat tanh_ps(vfloat x) {
    const vfloat one = v_set(1.0f);
    vfloat e = exp_nonpositive(v_mul(v_abs(x), v_set(-2.0f)));
    return v_copysign(v_div(v_sub(one, e), v_add(one, e)), x);
}

/* sigmoid(x) = 1 / (1 + e) for x >= 0 and e / (1 + e) below, with e = e^(-|x|). */
INLINE vfloat sigmoid_ps(vfloat x) {
    const vfloat one = v_set(1.0f);
    vfloat e = exp_nonpositive(v_sub(v_zero(), v_abs(x)));
    return v_div(v_select(v_is_negative(x), e, one), v_add(one, e));
}

/* log(1 + e^x) = max(x, 0) + log(1 + e) with e = e^(-|x|), to 3 units in the last place.
 * log(1 + e) = 2 artanh(s) with s = e / (2 + e), at most 1/3: the first terms of its series. */
INLINE vfloat softplus_ps(vfloat x) {
    vfloat e = exp_nonpositive(v_sub(v_zero(), v_abs(x)));
    vfloat s = v_div(e, v_add(v_set(2.0f), e));
    vfloat square = v_mul(s, s);
    vfloat sum = v_set(1.0f / 15);
    sum = v_fma(sum, square, v_set(1.0f / 13));
    sum = v_fma(sum, square, v_set(1.0f / 11));
    sum = v_fma(sum, square, v_set(1.0f / 9));
    sum = v_fma(sum, square, v_set(1.0f / 7));
    sum = v_fma(sum, square, v_set(1.0f / 5));
    sum = v_fma(sum, square, v_set(1.0f / 3));
    sum = v_fma(sum, square, v_set(1.0f));
    vfloat logarithm = v_mul(v_add(s, s), sum);
    return v_add(v_max(v_zero(), x), logarithm); /* in this order, NaN stays NaN */
}

#endif
