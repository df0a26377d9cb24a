// Runs every test, or those whose promise contains the first argument.
#include <cstring>

#include "check.h"

int main(int count, char** arguments) {
  using namespace kernel_tests;
  int passed = 0;
  int failed = 0;
  int skipped = 0;
  for (const Test& test : all_tests()) {
    if (count > 1 && std::strstr(test.promise, arguments[1]) == nullptr) {
      continue;
    }
    outcome() = {};
    test.run();
    if (outcome().failures > 0) {
      ++failed;
      std::printf("FAILED: %s (%d failures)\n", test.promise, outcome().failures);
    } else if (!outcome().skipped.empty()) {
      ++skipped;
      std::printf("SKIPPED: %s: %s\n", test.promise, outcome().skipped.c_str());
    } else {
      ++passed;
      std::printf("passed: %s\n", test.promise);
    }
    std::fflush(stdout);
  }
  std::printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
  return failed > 0 ? 1 : 0;
}
