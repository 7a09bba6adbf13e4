/* The elements of a KV cache, in each of its types. The type is a constant everywhere, so that no
 * loop tests it.
 *
 * A cache consists of words of 32 bits, in the order in which products take them. Of each head,
 * PANEL_WIDTH tokens lie together:
 * - Keys are a panel as those of linear.h, with a token in each column: [head_dim / v, PANEL_WIDTH]
 *   words, v consecutive dimensions of a token in each.
 * - Values are [PANEL_WIDTH / v, head_dim] words, v consecutive tokens of a dimension in each.
 */

INLINE int64_t kv_element_size(int kv_type) {
    return kv_type == KV_F32 ? 4 : kv_type == KV_BF16 || kv_type == KV_F16 ? 2 : 1;
}

/* Whether the elements are multiples of a scale. */
INLINE int kv_is_quantized(int kv_type) {
    return kv_type == KV_INT8 || kv_type == KV_FP8;
}

/* The weight type that a word is read as. FP8 has none; its words are those of int8. */
INLINE int kv_weight_type(int kv_type) {
    return kv_type == KV_F32    ? WEIGHT_F32
           : kv_type == KV_BF16 ? WEIGHT_BF16
           : kv_type == KV_F16  ? WEIGHT_F16
                                : WEIGHT_INT8;
}

/* The elements of a word. */
INLINE int kv_word_values(int kv_type) {
    return word_values(kv_weight_type(kv_type));
}

/* Where the token in a slot begins, among the elements of a head. */
INLINE int64_t first_key_element(int64_t slot, int64_t head_dim, int values) {
    return slot / PANEL_WIDTH * PANEL_WIDTH * head_dim + slot % PANEL_WIDTH * values;
}

INLINE int64_t first_value_element(int64_t slot, int64_t head_dim, int values) {
    return slot / values * values * head_dim + slot % values;
}

/* FP8 (e4m3), with its sign in all bits above, as floats: as the float16 of the same digits, whose
 * exponent is 8 too small. */
INLINE vfloat fp8_to_float(vint bytes) {
    vint magnitude = vi_shift_left(vi_and(bytes, vi_set(0x7f)), 7);
    vfloat x = vi_f16_to_float(vi_add(magnitude, vi_and(bytes, vi_set(0x8000))));
    /* The largest digits mean NaN; as a float16 they would be 1.875. */
    return v_select(v_less(v_abs(x), v_set(1.8125f)), v_mul(x, v_set(256)), v_set(NAN));
}

/* Element i of each word as a float. */
INLINE vfloat kv_word_value(int kv_type, vint words, int i) {
    if (kv_type == KV_FP8)
        return fp8_to_float(vi_shift_right_signed(vi_shift_left(words, 24 - 8 * i), 24));
    return word_value(kv_weight_type(kv_type), words, i);
}

/* Write the low `bytes` bytes of each word. */
INLINE void store_narrow(char *to, vint words, int bytes) {
    uint32_t wide[VECTOR_WIDTH];
    vi_store(wide, words);
    for (int i = 0; i < VECTOR_WIDTH; i++)
        if (bytes == 1)
            ((uint8_t *)to)[i] = (uint8_t)wide[i];
        else
            ((uint16_t *)to)[i] = (uint16_t)wide[i];
}

/* The bits of floats rounded to bfloat16: to the nearest, ties to even. */
INLINE vint bf16_bits(vfloat x) {
    vint bits = v_bits(x);
    vint odd = vi_and(vi_shift_right(bits, 16), vi_set(1));
    vint rounded = vi_add(vi_add(bits, vi_set(0x7fff)), odd);
    vfloat kept = v_select(v_less_equal(x, x), vi_as_float(rounded), v_set(NAN));
    return vi_shift_right(v_bits(kept), 16);
}

/* The bits of floats of at most 448 rounded to FP8 (e4m3): to the nearest, ties to even. */
INLINE vint fp8_bits(vfloat x) {
    vfloat magnitude = v_abs(x);
    vint bits = v_bits(magnitude);
    /* Normal numbers: the exponent's bias is 7 instead of 127, and 20 bits of the fraction go. */
    vint odd = vi_and(vi_shift_right(bits, 20), vi_set(1));
    vint rebias = vi_set(0x7ffff - (120 << 23));
    vint normal = vi_shift_right(vi_add(vi_add(bits, rebias), odd), 20);
    /* Subnormal numbers are multiples of 2^-9, as are the numbers from 2^14 to 2^15. */
    const vfloat large = v_set(16384.0f);
    vint subnormal = vi_sub(v_bits(v_add(magnitude, large)), v_bits(large));
    vfloat y = v_select(v_less(magnitude, v_set(0.015625f)), vi_as_float(subnormal),
                        vi_as_float(normal));
    y = v_select(v_less_equal(x, x), y, vi_as_float(vi_set(0x7f))); /* NaN */
    return vi_add(v_bits(y), vi_and(vi_shift_right(v_bits(x), 24), vi_set(0x80)));
}

/* Write VECTOR_WIDTH elements, one after the other. */
INLINE void store_elements(char *to, vfloat x, int kv_type, float scale) {
    if (kv_type == KV_F32) {
        v_store((float *)to, x);
    } else if (kv_type == KV_BF16) {
#if defined(LEVEL_BF16)
        v_store_bf16((uint16_t *)to, x);
#else
        store_narrow(to, bf16_bits(x), 2);
#endif
    } else if (kv_type == KV_F16) {
        v_store_f16((uint16_t *)to, x);
    } else if (kv_type == KV_INT8) {
        vfloat steps = v_div(x, v_set(scale));
        v_store_int8((int8_t *)to, v_max(v_set(-128), v_min(v_set(127), steps)));
    } else {
        vfloat steps = v_div(x, v_set(scale)); /* in this order, NaN stays NaN */
        store_narrow(to, fp8_bits(v_max(v_set(-448), v_min(v_set(448), steps))), 1);
    }
}
