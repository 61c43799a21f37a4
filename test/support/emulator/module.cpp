// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "support/emulator/module.hpp"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>

#include "support/emulator/device.hpp"

namespace emulator {

namespace {

bool is_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.'; }

std::string trimmed(std::string_view s)
{
    while (!s.empty() && std::isspace(static_cast<unsigned char>(s.front()))) s.remove_prefix(1);
    while (!s.empty() && std::isspace(static_cast<unsigned char>(s.back()))) s.remove_suffix(1);
    return std::string(s);
}

/// At commas outside of brackets.
std::vector<std::string> split(std::string_view s)
{
    std::vector<std::string> out;
    int depth = 0;
    std::size_t from = 0;
    for (std::size_t i = 0; i <= s.size(); ++i) {
        const char c = i < s.size() ? s[i] : ',';
        if (c == '{' || c == '[' || c == '(') ++depth;
        if (c == '}' || c == ']' || c == ')') --depth;
        if (i == s.size() || (c == ',' && depth == 0)) {
            if (std::string part = trimmed(s.substr(from, i - from)); !part.empty() || !out.empty() || i < s.size())
                out.push_back(std::move(part));
            from = i + 1;
        }
    }
    return out;
}

int bytes_of(std::string_view type)
{
    if (type.size() < 3) throw syntax_error("type " + std::string(type));
    return std::atoi(std::string(type.substr(type.find_first_of("0123456789"))).c_str()) / 8;
}

bool decode(const statement& s, operand_source& from, instruction& out)
{
    for (const auto known : {decode_arithmetic, decode_registers, decode_memory, decode_conversion, decode_meeting, decode_asynchronous})
        if (known(s, from, out)) return true;
    return false;
}

/// Reads one kernel.
struct reader final : operand_source {
    std::string_view text;
    std::size_t at;
    std::uint32_t line;
    kernel& out;
    const std::unordered_map<std::string, std::uint32_t>& dynamic_shared;
    const std::unordered_map<std::string, std::uint64_t>& globals;
    const std::unordered_map<std::string, std::size_t>& functions;

    struct variable {
        slot at;
        char kind; // 'p' predicate, 's' 4 bytes, 'w' 8 bytes
    };
    struct scope {
        std::unordered_map<std::string, variable> registers;
        std::unordered_map<std::string, int> labels;
        std::vector<std::pair<int, std::string>> jumps;
        std::unordered_map<std::string, std::uint64_t> call_parameters; ///< in local memory
        bool is_function = false;
    };
    bool any_width = false; ///< in loads and stores, which look themselves
    std::vector<scope> scopes;
    std::unordered_map<std::string, std::uint64_t> parameters, shared, local;
    std::unordered_map<std::uint64_t, slot> numbers, wide_numbers;
    std::unordered_map<std::string, slot> names;

    reader(std::string_view t, std::size_t from, std::uint32_t l, kernel& k, const std::unordered_map<std::string, std::uint32_t>& d,
           const std::unordered_map<std::string, std::uint64_t>& g, const std::unordered_map<std::string, std::size_t>& f)
        : text(t), at(from), line(l), out(k), dynamic_shared(d), globals(g), functions(f)
    {}

    [[noreturn]] void fail(const std::string& what) const { throw syntax_error("line " + std::to_string(line) + ": " + what); }

    void skip()
    {
        while (at < text.size()) {
            if (text[at] == '\n')
                ++line, ++at;
            else if (std::isspace(static_cast<unsigned char>(text[at])))
                ++at;
            else if (text.substr(at, 2) == "//")
                at = std::min(text.find('\n', at), text.size());
            else
                return;
        }
    }
    std::string_view until(char end)
    {
        const std::size_t from = at;
        while (at < text.size() && text[at] != end) {
            if (text[at] == '\n') ++line;
            ++at;
        }
        if (at == text.size()) fail(std::string("no ") + end);
        return text.substr(from, at++ - from);
    }

    slot take(bool wide, bool predicate = false)
    {
        out.register_bytes = (out.register_bytes + 63) / 64 * 64;
        const auto here = static_cast<slot>(out.register_bytes);
        out.register_bytes += predicate ? 4 : wide ? 256 : 128;
        return here;
    }

    // -- declarations ------------------------------------------------------------------------------------------------

