// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// PTX as nvcc writes it, read into instructions that a warp of 32 lanes runs one at a time. See "PTX ISA", 9.0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace emulator {

struct warp;
struct instruction;

/// A register is a line of 32 values, of 4 or of 8 bytes; a predicate a word of 32 bits. Operands are offsets of bytes in a warp's
/// registers; numbers, addresses of variables and special registers are lines that are filled before the kernel runs.
using slot = std::uint32_t;
inline constexpr slot no_slot = ~slot{0};

using action = void (*)(warp&, const instruction&, std::uint32_t lanes);

enum class flow : std::uint8_t {
    on,     ///< the next instruction follows
    branch, ///< to `target`, where the guard says so
    exit,
    barrier,      ///< bar.sync
    cluster_wait, ///< barrier.cluster.wait
    meeting,      ///< all lanes of a mask have to come
    attempt,      ///< mbarrier.try_wait: where it fails, others go first
    fault,        ///< trap, or what this emulator does not know
};

enum class space : std::uint8_t { generic, global, shared, local, param };

struct instruction {
    action run = nullptr;
    flow next = flow::on;
    space where = space::generic;
    bool negated = false; ///< the guard
    std::uint8_t count = 1;
    slot guard = no_slot, d = no_slot, e = no_slot, a = no_slot, b = no_slot, c = no_slot, m = no_slot;
    std::int64_t offset = 0;
    int target = -1;
    std::vector<slot> list, more; ///< of several registers: results or what is stored; then operands
    std::uint32_t line = 0;       ///< of the text
    int number = 0;               ///< in the kernel
    int variant = 0;              ///< as the action means it
};

struct special {
    slot at;
    std::string name;
};
struct constant {
    slot at;
    std::uint64_t value;
    bool wide;
};

struct kernel {
    std::string name;
    std::vector<std::pair<std::size_t, std::size_t>> parameters; ///< where each lies, and its size
    std::size_t parameter_bytes = 0;
    std::uint32_t shared_bytes = 0, dynamic_shared_align = 16, local_bytes = 0;
    bool has_dynamic_shared = false;
    int most_threads = 1024;
    std::size_t register_bytes = 0;
    std::vector<constant> constants;
    std::vector<slot> dynamic_shared; ///< lines of 8 bytes that hold where it begins
    std::vector<slot> dynamic_shared_short;
    std::vector<special> specials;
    std::vector<instruction> code;
    std::vector<std::string> unknown; ///< instructions that cannot be run
};

struct syntax_error : std::runtime_error {
    using runtime_error::runtime_error;
};

/// A module: the text stays, so that messages can quote it.
class module {
public:
    explicit module(std::string text);
    const kernel* find(const std::string& name) const; ///< read on first use
    std::string_view line(std::uint32_t number) const;
    std::size_t kernels() const { return at_.size(); }

private:
    std::string text_;
    std::vector<std::size_t> lines_;
    std::unordered_map<std::string, std::size_t> at_;               ///< where a kernel's `.entry` is
    std::unordered_map<std::string, std::uint32_t> dynamic_shared_; ///< and how it is aligned
    std::unordered_map<std::string, std::uint64_t> globals_;
    std::unordered_map<std::string, std::size_t> functions_; ///< that kernels call: where each is defined
    std::deque<std::unique_ptr<std::byte[]>> storage_;
    mutable std::unordered_map<std::string, std::unique_ptr<kernel>> read_;
};

/// What decode() is told of an instruction: "ld.global.v2.u32" in its parts, and its operands.
struct statement {
    std::vector<std::string_view> parts;
    std::vector<std::string> operands;
    bool has(std::string_view part) const
    {
        for (const auto& p : parts)
            if (p == part) return true;
        return false;
    }
};

/// Where operands come from while a kernel is read.
struct operand_source {
    virtual slot read(const std::string& operand, bool wide) = 0; ///< a register, or a line of its own for a number or a name
    /// "[base+4]": its base; the offset goes to `out`, and that it is local memory where it is a parameter of a call.
    virtual slot address(const std::string& operand, instruction& out) = 0;
    virtual bool is_wide(const std::string& operand) = 0;
    virtual std::vector<std::string> parts(const std::string& list) = 0; ///< of "{a, b}"
    virtual ~operand_source() = default;
};

/// Fill run, next and operands. False: not known here.
bool decode_arithmetic(const statement& s, operand_source& from, instruction& out);
bool decode_conversion(const statement& s, operand_source& from, instruction& out);
bool decode_registers(const statement& s, operand_source& from, instruction& out);
bool decode_memory(const statement& s, operand_source& from, instruction& out);
bool decode_meeting(const statement& s, operand_source& from, instruction& out);
bool decode_asynchronous(const statement& s, operand_source& from, instruction& out);

} // namespace emulator
