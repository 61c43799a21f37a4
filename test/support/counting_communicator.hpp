// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A communicator that counts what this rank sends through another one, by collective and by receiver, so that a test can
/// hold an algorithm to its formula. What a rank keeps for itself is not counted.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>

#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/exec/executor.hpp>

namespace support {

using fastmoe::int64_t;

/// Of one kind of message.
struct traffic {
    int64_t bytes = 0;
    int64_t messages = 0; ///< those with at least a byte

    friend bool operator==(const traffic&, const traffic&) = default;
};

/// What one rank has sent.
class traffic_log {
public:
    void add(const char* verb, int peer, int64_t bytes)
    {
        if (bytes == 0) return;
        auto& t = all_[{verb, peer}];
        t.bytes += bytes;
        ++t.messages;
    }
    void call(const char* verb) { ++calls_[verb]; }

    /// Sums over the collectives or the peers that are left out.
    traffic of(const std::string& verb = "", int peer = -1) const
    {
        traffic out;
        for (const auto& [key, t] : all_)
            if ((verb.empty() || key.first == verb) && (peer < 0 || key.second == peer)) {
                out.bytes += t.bytes;
                out.messages += t.messages;
            }
        return out;
    }
    int64_t calls(const std::string& verb) const { return calls_.count(verb) ? calls_.at(verb) : 0; }
    void reset() { all_.clear(), calls_.clear(); }

private:
    std::map<std::pair<std::string, int>, traffic> all_;
    std::map<std::string, int64_t> calls_;
};

/// Each collective is counted as its plain algorithm: all_to_all, all_to_all_v, all_gather and reduce_scatter send each
/// block to its receiver at once, broadcast sends from the root to each rank, and all_reduce is the reduce_scatter of equal
/// shares (the first ranks get one element more) and their all_gather, which is (R-1)/R of the values out, twice.
/// Copies share a log; a split has one of its own, whose peers are its ranks.
template <class Communicator>
class counting_communicator {
public:
    explicit counting_communicator(Communicator c) : inner_(std::move(c)), log_(std::make_shared<traffic_log>()) {}

    int rank() const { return inner_.rank(); }
    int size() const { return inner_.size(); }
    traffic_log& log() const { return *log_; }

    template <fastmoe::executor Executor, class T>
    void all_reduce(Executor& ex, fastmoe::vector_view<T> values) const // (N)
    {
        log_->call("all_reduce");
        const auto share = [&](int r) {
            const int64_t n = values.extent(0);
            return bytes<T>(n / size() + (r < n % size()));
        };
        to_others([&](int r) { log_->add("all_reduce", r, share(r)); });
        to_others([&](int r) { log_->add("all_reduce", r, share(rank())); });
        inner_.all_reduce(ex, values);
    }
    template <fastmoe::executor Executor, class T>
    void reduce_scatter(Executor& ex, std::type_identity_t<fastmoe::vector_view<const T>> sent,
                        fastmoe::vector_view<T> received) const
    {
        log_->call("reduce_scatter");
        to_others([&](int r) { log_->add("reduce_scatter", r, bytes<T>(received.extent(0))); });
        inner_.reduce_scatter(ex, sent, received);
    }
    template <fastmoe::executor Executor, class T>
    void all_gather(Executor& ex, std::type_identity_t<fastmoe::vector_view<const T>> sent,
                    fastmoe::vector_view<T> received) const
    {
        log_->call("all_gather");
        to_others([&](int r) { log_->add("all_gather", r, bytes<T>(sent.extent(0))); });
        inner_.all_gather(ex, sent, received);
    }
    template <fastmoe::executor Executor, class T>
    void all_to_all(Executor& ex, std::type_identity_t<fastmoe::vector_view<const T>> sent,
                    fastmoe::vector_view<T> received) const
    {
        log_->call("all_to_all");
        to_others([&](int r) { log_->add("all_to_all", r, bytes<T>(sent.extent(0) / size())); });
        inner_.all_to_all(ex, sent, received);
    }
    template <fastmoe::executor Executor, class T>
    void all_to_all_v(Executor& ex, std::type_identity_t<fastmoe::matrix_view<const T>> sent,
                      fastmoe::vector_view<const int64_t> sent_rows, fastmoe::matrix_view<T> received,
                      fastmoe::vector_view<const int64_t> received_rows) const
    {
        log_->call("all_to_all_v");
        to_others([&](int r) {
            if (r < sent_rows.extent(0)) log_->add("all_to_all_v", r, bytes<T>(sent_rows(r) * sent.extent(1)));
        });
        inner_.all_to_all_v(ex, sent, sent_rows, received, received_rows);
    }
    template <fastmoe::executor Executor, class T>
    void broadcast(Executor& ex, fastmoe::vector_view<T> values, int root) const // (N)
    {
        log_->call("broadcast");
        if (rank() == root) to_others([&](int r) { log_->add("broadcast", r, bytes<T>(values.extent(0))); });
        inner_.broadcast(ex, values, root);
    }
    template <fastmoe::executor Executor>
    void barrier(Executor& ex) const
    {
        log_->call("barrier");
        inner_.barrier(ex);
    }
    counting_communicator split(int color, int key) const { return counting_communicator(inner_.split(color, key)); }

private:
    template <class T>
    static int64_t bytes(int64_t count)
    {
        return count * static_cast<int64_t>(sizeof(T));
    }
    template <class F>
    void to_others(F f) const
    {
        for (int r = 0; r < size(); ++r)
            if (r != rank()) f(r);
    }

    Communicator inner_;
    std::shared_ptr<traffic_log> log_;
};

} // namespace support