    void declare_registers(std::string_view what) // ".b32 %r<5>" or ".b32 there" or ".pred p, q"
    {
        const std::size_t gap = what.find_first_of(" \t");
        const std::string type = trimmed(what.substr(0, gap));
        const char kind = type == ".pred" ? 'p' : bytes_of(type) == 8 ? 'w' : 's';
        for (const std::string& name : split(what.substr(gap))) {
            const std::size_t many = name.find('<');
            if (many == std::string::npos) {
                scopes.back().registers[name] = {take(kind == 'w', kind == 'p'), kind};
                continue;
            }
            const int count = std::atoi(name.c_str() + many + 1);
            for (int i = 0; i < count; ++i)
                scopes.back().registers[name.substr(0, many) + std::to_string(i)] = {take(kind == 'w', kind == 'p'), kind};
        }
    }
    /// ".align 8 .b8 name[16]" or ".u64 name": the name, its alignment and its size.
    static std::string declared(std::string_view what, std::size_t& align, std::size_t& bytes)
    {
        std::string word, name;
        align = 0;
        std::size_t element = 1, i = 0;
        bytes = 0;
        while (i < what.size()) {
            while (i < what.size() && std::isspace(static_cast<unsigned char>(what[i]))) ++i;
            const std::size_t from = i;
            while (i < what.size() && is_name(what[i])) ++i;
            word = std::string(what.substr(from, i - from));
            if (word == ".align") {
                align = static_cast<std::size_t>(std::strtoul(what.data() + i, nullptr, 10));
                while (i < what.size() && !std::isdigit(static_cast<unsigned char>(what[i]))) ++i;
                while (i < what.size() && std::isdigit(static_cast<unsigned char>(what[i]))) ++i;
            } else if (word.size() > 2 && word[0] == '.' && std::strchr("busf", word[1]) &&
                       std::isdigit(static_cast<unsigned char>(word[2]))) {
                element = static_cast<std::size_t>(bytes_of(word));
            } else if (!word.empty() && word[0] != '.') {
                name = word;
                bytes = element;
                if (i < what.size() && what[i] == '[')
                    bytes = element * static_cast<std::size_t>(std::strtoul(what.data() + i + 1, nullptr, 10));
                break;
            } else if (word.empty()) {
                ++i;
            }
        }
        if (align == 0) align = element;
        return name;
    }

    void read_parameters()
    {
        (void)until('(');
        for (const std::string& one : split(until(')'))) {
            if (one.empty()) continue;
            std::size_t align = 0, bytes = 0;
            const std::string name = declared(std::string_view(one).substr(6), align, bytes); // ".param"
            out.parameter_bytes = (out.parameter_bytes + align - 1) / align * align;
            parameters[name] = out.parameter_bytes;
            out.parameters.emplace_back(out.parameter_bytes, bytes);
            out.parameter_bytes += bytes;
        }
    }

    // -- operands ----------------------------------------------------------------------------------------------------

