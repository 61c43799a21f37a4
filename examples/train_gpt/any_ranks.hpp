// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Any communicator behind one type, for an executor: the model over many ranks is compiled once, whether they are threads
/// or processes. A call more costs nothing beside the meeting of ranks that every collective is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/core/dtype.hpp>
#include <fastmoe/exec/host_executor.hpp>

namespace train_gpt {

namespace fm = fastmoe;

namespace detail {

/// The element types of communicator.hpp, as values.
enum class element : std::uint8_t { float64, float32, bfloat16, float16, int32, int64, byte };

template <class T>
consteval element find_element()
{
    if constexpr (std::is_same_v<T, double>) return element::float64;
    else if constexpr (std::is_same_v<T, float>) return element::float32;
    else if constexpr (std::is_same_v<T, fm::bfloat16>) return element::bfloat16;
    else if constexpr (std::is_same_v<T, fm::half>) return element::float16;
    else if constexpr (std::is_same_v<T, fm::int32_t>) return element::int32;
    else if constexpr (std::is_same_v<T, fm::int64_t>) return element::int64;
    else {
        static_assert(std::is_same_v<T, std::byte>, "not one of the element types of communicator.hpp");
        return element::byte;
    }
}
template <class T>
inline constexpr element element_of = find_element<T>();

/// f(T{}) for the type that the value names.
template <class F>
void with_element(element e, const F& f)
{
    switch (e) {
    case element::float64: return f(double{});
    case element::float32: return f(float{});
    case element::bfloat16: return f(fm::bfloat16{});
    case element::float16: return f(fm::half{});
    case element::int32: return f(fm::int32_t{});
    case element::int64: return f(fm::int64_t{});
    default: return f(std::byte{});
    }
}

/// Elements of a type that a value names.
template <class Pointer>
struct elements {
    element type;
    Pointer data;
    fm::int64_t rows, width = 1;

    template <class T>
    auto vector() const
    {
        using value = std::conditional_t<std::is_same_v<Pointer, const void*>, const T, T>;
        return fm::vector_view<value>(static_cast<value*>(data), rows);
    }
    template <class T>
    auto matrix() const
    {
        using value = std::conditional_t<std::is_same_v<Pointer, const void*>, const T, T>;
        return fm::matrix_view<value>(static_cast<value*>(data), rows, width);
    }
};

template <class T>
elements<void*> to_receive(fm::vector_view<T> v)
{
    return {element_of<T>, v.data_handle(), v.extent(0)};
}
template <class T>
elements<const void*> to_send(fm::vector_view<const T> v)
{
    return {element_of<T>, v.data_handle(), v.extent(0)};
}

} // namespace detail

/// One of R ranks; a communicator for an Executor alone. Copies are the same rank. Errors are those of the communicator inside.
template <class Executor>
class any_ranks {
    using counts = fm::vector_view<const fm::int64_t>;
    using in = detail::elements<const void*>;
    using out = detail::elements<void*>;

public:
    template <class Communicator>
    explicit any_ranks(const Communicator& c) : own_(std::make_shared<const holder<Communicator>>(c))
    {
    }

    int rank() const noexcept { return own_->rank(); }
    int size() const noexcept { return own_->size(); }

    template <class T>
    void all_reduce(Executor& ex, fm::vector_view<T> values) const // (N)
    {
        own_->all_reduce(ex, detail::to_receive(values));
    }
    template <class T>
    void reduce_scatter(Executor& ex, fm::type_identity_t<fm::vector_view<const T>> sent, fm::vector_view<T> received) const
    {
        own_->reduce_scatter(ex, detail::to_send<T>(sent), detail::to_receive(received));
    }
    template <class T>
    void all_gather(Executor& ex, fm::type_identity_t<fm::vector_view<const T>> sent, fm::vector_view<T> received) const
    {
        own_->all_gather(ex, detail::to_send<T>(sent), detail::to_receive(received));
    }
    template <class T>
    void all_to_all(Executor& ex, fm::type_identity_t<fm::vector_view<const T>> sent, fm::vector_view<T> received) const
    {
        own_->all_to_all(ex, detail::to_send<T>(sent), detail::to_receive(received));
    }
    /// The same, of what the host needs to know: by way of its arrays, if the communicator inside can do that.
    template <class T>
        requires(!fm::has_readable_memory<Executor>)
    void all_to_all_known(Executor& ex, fm::type_identity_t<fm::vector_view<const T>> sent, fm::vector_view<T> received,
                          fm::vector_view<T> to_others, fm::vector_view<T> from_others) const
    {
        own_->all_to_all_known(ex, detail::to_send<T>(sent), detail::to_receive(received), detail::to_receive(to_others),
                               detail::to_receive(from_others));
    }
    template <class T>
    void all_to_all_v(Executor& ex, fm::type_identity_t<fm::matrix_view<const T>> sent, counts sent_rows,
                      fm::matrix_view<T> received, counts received_rows) const
    {
        own_->all_to_all_v(ex, {detail::element_of<T>, sent.data_handle(), sent.extent(0), sent.extent(1)}, sent_rows,
                           {detail::element_of<T>, received.data_handle(), received.extent(0), received.extent(1)},
                           received_rows);
    }
    template <class T>
    void broadcast(Executor& ex, fm::vector_view<T> values, int root) const // (N)
    {
        own_->broadcast(ex, detail::to_receive(values), root);
    }
    void barrier(Executor& ex) const { own_->barrier(ex); }
    any_ranks split(int color, int key) const { return own_->split(color, key); }

private:
    struct collectives {
        virtual ~collectives() = default;
        virtual int rank() const = 0;
        virtual int size() const = 0;
        virtual void all_reduce(Executor& ex, out values) const = 0;
        virtual void reduce_scatter(Executor& ex, in sent, out received) const = 0;
        virtual void all_gather(Executor& ex, in sent, out received) const = 0;
        virtual void all_to_all(Executor& ex, in sent, out received) const = 0;
        virtual void all_to_all_known(Executor& ex, in sent, out received, out to_others, out from_others) const = 0;
        virtual void all_to_all_v(Executor& ex, in sent, counts sent_rows, out received, counts received_rows) const = 0;
        virtual void broadcast(Executor& ex, out values, int root) const = 0;
        virtual void barrier(Executor& ex) const = 0;
        virtual any_ranks split(int color, int key) const = 0;
    };

