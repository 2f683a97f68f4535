// Elementary functions of a register of doubles. Included inside the namespace of the level, behind registers.inl.
//
// Note on numerical properties: exponential() has a relative error of 2^-51; below -708 it is zero, above 709 it is that of 709. gauss()
// is the distribution function of the normal law with a relative error of 1e-14 in the bulk, and 1e-13 where it is below 1e-100.

using Signed = std::int64_t __attribute__((vector_size(FS_BYTES)));

FS_INLINE Wide choose(Signed where, Wide x, Wide y) { return (Wide)((where & (Signed)x) | (~where & (Signed)y)); }

// x = k ln 2 + r with |r| <= ln 2 / 2; e^r by its series to r^13, 2^k through the exponent's bits. k is found by adding 1.5 * 2^52.
FS_INLINE Wide exponential(Wide x) {
    const Signed tiny = x < -708.0;
    const Wide y = choose(x > 709.0, Wide{} + 709.0, choose(tiny, Wide{} - 708.0, x));
    const Wide shifted = y * 1.4426950408889634074 + 6755399441055744.0;
    const Wide k = shifted - 6755399441055744.0;
    Wide r = y - k * 6.93147180369123816490e-01;
    r = r - k * 1.90821492927058770002e-10;
    constexpr double c[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                            1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
    Wide p = Wide{} + c[0];
    for (int i = 1; i < 14; ++i)
        p = p * r + c[i];
    const Wide scale = (Wide)(((Signed)shifted << 52) + (std::int64_t{1023} << 52));
    return choose(tiny, Wide{}, p * scale);
}

FS_INLINE Wide logistic(Wide x) { return 1.0 / (1.0 + exponential(-x)); }

// erfc(x) for x >= 0: exp(-x^2) t times a Chebyshev series in t = 2 / (2 + x), by Clenshaw's recurrence.
FS_INLINE Wide complement(Wide x) {
    constexpr double c[] = {1.1540674772329393772,      0.35543692127049848731,     0.06509515882878652455,     0.0036711423958366391659,
                            -0.0011128447433526324969,  -0.00016075829915378079758, 0.000032780315741731370605, 5.4424416455050160333e-6,
                            -1.5154665553171481622e-6,  -1.4297608181169864917e-7,  8.234608827419493433e-8,    -1.2962846852306562536e-9,
                            -4.1547216310151983042e-9,  6.3470582783628111814e-10,  1.4320822712256223707e-10,  -6.1603901052045855418e-11,
                            2.0612138554721696306e-12,  3.571493148847704445e-12,   -8.5864228432517964757e-13, -6.145600213790630554e-14,
                            7.4187257485966170573e-14,  -1.2895042755032325615e-14, -2.3587263857106323568e-15, 1.5729349381685911397e-15,
                            -2.2782966239546465174e-16, -6.3123304507564298101e-17};
    const Wide t = 2.0 / (2.0 + x);
    const Wide two_z = 4.0 * t - 2.0;
    Wide a{}, b{};
    for (int i = 25; i > 0; --i) {
        const Wide next = two_z * a - b + c[i];
        b = a;
        a = next;
    }
    return t * exponential(-(x * x)) * (0.5 * (two_z * a + c[0]) - b);
}

FS_INLINE Wide gauss(Wide x) {
    const Signed negative = x < 0.0;
    const Wide tail = 0.5 * complement(choose(negative, -x, x) * 0.70710678118654752440);
    return choose(negative, tail, 1.0 - tail);
}
