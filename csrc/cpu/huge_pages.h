// Fresh memory in huge pages.
#pragma once

#include <cstddef>

namespace masked_softmax {

// Advises the system to use huge pages for fresh memory that is about to be written as a whole. The first touch then
// costs one page fault for 2 MiB instead of 4 KiB; for large outputs page faults cost more than the arithmetic. Only
// whole huge pages are advised, and nothing changes for less than two of them (4 MiB) or without support in the system.
// (numpy does the same for its large arrays.)
void advise_huge_pages(void* data, size_t size_bytes);

}  // namespace masked_softmax
