// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// FASTMOE_UNDER_ASAN and FASTMOE_UNDER_TSAN: 1 under AddressSanitizer, under ThreadSanitizer, or else 0. g++ and clang++ say it each
/// in its own way.
#pragma once

#if defined(__has_feature)
#define FASTMOE_HAS_FEATURE(name) __has_feature(name)
#else
#define FASTMOE_HAS_FEATURE(name) 0
#endif

#if defined(__SANITIZE_ADDRESS__) || FASTMOE_HAS_FEATURE(address_sanitizer)
#define FASTMOE_UNDER_ASAN 1
#else
#define FASTMOE_UNDER_ASAN 0
#endif
#if defined(__SANITIZE_THREAD__) || FASTMOE_HAS_FEATURE(thread_sanitizer)
#define FASTMOE_UNDER_TSAN 1
#else
#define FASTMOE_UNDER_TSAN 0
#endif
