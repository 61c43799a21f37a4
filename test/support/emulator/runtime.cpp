// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// The CUDA runtime, as far as this project and its tests call it, over the emulator. A stream does nothing before somebody waits
// for it: what is queued too early, or given back too early, shows.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <unordered_map>

#include "support/emulator/device.hpp"
#include "support/emulator/tensor_map.hpp"

namespace emulator {
namespace {

using work = std::function<void()>;

int setting(const char* name, int otherwise)
{
    const char* text = std::getenv(name);
    return text && *text ? std::atoi(text) : otherwise;
}

struct graph {
    std::vector<work> steps;
};
struct stream {
    std::deque<work> queue;
    bool blocking = true; ///< with the default stream
    std::shared_ptr<graph> captured;
};
struct event {
    stream* of = nullptr;
    bool done = true;
    std::chrono::steady_clock::time_point when;
};
struct function {
    const module* in = nullptr;
    std::string name;
    const kernel* code = nullptr;
    int dynamic_shared = 48 * 1024;
};
struct image {
    std::vector<std::unique_ptr<module>> modules;
};
struct pool {
    int blocks = 0;
};

/// All of it, behind one lock. Never given back: programs' statics end after it.
struct machine {
    std::recursive_mutex lock;
    std::unordered_map<const void*, function> functions;
    std::set<stream*> streams;
    stream main;
    cudaError_t sticky = cudaSuccess;
    unsigned launches = 0, seed = static_cast<unsigned>(setting("FASTMOE_EMULATOR_SEED", 1));
    int multiprocessors = setting("FASTMOE_EMULATOR_MULTIPROCESSORS", 4);
    bool races = setting("FASTMOE_EMULATOR_RACES", 0) != 0;
    std::map<void*, std::size_t> sizes;
};
thread_local cudaError_t last = cudaSuccess;
thread_local int inside = 0; ///< of this file: what operator new is asked for then is the emulator's own

machine& all()
{
    alignas(machine) static unsigned char room[sizeof(machine)];
    static machine& one = [&]() -> machine& {
        ++inside;
        machine& made = *new (room) machine;
        --inside;
        return made;
    }();
    return one;
}

struct enter {
    std::unique_lock<std::recursive_mutex> held{all().lock};
    enter() { ++inside; }
    ~enter() { --inside; }
};
cudaError_t said(cudaError_t e)
{
    if (all().sticky != cudaSuccess) e = all().sticky;
    if (e != cudaSuccess) last = e;
    return e;
}

constexpr std::size_t most_shared = 227 * 1024;

void drain(stream& s)
{
    while (!s.queue.empty()) {
        const work next = std::move(s.queue.front());
        s.queue.pop_front();
        next();
    }
}
stream& of(cudaStream_t s)
{
    if (s == nullptr || s == cudaStreamLegacy || s == cudaStreamPerThread) return all().main;
    return *reinterpret_cast<stream*>(s);
}
cudaError_t queue(cudaStream_t to, work w)
{
    stream& s = of(to);
    if (s.captured) {
        s.captured->steps.push_back(std::move(w));
        return cudaSuccess;
    }
    // The default stream and others that block each other come in order.
    if (&s == &all().main) {
        for (stream* other : all().streams)
            if (other->blocking && !other->captured) drain(*other);
    } else if (s.blocking) {
        drain(all().main);
    }
    s.queue.push_back(std::move(w));
    return cudaSuccess;
}
void drain_all()
{
    drain(all().main);
    for (stream* s : all().streams) drain(*s);
}

function* find(const void* host)
{
    const auto found = all().functions.find(host);
    if (found == all().functions.end()) return nullptr;
    function& f = found->second;
    if (!f.code) {
        try {
            f.code = f.in->find(f.name);
        } catch (const syntax_error& e) {
            std::fprintf(stderr, "emulator: %s: %s\n", f.name.c_str(), e.what());
            return nullptr;
        }
        if (f.code && !f.code->unknown.empty()) {
            std::fprintf(stderr, "emulator: %s has instructions that the emulator does not know:", f.name.c_str());
            for (const std::string& u : f.code->unknown) std::fprintf(stderr, " %s", u.c_str());
            std::fprintf(stderr, "\n");
        }
    }
    return f.code ? &f : nullptr;
}

cudaError_t launch(const void* host, dim3 grid, dim3 block, unsigned cluster, void** arguments, std::size_t shared, cudaStream_t s,
                   bool early = false)
{
    function* f = find(host);
    if (!f) return said(cudaErrorInvalidDeviceFunction);
    const unsigned threads = block.x * block.y * block.z;
    if (threads == 0 || static_cast<int>(threads) > f->code->most_threads || grid.x == 0 || grid.y == 0 || grid.z == 0)
        return said(cudaErrorInvalidConfiguration);
    if (grid.x * grid.y * grid.z % cluster != 0 || cluster > 8) return said(cudaErrorInvalidClusterSize);
    if (static_cast<int>(shared) > f->dynamic_shared || shared + f->code->shared_bytes > most_shared) return said(cudaErrorInvalidValue);
    std::vector<std::byte> values(f->code->parameter_bytes);
    for (std::size_t n = 0; n < f->code->parameters.size(); ++n)
        std::memcpy(values.data() + f->code->parameters[n].first, arguments[n], f->code->parameters[n].second);
    const launch_shape shape{
        {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, cluster, static_cast<std::uint32_t>(shared), all().races, early};
    return said(queue(s, [f, shape, values = std::move(values)] {
        if (all().sticky != cudaSuccess) return;
        try {
            run(*f->in, *f->code, shape, values.data(), all().seed * 7919 + ++all().launches);
        } catch (const kernel_error& e) {
            std::fprintf(stderr, "emulator: %s\n", e.what());
            all().sticky = cudaErrorLaunchFailure;
        }
    }));
}

// -- memory ----------------------------------------------------------------------------------------------------------

constexpr std::size_t most_poisoned = std::size_t{64} << 20; ///< pages of what is larger come when they are touched

void* take(std::size_t bytes, memory_kind kind)
{
    const std::size_t whole = (bytes ? bytes : 1);
    void* p = std::aligned_alloc(256, (whole + 256 + 255) / 256 * 256); // and a gap that is nobody's
    if (!p) return nullptr;
    if (whole <= most_poisoned) std::memset(p, 0xff, whole);
    all().sizes[p] = whole;
    memory_map::instance().add(p, whole, kind);
    return p;
}
bool give(void* p)
{
    const auto found = all().sizes.find(p);
    if (found == all().sizes.end()) return false;
    memory_map::instance().remove(p);
    if (found->second <= most_poisoned) std::memset(p, 0xff, found->second);
    all().sizes.erase(found);
    std::free(p);
    return true;
}
bool is_pageable(const void* p) { return memory_map::instance().find(reinterpret_cast<std::uintptr_t>(p)).to == 0; }

cudaError_t copy(void* to, const void* from, std::size_t bytes, cudaStream_t s)
{
    if (bytes == 0) return cudaSuccess;
    for (const void* p : {static_cast<const void*>(to), from}) {
        const auto is = memory_map::instance().find(reinterpret_cast<std::uintptr_t>(p));
        if (is.to && reinterpret_cast<std::uintptr_t>(p) + bytes > is.to) return cudaErrorInvalidValue;
    }
    if (is_pageable(to) || is_pageable(from)) {
        if (of(s).captured) return cudaErrorStreamCaptureUnsupported;
        drain(of(s));
        std::memcpy(to, from, bytes);
        return cudaSuccess;
    }
    return queue(s, [=] { std::memcpy(to, from, bytes); });
}

} // namespace
} // namespace emulator

using namespace emulator;

// NOLINTBEGIN: names are CUDA's
extern "C" {

// -- programs --------------------------------------------------------------------------------------------------------

struct fat_binary_wrapper {
    int magic, version;
    const std::uint64_t* data;
    void* unused;
};
void** __cudaRegisterFatBinary(void* wrapper)
{
    enter here;
    auto* out = new image;
    const auto* bytes = reinterpret_cast<const unsigned char*>(static_cast<fat_binary_wrapper*>(wrapper)->data);
    std::uint64_t size = 0;
    std::uint16_t header = 0;
    std::memcpy(&header, bytes + 6, 2);
    std::memcpy(&size, bytes + 8, 8);
    for (const unsigned char *at = bytes + header, *end = at + size; at < end;) {
        std::uint16_t kind = 0;
        std::uint32_t entry_header = 0, flags = 0;
        std::uint64_t payload = 0;
        std::memcpy(&kind, at, 2);
        std::memcpy(&entry_header, at + 4, 4);
        std::memcpy(&payload, at + 8, 8);
        std::memcpy(&flags, at + 40, 4);
        const char* text = reinterpret_cast<const char*>(at + entry_header);
        if (kind == 1) {
            std::string ptx(text, payload);
            ptx.erase(std::min(ptx.find('\0'), ptx.size()));
            if (ptx.find(".version") == std::string::npos) {
                std::fprintf(stderr, "emulator: PTX is compressed; compile with --no-compress\n");
                std::abort();
            }
            // What is of the architecture itself goes before what others run, too.
            const bool own = ptx.find(".target sm_90a") != std::string::npos;
            out->modules.insert(own ? out->modules.begin() : out->modules.end(), std::make_unique<emulator::module>(std::move(ptx)));
        }
        at += entry_header + payload;
    }
    return reinterpret_cast<void**>(out);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*)
{
    enter here;
    const auto* in = reinterpret_cast<const image*>(handle);
    if (in->modules.empty()) return;
    function f;
    f.in = in->modules.front().get();
    f.name = name;
    all().functions.emplace(host, f);
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }

struct call_configuration {
    dim3 grid, block;
    std::size_t shared;
    void* stream;
};
static thread_local std::vector<call_configuration>* calls;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared, void* stream)
{
    enter here;
    if (!calls) calls = new std::vector<call_configuration>;
    calls->push_back({grid, block, shared, stream});
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared, void* stream)
{
    const call_configuration c = calls->back();
    calls->pop_back();
    *grid = c.grid, *block = c.block, *shared = c.shared;
    *static_cast<void**>(stream) = c.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function)
{
    *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, std::size_t shared, cudaStream_t s)
{
    enter here;
    return launch(reinterpret_cast<const void*>(kernel), grid, block, 1, arguments, shared, s);
}
cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** arguments, std::size_t shared, cudaStream_t s)
{
    enter here;
    return launch(f, grid, block, 1, arguments, shared, s);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* f, void** arguments)
{
    enter here;
    unsigned cluster = 1;
    bool early = false;
    for (unsigned n = 0; n < how->numAttrs; ++n) {
        const cudaLaunchAttribute& a = how->attrs[n];
        if (a.id == cudaLaunchAttributeClusterDimension) cluster = a.val.clusterDim.x;
        if (a.id == cudaLaunchAttributeProgrammaticStreamSerialization) early = a.val.programmaticStreamSerializationAllowed != 0;
    }
    return launch(f, how->gridDim, how->blockDim, cluster, arguments, how->dynamicSmemBytes, how->stream, early);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* host)
{
    enter here;
    function* f = find(host);
    if (!f) return said(cudaErrorInvalidDeviceFunction);
    *out = {};
    out->maxThreadsPerBlock = f->code->most_threads;
    out->sharedSizeBytes = f->code->shared_bytes;
    out->localSizeBytes = f->code->local_bytes;
    out->maxDynamicSharedSizeBytes = f->dynamic_shared;
    out->ptxVersion = out->binaryVersion = 90;
    out->numRegs = 64;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute what, int value)
{
    enter here;
    function* f = find(host);
    if (!f) return said(cudaErrorInvalidDeviceFunction);
    if (what != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || value + f->code->shared_bytes > most_shared) return said(cudaErrorInvalidValue);
    f->dynamic_shared = value;
    return cudaSuccess;
}

