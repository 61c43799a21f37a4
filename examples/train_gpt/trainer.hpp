// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A run: the model, the optimizer and the place in the data, one step at a time. A step is a function of the state and
/// the corpus alone, so a run that was stopped and resumed has the bits of one that was not. R ranks do the steps of one:
/// each takes its share of a batch's sequences, losses are divided by the tokens of the batch, and gradients are summed.
#pragma once

#include <algorithm>
#include <chrono>

#include <fastmoe/parallel/gradient_norm.hpp>
#include <fastmoe/parallel/gradients.hpp>

#include "train_gpt/corpus.hpp"
#include "train_gpt/model.hpp"
#include "train_gpt/ranks.hpp"
#include "train_gpt/report.hpp"
#include "train_gpt/run_config.hpp"
#include "train_gpt/saved_run.hpp"

namespace train_gpt {

/// @tparam Ranks  one_rank, or rank_team, whose ranks call everything that is said to be collective in the same order
template <class T, class Executor, class Gemm, class Ranks = one_rank>
class trainer {
public:
    using model_type = gpt<T, Executor, Gemm, typename Ranks::parallel_type>;
    using real = typename model_type::real;

    /// The executor and the text must outlive the trainer.
    /// @throws invalid_argument if an option is out of range or the text is too short
    trainer(Executor& ex, const run_config& config, const corpus& text, const Ranks& ranks = {})
        : ex_(ex),
          ranks_(ranks),
          config_((config.check(), config)),
          text_(text),
          data_(text, config.batch, config.model.context, config.seed),
          model_(ex, config.shape(), config.seed, ranks.parallel(most_sequences() * config.model.context)),
          first_(ex, model_.parameters().extent(0)),
          second_(ex, model_.parameters().extent(0)),
          ids_(ex, most_sequences() * config.model.context),
          targets_(ex, most_sequences() * config.model.context),
          counts_(ex, model_.config().layers * model_.config().experts),
          loss_(ex, 2),
          norm_(ex, 1),
          workspace_(ex, workspace_bytes()),
          batch_(static_cast<std::size_t>(config.batch * (config.model.context + 1)))
    {
        for (const auto& moment : {first_.view(), second_.view()})
            fm::for_each(ex, moment.extent(0), detail::set_elements<real>{moment.data_handle(), real(0)});
    }

    model_type& model() noexcept { return model_; }
    const Ranks& ranks() const noexcept { return ranks_; }
    const run_config& config() const noexcept { return config_; }
    int64_t steps_done() const noexcept { return step_; }
    bool finished() const noexcept { return step_ >= config_.steps; }

    /// One step of AdamW on the next batch. The row, the same on all ranks, lacks what only a clock knows. Collective.
    /// @throws error if the loss is no longer finite
    log_row step()
    {
        const int64_t context = config_.model.context;
        data_.training(step_, fm::as_matrix(batch_, config_.batch, context + 1));
        const int64_t tokens = upload(config_.batch) * context;
        model_.gradient(fm::slice(ids_.view(), 0, tokens), fm::slice(targets_.view(), 0, tokens), context, loss_.view(),
                        counts(), arena(), config_.tokens_per_step());
        join_ranks();
        auto memory = arena();
        join_gradients(memory);
        const double rate = config_.schedule().at(step_);
        adamw<real>(ex_, config_.optimizer(), rate, step_, model_.gradients(), norm_.view(), model_.decayed(),
                    {model_.parameters(), first_.view(), second_.view()});
        model_.parameters_changed();
        ++step_;
        log_row row{.step = step_, .tokens = step_ * config_.tokens_per_step(), .learning_rate = rate};
        row.loss = double(to_host(ex_, loss_.view())[0]);
        row.gradient_norm = double(to_host(ex_, norm_.view())[0]);
        row.balance = evenness(load());
        if (!std::isfinite(row.loss) || !std::isfinite(row.gradient_norm))
            fm::raise<fm::error>("the loss of step " + std::to_string(step_) + " is " + std::to_string(row.loss) +
                                 " and its gradient's norm " + std::to_string(row.gradient_norm) +
                                 "; expected finite numbers: a lower --learning-rate may help");
        return row;
    }

