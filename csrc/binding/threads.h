// Work on the threads of torch's intra-op pool.
#pragma once

#include <cstdint>
#include <functional>

namespace masked_softmax {

// Calls body(part) once for each part of 0..parts, on as many threads as torch.set_num_threads allows, and returns when
// all are done. An exception that a body throws is thrown here, after the others have ended.
void for_each_part(int64_t parts, const std::function<void(int64_t)>& body);

}  // namespace masked_softmax
