// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// cuBLAS and cuBLASLt of fake_cuda.hpp. Descriptors keep what was set; a product reads its shapes, transposes, leading
/// dimensions, scalars and epilogue from them, sums in double and rounds once. What the real libraries refuse by their
/// documentation is refused; an algorithm uses every liberty that the preferences leave it: it needs all of the workspace and
/// each alignment, is good for its shape alone, and keeps parts of sums in the output's type if it may.
#include <cublasLt.h>
#include <cublas_v2.h>

#include <cmath>
#include <cstring>

#include <fastmoe/core/dtype.hpp>

#include "cublaslt_13_4.hpp"
#include "fake_cuda.hpp"

using std::int64_t;

struct cublasLtContext {
    int alive;
};
struct cublasContext {
    bool has_workspace;
    int math_mode;
};

namespace support {
namespace {

fake_cuda& fake() { return fake_cuda::of_program(); }

constexpr std::uint32_t desc_mark = 0x64657363, layout_mark = 0x6c61796f, preference_mark = 0x70726566, algorithm_mark = 0x616c676f;

struct desc_state {
    std::uint32_t mark;
    cublasComputeType_t compute;
    cudaDataType scale;
    std::int32_t turn_a, turn_b, pointer_mode;
    cublasLtEpilogue_t epilogue;
    const void* bias;
};
struct layout_state {
    std::uint32_t mark;
    std::int32_t type, mode, count, width, line_width;
    union {
        struct {
            std::uint64_t rows, cols;
            int64_t line;
        };
        const void* arrays[3]; // of a grouped layout: rows, cols, ld on the device
    };
};
struct preference_state {
    std::uint32_t mark, reductions;
    std::uint64_t workspace;
    std::uint32_t alignment[4]; // A B C D
    int64_t average[3];         // depth, rows, cols
};
struct algorithm_state {
    std::uint32_t mark, reduction;
    std::uint64_t workspace, problem;
    std::uint32_t alignment[4];
};
static_assert(sizeof(desc_state) <= sizeof(cublasLtMatmulDescOpaque_t) && sizeof(layout_state) <= sizeof(cublasLtMatrixLayoutOpaque_t));
static_assert(sizeof(preference_state) <= sizeof(cublasLtMatmulPreferenceOpaque_t) && sizeof(algorithm_state) <= sizeof(cublasLtMatmulAlgo_t));

/// What stands in an opaque place.
template <class State, class Opaque>
State get(const Opaque* from)
{
    State out{};
    if (from) std::memcpy(&out, from, sizeof out);
    return out;
}
template <class State, class Opaque>
void put(Opaque* to, const State& state)
{
    std::memcpy(to, &state, sizeof state);
}

int64_t bytes_of(int type) { return type == CUDA_R_64F ? 8 : type == CUDA_R_32F ? 4 : 2; }

double read(const void* from, int type, int64_t at)
{
    switch (type) {
    case CUDA_R_64F: return static_cast<const double*>(from)[at];
    case CUDA_R_32F: return static_cast<const float*>(from)[at];
    case CUDA_R_16F: return static_cast<double>(static_cast<const fastmoe::half*>(from)[at]);
    default: return static_cast<double>(static_cast<const fastmoe::bfloat16*>(from)[at]);
    }
}
void write(void* to, int type, int64_t at, double value)
{
    switch (type) {
    case CUDA_R_64F: static_cast<double*>(to)[at] = value; break;
    case CUDA_R_32F: static_cast<float*>(to)[at] = static_cast<float>(value); break;
    case CUDA_R_16F: static_cast<fastmoe::half*>(to)[at] = fastmoe::half(static_cast<float>(value)); break;
    default: static_cast<fastmoe::bfloat16*>(to)[at] = fastmoe::bfloat16(static_cast<float>(value));
    }
}
double rounded(double value, int type)
{
    double place = 0;
    write(&place, type, 0, value);
    return read(&place, type, 0);
}

struct matrix {
    void* data;
    int type;
    int64_t line;
    bool turned;

