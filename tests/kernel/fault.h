// Reports what was running when a forbidden read or write ends the process.
#pragma once

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string>

namespace kernel_tests {

class FaultReport {
 public:
  explicit FaultReport(const std::string& what) {
    const size_t length = std::min(what.size(), sizeof(what_runs_) - 2);
    std::memcpy(what_runs_, what.data(), length);
    what_runs_[length] = '\n';
    what_runs_[length + 1] = 0;
    struct sigaction action = {};
    action.sa_handler = report;
    sigaction(SIGSEGV, &action, &old_segv_);
    sigaction(SIGBUS, &action, &old_bus_);
  }
  FaultReport(const FaultReport&) = delete;
  FaultReport& operator=(const FaultReport&) = delete;
  ~FaultReport() {
    sigaction(SIGSEGV, &old_segv_, nullptr);
    sigaction(SIGBUS, &old_bus_, nullptr);
  }

 private:
  // Async-signal-safe calls only.
  static void report(int /*signal*/) {
    constexpr char kBroken[] = "FAILED: memory was touched that must not be, by ";
    ssize_t written = write(STDOUT_FILENO, kBroken, sizeof(kBroken) - 1);
    written += write(STDOUT_FILENO, what_runs_, std::strlen(what_runs_));
    _exit(written > 0 ? 1 : 2);
  }

  static inline char what_runs_[200];
  struct sigaction old_segv_;
  struct sigaction old_bus_;
};

}  // namespace kernel_tests