    const variable* find(const std::string& name) const
    {
        for (auto s = scopes.rbegin(); s != scopes.rend(); ++s)
            if (const auto found = s->registers.find(name); found != s->registers.end()) return &found->second;
        return nullptr;
    }
    const std::uint64_t* find_call_parameter(const std::string& name) const
    {
        for (auto s = scopes.rbegin(); s != scopes.rend(); ++s)
            if (const auto found = s->call_parameters.find(name); found != s->call_parameters.end()) return &found->second;
        return nullptr;
    }
    bool is_wide(const std::string& operand) override
    {
        const variable* v = find(operand);
        return v && v->kind == 'w';
    }
    std::vector<std::string> parts(const std::string& list) override
    {
        if (list.size() < 2 || list.front() != '{') return {list};
        return split(std::string_view(list).substr(1, list.size() - 2));
    }
    slot number(std::uint64_t value, bool wide)
    {
        auto& known = wide ? wide_numbers : numbers;
        if (const auto found = known.find(value); found != known.end()) return found->second;
        const slot here = take(wide);
        out.constants.push_back({here, value, wide});
        return known[value] = here;
    }
    slot read(const std::string& operand, bool wide) override
    {
        if (operand.empty()) fail("an operand is missing");
        if (operand == "_") return no_slot;
        if (operand.front() == '!') fail("negated operand " + operand);
        if (const variable* v = find(operand)) {
            if (v->kind != 'p' && (v->kind == 'w') != wide && !any_width) fail("a register of another width: " + operand);
            return v->at;
        }
        if (operand == "-1" || operand.front() == '-' || std::isdigit(static_cast<unsigned char>(operand.front()))) {
            if (operand.size() > 2 && operand[0] == '0' && (operand[1] == 'f' || operand[1] == 'F'))
                return number(std::strtoull(operand.c_str() + 2, nullptr, 16), false);
            if (operand.size() > 2 && operand[0] == '0' && (operand[1] == 'd' || operand[1] == 'D'))
                return number(std::strtoull(operand.c_str() + 2, nullptr, 16), true);
            return number(operand.front() == '-' ? static_cast<std::uint64_t>(std::strtoll(operand.c_str(), nullptr, 0))
                                                 : std::strtoull(operand.c_str(), nullptr, 0),
                          wide);
        }
        if (operand.front() == '%') {
            if (const auto found = names.find(operand + (wide ? "w" : "")); found != names.end()) return found->second;
            const slot here = take(wide);
            out.specials.push_back({here, operand});
            return names[operand + (wide ? "w" : "")] = here;
        }
        if (const auto p = parameters.find(operand); p != parameters.end()) return number(p->second, wide);
        if (const auto s = shared.find(operand); s != shared.end()) return number(s->second, wide);
        if (const auto l = local.find(operand); l != local.end()) return number(l->second, wide);
        if (const auto g = globals.find(operand); g != globals.end()) return number(g->second, true);
        if (const auto d = dynamic_shared.find(operand); d != dynamic_shared.end()) {
            out.has_dynamic_shared = true;
            out.dynamic_shared_align = std::max(out.dynamic_shared_align, d->second);
            if (const auto found = names.find(operand + (wide ? "w" : "")); found != names.end()) return found->second;
            const slot here = take(wide);
            (wide ? out.dynamic_shared : out.dynamic_shared_short).push_back(here);
            return names[operand + (wide ? "w" : "")] = here;
        }
        fail("unknown name " + operand);
    }
    slot address(const std::string& operand, instruction& i) override
    {
        if (operand.size() < 3 || operand.front() != '[' || operand.back() != ']') fail("not an address: " + operand);
        std::string base = trimmed(std::string_view(operand).substr(1, operand.size() - 2));
        i.offset = 0;
        if (const std::size_t plus = base.find('+'); plus != std::string::npos) {
            i.offset = std::strtoll(base.c_str() + plus + 1, nullptr, 0);
            base = trimmed(std::string_view(base).substr(0, plus));
        }
        if (const std::uint64_t* parameter = find_call_parameter(base)) {
            i.where = space::local;
            return number(*parameter, true);
        }
        return read(base, !find(base) || find(base)->kind == 'w');
    }

    // -- the body ----------------------------------------------------------------------------------------------------

    void close()
    {
        for (const auto& [from, name] : scopes.back().jumps) {
            const auto found = scopes.back().labels.find(name);
            if (found != scopes.back().labels.end())
                out.code[static_cast<std::size_t>(from)].target = found->second;
            else if (scopes.size() > 1)
                scopes[scopes.size() - 2].jumps.emplace_back(from, name);
            else
                fail("no label " + name);
        }
        scopes.pop_back();
    }

    void directive()
    {
        const std::string all(until(';'));
        const std::string_view what = all;
        const std::size_t gap = what.find_first_of(" \t");
        const std::string_view word = what.substr(0, gap);
        if (word == ".reg") return declare_registers(trimmed(what.substr(gap)));
        if (word == ".shared" || word == ".local") {
            std::size_t align = 0, bytes = 0;
            const std::string name = declared(what.substr(gap), align, bytes);
            std::uint32_t& total = word == ".shared" ? out.shared_bytes : out.local_bytes;
            total = static_cast<std::uint32_t>((total + align - 1) / align * align);
            (word == ".shared" ? shared : local)[name] = word == ".shared" ? total + shared_window : total;
            total += static_cast<std::uint32_t>(bytes);
            return;
        }
        if (word == ".param") { // of a call
            std::size_t align = 0, bytes = 0;
            const std::string name = declared(what.substr(gap), align, bytes);
            out.local_bytes = static_cast<std::uint32_t>((out.local_bytes + align - 1) / align * align);
            scopes.back().call_parameters[name] = out.local_bytes;
            out.local_bytes += static_cast<std::uint32_t>(bytes);
            return;
        }
        if (word == ".pragma" || word == ".loc" || word == ".file") return;
        fail("unknown directive " + std::string(word));
    }

