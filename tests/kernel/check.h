// A small test harness: TEST registers a test under the promise that it checks, CHECK reports what broke it.
#pragma once

#include <cstdio>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

namespace kernel_tests {

struct Test {
  const char* promise;
  std::function<void()> run;
};

// Of the test that is running.
struct Outcome {
  int failures = 0;
  std::string skipped;
};

inline std::vector<Test>& all_tests() {
  static std::vector<Test> tests;
  return tests;
}

inline Outcome& outcome() {
  static Outcome current;
  return current;
}

struct Registration {
  Registration(const char* promise, std::function<void()> run) { all_tests().push_back({promise, std::move(run)}); }
};

// Prints the first few failures only: one broken promise may affect thousands of elements.
inline void fail(const char* file, int line, const std::string& what) {
  constexpr int kShown = 5;
  if (++outcome().failures <= kShown) {
    std::printf("  %s:%d: %s\n", file, line, what.c_str());
  }
}

inline void skip(const std::string& why) { outcome().skipped = why; }

}  // namespace kernel_tests

#define KERNEL_TEST_JOIN2(a, b) a##b
#define KERNEL_TEST_JOIN(a, b) KERNEL_TEST_JOIN2(a, b)

#define TEST(promise)                                                                      \
  static void KERNEL_TEST_JOIN(test_at_line_, __LINE__)();                                 \
  static const kernel_tests::Registration KERNEL_TEST_JOIN(registered_at_line_, __LINE__){ \
      promise, KERNEL_TEST_JOIN(test_at_line_, __LINE__)};                                 \
  static void KERNEL_TEST_JOIN(test_at_line_, __LINE__)()

#define CHECK(condition, ...)                                   \
  do {                                                          \
    if (!(condition)) {                                         \
      std::ostringstream what_broke;                            \
      what_broke << #condition << ": " << __VA_ARGS__;          \
      kernel_tests::fail(__FILE__, __LINE__, what_broke.str()); \
    }                                                           \
  } while (false)
