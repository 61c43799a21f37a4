// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What R ranks do between backward and the optimizer's step: gradients become what one rank would have of the joined
/// batch. Losses are divided by global counts before backward; then every gradient is summed over the ranks that hold its
/// parameter. See also gradient_norm.hpp.
#pragma once

#include <fastmoe/comm/self.hpp>
#include <fastmoe/exec/scratch.hpp>
#include <fastmoe/parallel/agreement.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// How the ranks' gradients become one.
enum class gradient_reduction : std::uint8_t {
    sum, ///< right whenever losses are divided by global counts, whatever the ranks' token counts are
    /// For losses that each rank divided by its own count: sums, then divides all gradients, those tagged `none` too, by the
    /// number of ranks. Right only if all ranks have the same number of tokens, so options.tokens is compared.
    mean_of_equal_counts,
};

/// In what the ranks' gradients are added.
enum class gradient_accumulation : std::uint8_t {
    as_stored, ///< what the communicator does with the gradients' own type
    float32,   ///< bfloat16 and half travel as float: converted once, summed in rank order, rounded once; twice the bytes
};

struct synchronize_options {
    /// Bytes that one all-reduce moves, and that the workspace holds. Large ones cost memory, small ones latency; the result
    /// is the same to the bit.
    int64_t bucket_bytes = int64_t{32} << 20;
    gradient_accumulation accumulate = gradient_accumulation::as_stored;
    gradient_reduction reduce = gradient_reduction::sum;
    int64_t tokens = 0; ///< this rank's, for mean_of_equal_counts alone
};

namespace detail {

template <class From, class To>
struct convert_elements {
    using vectorized = void;
    const From* from; // (N)
    To* to;           // (N)

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { to[i] = static_cast<To>(from[i]); }
};

template <class From, class To>
struct divide_elements {
    using vectorized = void;
    using wide = wider_t<From, To>;
    const From* from; // (N)
    To* to;           // (N)
    wide divisor;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { to[i] = static_cast<To>(static_cast<wide>(from[i]) / divisor); }
};

/// to = from / divisor.                                                                        // (N), (N)
template <class Executor, class From, class To>
void divide(Executor& ex, vector_view<From> from, vector_view<To> to, int divisor)
{
    const int64_t n = to.extent(0);
    if (divisor == 1) fastmoe::for_each(ex, n, convert_elements<From, To>{from.data_handle(), to.data_handle()});
    else {
        using wide = wider_t<From, To>;
        fastmoe::for_each(ex, n,
                          divide_elements<From, To>{from.data_handle(), to.data_handle(), static_cast<wide>(divisor)});
    }
}

/// The gradients of one tag and type one behind the other, and a place in that row.
template <class G>
struct gradient_stream {
    vector_view<const parameter_view> parameters;
    parameter_tag tag;
    int64_t entry = 0, offset = 0;