    /// Whether to stop after this step, told to all ranks. Collective.
    step_end agree(bool stops) { return ranks_.agree(ex_, stops); }

    struct validation_result {
        double loss = 0; ///< nats per byte
        expert_load load;
    };

    /// Over `windows` windows that are spread evenly over the validation text (as many as it has, if fewer). Collective.
    validation_result validate(int64_t windows)
    {
        const int64_t context = config_.model.context;
        windows = std::min(windows, data_.validation_windows());
        validation_result out;
        for (int64_t first = 0; first < windows; first += config_.batch) {
            const int64_t here = std::min(config_.batch, windows - first);
            data_.validation(first, windows, matrix_view<int32_t>(batch_.data(), here, context + 1));
            const int64_t tokens = upload(here) * context;
            model_.loss(fm::slice(ids_.view(), 0, tokens), fm::slice(targets_.view(), 0, tokens), context, loss_.view(),
                        counts(), arena(), here * context);
            join_ranks();
            out.loss += double(to_host(ex_, loss_.view())[0]) * double(here) / double(windows);
            add(out.load, load());
        }
        return out;
    }

    /// Over ranks into a folder that is there, and collective.
    void save(const std::string& path)
    {
        host_state s = on_host();
        const run_state state{step_, data_.position(step_), config_.seed, text_.fingerprint, to_json(config_).dump()};
        if constexpr (Ranks::many)
            save_parts(ex_, path, tensors(s), state, ranks_.world(),
                       ranks_.data().rank() == 0 ? fm::io::checkpoint_role::writer : fm::io::checkpoint_role::replica);
        else save_checkpoint(path, tensors(s), state);
    }

    /// Goes on where the checkpoint's run stopped; nothing changes if it does not fit.
    /// @throws invalid_argument if it is of another text, format_error if of another model
    void load(const saved_run& from)
    {
        const run_state& state = from.state();
        fm::expects(state.corpus == text_.fingerprint, "--text", "'" + text_.path + "'",
                    "the text that the checkpoint's run was trained on");
        fm::expects<fm::format_error>(state.data_position == data_.position(state.step) && state.seed == config_.seed,
                                      "data position", state.data_position, data_.position(state.step));
        host_state s = on_host();
        from.load(tensors(s));
        to_executor<Executor, real>(ex_, s.parameters.data(), model_.parameters());
        to_executor<Executor, real>(ex_, s.first.data(), first_.view());
        to_executor<Executor, real>(ex_, s.second.data(), second_.view());
        model_.parameters_changed();
        step_ = state.step;
    }

private:
    struct host_state {
        std::vector<real> parameters, first, second;
    };

    int64_t workspace_bytes()
    {
        fm::arena measure;
        join_gradients(measure);
        return std::max(measure.bytes(), model_.training_bytes(most_sequences(), config_.model.context));
    }
    fm::arena arena() { return fm::arena(workspace_.view()); }

    matrix_view<int32_t> counts() { return counts_.matrix(model_.config().layers, model_.config().experts); }

    /// Sequences of a batch that a rank has at most.
    int64_t most_sequences() const { return rank_share::largest(config_.batch, ranks_.size()); }

    /// Loss and counts of all ranks from those of each.
    void join_ranks()
    {
        ranks_.sum(ex_, fm::slice(loss_.view(), 0, 1)); // the gates' losses are those of all ranks already
        ranks_.sum(ex_, counts_.view());
    }