    double operator()(int64_t row, int64_t col) const { return read(data, type, turned ? col + row * line : row + col * line); }
};

/// d = alpha a b + beta c + bias, c being where d is.
void multiply(int64_t m, int64_t n, int64_t k, double alpha, const matrix& a, const matrix& b, double beta, const matrix& d,
              const void* bias, bool keeps_parts)
{
    for (int64_t col = 0; col < n; ++col)
        for (int64_t row = 0; row < m; ++row) {
            double total = 0;
            const int64_t part = keeps_parts ? (k + 3) / 4 : k;
            for (int64_t begin = 0; begin < k; begin += part) {
                double sum = 0;
                for (int64_t i = begin; i < k && i < begin + part; ++i) sum += a(row, i) * b(i, col);
                total = keeps_parts ? rounded(total + rounded(sum, d.type), d.type) : sum;
            }
            double value = alpha * total;
            if (beta != 0) value += beta * d(row, col); // with a zero nothing is read
            if (bias) value += read(bias, d.type, row);
            write(d.data, d.type, row + col * d.line, value);
        }
}

bool is_aligned(const void* p, std::uintptr_t bytes) { return reinterpret_cast<std::uintptr_t>(p) % bytes == 0; }

/// One product, or as many as there are groups, as the descriptors give it.
struct problem {
    desc_state what;
    layout_state a, b, d;
    bool grouped() const { return d.mode == CUBLASLT_BATCH_MODE_GROUPED; }
    int64_t m() const { return static_cast<int64_t>(d.rows); }
    int64_t n() const { return static_cast<int64_t>(d.cols); }
    int64_t k() const { return static_cast<int64_t>(what.turn_a == CUBLAS_OP_T ? a.rows : a.cols); }
    std::uint64_t number() const
    {
        std::uint64_t out = 1469598103934665603u;
        const auto mix = [&out](std::uint64_t v) { out = (out ^ v) * 1099511628211u; };
        for (std::uint64_t v : {std::uint64_t(what.compute), std::uint64_t(what.turn_a), std::uint64_t(what.turn_b), std::uint64_t(what.pointer_mode),
                                std::uint64_t(what.epilogue), std::uint64_t(grouped())})
            mix(v);
        for (const layout_state& x : {a, b, d}) {
            mix(static_cast<std::uint64_t>(x.type));
            if (grouped()) mix(static_cast<std::uint64_t>(x.count));
            else mix(x.rows), mix(x.cols), mix(static_cast<std::uint64_t>(x.line));
        }
        return out;
    }
};

bool are_types(const desc_state& what, int a, int b, int d, bool grouped)
{
    if (a != b) return false;
    if (what.compute == CUBLAS_COMPUTE_64F) return !grouped && what.scale == CUDA_R_64F && a == CUDA_R_64F && d == CUDA_R_64F;
    if (what.compute != CUBLAS_COMPUTE_32F || what.scale != CUDA_R_32F) return false;
    if (a == CUDA_R_32F) return !grouped && d == CUDA_R_32F;
    return (a == CUDA_R_16F || a == CUDA_R_16BF) && (d == a || d == CUDA_R_32F);
}

cublasStatus_t check(problem& p, cublasLtMatmulDesc_t what, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                     cublasLtMatrixLayout_t d)
{
    p = {get<desc_state>(what), get<layout_state>(a), get<layout_state>(b), get<layout_state>(d)};
    const auto last = get<layout_state>(c);
    if (p.what.mark != desc_mark) return CUBLAS_STATUS_INVALID_VALUE;
    for (const layout_state& x : {p.a, p.b, last, p.d})
        if (x.mark != layout_mark || x.mode != p.d.mode || x.count != p.d.count) return CUBLAS_STATUS_INVALID_VALUE;
    if (std::memcmp(c, d, sizeof *c) != 0) return CUBLAS_STATUS_INVALID_VALUE; // in place, so as one
    if (!are_types(p.what, p.a.type, p.b.type, p.d.type, p.grouped())) return CUBLAS_STATUS_NOT_SUPPORTED;
    const bool has_bias = p.what.epilogue == CUBLASLT_EPILOGUE_BIAS;
    if (!has_bias && p.what.epilogue != CUBLASLT_EPILOGUE_DEFAULT) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (has_bias && !p.what.bias) return CUBLAS_STATUS_INVALID_VALUE;
    if (p.grouped()) { // of compute capability 9.0
        if (has_bias) return CUBLAS_STATUS_NOT_SUPPORTED;
        for (const layout_state& x : {p.a, p.b, p.d})
            if (x.count < 1 || !x.arrays[0] || !x.arrays[1] || !x.arrays[2]) return CUBLAS_STATUS_INVALID_VALUE;
        return CUBLAS_STATUS_SUCCESS;
    }
    const auto stored = [](const layout_state& x, bool turned, std::uint64_t rows, std::uint64_t cols) {
        return x.rows == (turned ? cols : rows) && x.cols == (turned ? rows : cols) && x.line >= static_cast<int64_t>(x.rows);
    };
    const auto k = static_cast<std::uint64_t>(p.k());
    const bool fits = stored(p.a, p.what.turn_a == CUBLAS_OP_T, p.d.rows, k) && stored(p.b, p.what.turn_b == CUBLAS_OP_T, k, p.d.cols) &&
                      stored(p.d, false, p.d.rows, p.d.cols);
    return fits && p.d.rows > 0 && p.d.cols > 0 && k > 0 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

/// What a grouped product reads on the device, when it runs.
void multiply_groups(const problem& p, const float* alpha, const void* const* a, const void* const* b, const float* beta, void* const* d,
                     bool keeps_parts)
{
    const auto at = [](const layout_state& x, int which, int64_t e) {
        const bool wide = (which == 2 ? x.line_width : x.width) == CUBLASLT_INTEGER_WIDTH_64;
        return wide ? static_cast<const int64_t*>(x.arrays[which])[e] : static_cast<const std::int32_t*>(x.arrays[which])[e];
    };
    for (int64_t e = 0; e < p.d.count; ++e) {
        const bool turned_a = p.what.turn_a == CUBLAS_OP_T, turned_b = p.what.turn_b == CUBLAS_OP_T;
        const int64_t m = at(p.d, 0, e), n = at(p.d, 1, e), k = at(p.a, turned_a ? 0 : 1, e);
        if (at(p.a, turned_a ? 1 : 0, e) != m || at(p.b, turned_b ? 1 : 0, e) != k || at(p.b, turned_b ? 0 : 1, e) != n)
            fake().complain("grouped: the matrices of a group do not fit");
        for (const layout_state* x : {&p.a, &p.b, &p.d}) {
            if (at(*x, 2, e) < at(*x, 0, e) || at(*x, 2, e) < 1) fake().complain("grouped: a leading dimension below the rows");
            if (at(*x, 2, e) * bytes_of(x->type) % 16 != 0) fake().complain("grouped: a leading dimension that 16 bytes do not divide");
        }
        // Along memory, every dimension but that of the rows of a token.
        if (m * bytes_of(p.d.type) % 16 != 0 || (turned_a ? k : m) * bytes_of(p.a.type) % 16 != 0 ||
            (turned_b ? n : k) * bytes_of(p.b.type) % 16 != 0)
            fake().complain("grouped: a dimension that 16 bytes do not divide");
        if (m > 0 && n > 0 && k == 0) fake().complain("grouped: a product without depth");
        if (m == 0 || n == 0) continue;
        if (!is_aligned(a[e], 16) || !is_aligned(b[e], 16) || !is_aligned(d[e], 16)) fake().complain("grouped: an address that 16 does not divide");
        multiply(m, n, k, *alpha, {const_cast<void*>(a[e]), p.a.type, at(p.a, 2, e), turned_a},
                 {const_cast<void*>(b[e]), p.b.type, at(p.b, 2, e), turned_b}, *beta, {d[e], p.d.type, at(p.d, 2, e), false}, nullptr, keeps_parts);
    }
}

} // namespace
} // namespace support

using namespace support;

#define FASTMOE_ENTER(name)                                                                                           \
    const std::lock_guard lock(fake().mutex);                                                                         \
    if (const int status = fake().enter(name)) return static_cast<cublasStatus_t>(status)

/// An attribute that has the size of its kind.
#define FASTMOE_ATTRIBUTE(name, to)                                                                                   \
    case name:                                                                                                        \
        if (size != sizeof(to)) return CUBLAS_STATUS_INVALID_VALUE;                                                   \
        std::memcpy(&(to), value, size);                                                                              \
        break

extern "C" {

const char* cublasLtGetStatusName(cublasStatus_t status)
{
    switch (status) {
    case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_ALLOC_FAILED: return "CUBLAS_STATUS_ALLOC_FAILED";
    case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
    case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    default: return "another status";
    }
}
const char* cublasLtGetStatusString(cublasStatus_t) { return "what the status means"; }

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle)
{
    FASTMOE_ENTER("cublasLtCreate");
    *handle = new cublasLtContext{1};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle)
{
    FASTMOE_ENTER("cublasLtDestroy");
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t what, size_t size, cublasComputeType_t compute, cudaDataType_t scale)
{
    FASTMOE_ENTER("cublasLtMatmulDescInit");
    if (size < sizeof(desc_state)) return CUBLAS_STATUS_ALLOC_FAILED;
    put(what, desc_state{desc_mark, compute, scale, CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_POINTER_MODE_HOST, CUBLASLT_EPILOGUE_DEFAULT, nullptr});
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t what, cublasLtMatmulDescAttributes_t name, const void* value, size_t size)
{
    FASTMOE_ENTER("cublasLtMatmulDescSetAttribute");
    auto state = get<desc_state>(what);
    if (state.mark != desc_mark || !value) return CUBLAS_STATUS_INVALID_VALUE;
    switch (name) {
        FASTMOE_ATTRIBUTE(CUBLASLT_MATMUL_DESC_TRANSA, state.turn_a);
        FASTMOE_ATTRIBUTE(CUBLASLT_MATMUL_DESC_TRANSB, state.turn_b);
        FASTMOE_ATTRIBUTE(CUBLASLT_MATMUL_DESC_POINTER_MODE, state.pointer_mode);
        FASTMOE_ATTRIBUTE(CUBLASLT_MATMUL_DESC_EPILOGUE, state.epilogue);
        FASTMOE_ATTRIBUTE(CUBLASLT_MATMUL_DESC_BIAS_POINTER, state.bias);
    default: return CUBLAS_STATUS_INVALID_VALUE;
    }
    put(what, state);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t to, size_t size, cudaDataType type, uint64_t rows, uint64_t cols,
                                                 int64_t line)
{
    FASTMOE_ENTER("cublasLtMatrixLayoutInit");
    if (size < sizeof(layout_state)) return CUBLAS_STATUS_ALLOC_FAILED;
    layout_state state{layout_mark, type, CUBLASLT_BATCH_MODE_STRIDED, 1, 0, 0, {}};
    state.rows = rows, state.cols = cols, state.line = line;
    put(to, state);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtGroupedMatrixLayoutInit_internal(cublasLtMatrixLayout_t to, size_t size, cudaDataType type, int groups,
                                                        const void* rows, const void* cols, const void* lines)
{
    FASTMOE_ENTER("cublasLtGroupedMatrixLayoutInit");
    if (size < sizeof(layout_state)) return CUBLAS_STATUS_ALLOC_FAILED;
    layout_state state{layout_mark, type, CUBLASLT_BATCH_MODE_GROUPED, groups, CUBLASLT_INTEGER_WIDTH_32, CUBLASLT_INTEGER_WIDTH_32, {}};
    state.arrays[0] = rows, state.arrays[1] = cols, state.arrays[2] = lines;
    put(to, state);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t to, cublasLtMatrixLayoutAttribute_t name, const void* value, size_t size)
{
    FASTMOE_ENTER("cublasLtMatrixLayoutSetAttribute");
    auto state = get<layout_state>(to);
    if (state.mark != layout_mark || !value) return CUBLAS_STATUS_INVALID_VALUE;
    switch (static_cast<int>(name)) {
        FASTMOE_ATTRIBUTE(CUBLASLT_GROUPED_MATRIX_LAYOUT_ROWS_COLS_ARRAY_INTEGER_WIDTH, state.width);
        FASTMOE_ATTRIBUTE(CUBLASLT_GROUPED_MATRIX_LAYOUT_LD_ARRAY_INTEGER_WIDTH, state.line_width);
    default: return CUBLAS_STATUS_INVALID_VALUE;
    }
    put(to, state);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t to, size_t size)
{
    FASTMOE_ENTER("cublasLtMatmulPreferenceInit");
    if (size < sizeof(preference_state)) return CUBLAS_STATUS_ALLOC_FAILED;
    put(to, preference_state{preference_mark, CUBLASLT_REDUCTION_SCHEME_MASK, 0, {256, 256, 256, 256}, {}});
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t to, cublasLtMatmulPreferenceAttributes_t name, const void* value,
                                                    size_t size)
{
    FASTMOE_ENTER("cublasLtMatmulPreferenceSetAttribute");
    auto state = get<preference_state>(to);
    if (state.mark != preference_mark || !value) return CUBLAS_STATUS_INVALID_VALUE;
    switch (static_cast<int>(name)) {
        FASTMOE_ATTRIBUTE(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, state.reductions);
        FASTMOE_ATTRIBUTE(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, state.workspace);
        FASTMOE_ATTRIBUTE(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, state.alignment[0]);
        FASTMOE_ATTRIBUTE(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, state.alignment[1]);
        FASTMOE_ATTRIBUTE(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, state.alignment[2]);
        FASTMOE_ATTRIBUTE(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, state.alignment[3]);
        FASTMOE_ATTRIBUTE(CUBLASLT_MATMUL_PREF_GROUPED_AVERAGE_REDUCTION_DIM, state.average[0]);
        FASTMOE_ATTRIBUTE(CUBLASLT_MATMUL_PREF_GROUPED_DESC_D_AVERAGE_ROWS, state.average[1]);
        FASTMOE_ATTRIBUTE(CUBLASLT_MATMUL_PREF_GROUPED_DESC_D_AVERAGE_COLS, state.average[2]);
    default: return CUBLAS_STATUS_INVALID_VALUE;
    }
    put(to, state);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t what, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t wishes, int most, cublasLtMatmulHeuristicResult_t results[],
                                              int* count)
{
    FASTMOE_ENTER("cublasLtMatmulAlgoGetHeuristic");
    const auto wish = get<preference_state>(wishes);
    if (!handle || wish.mark != preference_mark || most < 1) return CUBLAS_STATUS_INVALID_VALUE;
    problem p;
    if (const auto status = check(p, what, a, b, c, d); status != CUBLAS_STATUS_SUCCESS) return status;
    for (int i = 0; i < 3; ++i)
        if (p.grouped() != (wish.average[i] > 0)) return CUBLAS_STATUS_INVALID_VALUE;
    *count = 0;
    if (fake().has_no_algorithm) return CUBLAS_STATUS_SUCCESS;
    const std::uint32_t kept_in_output = CUBLASLT_REDUCTION_SCHEME_INPLACE | CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE;
    algorithm_state algorithm{algorithm_mark, wish.reductions & kept_in_output, wish.workspace, p.number(), {}};
    std::memcpy(algorithm.alignment, wish.alignment, sizeof wish.alignment);
    results[0] = {};
    put(&results[0].algo, algorithm);
    results[0].workspaceSize = wish.workspace;
    results[0].state = CUBLAS_STATUS_SUCCESS;
    *count = 1;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t what, const void* alpha, const void* a, cublasLtMatrixLayout_t a_layout,
                              const void* b, cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                              cublasLtMatrixLayout_t c_layout, void* d, cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t* algo, void* workspace, size_t bytes, cudaStream_t)
{
    FASTMOE_ENTER("cublasLtMatmul");
    const auto algorithm = get<algorithm_state>(algo);
    if (!handle || !alpha || !beta || !a || !b || c != d || !d || algorithm.mark != algorithm_mark) return CUBLAS_STATUS_INVALID_VALUE;
    problem p;
    if (const auto status = check(p, what, a_layout, b_layout, c_layout, d_layout); status != CUBLAS_STATUS_SUCCESS) return status;
    if (algorithm.problem != p.number() || bytes < algorithm.workspace || (bytes > 0 && !workspace) || !is_aligned(workspace, 256))
        return CUBLAS_STATUS_INVALID_VALUE;
    const bool keeps_parts = algorithm.reduction != 0;
    // What the workspace holds is nobody's.
    fake().enqueue([=] {
        if (bytes > 0) std::memset(workspace, 0xff, bytes);
    });
    if (p.grouped()) {
        if (p.what.pointer_mode != CUBLASLT_POINTER_MODE_DEVICE) return CUBLAS_STATUS_NOT_SUPPORTED; // all that is used of the two
        for (int i = 0; i < 4; ++i)
            if (algorithm.alignment[i] > 16) return CUBLAS_STATUS_NOT_SUPPORTED; // addresses in arrays are not more than that
        fake().enqueue([=] {
            multiply_groups(p, static_cast<const float*>(alpha), static_cast<const void* const*>(a), static_cast<const void* const*>(b),
                            static_cast<const float*>(beta), static_cast<void* const*>(d), keeps_parts);
        });
        return CUBLAS_STATUS_SUCCESS;
    }
    if (p.what.pointer_mode != CUBLASLT_POINTER_MODE_HOST) return CUBLAS_STATUS_NOT_SUPPORTED;
    const void* const addresses[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i)
        if (!is_aligned(addresses[i], algorithm.alignment[i])) return CUBLAS_STATUS_INVALID_VALUE;
    // Nobody says so, but kernels read a bias in lines of 16 bytes.
    if (p.what.epilogue == CUBLASLT_EPILOGUE_BIAS && !is_aligned(p.what.bias, 16)) return CUBLAS_STATUS_INVALID_VALUE;
    const double times = read(alpha, p.what.scale, 0), plus = read(beta, p.what.scale, 0);
    fake().enqueue([=] {
        multiply(p.m(), p.n(), p.k(), times, {const_cast<void*>(a), p.a.type, p.a.line, p.what.turn_a == CUBLAS_OP_T},
                 {const_cast<void*>(b), p.b.type, p.b.line, p.what.turn_b == CUBLAS_OP_T}, plus, {d, p.d.type, p.d.line, false},
                 p.what.epilogue == CUBLASLT_EPILOGUE_BIAS ? p.what.bias : nullptr, keeps_parts);
    });
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasCreate_v2(cublasHandle_t* handle)
{
    FASTMOE_ENTER("cublasCreate");
    *handle = new cublasContext{false, CUBLAS_DEFAULT_MATH};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t handle)
{
    FASTMOE_ENTER("cublasDestroy");
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode)
{
    FASTMOE_ENTER("cublasSetMathMode");
    handle->math_mode = mode;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t)
{
    FASTMOE_ENTER("cublasSetStream");
    handle->has_workspace = false; // as documented: back to the library's own
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void* workspace, size_t bytes)
{
    FASTMOE_ENTER("cublasSetWorkspace");
    if ((bytes > 0 && !workspace) || !is_aligned(workspace, 256)) return CUBLAS_STATUS_INVALID_VALUE;
    handle->has_workspace = true;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGemmGroupedBatchedEx_64(cublasHandle_t handle, const cublasOperation_t turn_a[], const cublasOperation_t turn_b[],
                                             const int64_t m[], const int64_t n[], const int64_t k[], const void* alpha,
                                             const void* const a[], cudaDataType_t a_type, const int64_t line_a[], const void* const b[],
                                             cudaDataType_t b_type, const int64_t line_b[], const void* beta, void* const c[],
                                             cudaDataType_t c_type, const int64_t line_c[], int64_t groups, const int64_t sizes[],
                                             cublasComputeType_t compute)
{
    FASTMOE_ENTER("cublasGemmGroupedBatchedEx");
    if (!handle || !turn_a || !turn_b || !m || !n || !k || !alpha || !beta || !line_a || !line_b || !line_c || !sizes || groups < 0)
        return CUBLAS_STATUS_INVALID_VALUE;
    const bool wide = a_type == CUDA_R_64F;
    if (a_type != b_type || a_type != c_type || compute != (wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F)) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (!handle->has_workspace) fake().complain("together: a workspace of the library's own");
    const bool keeps_parts = (handle->math_mode & CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION) == 0;
    int64_t at = 0;
    for (int64_t i = 0; i < groups; ++i) {
        const bool turned_a = turn_a[i] == CUBLAS_OP_T, turned_b = turn_b[i] == CUBLAS_OP_T;
        const auto most = [](int64_t x) { return x > 1 ? x : 1; };
        if (m[i] < 0 || n[i] < 0 || k[i] < 0 || sizes[i] < 0 || line_a[i] < most(turned_a ? k[i] : m[i]) ||
            line_b[i] < most(turned_b ? n[i] : k[i]) || line_c[i] < most(m[i]))
            return CUBLAS_STATUS_INVALID_VALUE;
        if (m[i] == 0 || n[i] == 0 || k[i] == 0) fake().complain("together: a group that is empty");
        const double times = read(alpha, wide ? CUDA_R_64F : CUDA_R_32F, i), plus = read(beta, wide ? CUDA_R_64F : CUDA_R_32F, i);
        for (int64_t j = 0; j < sizes[i]; ++j, ++at) {
            const int64_t depth = k[i] * bytes_of(a_type);
            const std::uintptr_t aligned = bytes_of(a_type) > 2 ? 1 : depth % 16 == 0 ? 16 : depth % 4 == 0 ? 4 : 1;
            fake().enqueue([=, rows = m[i], cols = n[i], inner = k[i], la = line_a[i], lb = line_b[i], lc = line_c[i]] {
                for (const void* p : {a[at], b[at], static_cast<const void*>(c[at])})
                    if (!is_aligned(p, aligned)) fake().complain("together: an address that is not aligned");
                multiply(rows, cols, inner, times, {const_cast<void*>(a[at]), a_type, la, turned_a},
                         {const_cast<void*>(b[at]), b_type, lb, turned_b}, plus, {c[at], c_type, lc, false}, nullptr, keeps_parts);
            });
        }
    }
    return CUBLAS_STATUS_SUCCESS;
}

} // extern "C"