    template <class Communicator>
    struct holder final : collectives {
        Communicator c;

        explicit holder(const Communicator& from) : c(from) {}
        int rank() const override { return c.rank(); }
        int size() const override { return c.size(); }
        void all_reduce(Executor& ex, out values) const override
        {
            with_sum(values, [&](auto zero) { c.all_reduce(ex, values.template vector<decltype(zero)>()); });
        }
        void reduce_scatter(Executor& ex, in sent, out received) const override
        {
            with_sum(received, [&](auto zero) {
                using T = decltype(zero);
                c.template reduce_scatter<Executor, T>(ex, sent.template vector<T>(), received.template vector<T>());
            });
        }
        void all_gather(Executor& ex, in sent, out received) const override
        {
            detail::with_element(received.type, [&](auto zero) {
                using T = decltype(zero);
                c.template all_gather<Executor, T>(ex, sent.template vector<T>(), received.template vector<T>());
            });
        }
        void all_to_all(Executor& ex, in sent, out received) const override
        {
            detail::with_element(received.type, [&](auto zero) {
                using T = decltype(zero);
                c.template all_to_all<Executor, T>(ex, sent.template vector<T>(), received.template vector<T>());
            });
        }
        void all_to_all_known(Executor& ex, in sent, out received, out to_others, out from_others) const override
        {
            if constexpr (fm::exchanges_known_blocks<Communicator, Executor, fm::int64_t>) {
                detail::with_element(received.type, [&](auto zero) {
                    using T = decltype(zero);
                    c.template all_to_all_known<Executor, T>(ex, sent.template vector<T>(), received.template vector<T>(),
                                                             to_others.template vector<T>(), from_others.template vector<T>());
                });
            } else if constexpr (!fm::has_readable_memory<Executor>) {
                all_to_all(ex, sent, received);
                detail::with_element(received.type, [&](auto zero) {
                    constexpr fm::int64_t bytes = sizeof zero;
                    ex.copy_to_host(to_others.data, sent.data, sent.rows * bytes);
                    ex.copy_to_host(from_others.data, received.data, received.rows * bytes);
                });
                ex.synchronize();
            }
        }
        void all_to_all_v(Executor& ex, in sent, counts sent_rows, out received, counts received_rows) const override
        {
            detail::with_element(received.type, [&](auto zero) {
                using T = decltype(zero);
                c.template all_to_all_v<Executor, T>(ex, sent.template matrix<T>(), sent_rows,
                                                     received.template matrix<T>(), received_rows);
            });
        }
        void broadcast(Executor& ex, out values, int root) const override
        {
            detail::with_element(values.type,
                                 [&](auto zero) { c.broadcast(ex, values.template vector<decltype(zero)>(), root); });
        }
        void barrier(Executor& ex) const override { c.barrier(ex); }
        any_ranks split(int color, int key) const override { return any_ranks(c.split(color, key)); }

        template <class F>
        static void with_sum(const out& values, const F& f)
        {
            detail::with_element(values.type, [&](auto zero) {
                if constexpr (!std::is_same_v<decltype(zero), std::byte>) f(zero);
                else fm::expects(false, "values (N)", "bytes", "numbers: bytes have no sum");
            });
        }
    };

    std::shared_ptr<const collectives> own_;
};

using host_ranks = any_ranks<fm::host_executor>;
static_assert(fm::communicator<host_ranks, fm::host_executor>);

} // namespace train_gpt