// -- devices ---------------------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* d) { return *d = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int d) { return d == 0 ? cudaSuccess : said(cudaErrorInvalidDevice); }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int)
{
    switch (what) {
    case cudaDevAttrComputeCapabilityMajor:
        *value = 9;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *value = 0;
        break;
    case cudaDevAttrMultiProcessorCount:
        *value = all().multiprocessors;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = static_cast<int>(most_shared);
        break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
        *value = 48 * 1024;
        break;
    case cudaDevAttrMaxThreadsPerBlock:
        *value = 1024;
        break;
    case cudaDevAttrWarpSize:
        *value = 32;
        break;
    case cudaDevAttrConcurrentManagedAccess:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrMemoryPoolsSupported:
        *value = 1;
        break;
    default:
        *value = 0;
    }
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int)
{
    *p = {};
    std::snprintf(p->name, sizeof p->name, "emulated, no GPU");
    p->major = 9;
    p->multiProcessorCount = all().multiprocessors;
    p->sharedMemPerBlockOptin = most_shared;
    p->warpSize = 32;
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize()
{
    enter here;
    drain_all();
    return said(cudaSuccess);
}
cudaError_t cudaMemGetInfo(std::size_t* left, std::size_t* total) { return *left = *total = std::size_t{8} << 30, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* v) { return *v = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* v) { return *v = CUDART_VERSION, cudaSuccess; }

// -- memory ----------------------------------------------------------------------------------------------------------

static cudaError_t taken(void** p, std::size_t bytes, memory_kind kind)
{
    if (inside) { // the emulator's own
        *p = std::malloc(bytes ? bytes : 1);
        return cudaSuccess;
    }
    enter here;
    if (bytes > std::size_t{16} << 30 || !(*p = take(bytes, kind))) return said(cudaErrorMemoryAllocation);
    return said(cudaSuccess);
}
static cudaError_t given(void* p)
{
    if (!p) return cudaSuccess;
    {
        enter here;
        if (give(p)) return cudaSuccess;
    }
    std::free(p);
    return cudaSuccess;
}
cudaError_t cudaMalloc(void** p, std::size_t bytes) { return taken(p, bytes, memory_kind::device); }
cudaError_t cudaMallocManaged(void** p, std::size_t bytes, unsigned) { return taken(p, bytes, memory_kind::managed); }
cudaError_t cudaMallocHost(void** p, std::size_t bytes) { return taken(p, bytes, memory_kind::pinned); }
cudaError_t cudaHostAlloc(void** p, std::size_t bytes, unsigned) { return taken(p, bytes, memory_kind::pinned); }
cudaError_t cudaFree(void* p)
{
    if (p && !inside) { // waits for all that runs, unless it is the heap of the program
        enter here;
        const auto is = memory_map::instance().find(reinterpret_cast<std::uintptr_t>(p));
        if (is.to && is.kind == memory_kind::device) drain_all();
    }
    return given(p);
}
cudaError_t cudaFreeHost(void* p) { return given(p); }
cudaError_t cudaMemPoolCreate(cudaMemPool_t* p, const cudaMemPoolProps*)
{
    enter here;
    *p = reinterpret_cast<cudaMemPool_t>(new pool);
    return said(cudaSuccess);
}
cudaError_t cudaMemPoolDestroy(cudaMemPool_t) { return cudaSuccess; }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMallocFromPoolAsync(void** p, std::size_t bytes, cudaMemPool_t, cudaStream_t s)
{
    enter here;
    if (of(s).captured) return said(cudaErrorStreamCaptureUnsupported);
    --inside;
    const cudaError_t e = taken(p, bytes, memory_kind::device);
    ++inside;
    return e;
}
cudaError_t cudaMallocAsync(void** p, std::size_t bytes, cudaStream_t s) { return cudaMallocFromPoolAsync(p, bytes, nullptr, s); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t s)
{
    enter here;
    return said(queue(s, [p] { (void)given(p); }));
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t s)
{
    enter here;
    return said(copy(to, from, bytes, s));
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind)
{
    enter here;
    drain_all();
    const cudaError_t e = copy(to, from, bytes, nullptr);
    drain(all().main);
    return said(e);
}
cudaError_t cudaMemsetAsync(void* at, int value, std::size_t bytes, cudaStream_t s)
{
    enter here;
    const auto is = memory_map::instance().find(reinterpret_cast<std::uintptr_t>(at));
    if (bytes && reinterpret_cast<std::uintptr_t>(at) + bytes > is.to) return said(cudaErrorInvalidValue);
    return said(queue(s, [=] { std::memset(at, value, bytes); }));
}
cudaError_t cudaMemset(void* at, int value, std::size_t bytes) { return cudaMemsetAsync(at, value, bytes, nullptr); }
cudaError_t cudaMemset2DAsync(void* at, std::size_t pitch, int value, std::size_t width, std::size_t height, cudaStream_t s)
{
    enter here;
    const auto is = memory_map::instance().find(reinterpret_cast<std::uintptr_t>(at));
    if (width > pitch || (height && reinterpret_cast<std::uintptr_t>(at) + (height - 1) * pitch + width > is.to))
        return said(cudaErrorInvalidValue);
    return said(queue(s, [=] {
        for (std::size_t row = 0; row < height; ++row) std::memset(static_cast<char*>(at) + row * pitch, value, width);
    }));
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* p)
{
    const auto is = memory_map::instance().find(reinterpret_cast<std::uintptr_t>(p));
    *out = {};
    out->type = !is.to                            ? cudaMemoryTypeUnregistered
                : is.kind == memory_kind::device  ? cudaMemoryTypeDevice
                : is.kind == memory_kind::managed ? cudaMemoryTypeManaged
                                                  : cudaMemoryTypeHost;
    out->devicePointer = out->hostPointer = const_cast<void*>(p);
    return cudaSuccess;
}

// -- streams, events, graphs -----------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags)
{
    enter here;
    auto* made = new stream;
    made->blocking = !(flags & cudaStreamNonBlocking);
    all().streams.insert(made);
    *s = reinterpret_cast<cudaStream_t>(made);
    return said(cudaSuccess);
}
cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithFlags(s, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t s)
{
    enter here;
    drain(of(s));
    all().streams.erase(&of(s));
    delete &of(s);
    return said(cudaSuccess);
}
cudaError_t cudaStreamSynchronize(cudaStream_t s)
{
    enter here;
    if (of(s).captured) return said(cudaErrorStreamCaptureUnsupported);
    drain(of(s));
    return said(cudaSuccess);
}
cudaError_t cudaStreamQuery(cudaStream_t s)
{
    enter here;
    if (of(s).queue.empty()) return said(cudaSuccess);
    const work next = std::move(of(s).queue.front());
    of(s).queue.pop_front();
    next();
    return said(cudaErrorNotReady);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* status)
{
    *status = of(s).captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned)
{
    enter here;
    return said(queue(s, [e] {
        if (const auto* of_event = reinterpret_cast<event*>(e); of_event->of && !of_event->done) drain(*of_event->of);
    }));
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned)
{
    enter here;
    *e = reinterpret_cast<cudaEvent_t>(new event);
    return said(cudaSuccess);
}
cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e)
{
    enter here;
    auto* is = reinterpret_cast<event*>(e);
    if (!is->done && is->of) drain(*is->of);
    delete is;
    return said(cudaSuccess);
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s)
{
    enter here;
    auto* is = reinterpret_cast<event*>(e);
    is->of = &of(s);
    is->done = false;
    return said(queue(s, [is] { is->done = true, is->when = std::chrono::steady_clock::now(); }));
}
cudaError_t cudaEventSynchronize(cudaEvent_t e)
{
    enter here;
    auto* is = reinterpret_cast<event*>(e);
    if (!is->done) drain(*is->of);
    return said(cudaSuccess);
}
cudaError_t cudaEventQuery(cudaEvent_t e) { return reinterpret_cast<event*>(e)->done ? cudaSuccess : cudaErrorNotReady; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to)
{
    *ms = std::chrono::duration<float, std::milli>(reinterpret_cast<event*>(to)->when - reinterpret_cast<event*>(from)->when).count();
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode)
{
    enter here;
    if (&of(s) == &all().main) return said(cudaErrorStreamCaptureUnsupported);
    of(s).captured = std::make_shared<graph>();
    return said(cudaSuccess);
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* out)
{
    enter here;
    *out = reinterpret_cast<cudaGraph_t>(new graph(std::move(*of(s).captured)));
    of(s).captured.reset();
    return said(cudaSuccess);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t g, unsigned long long)
{
    enter here;
    *out = reinterpret_cast<cudaGraphExec_t>(new graph(*reinterpret_cast<graph*>(g)));
    return said(cudaSuccess);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t*, std::size_t* n)
{
    return *n = reinterpret_cast<graph*>(g)->steps.size(), cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t g, cudaStream_t s)
{
    enter here;
    for (const work& w : reinterpret_cast<graph*>(g)->steps) (void)queue(s, w);
    return said(cudaSuccess);
}
cudaError_t cudaGraphDestroy(cudaGraph_t g)
{
    enter here;
    delete reinterpret_cast<graph*>(g);
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g)
{
    enter here;
    delete reinterpret_cast<graph*>(g);
    return cudaSuccess;
}

