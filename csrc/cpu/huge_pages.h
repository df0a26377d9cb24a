// Fresh memory in large pages.
#pragma once

#include <cstddef>

namespace masked_softmax {

// Asks for large pages under fresh memory that is about to be written as a whole. Its first touch costs one page fault
// per 2 MiB then, instead of one per 4 KiB: for large outputs those cost more than the arithmetic. A hint: where the
// system does not take it, nothing changes. (numpy does the same for its large arrays.)
void advise_huge_pages(void* data, size_t size_bytes);

}  // namespace masked_softmax
