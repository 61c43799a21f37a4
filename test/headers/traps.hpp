// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Names that C libraries and careless headers define as macros, each set to text that cannot be compiled. The headers
/// of others come first; a header of ours that uses such a name after them fails.
#pragma once

#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <concepts>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <cuda/std/array>
#include <cuda/std/bit>
#include <cuda/std/mdspan>
#include <cuda/std/tuple>

#if __has_include(<nlohmann/json.hpp>)
#include <nlohmann/json.hpp>
#endif
#if __has_include(<oneapi/dnnl/dnnl.hpp>)
#include <oneapi/dnnl/dnnl.hpp>
#endif
#if __has_include(<mpi.h>)
#include <mpi.h>
#endif

#define FASTMOE_TRAP ) this name is a macro elsewhere (

#define min(a, b) FASTMOE_TRAP         // windows.h
#define max(a, b) FASTMOE_TRAP         // windows.h
#define check(a) FASTMOE_TRAP          // AssertMacros.h
#define small FASTMOE_TRAP             // rpcndr.h
#define near FASTMOE_TRAP              // windef.h
#define far FASTMOE_TRAP               // windef.h
#define major(a) FASTMOE_TRAP          // sys/sysmacros.h
#define minor(a) FASTMOE_TRAP          // sys/sysmacros.h
#define OVERFLOW FASTMOE_TRAP          // math.h
#define B0 FASTMOE_TRAP                // termios.h
#define I FASTMOE_TRAP                 // complex.h
#define E FASTMOE_TRAP
#define D FASTMOE_TRAP
#define K FASTMOE_TRAP
#define S FASTMOE_TRAP
