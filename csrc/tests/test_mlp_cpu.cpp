// Products of fully connected nets on the CPU against long double sums for the Gauss-Newton matrix of one linear layer, and against
// themselves: symmetric, the same bits for any thread count, and every buffer exactly as long as the kernel may touch.
#include <cstring>

#include "check.hpp"
#include "fastsharp/mlp.hpp"

using namespace fastsharp;

namespace {

template <class T> struct Net {
    std::vector<i64> widths, weights, biases;
    i64 n = 0;
    MlpShape shape{};

    Net(std::vector<i64> w, bool curved, MlpLoss loss, i64 samples, bool biased) : widths(std::move(w)) {
        for (std::size_t l = 1; l < widths.size(); ++l) {
            weights.push_back(n);
            n += widths[l] * widths[l - 1];
            biases.push_back(biased ? n : -1);
            n += biased ? widths[l] : 0;
        }
        shape = {static_cast<i64>(weights.size()), widths.data(), weights.data(), biases.data(), curved, loss, samples, n};
    }
};

template <class T> std::vector<T> filled(i64 size, test::Sequence& next) {
    std::vector<T> x(static_cast<std::size_t>(size));
    for (T& v : x)
        v = static_cast<T>(next());
    return x;
}

struct Parts { // the units that take part, tile by tile
    std::vector<i64> units, counts;

    // All of them; or, with `some`, hidden layers backwards and cut, down to none.
    template <class T> Parts(const Net<T>& net, i64 tiles, bool some) {
        for (i64 tile = 0; tile < tiles; ++tile) {
            for (std::size_t l = 0; l < net.widths.size(); ++l) {
                const i64 d = net.widths[l];
                const bool cut = some && l > 0 && l + 1 < net.widths.size();
                for (i64 k = 0; k < d; ++k)
                    units.push_back(cut ? d - 1 - k : k);
                counts.push_back(cut ? (d * (tile % 4) + 3) / 4 : d);
            }
        }
    }
};

template <class T> std::vector<T> product(const MlpShape& s, bool gauss, const std::vector<T>& cache, const std::vector<T>& theta,
                                          const Parts& parts, const std::vector<i64>& member, const std::vector<T>& V, int threads) {
    const auto rows = static_cast<i64>(member.size());
    auto out = test::poisoned_as<T>(rows * s.n);
    auto work = test::poisoned_as<T>(cpu::mlp_workspace_size<T>(s, rows, threads));
    const MlpProduct<T> p{s,    gauss,         cache.data(), theta.data(), parts.units.data(), parts.counts.data(),
                          rows, member.data(), V.data(),     s.n,          out.data(),         s.n,
                          T{3}, T{7}};
    CHECK(cpu::mlp_product(p, work.data(), threads).ok(), "mlp_product");
    for (const T x : out)
        CHECK(std::isfinite(x), "an entry of the product was not written, or came from memory that was not");
    return out;
}

// Any cache whose padding is zero, whatever its numbers: slabs, tiles and lanes must fit it for every width and count of samples.
template <class T> void shapes(std::vector<i64> widths, bool curved, MlpLoss loss, i64 samples) {
    const Net<T> net(std::move(widths), curved, loss, samples, samples % 2 == 1);
    const i64 E = 2, tiles = ceil_div(samples, kSamples<T>);
    test::Sequence next;
    const auto cache = filled<T>(E * tiles * cpu::mlp_tile_size<T>(net.shape), next);
    const auto theta = filled<T>(E * net.n, next), V = filled<T>(3 * net.n, next);
    const std::vector<i64> member{1, 0, 1};
    for (const int kind : {0, 1, 2, 3}) {
        const bool gauss = kind % 2 == 1;
        const Parts parts(net, E * tiles, kind > 1);
        const auto one = product(net.shape, gauss, cache, theta, parts, member, V, 1);
        for (const int threads : {2, 5}) {
            const auto more = product(net.shape, gauss, cache, theta, parts, member, V, threads);
            CHECK(std::memcmp(one.data(), more.data(), one.size() * sizeof(T)) == 0, "%d threads change the bits", threads);
        }
    }
}

// One layer, squared error: out = V (sum_i w_i x_i x_i'), known in long double.
template <class T> void one_layer(i64 in, i64 width, i64 samples) {
    const Net<T> net({in, width}, false, MlpLoss::squared, samples, false);
    const i64 S = kSamples<T>, tiles = ceil_div(samples, S), ld = padded<T>(in), size = cpu::mlp_tile_size<T>(net.shape);
    test::Sequence next;
    std::vector<T> cache(static_cast<std::size_t>(tiles * size)), x = filled<T>(samples * in, next), w = filled<T>(samples, next);
    for (i64 i = 0; i < samples; ++i) {
        T* tile = cache.data() + (i / S) * size;
        for (i64 k = 0; k < in; ++k)
            tile[k * S + i % S] = tile[in * S + (i % S) * ld + k] = x[static_cast<std::size_t>(i * in + k)];
        tile[in * S + S * ld + width * S + i % S] = w[static_cast<std::size_t>(i)];
    }
    const auto theta = filled<T>(net.n, next), V = filled<T>(net.n, next);
    const auto out = product(net.shape, false, cache, theta, Parts(net, tiles, false), {0}, V, 3);
    const double bound = 64 * static_cast<double>(std::numeric_limits<T>::epsilon());
    for (i64 o = 0; o < width; ++o) {
        for (i64 k = 0; k < in; ++k) {
            test::Sum sum;
            for (i64 i = 0; i < samples; ++i) {
                for (i64 m = 0; m < in; ++m) {
                    const auto at = [&](i64 column) { return static_cast<double>(x[static_cast<std::size_t>(i * in + column)]); };
                    sum.add(static_cast<double>(V[static_cast<std::size_t>(o * in + m)]) * at(m),
                            static_cast<double>(w[static_cast<std::size_t>(i)]) * at(k));
                }
            }
            test::close(static_cast<double>(out[static_cast<std::size_t>(o * in + k)]) * 7 / 3, sum.value, sum.terms, bound, "mlp",
                        o * in + k);
        }
    }
}

template <class T> void all() {
    for (const i64 samples : {1, 33, 64, 65, 300, 1100}) {
        shapes<T>({3, 17, 5, 2}, true, MlpLoss::cross_entropy, samples);
        shapes<T>({1, 1, 1}, false, MlpLoss::squared, samples);
        shapes<T>({2, 70, 7, 33}, false, MlpLoss::cross_entropy, samples);
    }
    for (const i64 in : {1, 5, 16, 37})
        one_layer<T>(in, 7, 150);
}

} // namespace

int main() {
    test::for_each_level([] {
        all<float>();
        all<double>();
    });
}