    void instruction_at(std::string_view all, std::uint32_t here)
    {
        instruction i;
        i.line = here;
        std::string body = trimmed(all);
        if (body.front() == '@') {
            const std::size_t gap = body.find_first_of(" \t");
            std::string guard = body.substr(1, gap - 1);
            if (guard.front() == '!') i.negated = true, guard.erase(0, 1);
            i.guard = read(guard, false);
            body = trimmed(std::string_view(body).substr(gap));
        }
        const std::size_t gap = std::min(body.find_first_of(" \t\n"), body.size());
        statement s;
        const std::string_view mnemonic = std::string_view(body).substr(0, gap);
        for (std::size_t from = 0; from <= mnemonic.size();) {
            const std::size_t end = std::min(mnemonic.find('.', from), mnemonic.size());
            s.parts.push_back(mnemonic.substr(from, end - from));
            from = end + 1;
        }
        s.operands = split(std::string_view(body).substr(gap));
        i.number = static_cast<int>(out.code.size());
        if (s.parts[0] == "call") return call(s);
        if (s.parts[0] == "ret" && std::any_of(scopes.begin(), scopes.end(), [](const scope& of) { return of.is_function; })) {
            i.next = flow::branch;
            scopes.back().jumps.emplace_back(i.number, "return of a function");
        } else if (s.parts[0] == "bra") {
            i.next = flow::branch;
            scopes.back().jumps.emplace_back(i.number, s.operands.at(0));
        } else if (any_width = s.parts[0] == "ld" || s.parts[0] == "st"; !decode(s, *this, i)) {
            i.next = flow::fault;
            i.run = nullptr;
            out.unknown.push_back(std::string(mnemonic));
        }
        out.code.push_back(std::move(i));
    }

    /// To the brace that closes it; the scope stays.
    void read_block()
    {
        const std::size_t depth = scopes.size();
        while (true) {
            skip();
            if (at >= text.size()) fail("the kernel does not end");
            if (text[at] == '{') {
                ++at;
                scopes.emplace_back();
            } else if (text[at] == '}') {
                ++at;
                if (scopes.size() == depth) return;
                close();
            } else if (text[at] == '.') {
                directive();
            } else {
                std::size_t end = at;
                while (end < text.size() && is_name(text[end])) ++end;
                if (end < text.size() && text[end] == ':' && text.substr(end, 2) != "::") {
                    scopes.back().labels[std::string(text.substr(at, end - at))] = static_cast<int>(out.code.size());
                    at = end + 1;
                    continue;
                }
                const std::uint32_t here = line;
                instruction_at(until(';'), here);
            }
        }
    }

    /// The function's instructions stand where it is called; its parameters are the call's, in local memory.
    void call(const statement& s)
    {
        const bool returns = s.operands.at(0).front() == '(';
        const std::string& name = s.operands.at(returns ? 1 : 0);
        const auto inside = [](const std::string& list) { return split(std::string_view(list).substr(1, list.size() - 2)); };
        const auto function = functions.find(name);
        if (function == functions.end()) { // printf, assert: nothing of ours
            instruction i;
            i.next = flow::fault;
            i.line = line;
            i.number = static_cast<int>(out.code.size());
            out.unknown.push_back("call " + name);
            out.code.push_back(i);
            return;
        }
        std::vector<std::string> actual;
        if (returns) actual = inside(s.operands[0]);
        if (const std::size_t n = returns ? 2 : 1; s.operands.size() > n)
            for (const std::string& one : inside(s.operands[n])) actual.push_back(one);
        const std::size_t back = at;
        const std::uint32_t back_line = line;
        at = function->second;
        std::string header(until('{'));
        scope of;
        of.is_function = true;
        std::size_t n = 0;
        for (std::size_t from = header.find(".param"); from != std::string::npos; from = header.find(".param", from + 1)) {
            std::size_t align = 0, bytes = 0;
            const std::string formal =
                declared(std::string_view(header).substr(from + 6, header.find_first_of(",)", from) - from - 6), align, bytes);
            if (n >= actual.size()) fail("a call of " + name + " with too few arguments");
            const std::uint64_t* place = find_call_parameter(actual[n++]);
            if (!place) fail("an argument of " + name + " that is no parameter");
            of.call_parameters[formal] = *place;
        }
        scopes.push_back(std::move(of));
        read_block();
        scopes.back().labels["return of a function"] = static_cast<int>(out.code.size());
        close();
        at = back;
        line = back_line;
    }

