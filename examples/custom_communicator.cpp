// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A communicator of your own: any type with these members. This one wraps another and counts the bytes that each
/// collective is given, to see what a configuration would move.
#include <fastmoe/moe.hpp>

#include <cstdio>
#include <vector>

namespace fm = fastmoe;

// [communicator]
template <class Inner>
struct counting {
    Inner inner;
    fm::int64_t* bytes; // outlives the communicator

    int rank() const { return inner.rank(); }
    int size() const { return inner.size(); }

    template <class Executor, class T>
    void all_reduce(Executor& ex, fm::vector_view<T> values) const
    {
        count<T>(values.extent(0));
        inner.all_reduce(ex, values);
    }
    template <class Executor, class T>
    void reduce_scatter(Executor& ex, fm::type_identity_t<fm::vector_view<const T>> sent, fm::vector_view<T> received) const
    {
        count<T>(sent.extent(0));
        inner.reduce_scatter(ex, sent, received);
    }
    template <class Executor, class T>
    void all_gather(Executor& ex, fm::type_identity_t<fm::vector_view<const T>> sent, fm::vector_view<T> received) const
    {
        count<T>(sent.extent(0));
        inner.all_gather(ex, sent, received);
    }
    template <class Executor, class T>
    void all_to_all(Executor& ex, fm::type_identity_t<fm::vector_view<const T>> sent, fm::vector_view<T> received) const
    {
        count<T>(sent.extent(0));
        inner.all_to_all(ex, sent, received);
    }
    template <class Executor, class T>
    void all_to_all_v(Executor& ex, fm::type_identity_t<fm::matrix_view<const T>> sent,
                      fm::vector_view<const fm::int64_t> sent_rows, fm::matrix_view<T> received,
                      fm::vector_view<const fm::int64_t> received_rows) const
    {
        for (int r = 0; r < size(); ++r) count<T>(sent_rows(r) * sent.extent(1));
        inner.all_to_all_v(ex, sent, sent_rows, received, received_rows);
    }
    template <class Executor, class T>
    void broadcast(Executor& ex, fm::vector_view<T> values, int root) const
    {
        count<T>(values.extent(0));
        inner.broadcast(ex, values, root);
    }
    template <class Executor>
    void barrier(Executor& ex) const
    {
        inner.barrier(ex);
    }
    auto split(int color, int key) const { return counting<decltype(inner.split(color, key))>{inner.split(color, key), bytes}; }

private:
    template <class T>
    void count(fm::int64_t elements) const
    {
        *bytes += elements * static_cast<fm::int64_t>(sizeof(T));
    }
};

static_assert(fm::communicator<counting<fm::self>, fm::host_executor>);
// [communicator]

int main()
{
    constexpr int tokens = 40, width = 16;
    fm::int64_t bytes = 0;
    fm::host_executor ex;
    fm::moe_layer layer{fm::top_k_gate<fm::softmax_score>{.experts = 4, .k = 2, .balance = {.coefficient = 0.01}},
                        fm::mlp<fm::relu>{.width = width, .hidden = 32}, counting<fm::self>{{}, &bytes}};
    auto weights = fm::random_weights<float>(ex, layer, 1);
    std::vector<float> x(tokens * width, 0.25f), y(x.size());
    const auto saved = layer.forward(ex, fm::as_matrix(x, tokens, width), weights.view(), fm::as_matrix(y, tokens, width));
    std::printf("balance loss %.4f; the gate summed %lld bytes over ranks\n", saved.losses()(0),
                static_cast<long long>(bytes));
    return bytes > 0 ? 0 : 1;
}
