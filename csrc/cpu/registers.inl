// Registers of one instruction set (see levels.inl), and loads and stores of every storage type. Included inside the namespace of
// the level. Nothing here may call an inline function of the standard library: the linker could keep the copy compiled for the
// larger instruction set.

#define FS_INLINE FS_TARGET inline __attribute__((always_inline))

// A register of T; HalfFloat has as many floats as a register has doubles. Spelled out per type: the attribute
// is ignored on a template parameter.
using Float = float __attribute__((vector_size(FS_BYTES)));
using HalfFloat = float __attribute__((vector_size(FS_BYTES / 2)));
using Wide = double __attribute__((vector_size(FS_BYTES)));

template <class T> struct Register;
template <> struct Register<float> {
    using Full = Float;
};
template <> struct Register<double> {
    using Full = Wide;
};
template <class T> using Vec = typename Register<T>::Full;

template <class T> inline constexpr i64 kWidth = FS_BYTES / static_cast<i64>(sizeof(T));
inline constexpr i64 kWide = kWidth<double>;

FS_INLINE float from_bits(std::uint32_t x) {
    float f;
    __builtin_memcpy(&f, &x, sizeof f);
    return f;
}
FS_INLINE std::uint32_t to_bits(float f) {
    std::uint32_t x;
    __builtin_memcpy(&x, &f, sizeof x);
    return x;
}

// One element. Subnormal halves go through an integer, not through a subnormal float, which a thread may flush to zero.
FS_INLINE double one(double x) { return x; }
FS_INLINE double one(float x) { return static_cast<double>(x); }
FS_INLINE double one(BFloat16 x) { return static_cast<double>(from_bits(static_cast<std::uint32_t>(x.bits) << 16)); }
FS_INLINE double one(Half x) {
    const std::uint32_t h = x.bits;
    const std::uint32_t sign = (h & 0x8000U) << 16;
    const std::uint32_t size = h & 0x7FFFU;
    const float small = static_cast<float>(static_cast<int>(size)) * 0x1p-24F;
    const std::uint32_t large = (size << 13) + (size < 0x7C00U ? 112U << 23 : 224U << 23);
    return static_cast<double>(from_bits(sign | (size < 0x400U ? to_bits(small) : large)));
}

// One float rounded to nearest even.
FS_INLINE BFloat16 to_bfloat(float f) {
    const std::uint32_t x = to_bits(f);
    const bool nan = (x & 0x7FFFFFFFU) > 0x7F800000U;
    return {static_cast<std::uint16_t>(nan ? x >> 16 | 0x40U : (x + 0x7FFFU + (x >> 16 & 1U)) >> 16)};
}
FS_INLINE Half to_half(float f) {
    const std::uint32_t x = to_bits(f);
    const std::uint32_t sign = x >> 16 & 0x8000U;
    const std::uint32_t size = x & 0x7FFFFFFFU;
    std::uint32_t h;
    if (size > 0x7F800000U)
        h = 0x7E00U;
    else if (size >= 0x477FF000U) // 65520, the midpoint of the largest half and the power above
        h = 0x7C00U;
    else if (size < 0x38800000U) // below 2^-14: adding 1/2 leaves multiples of 2^-24 in the last bits
        h = to_bits(from_bits(size) + 0.5F) - 0x3F000000U;
    else
        h = (size - (112U << 23) + 0xFFFU + (size >> 13 & 1U)) >> 13;
    return {static_cast<std::uint16_t>(sign | h)};
}

