// What both binding files share: addresses as integers, a Status as an exception.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "fastsharp/status.hpp"

#ifndef FASTSHARP_STUB // set by setup.py: a checksum of the stub (.pyi) that the module was built for
#define FASTSHARP_STUB 0U
#endif

namespace fastsharp::bindings {

using Address = std::uintptr_t;
using Release = pybind11::call_guard<pybind11::gil_scoped_release>;

template <class T> T* at(Address a) {
    return reinterpret_cast<T*>(a); // NOLINT: the address was checked by fastsharp/ops/_border.py
}

inline void check(const Status& s) {
    if (!s.ok())
        throw std::runtime_error(message(s));
}

} // namespace fastsharp::bindings