    void read_body()
    {
        // What stands before it: ".maxntid 256, 1, 1" and the like.
        const std::string before(until('{'));
        for (const char* word : {".maxntid ", ".reqntid "})
            if (const std::size_t found = before.find(word); found != std::string::npos)
                out.most_threads = std::atoi(before.c_str() + found + 9);
        scopes.emplace_back();
        read_block();
        instruction last;
        last.next = flow::exit;
        last.number = static_cast<int>(out.code.size());
        last.line = line;
        out.code.push_back(last);
        close();
    }
};

} // namespace

module::module(std::string text) :text_(std::move(text))
{
    lines_.push_back(0);
    for (std::size_t i = 0; i < text_.size(); ++i)
        if (text_[i] == '\n') lines_.push_back(i + 1);
    const std::string_view all = text_;
    for (std::size_t n = 0; n < lines_.size(); ++n) {
        const std::size_t end = std::min(all.find('\n', lines_[n]), all.size());
        const std::string_view one = all.substr(lines_[n], end - lines_[n]);
        if (const std::size_t entry = one.find(".entry "); entry != std::string_view::npos && one.find("//") != 0) {
            std::size_t from = entry + 7, to = from;
            while (to < one.size() && is_name(one[to])) ++to;
            at_[std::string(one.substr(from, to - from))] = lines_[n];
        } else if (one.find(".func ") != std::string_view::npos && one.find("//") != 0) {
            // A declaration ends with a semicolon, a definition has a body.
            const std::size_t end_of_header = all.find_first_of(";{", lines_[n]);
            if (end_of_header == std::string_view::npos || all[end_of_header] != '{') continue;
            const std::string_view header = all.substr(lines_[n], end_of_header - lines_[n]);
            std::size_t from = header.find(".func ") + 6;
            if (header[from] == '(') from = header.find(')', from) + 1;
            while (from < header.size() && !is_name(header[from])) ++from;
            std::size_t to = from;
            while (to < header.size() && is_name(header[to])) ++to;
            functions_[std::string(header.substr(from, to - from))] = lines_[n];
        } else if (one.starts_with(".extern .shared")) {
            std::size_t align = 0, bytes = 0;
            const std::string name = reader::declared(one.substr(15), align, bytes);
            dynamic_shared_[name] = static_cast<std::uint32_t>(align);
        } else if (one.starts_with(".global") || one.starts_with(".const") || one.starts_with(".visible .global") ||
                   one.starts_with(".visible .const") || one.starts_with(".weak .global") || one.starts_with(".weak .const")) {
            std::size_t align = 0, bytes = 0;
            const std::size_t skip = one.find(".global") != std::string_view::npos ? one.find(".global") + 7 : one.find(".const") + 6;
            const std::string name = reader::declared(one.substr(skip), align, bytes);
            auto memory = std::make_unique<std::byte[]>(bytes + 256);
            auto base = reinterpret_cast<std::uintptr_t>(memory.get());
            base = (base + 255) / 256 * 256;
            if (const std::size_t values = one.find('{'); values != std::string_view::npos) {
                const std::size_t element = one.find("[") != std::string_view::npos && one.find(".b8 ") == std::string_view::npos ? 0 : 1;
                if (element == 0) continue; // of wider elements: not read, so kernels that name it are refused
                std::size_t n_values = 0;
                for (const std::string& v : split(one.substr(values + 1, one.find('}') - values - 1)))
                    reinterpret_cast<unsigned char*>(base)[n_values++] = static_cast<unsigned char>(std::atoi(v.c_str()));
            }
            memory_map::instance().add(reinterpret_cast<void*>(base), bytes, memory_kind::device);
            globals_[name] = base;
            storage_.push_back(std::move(memory));
        }
    }
}

const kernel* module::find(const std::string& name) const
{
    const auto entry = at_.find(name);
    if (entry == at_.end()) return nullptr;
    auto& known = read_[name];
    if (!known) {
        known = std::make_unique<kernel>();
        known->name = name;
        const auto line = static_cast<std::uint32_t>(std::upper_bound(lines_.begin(), lines_.end(), entry->second) - lines_.begin());
        reader r(text_, entry->second, line, *known, dynamic_shared_, globals_, functions_);
        r.read_parameters();
        r.read_body();
    }
    return known.get();
}

std::string_view module::line(std::uint32_t number) const
{
    if (number == 0 || number > lines_.size()) return {};
    const std::size_t from = lines_[number - 1];
    return std::string_view(text_).substr(from, std::min(text_.find('\n', from), text_.size()) - from);
}

} // namespace emulator
