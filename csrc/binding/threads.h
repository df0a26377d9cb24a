// Work on the threads of torch's intra-op pool.
#pragma once

#include <cstdint>
#include <functional>

namespace masked_softmax {

// Calls body(part) once for each part in 0..parts, on the number of threads that torch.set_num_threads sets, and
// returns when all have finished. Rethrows an exception of a body after the others have finished.
void for_each_part(int64_t parts, const std::function<void(int64_t)>& body);

}  // namespace masked_softmax