    /// Gradients of the batch from those of each rank's part of it, and their norm, in which each expert counts once.
    void join_gradients(fm::arena& memory)
    {
        if constexpr (Ranks::many) {
            std::vector<fm::parameter_view> all;
            const auto values = model_.named_tensors(), gradients = model_.named_gradients();
            for (std::size_t i = 0; i < values.size(); ++i)
                all.push_back(fm::as_parameter(vector_view<real>(values[i].data, values[i].size()),
                                               vector_view<real>(gradients[i].data, gradients[i].size()),
                                               values[i].all_experts > 0 ? fm::parameter_tag::data
                                                                         : fm::parameter_tag::world));
            const vector_view<const fm::parameter_view> list(all.data(), std::ssize(all));
            fm::synchronize_gradients(ex_, list, ranks_.world(), ranks_.data(), {}, memory);
            const real norm = real(fm::gradient_norm(ex_, list, ranks_.world(), ranks_.data(), memory));
            if (!memory.measuring()) to_executor<Executor, real>(ex_, &norm, norm_.view());
        } else {
            global_norm<real>(ex_, model_.gradients(), norm_.view(), memory);
        }
    }

    /// This rank's share of the first rows of batch_ as inputs and targets on the executor. @return how many rows it has
    int64_t upload(int64_t rows)
    {
        const int64_t context = config_.model.context;
        const auto own = rank_share::of(rows, ranks_.rank(), ranks_.size());
        std::vector<int32_t> inputs, targets;
        for (int64_t b = own.first; b < own.first + own.count; ++b) {
            const auto from = batch_.begin() + b * (context + 1);
            inputs.insert(inputs.end(), from, from + context);
            targets.insert(targets.end(), from + 1, from + context + 1);
        }
        to_executor<Executor, int32_t>(ex_, inputs.data(), fm::slice(ids_.view(), 0, own.count * context));
        to_executor<Executor, int32_t>(ex_, targets.data(), fm::slice(targets_.view(), 0, own.count * context));
        return own.count;
    }

    /// What the last batch chose.
    expert_load load()
    {
        const auto flat = to_host(ex_, counts_.view());
        const auto experts = model_.config().experts;
        expert_load out;
        for (auto from = flat.begin(); from != flat.end(); from += experts) out.emplace_back(from, from + experts);
        return out;
    }
    static void add(expert_load& total, const expert_load& more)
    {
        if (total.empty()) total.assign(more.size(), std::vector<std::int64_t>(more[0].size()));
        for (std::size_t l = 0; l < more.size(); ++l)
            for (std::size_t e = 0; e < more[l].size(); ++e) total[l][e] += more[l][e];
    }
    /// E * the sum of squared shares, mean over layers: what the balance loss is where probabilities are as the counts.
    static double evenness(const expert_load& load)
    {
        double total = 0;
        for (const auto& layer : load) total += 1 + load_cv(layer) * load_cv(layer);
        return total / double(load.size());
    }

    host_state on_host()
    {
        return {to_host(ex_, model_.parameters()), to_host(ex_, first_.view()), to_host(ex_, second_.view())};
    }
    /// Every parameter that is here and its two moments, by name.
    std::vector<named_tensor> tensors(host_state& s)
    {
        std::vector<named_tensor> out;
        const auto add = [&](const auto& entry, const char* suffix, std::vector<real>& flat) {
            const auto offset = entry.data - model_.parameters().data_handle();
            const auto type = fm::io::as_safetensor(vector_view<real>(flat.data(), 1)).type;
            const int64_t whole = entry.all_experts > 0 ? entry.all_experts : -1;
            out.push_back({entry.name + suffix, type, entry.shape, flat.data() + offset, whole, entry.own.first});
        };
        for (const auto& e : model_.named_tensors()) {
            add(e, "", s.parameters);
            add(e, "/m", s.first);
            add(e, "/v", s.second);
        }
        return out;
    }

    Executor& ex_;
    Ranks ranks_;
    run_config config_;
    const corpus& text_;
    batch_source data_;
    model_type model_;
    fm::buffer<real, Executor> first_, second_; // (N)
    fm::buffer<int32_t, Executor> ids_, targets_; // (T)  of the rank with most
    fm::buffer<int32_t, Executor> counts_;        // (layers,E)
    fm::buffer<real, Executor> loss_, norm_;      // (2), (1)
    fm::buffer<std::byte, Executor> workspace_;
    std::vector<int32_t> batch_; // (batch,context+1), on the host
    int64_t step_ = 0;
};

} // namespace train_gpt