template <class V, class T> FS_INLINE V load(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <class V, class S> FS_INLINE V each(const S* p) {
    V v{};
    for (unsigned k = 0; k < sizeof(V) / sizeof(float); ++k)
        v[k] = static_cast<float>(one(p[k]));
    return v;
}
FS_INLINE void store_each(Half* p, HalfFloat x) {
    for (i64 k = 0; k < kWide; ++k)
        p[k] = to_half(x[k]);
}

// A register of T, or of doubles, from storage.
FS_INLINE Float as(const float* p, float) { return load<Float>(p); }
FS_INLINE Float as(const Half* p, float) { return FS_HALVES(p); }
FS_INLINE Float as(const BFloat16* p, float) { return FS_BFLOATS(p); }
FS_INLINE Wide as(const double* p, double) { return load<Wide>(p); }

FS_INLINE Wide widen(const float* p) { return FS_TO_DOUBLE(load<HalfFloat>(p)); }
FS_INLINE Wide widen(const double* p) { return load<Wide>(p); }
FS_INLINE Wide widen(const Half* p) { return FS_TO_DOUBLE(FS_HALVES_2(p)); }
FS_INLINE Wide widen(const BFloat16* p) { return FS_TO_DOUBLE(FS_BFLOATS_2(p)); }

// K registers of doubles at once. Half-precision rows go to floats in whole registers and through the first-level cache to doubles:
// from memory a conversion to double is one operation, from a register two, and update is limited by them.
template <int K, class T> FS_INLINE void widen_all(const T* p, Wide* x) {
    for (int k = 0; k < K; ++k)
        x[k] = widen(p + k * kWide);
}
template <int K, class S> FS_INLINE void widen_halves(const S* p, Wide* x) {
    if constexpr (K % 2 == 0 && FS_BYTES > 16) {
        float f[K * kWide];
        for (int k = 0; k < K / 2; ++k) {
            const Float y = as(p + k * 2 * kWide, 0.0F);
            __builtin_memcpy(f + k * 2 * kWide, &y, sizeof y);
        }
        asm("" : "+m"(f)); // else the compiler splits the register again
        for (int k = 0; k < K; ++k)
            x[k] = widen(f + k * kWide);
    } else {
        for (int k = 0; k < K; ++k)
            x[k] = widen(p + k * kWide);
    }
}
template <int K> FS_INLINE void widen_all(const Half* p, Wide* x) { widen_halves<K>(p, x); }
template <int K> FS_INLINE void widen_all(const BFloat16* p, Wide* x) { widen_halves<K>(p, x); }

// Rounds, stores, and gives back what was stored.
FS_INLINE Wide store(float* p, Wide x) {
    const HalfFloat rounded = FS_TO_FLOAT(x);
    __builtin_memcpy(p, &rounded, sizeof rounded);
    return FS_TO_DOUBLE(rounded);
}
FS_INLINE Wide store(double* p, Wide x) {
    __builtin_memcpy(p, &x, sizeof x);
    return x;
}
FS_INLINE void store(Half* p, Wide x) { FS_STORE_HALVES(p, FS_TO_FLOAT(x)); }
FS_INLINE void store(BFloat16* p, Wide x) {
    using Bits = std::uint32_t __attribute__((vector_size(FS_BYTES / 2)));
    using Short = std::uint16_t __attribute__((vector_size(FS_BYTES / 4)));
    const Bits f = (Bits)FS_TO_FLOAT(x);
    const Bits nan = (Bits)((f & 0x7FFFFFFFU) > 0x7F800000U); // all ones or none
    const Bits nearest = (f + 0x7FFFU + (f >> 16 & 1U)) >> 16;
    const Short out = __builtin_convertvector((nan & (f >> 16 | 0x40U)) | (~nan & nearest), Short);
    __builtin_memcpy(p, &out, sizeof out);
}
FS_INLINE void store_one(double* p, double x) { *p = x; }
FS_INLINE void store_one(float* p, double x) { *p = static_cast<float>(x); }
FS_INLINE void store_one(Half* p, double x) { *p = to_half(static_cast<float>(x)); }
FS_INLINE void store_one(BFloat16* p, double x) { *p = to_bfloat(static_cast<float>(x)); }

FS_INLINE double sum(Wide x) {
    double s = 0;
    for (i64 k = 0; k < kWide; ++k)
        s += x[k];
    return s;
}
