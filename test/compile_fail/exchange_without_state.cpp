// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// An exchange without a state is refused where it enters expert_parallel, by the concept's name.
// expect: reserves_exchange
#include <fastmoe/moe.hpp>

namespace fm = fastmoe;

#if defined(CORRECT)
using my_exchange = fm::padded_exchange<>;
#else
struct my_exchange {
    using partials = fm::accumulated_partials;
};
#endif

using ranks = fm::expert_parallel<fm::self, fm::self, fm::block_placement, my_exchange>;
ranks make() { return {fm::self{}, fm::self{}}; }
