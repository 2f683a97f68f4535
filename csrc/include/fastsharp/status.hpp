// Status: how a kernel says that it failed. Kernels never throw, print or exit; the binding turns a Status into an
// exception, so that C callers and tests see the same thing.
#pragma once
#include <string>

namespace fastsharp {

struct Status {
    const char* kernel = "";       // name of the op, static storage
    const char* problem = nullptr; // nullptr: success; else static storage

    [[nodiscard]] bool ok() const { return problem == nullptr; }
};

inline std::string message(const Status& s) { return std::string(s.kernel) + ": " + (s.ok() ? "success" : s.problem); }

} // namespace fastsharp