// -- errors ----------------------------------------------------------------------------------------------------------

cudaError_t cudaGetLastError()
{
    const cudaError_t e = all().sticky != cudaSuccess ? all().sticky : last;
    last = cudaSuccess;
    return e;
}
cudaError_t cudaPeekAtLastError() { return all().sticky != cudaSuccess ? all().sticky : last; }
const char* cudaGetErrorName(cudaError_t e)
{
    return e == cudaSuccess                 ? "cudaSuccess"
           : e == cudaErrorLaunchFailure    ? "cudaErrorLaunchFailure"
           : e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation"
                                            : "cudaError";
}
const char* cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : "see what the emulator printed"; }

// -- the driver's --------------------------------------------------------------------------------------------------------

static CUresult encode(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* extent,
                       const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t* every, CUtensorMapInterleave interleave,
                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill)
{
    if (rank != 3 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
        return CUDA_ERROR_INVALID_VALUE;
    const std::uint32_t bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : type == CU_TENSOR_MAP_DATA_TYPE_UINT16 ? 2 : 0;
    if (bytes == 0 || reinterpret_cast<std::uintptr_t>(out) % 64 || reinterpret_cast<std::uintptr_t>(base) % 16)
        return CUDA_ERROR_INVALID_VALUE;
    emulator::tensor_map map;
    map.base = reinterpret_cast<std::uintptr_t>(base);
    map.element_bytes = bytes;
    map.swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
    if (!map.swizzled && swizzle != CU_TENSOR_MAP_SWIZZLE_NONE) return CUDA_ERROR_INVALID_VALUE;
    for (int n = 0; n < 3; ++n) {
        if (extent[n] == 0 || extent[n] > std::uint64_t{1} << 32 || box[n] == 0 || box[n] > 256 || every[n] != 1)
            return CUDA_ERROR_INVALID_VALUE;
        map.extent[n] = extent[n];
        map.box[n] = box[n];
    }
    for (int n = 0; n < 2; ++n) {
        if (stride[n] % 16 || stride[n] >= std::uint64_t{1} << 40) return CUDA_ERROR_INVALID_VALUE;
        map.stride[n] = stride[n];
    }
    if (box[0] * bytes % 16 || (map.swizzled && box[0] * bytes > 128)) return CUDA_ERROR_INVALID_VALUE;
    std::memset(static_cast<void*>(out), 0, sizeof *out);
    std::memcpy(static_cast<void*>(out), &map, sizeof map);
    return CUDA_SUCCESS;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found)
{
    const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
    *entry = known ? reinterpret_cast<void*>(encode) : nullptr;
    *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

} // extern "C"
// NOLINTEND