    bool holds(int64_t i) const noexcept
    {
        return parameters(i).tag == tag && parameters(i).gradient_type == scalar_type_of<G>;
    }
    int64_t elements() const noexcept
    {
        int64_t n = 0;
        for (int64_t i = 0; i < parameters.extent(0); ++i) n += holds(i) ? parameters(i).count : 0;
        return n;
    }
    /// The next elements that lie together, at most so many, of which there is one at least.
    vector_view<G> next(int64_t most) noexcept
    {
        while (!holds(entry) || offset == parameters(entry).count) ++entry, offset = 0;
        const int64_t left = parameters(entry).count - offset, n = left < most ? left : most;
        const auto out = slice(elements_of<G>(parameters(entry), parameter_side::gradient), offset, n);
        offset += n;
        return out;
    }
};

/// Sums the gradients of one stream over a communicator, bucket by bucket. Sum is G or wider; a bucket that lies in one
/// gradient already, and has its type, is summed where it lies.
template <class G, class Sum, class Executor, class Communicator>
void reduce_stream(Executor& ex, gradient_stream<G> stream, const Communicator& c, int64_t bucket_bytes, int divisor,
                   arena& scratch)
{
    static_assert(sums_over_ranks<Communicator, Executor, Sum>, "the communicator lacks sums; see communicator.hpp");
    int64_t left = stream.elements();
    const int64_t fits = bucket_bytes / static_cast<int64_t>(sizeof(Sum)), bucket = fits < left ? fits : left;
    const arena::scope lent(scratch);
    const vector_view<Sum> packed = scratch.vector<Sum>(bucket);
    for (int64_t n = bucket; left > 0 && !scratch.measuring(); left -= n, n = bucket < left ? bucket : left) {
        gradient_stream<G> ahead = stream;
        const vector_view<G> first = ahead.next(n);
        if (std::is_same_v<G, Sum> && first.extent(0) == n) {
            c.all_reduce(ex, first);
            if (divisor != 1) divide(ex, first, first, divisor);
            stream = ahead;
            continue;
        }
        ahead = stream;
        for (int64_t done = 0; done < n;) {
            const vector_view<G> piece = ahead.next(n - done);
            divide(ex, piece, slice(packed, done, piece.extent(0)), 1);
            done += piece.extent(0);
        }
        c.all_reduce(ex, slice(packed, 0, n));
        for (int64_t done = 0; done < n;) {
            const vector_view<G> piece = stream.next(n - done);
            divide(ex, slice(packed, done, piece.extent(0)), piece, divisor);
            done += piece.extent(0);
        }
    }
}

/// All gradients of one tag, a type at a time: the order is that of scalar_type, so ranks need not list types alike.
template <class Executor, class Communicator>
void reduce_tag(Executor& ex, vector_view<const parameter_view> parameters, parameter_tag tag, const Communicator& c,
                const synchronize_options& options, int divisor, arena& scratch)
{
    for (int type = 0; type < static_cast<int>(scalar_type::count_); ++type)
        with_scalar_type(static_cast<scalar_type>(type), [&](auto zero) {
            using G = decltype(zero);
            const gradient_stream<G> stream{parameters, tag};
            if (options.accumulate == gradient_accumulation::float32)
                reduce_stream<G, accumulate_t<G>>(ex, stream, c, options.bucket_bytes, divisor, scratch);
            else reduce_stream<G, G>(ex, stream, c, options.bucket_bytes, divisor, scratch);
        });
}

/// Divides the gradients of one tag: the mean where there is nobody to add.
template <class Executor>
void divide_tag(Executor& ex, vector_view<const parameter_view> parameters, parameter_tag tag, int divisor)
{
    for (int64_t i = 0; i < parameters.extent(0) && divisor != 1; ++i)
        if (parameters(i).tag == tag)
            with_scalar_type(parameters(i).gradient_type, [&](auto zero) {
                const auto g = elements_of<decltype(zero)>(parameters(i), parameter_side::gradient);
                divide(ex, g, g, divisor);
            });
}

template <class Executor, class World, class Data>
void synchronize(Executor& ex, vector_view<const parameter_view> parameters, const World& world, const Data& data,
                 const synchronize_options& options, arena& scratch)
{
    const bool mean = options.reduce == gradient_reduction::mean_of_equal_counts;
    const auto facts = [&](parameter_tag tag) {
        parameter_facts out = parameter_facts::of(parameters, tag, parameter_side::gradient);
        out.add(static_cast<std::uint64_t>(options.bucket_bytes));
        out.add(static_cast<std::uint64_t>(options.accumulate) << 8 | static_cast<std::uint64_t>(options.reduce));
        out.tokens = mean ? options.tokens : 0;
        return out;
    };
    expects_agreement(ex, world, data, facts(parameter_tag::world), facts(parameter_tag::data), scratch);
    const int divisor = mean ? world.size() : 1;
    const auto reduce = [&](parameter_tag tag, const auto& c) {
        if (c.size() > 1) reduce_tag(ex, parameters, tag, c, options, divisor, scratch);
        else if (!scratch.measuring()) divide_tag(ex, parameters, tag, divisor);
    };
    reduce(parameter_tag::world, world);
    reduce(parameter_tag::data, data);
    reduce(parameter_tag::none, self{});
}

} // namespace detail

/// Makes each gradient the sum over the ranks that hold its parameter: over `world`, over `data`, or over nobody, by its tag.
/// Buckets are cut by the shapes alone and hold gradients of one tag and type, so the same call has the same bits on all
/// ranks, for any number of threads and any size of buckets. With this workspace nothing is allocated.
/// Collective over both communicators: all ranks of `world` have the same options and the same parameters tagged `world`, in
/// the same order, those of `data` the same tagged `data`. This is compared first, with two small sums over ranks.
/// @param parameters  host memory
/// @param data     the ranks with the same expert-parallel coordinate: world.split(coordinate, rank); self where no
///                 expert has replicas
/// @param scratch  run on an arena without storage, the call measures and touches nothing
/// @throws comm_error on all ranks if their parameters or options differ, before anything is written; or if a peer failed
/// @throws invalid_argument if a gradient has no memory, options make no sense, or data is larger than world
/// @throws out_of_memory if the workspace is too small
template <executor Executor, counts_ranks World, counts_ranks Data>
void synchronize_gradients(Executor& ex, vector_view<const parameter_view> parameters, const World& world, const Data& data,
                           const synchronize_options& options, arena& scratch)
{
    const bool mean = options.reduce == gradient_reduction::mean_of_equal_counts;
    expects(options.bucket_bytes >= 8, "options.bucket_bytes", options.bucket_bytes, "8 or more");
    expects(!mean || options.tokens > 0, "options.tokens", options.tokens, "this rank's number of tokens, for a mean");
    if (!scratch.measuring()) detail::expects_parameters(parameters, detail::parameter_side::gradient);
    detail::with_scratch(scratch, [&](arena& memory) {
        detail::synchronize(ex, parameters, world, data, options, memory);
    });
}

/// The same with memory of the executor.
template <executor Executor, counts_ranks World, counts_ranks Data>
void synchronize_gradients(Executor& ex, vector_view<const parameter_view> parameters, const World& world, const Data& data,
                           const synchronize_options& options = {})
{
    detail::with_own_scratch(
        ex, [&](arena& scratch) { synchronize_gradients(ex, parameters, world, data, options, scratch); });
}

} // namespace fastmoe::inline FASTMOE_ABI
