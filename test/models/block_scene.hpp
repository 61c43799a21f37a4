// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A case of test/models/vectors in memory, to be changed, and the program run_block on it.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <nlohmann/json.hpp>

#include <fastmoe/io/safetensors.hpp>

#include "support/child_process.hpp"
#include "support/temporary_folder.hpp"

namespace models_test {

namespace io = fastmoe::io;
using std::int64_t;

class scene {
public:
    nlohmann::json config;
    io::safetensors block, input;

    explicit scene(const std::string& name)
        : name_(name), block_file_(vector("block.safetensors")), input_file_(vector("in.safetensors"))
    {
        config = nlohmann::json::parse(support::read_file(vector("config.json")));
        block.tensors = block_file_.tensors();
        input.tensors = input_file_.tensors();
    }

    /// A file of the case as it is committed.
    std::string vector(const char* file) const { return std::string(FASTMOE_VECTORS "/") + name_ + "/" + file; }
    std::string output() const { return folder_ / "out.safetensors"; }
    std::string path(const char* file) const { return folder_ / file; }
    bool has_output() const { return std::filesystem::exists(output()); }

    /// Writes all three files, and runs.
    support::finished_process run(const std::vector<std::string>& more = {}) const
    {
        support::write_file(path("config.json"), config.dump());
        support::write_file(path("block.safetensors"), file_of(block));
        support::write_file(path("in.safetensors"), file_of(input));
        return run_files(more);
    }
    /// Runs on the files that are there.
    support::finished_process run_files(const std::vector<std::string>& more = {}) const
    {
        std::vector<std::string> all{FASTMOE_RUN_BLOCK,  "--config", path("config.json"),    "--weights", path("block.safetensors"),
                                     "--input",          path("in.safetensors"),             "--output",  output()};
        all.insert(all.end(), more.begin(), more.end());
        return support::run_process(all);
    }

    void rename(const std::string& from, const std::string& to)
    {
        auto node = block.tensors.extract(from);
        REQUIRE(!node.empty());
        node.key() = to;
        block.tensors.insert(std::move(node));
    }

    /// Puts experts that stand one by one under either name into experts.gate_up_proj and experts.down_proj.
    void stack_experts()
    {
        const bool numbered = block.tensors.contains("experts.0.w1.weight");
        const std::string gate = numbered ? "w1" : "gate_proj", up = numbered ? "w3" : "up_proj", down = numbered ? "w2" : "down_proj";
        std::string both, second;
        int64_t count = 0;
        io::safetensor one_gate, one_down;
        for (;; ++count) {
            const std::string prefix = "experts." + std::to_string(count) + ".";
            const auto found = block.tensors.find(prefix + gate + ".weight");
            if (found == block.tensors.end()) break;
            one_gate = found->second;
            one_down = block.tensors.at(prefix + down + ".weight");
            append(both, one_gate);
            append(both, block.tensors.at(prefix + up + ".weight"));
            append(second, one_down);
            for (const auto& part : {gate, up, down}) block.tensors.erase(prefix + part + ".weight");
        }
        REQUIRE(count > 0);
        block.tensors["experts.gate_up_proj"] = keep({one_gate.type, {count, 2 * one_gate.shape[0], one_gate.shape[1]}, {}}, both);
        block.tensors["experts.down_proj"] = keep({one_down.type, {count, one_down.shape[0], one_down.shape[1]}, {}}, second);
    }

    /// The other way, from (E,2H,D) or, as Llama 4 has it, (E,D,2H).
    void unstack_experts(bool numbered)
    {
        const bool input_first = block.tensors.contains("router.weight");
        const auto up_name = block.tensors.contains("input_linear.weight") ? "input_linear.weight" : "experts.gate_up_proj";
        const auto down_name = block.tensors.contains("output_linear.weight") ? "output_linear.weight" : "experts.down_proj";
        const io::safetensor up = block.tensors.at(up_name), down = block.tensors.at(down_name);
        block.tensors.erase(up_name);
        block.tensors.erase(down_name);
        const std::size_t size = static_cast<std::size_t>(io::bytes_of(up.type));
        const int64_t width = up.shape[input_first ? 1 : 2], hidden = up.shape[input_first ? 2 : 1] / 2;
        // Element (e, o, i) of a matrix that is `out` wide or high.
        const auto matrix = [&](const io::safetensor& from, int64_t e, int64_t first, int64_t rows, int64_t out, int64_t in) {
            std::string bytes;
            for (int64_t o = first; o < first + rows; ++o)
                for (int64_t i = 0; i < in; ++i) {
                    const int64_t at = e * out * in + (input_first ? i * out + o : o * in + i);
                    bytes.append(reinterpret_cast<const char*>(from.data) + static_cast<std::size_t>(at) * size, size);
                }
            return keep({from.type, {rows, in}, {}}, bytes);
        };
        for (int64_t e = 0; e < up.shape[0]; ++e) {
            const std::string prefix = "experts." + std::to_string(e) + ".";
            block.tensors[prefix + (numbered ? "w1" : "gate_proj") + ".weight"] = matrix(up, e, 0, hidden, 2 * hidden, width);
            block.tensors[prefix + (numbered ? "w3" : "up_proj") + ".weight"] = matrix(up, e, hidden, hidden, 2 * hidden, width);
            block.tensors[prefix + (numbered ? "w2" : "down_proj") + ".weight"] = matrix(down, e, 0, width, width, hidden);
        }
    }

    /// All tensors of the block in another type.
    template <class To>
    void convert()
    {
        for (auto& [name, t] : block.tensors) {
            std::string bytes;
            const int64_t count = t.bytes() / io::bytes_of(t.type);
            for (int64_t i = 0; i < count; ++i) {
                const float value = t.type == io::element_type::f32    ? reinterpret_cast<const float*>(t.data)[i]
                                    : t.type == io::element_type::bf16 ? float(reinterpret_cast<const fastmoe::bfloat16*>(t.data)[i])
                                                                       : float(reinterpret_cast<const fastmoe::half*>(t.data)[i]);
                const To other(value);
                bytes.append(reinterpret_cast<const char*>(&other), sizeof other);
            }
            t = keep({io::element_type_of<To>, t.shape, {}}, bytes);
        }
    }

    /// A tensor over a copy of these bytes.
    io::safetensor keep(io::safetensor t, const std::string& bytes)
    {
        memory_.push_back(std::make_unique<std::byte[]>(bytes.size()));
        std::memcpy(memory_.back().get(), bytes.data(), bytes.size());
        t.data = memory_.back().get();
        return t;
    }

private:
    /// A file's bytes; unlike the library's writer, nothing waits for the disk.
    static std::string file_of(const io::safetensors& content)
    {
        nlohmann::json header = nlohmann::json::object();
        std::string data;
        for (const auto& [key, t] : content.tensors) {
            const std::size_t begin = data.size();
            append(data, t);
            header[key] = {{"dtype", io::name_of(t.type)}, {"shape", t.shape}, {"data_offsets", {begin, data.size()}}};
        }
        const std::string text = header.dump();
        std::string length;
        for (int i = 0; i < 8; ++i) length += static_cast<char>(text.size() >> 8 * i);
        return length + text + data;
    }
    static void append(std::string& to, const io::safetensor& t)
    {
        to.append(reinterpret_cast<const char*>(t.data), static_cast<std::size_t>(t.bytes()));
    }

    std::string name_;
    io::safetensors_file block_file_, input_file_;
    support::temporary_folder folder_;
    std::vector<std::unique_ptr<std::byte[]>> memory_;
};

} // namespace models_test
