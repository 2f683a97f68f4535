// The CUDA kernel for products of fully connected nets, executed by host_shim.hpp: against the formulas of mlp.hpp in long double on any
// numbers, in several launch shapes with the same bits, for every row those of a call with it alone.
#include <cstring>
#include <functional>

#include "check.hpp"
#include "fastsharp/mlp.hpp"
#include "host_shim.hpp"

using namespace fastsharp;
using cuda::MlpLaunch;
using test::real;

namespace {

using Matrix = std::vector<real>; // row by row

// E nets with everything that a primal pass leaves, as plain matrices (samples, width) by layer, and as the kernel's cache.
template <class T> struct Nets {
    std::vector<i64> widths, weights, biases;
    i64 E, N, n = 0;
    MlpShape shape{};
    std::vector<std::vector<Matrix>> a, f, c, y; // [e][l]
    std::vector<Matrix> p, w, theta;             // [e]
    std::vector<T> cache, flat;
    test::Sequence next;

    Nets(std::vector<i64> w_, bool curved, MlpLoss loss, i64 members, i64 samples, bool biased)
        : widths(std::move(w_)), E(members), N(samples) {
        const i64 L = static_cast<i64>(widths.size()) - 1;
        for (i64 l = 1; l <= L; ++l) {
            weights.push_back(n);
            n += width(l) * width(l - 1);
            biases.push_back(biased ? n : -1);
            n += biased ? width(l) : 0;
        }
        shape = {L, widths.data(), weights.data(), biases.data(), curved, loss, N, n};
        for (i64 e = 0; e < E; ++e) {
            std::vector<Matrix> as, fs, cs(1), ys(1);
            for (i64 l = 0; l < L; ++l)
                as.push_back(random(N * width(l)));
            fs.emplace_back();
            for (i64 l = 1; l < L; ++l) {
                fs.push_back(random(N * width(l)));
                cs.push_back(curved ? random(N * width(l)) : Matrix(static_cast<std::size_t>(N * width(l)), 0));
            }
            for (i64 l = 1; l <= L; ++l)
                ys.push_back(random(N * width(l)));
            a.push_back(as);
            f.push_back(fs);
            c.push_back(cs);
            y.push_back(ys);
            p.push_back(random(N * width(L)));
            w.push_back(random(N));
            theta.push_back(random(n));
            fill(e);
        }
    }

    [[nodiscard]] i64 width(i64 l) const { return widths[static_cast<std::size_t>(l)]; }

    Matrix random(i64 size) {
        Matrix m(static_cast<std::size_t>(size));
        for (real& x : m)
            x = static_cast<real>(static_cast<T>(next()));
        return m;
    }

    // The tiles of net e, in the order of mlp.hpp, without transposes.
    void fill(i64 e) {
        const i64 S = kSamples<T>, L = shape.layers;
        const auto at = [](const auto& v, i64 i) { return v[static_cast<std::size_t>(i)]; };
        for (i64 first = 0; first < N; first += S) {
            const auto put = [&](const Matrix& m, i64 columns) {
                for (i64 k = 0; k < columns; ++k) {
                    for (i64 i = first; i < first + S; ++i)
                        cache.push_back(i < N ? static_cast<T>(at(m, i * columns + k)) : T(0));
                }
            };
            for (i64 l = 0; l < L; ++l)
                put(at(at(a, e), l), width(l));
            for (i64 l = 1; l < L; ++l)
                put(at(at(f, e), l), width(l));
            for (i64 l = 1; shape.curved && l < L; ++l)
                put(at(at(c, e), l), width(l));
            for (i64 l = 1; l <= L; ++l)
                put(at(at(y, e), l), width(l));
            if (shape.loss == MlpLoss::cross_entropy)
                put(at(p, e), width(L));
            put(at(w, e), 1);
        }
        for (const real x : at(theta, e))
            flat.push_back(static_cast<T>(x));
    }

    // The product by the formulas; `moduli`: with the modulus of every factor and every difference a sum, which bounds all terms.
    Matrix product(i64 e_, const T* V, bool gauss, bool moduli) const {
        const auto e = static_cast<std::size_t>(e_);
        const i64 L = shape.layers;
        const auto g = [moduli](real x) { return moduli ? std::fabs(x) : x; };
        Matrix out(static_cast<std::size_t>(n), 0);
        const auto U = [](i64 i) { return static_cast<std::size_t>(i); };
        for (i64 i = 0; i < N; ++i) {
            std::vector<Matrix> zt(U(L + 1)), at(U(L + 1)), yt(U(L + 1));
            at[0].assign(U(width(0)), 0);
            for (i64 l = 1; l <= L; ++l) {
                for (i64 r = 0; r < width(l); ++r) {
                    real z = biases[U(l - 1)] < 0 ? 0 : g(static_cast<real>(V[biases[U(l - 1)] + r]));
                    for (i64 k = 0; k < width(l - 1); ++k) {
                        const i64 where = weights[U(l - 1)] + r * width(l - 1) + k;
                        z += g(static_cast<real>(V[where])) * g(a[e][U(l - 1)][U(i * width(l - 1) + k)]) +
                             g(theta[e][U(where)]) * at[U(l - 1)][U(k)];
                    }
                    zt[U(l)].push_back(z);
                    if (l < L)
                        at[U(l)].push_back(g(f[e][U(l)][U(i * width(l) + r)]) * z);
                }
            }
            const i64 C = width(L);
            real mean = 0;
            for (i64 k = 0; shape.loss == MlpLoss::cross_entropy && k < C; ++k)
                mean += g(p[e][U(i * C + k)]) * zt[U(L)][U(k)];
            for (i64 k = 0; k < C; ++k) {
                real u = zt[U(L)][U(k)];
                if (shape.loss == MlpLoss::cross_entropy)
                    u = g(p[e][U(i * C + k)]) * (moduli ? u + mean : u - mean);
                yt[U(L)].push_back(g(w[e][U(i)]) * u);
            }
            for (i64 l = L; l >= 1; --l) {
                for (i64 r = 0; r < width(l); ++r) {
                    const real adjoint = gauss ? 0 : g(y[e][U(l)][U(i * width(l) + r)]);
                    for (i64 k = 0; k < width(l - 1); ++k)
                        out[U(weights[U(l - 1)] + r * width(l - 1) + k)] +=
                            yt[U(l)][U(r)] * g(a[e][U(l - 1)][U(i * width(l - 1) + k)]) + adjoint * at[U(l - 1)][U(k)];
                    if (biases[U(l - 1)] >= 0)
                        out[U(biases[U(l - 1)] + r)] += yt[U(l)][U(r)];
                }
                for (i64 k = 0; l > 1 && k < width(l - 1); ++k) {
                    real back = 0;
                    for (i64 r = 0; r < width(l); ++r) {
                        const i64 where = weights[U(l - 1)] + r * width(l - 1) + k;
                        back += g(theta[e][U(where)]) * yt[U(l)][U(r)];
                        if (!gauss)
                            back += g(static_cast<real>(V[where])) * g(y[e][U(l)][U(i * width(l) + r)]);
                    }
                    const i64 j = i * width(l - 1) + k;
                    yt[U(l - 1)].push_back(g(f[e][U(l - 1)][U(j)]) * back + (gauss ? 0 : g(c[e][U(l - 1)][U(j)]) * zt[U(l - 1)][U(k)]));
                }
            }
        }
        return out;
    }
};

// `scale` times the rows of the product / 4, with V and the result `pad` elements further apart than they must be; the gaps must stay as
// they are. Powers of two, so that no bit changes.
template <class T> std::vector<T> run(const Nets<T>& nets, const std::vector<i64>& member, const std::vector<T>& V, i64 pad, bool gauss,
                                      MlpLaunch config, T scale = 4) {
    const auto rows = static_cast<i64>(member.size());
    const i64 n = nets.n, row = n + pad;
    auto apart = test::poisoned_as<T>((rows - 1) * row + n), out = apart;
    for (i64 r = 0; r < rows; ++r)
        std::memcpy(apart.data() + r * row, V.data() + r * n, static_cast<std::size_t>(n) * sizeof(T));
    CHECK(static_cast<i64>(nets.cache.size()) == nets.E * ceil_div(nets.N, kSamples<T>) * cuda::mlp_tile_size<T>(nets.shape), "tile size");
    auto work = test::poisoned_as<T>(cuda::mlp_workspace_size<T>(nets.shape, rows, config));
    const MlpProduct<T> p{
        nets.shape, gauss, nets.cache.data(), nets.flat.data(), nullptr, nullptr, rows, member.data(), apart.data(), row, out.data(), row,
        scale,      T(4)};
    CHECK(cuda::mlp_product(p, work.data(), config, 1, nullptr).ok(), "mlp_product");
    CHECK(shim::device == 0, "the caller's device was not restored");
    std::vector<T> tight;
    for (i64 i = 0; i < static_cast<i64>(out.size()); ++i) {
        if (i % row < n) {
            tight.push_back(out[static_cast<std::size_t>(i)]);
        } else {
            CHECK(std::isnan(out[static_cast<std::size_t>(i)]), "a gap was written");
        }
    }
    return tight;
}

template <class T> void check(std::vector<i64> widths, bool curved, MlpLoss loss, i64 samples, bool biased) {
    Nets<T> nets(std::move(widths), curved, loss, 2, samples, biased);
    const std::vector<i64> member{1, 0, 1};
    std::vector<T> V;
    for (const real x : nets.random(3 * nets.n))
        V.push_back(static_cast<T>(x));
    real depth = static_cast<real>(samples) + 16; // roundings that an entry of the result has behind it, at most
    for (const i64 d : nets.widths)
        depth += 4 * static_cast<real>(d) + 8;
    for (const bool gauss : {false, true}) {
        const auto all = run(nets, member, V, 0, gauss, {64});
        for (std::size_t r = 0; r < 3; ++r) {
            const T* v = V.data() + static_cast<i64>(r) * nets.n;
            const Matrix want = nets.product(member[r], v, gauss, false), terms = nets.product(member[r], v, gauss, true);
            for (i64 i = 0; i < nets.n; ++i) {
                const auto k = static_cast<std::size_t>(i);
                test::close(static_cast<double>(all[r * want.size() + k]), want[k], terms[k] * depth,
                            static_cast<double>(std::numeric_limits<T>::epsilon()) / 2, "mlp", i);
            }
            const auto alone = run(nets, {member[r]}, std::vector<T>(v, v + nets.n), 0, gauss, {32});
            CHECK(std::memcmp(alone.data(), all.data() + r * want.size(), want.size() * sizeof(T)) == 0,
                  "row %d has other bits alone, in a smaller block", static_cast<int>(r));
        }
        const auto apart = run(nets, member, V, 3, gauss, {64, 1}); // a launch for each row
        CHECK(std::memcmp(apart.data(), all.data(), all.size() * sizeof(T)) == 0, "rows apart, one a launch: other bits");
        const auto half = run(nets, member, V, 3, gauss, {64}, T(2));
        for (std::size_t i = 0; i < all.size(); ++i)
            CHECK(2 * half[i] == all[i], "scale / divisor at %d", static_cast<int>(i));
    }
}

void failures_name_the_kernel_and_the_error() {
    Nets<float> nets({2, 2}, false, MlpLoss::squared, 1, 3, true);
    const std::vector<float> V(static_cast<std::size_t>(nets.n), 1);
    auto out = V;
    auto work = test::poisoned_as<float>(cuda::mlp_workspace_size<float>(nets.shape, 1, {32}));
    const i64 member = 0;
    MlpProduct<float> p{nets.shape, false,  nets.cache.data(), nets.flat.data(), nullptr, nullptr, 1, &member,
                        V.data(),   nets.n, out.data(),        nets.n,           1,       1};
    shim::next_error = 700;
    CHECK(message(cuda::mlp_product(p, work.data(), {32}, 0, nullptr)) == "mlp_product: emulated failure", "-");
    CHECK(message(cuda::mlp_product(p, work.data(), {32}, 7, nullptr)) == "mlp_product: invalid device ordinal", "-");
    shim::device = 0;
    const i64 wide[] = {2, (i64{1} << 30) + 1};
    p.shape.widths = wide;
    CHECK(message(cuda::mlp_product(p, work.data(), {32}, 0, nullptr)) == "mlp_product: a layer has at most 2^30 units", "-");
    p.shape.layers = 33;
    CHECK(message(cuda::mlp_product(p, work.data(), {32}, 0, nullptr)) == "mlp_product: a net has 1 to 32 layers", "-");
}

template <class T> void all() {
    check<T>({3, 17, 5, 2}, true, MlpLoss::cross_entropy, 33, true);
    check<T>({2, 9, 4}, true, MlpLoss::squared, 64, false);
    check<T>({2, 70, 33}, false, MlpLoss::cross_entropy, 65, true); // columns beyond one tile of a product; two slabs
#ifndef FS_FLOAT_ALONE
    check<T>({37, 7}, false, MlpLoss::squared, 5, true);
    check<T>({1, 1, 1}, true, MlpLoss::cross_entropy, 1, true);
    check<T>({1, 2, 1}, true, MlpLoss::squared, 2100, true); // several tiles in a slab
#endif
}

} // namespace

// FS_FLOAT_ALONE: for run.sh, which builds it with mutants of the kernel.
int main() {
    all<float>();
    failures_name_the_kernel_and_the_error();
#ifndef FS_FLOAT_ALONE
    all<double>();
#endif
    std::printf("ok\n");
}
