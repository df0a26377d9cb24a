// Memory between unreadable pages: a read or a write beside it ends the process.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace kernel_tests {

// at_end: the last byte borders the unreadable page behind it; otherwise the first byte borders the one before it.
class GuardedBuffer {
 public:
  GuardedBuffer(int64_t size_bytes, bool at_end) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t inner = (size_bytes + page - 1) / page * page;
    mapped_bytes_ = inner + 2 * page;
    mapping_ = static_cast<char*>(
        mmap(nullptr, static_cast<size_t>(mapped_bytes_), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    inner_bytes_ = inner;
    mprotect(mapping_ + page, static_cast<size_t>(inner), PROT_READ | PROT_WRITE);
    data_ = at_end ? mapping_ + page + inner - size_bytes : mapping_ + page;
  }
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;
  ~GuardedBuffer() { munmap(mapping_, static_cast<size_t>(mapped_bytes_)); }

  char* data() const { return data_; }
  void forbid_writing() const {
    mprotect(mapping_ + sysconf(_SC_PAGESIZE), static_cast<size_t>(inner_bytes_), PROT_READ);
  }

 private:
  char* mapping_;
  char* data_;
  int64_t inner_bytes_;
  int64_t mapped_bytes_;
};

}  // namespace kernel_tests
